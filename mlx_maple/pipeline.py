"""From a prompt, and perhaps a picture, to pictures: the parts put together, step by step.

Legend   n pictures at once; H, W pixel rows and columns; h, w latent rows and columns; C latent
         channels; T prompt tokens; D their width. Channels last.
Source   The order of things is diffusers 0.42.1's (pipelines/stable_diffusion: pipeline_
         stable_diffusion.py, _img2img.py, _inpaint.py with a 4-channel UNet); which seed draws what
         is AUTOMATIC1111's (modules/rng.py), as mlx_maple/sampling/noise.py tells.
Differs  img2img starts from the posterior's mean unless told to sample it. What inpainting leaves
         alone is put back in pixels, so that it does not pass through the autoencoder.

Here a caller's arguments become a ``Job``; the work is in ``mlx_maple/drawing``. Nothing in either
knows where a model came from.
"""

import secrets
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from mlx_maple import images, metadata
from mlx_maple.control import IMAGE_GUIDANCE, describe_controls, read_controls, use_of_channels
from mlx_maple.drawing.arguments import (
    FAR_APART,
    MASK_CONTENTS,
    check_form,
    check_refiner,
    check_steered,
    one_of,
    pair_text,
    plan_of,
    preview_kind,
    read_array,
    read_deep_cache,
    read_loras,
    read_mask,
    read_prompts,
    read_size,
    read_sizes,
    read_step_noise,
    read_windows,
    seeded,
    sees_alike,
    steers_both,
    texts_of,
    whole,
    with_second,
)
from mlx_maple.drawing.jobs import Job, Picture
from mlx_maple.drawing.masked_area import masked_area
from mlx_maple.drawing.model import DEFAULTS as DEFAULTS
from mlx_maple.drawing.model import TEXT_ENCODERS as TEXT_ENCODERS
from mlx_maple.drawing.model import DiffusionModel
from mlx_maple.drawing.phases import run
from mlx_maple.drawing.previews import fit_latent_rgb_factors as fit_latent_rgb_factors
from mlx_maple.drawing.results import Component as Component
from mlx_maple.drawing.results import Info as Info
from mlx_maple.drawing.results import Progress as Progress
from mlx_maple.drawing.results import Result as Result
from mlx_maple.forms import freeu_text, read_form
from mlx_maple.guidance import EMPHASES
from mlx_maple.image_prompt import describe_image_prompts, read_image_prompts
from mlx_maple.metadata import Settings, check_number
from mlx_maple.sampling.noise import NOISE_SOURCES
from mlx_maple.text.language import SYNTAXES, left_out
from mlx_maple.text.prompt import encode_prompt

REFINER_START = 0.8
# What models with more input channels cannot do without.
_NEEDS = {
    "edit": "the picture that it changes by instruction",
    "depth": "the depth map that it follows",
}


class StableDiffusion(DiffusionModel):
    """A Stable Diffusion model, 1.x, 2.x or XL, ready to draw.

    It is put together, and its networks are reached, as ``DiffusionModel`` tells.
    """

    def __call__(self, prompt: str, **arguments: Any) -> Result:
        """Draw, and return when it is done; takes what ``generate`` takes."""
        result = None
        for progress in self.generate(prompt, **arguments):
            result = progress.result
        assert result is not None
        return result

    def generate(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = "",
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        guidance_start: float = 0.0,
        guidance_end: float = 1.0,
        tile: str | None = None,
        freeu: Sequence[float] | str | None = None,
        token_merging: float = 0.0,
        deep_cache: int | None = None,
        deep_cache_branch: int = 0,
        window: int | None = None,
        window_overlap: float = 0.5,
        seed: int | None = None,
        count: int = 1,
        sampler: str | None = None,
        schedule: str | None = None,
        eta: float | None = None,
        discard_penultimate: bool = False,
        image: Picture | None = None,
        strength: float = 0.75,
        fit: str = "stretch",
        sample_posterior: bool = False,
        mask: Picture | None = None,
        mask_blur: float = images.MASK_BLUR,
        mask_content: str = "original",
        only_masked: int | None = None,
        image_guidance_scale: float | None = None,
        depth_image: Picture | None = None,
        control_image: Picture | Sequence[Picture] | None = None,
        control_weight: float | Sequence[float] = 1.0,
        control_start: float | Sequence[float] = 0.0,
        control_end: float | Sequence[float] = 1.0,
        control_preprocess: str | Sequence[str] = "none",
        ip_image: Picture | Sequence[Any] | None = None,
        ip_scale: float | Sequence[float] = 1.0,
        ip_start: float | Sequence[float] = 0.0,
        ip_end: float | Sequence[float] = 1.0,
        clip_skip: int | None = None,
        syntax: str = "a1111",
        emphasis: str = "original",
        loras: Any = None,
        noise: str = "torch",
        variation_seed: int | None = None,
        variation_strength: float = 0.0,
        ensd: int = 0,
        hires_scale: float | None = None,
        hires_strength: float = 0.5,
        hires_steps: int | None = None,
        hires_upscaler: str = "latent",
        hires_prompt: str | None = None,
        hires_negative_prompt: str | None = None,
        original_size: Any = None,
        crop: Any = None,
        target_size: Any = None,
        aesthetic_score: float | None = None,
        negative_aesthetic_score: float | None = None,
        refiner: DiffusionModel | None = None,
        refiner_start: float = REFINER_START,
        latents: Any = None,
        step_noise: Any = None,
        preview: str | None = None,
    ) -> Generator[Progress, None, None]:
        """Draw pictures, telling of every step.

        Arguments are checked at once; the work begins with the first ``next``. Closing the
        generator cancels. What is None comes from the model.

        Args:
            prompt: what to draw.
            negative_prompt: what to stay away from; None is SDXL's absence of any text.
            width: in pixels, a multiple of 8. With ``image`` and no size, that of the image, made
                smaller where it is much larger than what the model was made for.
            height: likewise.
            steps: 1 to 1000.
            guidance_scale: how far to follow the prompt; 1 is unguided and takes half the time.
            guidance_rescale: 0 to 1, how far guidance is brought back to the spread of the
                prediction without it, against colours that are too strong; on a CPU a step takes
                two calls of the network then instead of one of both halves.
            guidance_start: share of the steps before which the prompt alone decides.
            guidance_end: likewise after which; it saves half of those steps' time.
            tile: the axes along which the picture continues at the opposite edge: "x", "y", "xy".
            freeu: FreeU's four factors b1, b2, s1, s2 (for SD 1.5 its authors take 1.5, 1.6, 0.9,
                0.2): more contrast and detail for no more work.
            token_merging: share of the pixels, to 0.75, that look around as one where they are
                alike, at the finest level: faster where pictures are large, with less detail.
            deep_cache: run the deep part of the network in one call of so many (3, say) and use
                again what it made in the others: much faster, and another picture; None is always.
            deep_cache_branch: how much runs every time; 0 is the least.
            window: pixels a side of overlapping windows that the network is shown one after the
                other, for pictures larger than it draws well (MultiDiffusion); None shows it all.
            window_overlap: the least share of one that its neighbours see too, 0 to 0.9.
            seed: of the first picture, the next ones count up; None draws one.
            count: how many pictures.
            sampler: the algorithm, one of ``sampling.SAMPLERS``.
            schedule: the choice of times, one of ``sampling.SCHEDULES``; None is the model's own
                for its own sampler, else the sampler's usual one.
            eta: share of fresh noise in each step, for samplers that have it.
            discard_penultimate: leave out the last noise level but one, as A1111 does for some.
            image: start from this picture: a PIL image, or uint8 (H, W, 3).
            strength: how far to leave it, 0 to 1.
            fit: how it and the mask come to the size: "stretch", or "crop" with its proportions.
            sample_posterior: start from a sample of the image's latents, not their mean; its noise
                is drawn as diffusers does, before all other, from the same seed.
            mask: draw only where this picture is white; it takes ``image``.
            mask_blur: of its edge, in pixels (a Gaussian's standard deviation).
            mask_content: what the drawing begins with inside the mask, as far as ``strength``
                leaves it: "original", "fill" (its surroundings, blurred), "noise" or "nothing".
            only_masked: draw the masked part alone, with so many pixels around it, at the size
                (``width`` x ``height``, by default the model's own) of a whole drawing, and put it
                back into the picture, which keeps its own size; None draws the whole picture, and
                so it is without a mask.
            image_guidance_scale: how far an edit stays with ``image``, for models that change a
                picture by instruction; None is 1.5.
            depth_image: a depth map, bright is near, for models that follow one.
            control_image: a picture for the model's ControlNet, or a list of one for each.
            control_weight: how strongly it steers, one for all or a list; so are the next three.
            control_start: share of the steps from which it does.
            control_end: and to which.
            control_preprocess: what is made of the picture first: "none", "canny" (edges),
                "scribble" or "invert".
            ip_image: a picture that the model's IP-Adapter looks at beside the prompt, or a list of
                some that it looks at together; for several adapters a list of such, one for each.
            ip_scale: how strongly it counts, one for all adapters or a list; so are the next two.
            ip_start: share of the steps from which it does.
            ip_end: and to which.
            clip_skip: which text layer to read, from the end; 1 is the last.
            syntax: how prompts are written: "a1111" with weights, changes, AND and BREAK, of any
                length; or "plain", cut to 75 tokens.
            emphasis: what weights on words do: "original" brings each chunk back to the mean that
                it had, "no norm" does not, which some prefer for SDXL (A1111's words).
            loras: the LoRAs of this drawing, beside those in the prompt: a list of paths or names,
                "NAME", "NAME:0.8", "NAME:unet=0.8,te=0.5" or (name, 0.8); or one text with ";"
                between. None are those that the model was loaded with. The networks keep them until
                another drawing wants others.
            noise: whose random numbers a seed draws: torch, nvidia, numpy or mlx.
            variation_seed: of a second noise to mix in; it counts up instead of the seed.
            variation_strength: how much of it, 0 to 1.
            ensd: A1111's "eta noise seed delta", added to the seed for the steps' noise.
            hires_scale: draw again, this many times larger, on top of the first drawing.
            hires_prompt: what the second is to draw; None is the same.
            hires_negative_prompt: likewise, what it is to stay away from.
            hires_strength: how far the second leaves the first, 0.01 to 1.
            hires_steps: that the second makes: at most ``hires_strength`` of all 1000; None is as
                many as the first, or as there are.
            hires_upscaler: what enlarges the first: "latent", "lanczos", or the name or place of a
                network that enlarges pictures.
            original_size: width and height of the picture that SDXL is told this one is cut from, a
                pair or "1024x768"; None is its own size.
            crop: pixels that it is told are cut off at the left and at the top.
            target_size: width and height that it is told the picture has.
            aesthetic_score: what SDXL's refiner is told of what is wanted, about 1 to 10.
            negative_aesthetic_score: likewise, of what is avoided.
            refiner: a model that draws the last part of the way, such as SDXL's refiner.
            refiner_start: share of the way from which it draws, by the noise that is left.
            latents: (count, h, w, C) of unit-variance starting noise, instead of the seed's.
            step_noise: the steps' noise for stochastic samplers, instead of the seed's: a callable
                (i, shape) -> array, or an array (steps, count, h, w, C).
            preview: what ``Progress.preview`` decodes with: "linear" or "taesd"; None is the
                better one there is.

        Returns:
            A generator of ``Progress``, the last of which carries the ``Result``.

        Raises:
            ValueError: in one line, for an argument that cannot be used.
        """
        zeroes, negative_prompt = negative_prompt is None, negative_prompt or ""
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if not isinstance(text, str):
                raise ValueError(f"{name} must be text, got {type(text).__name__}.")
        is_xl = self.configs["unet"].vector_channels is not None
        if zeroes and not is_xl:
            raise ValueError("negative_prompt None is for SDXL: other models take text, also none.")
        sizes = read_sizes(
            self,
            is_xl,
            {"original_size": original_size, "crop": crop, "target_size": target_size},
            {"score": aesthetic_score, "negative_score": negative_aesthetic_score},
        )
        refiner_start = check_number("refiner_start", refiner_start)
        if refiner is not None:
            check_refiner(self, refiner)
            if tile is not None:
                raise ValueError("tile does not go with a refiner, whose edges stay open.")
        if mask is not None and image is None:
            raise ValueError("a mask needs the image that it covers.")
        notes: list[str] = []
        if only_masked is not None:
            only_masked = whole("only_masked", only_masked)
            if mask is None:  # as a picture's settings are without its mask
                only_masked = None
                notes.append("only_masked is left out: there is no mask")
        content = one_of("mask_content", mask_content, MASK_CONTENTS)
        if sample_posterior and (variation_strength or ensd):
            raise ValueError("sample_posterior does not go with variation_strength or ensd.")
        if hires_scale is not None and (image is not None or step_noise is not None):
            raise ValueError("hires_scale goes with neither an image nor step_noise.")
        use = use_of_channels(self.configs["unet"])
        picture = None if image is None else images.to_rgb(image)
        for name, value, wanted in (
            ("image", image, "edit"),
            ("depth_image", depth_image, "depth"),
        ):
            if use == wanted and value is None:
                raise ValueError(f"this model needs {name}: {_NEEDS[use]}.")
        if depth_image is not None and use != "depth":
            raise ValueError("depth_image is for models that follow a depth map; this does not.")
        if image_guidance_scale is not None and use != "edit":
            raise ValueError("image_guidance_scale is for models that edit by instruction.")
        if use == "edit" and mask is not None:
            raise ValueError("a model that edits by instruction takes no mask.")
        # A part of it is drawn at the model's own size, if no other is named.
        whole_picture = picture if only_masked is None else None
        width, height = size = read_size(self, whole_picture, width, height, notes)
        area = None
        if picture is not None and mask is not None and only_masked is not None:
            blur = check_number("mask_blur", mask_blur)
            area = masked_area(picture, mask, only_masked, size, blur)
            control_image = area.parts(control_image)
            if depth_image is not None:
                depth_image = area.part(images.to_grey(depth_image))
        factor = self.configs["vae"].downscale
        count = whole("count", count)
        shape = count, height // factor, width // factor, self.configs["vae"].latent_channels
        guidance = check_number(
            "guidance_scale",
            self.defaults["guidance_scale"] if guidance_scale is None else guidance_scale,
        )
        rescale = (
            self.defaults["guidance_rescale"] if guidance_rescale is None else guidance_rescale
        )
        start = check_number("guidance_start", guidance_start)
        end = check_number("guidance_end", guidance_end)
        if start > end:
            raise ValueError(f"guidance_start {start:g} lies after guidance_end {end:g}.")
        check_form(self, form := read_form(tile, freeu, token_merging))
        own_layer = self.text_encoders.clip_skip
        skipped = whole("clip_skip", own_layer if clip_skip is None else clip_skip)
        parts = self.text_encoders.tokenizers
        if skipped > (layers := min(self.configs[part].num_hidden_layers for part in parts)):
            raise ValueError(f"clip_skip must be from 1 to {layers}, got {skipped}.")
        edited, image_guidance = None, None
        if use == "edit":
            assert picture is not None
            given_scale = IMAGE_GUIDANCE if image_guidance_scale is None else image_guidance_scale
            image_guidance = check_number("image_guidance_scale", given_scale)
            edited, picture = images.fitted(picture, width, height, fit), None
        controls = read_controls(
            list(self.control_names),
            control_image,
            weight=control_weight,
            start=control_start,
            end=control_end,
            preprocess=control_preprocess,
            size=size,
            fit=one_of("fit", fit, images.FITS),
        )
        check_steered(self, controls, size)
        if self.control_names and not controls:
            notes.append("no control_image: the ControlNet is not used")
        if controls and refiner is not None and not steers_both(self, refiner):
            notes.append("the refiner draws without the ControlNet, which is not made for it")
        prompted = read_image_prompts(
            list(self.ip_adapters), ip_image, scale=ip_scale, start=ip_start, end=ip_end
        )
        if self.ip_adapters and not prompted:
            notes.append("no ip_image: the IP-Adapter is not used")
        if prompted and refiner is not None and not sees_alike(self, refiner):
            notes.append("the refiner draws without the IP-Adapter, which is not made for it")
        told = None
        if self.configs["unet"].time_cond_dim is not None:
            told, guidance = guidance, 1.0
            if negative_prompt:
                notes.append("this model is told its guidance: the negative prompt has no effect")
        settings = Settings(
            prompt=prompt,
            negative_prompt=negative_prompt,
            width=width,
            height=height,
            steps=whole("steps", self.defaults["steps"] if steps is None else steps),
            sampler=sampler,
            schedule=schedule,
            guidance_scale=guidance if told is None else told,
            guidance_rescale=check_number("guidance_rescale", rescale),
            guidance_start=start,
            guidance_end=end,
            tile=form.tile,
            freeu=freeu_text(form),
            token_merging=form.merging,
            **read_deep_cache(self, deep_cache, deep_cache_branch, window, refiner),
            **read_windows(self, window, window_overlap, tile),
            image_guidance_scale=image_guidance,
            control=describe_controls(controls, self.control_names),
            image_prompts=describe_image_prompts(prompted, self.ip_adapters),
            seed=secrets.randbelow(2**32) if seed is None else whole("seed", seed),
            noise=one_of("noise", noise, NOISE_SOURCES),
            clip_skip=skipped,
            syntax=one_of("syntax", syntax, SYNTAXES),
            emphasis=one_of("emphasis", emphasis, EMPHASES),
            strength=None if picture is None else check_number("strength", strength),
            fit=None if picture is None else one_of("fit", fit, images.FITS),
            mask_blur=None if mask is None else check_number("mask_blur", mask_blur),
            mask_content=None if mask is None else content,
            only_masked=only_masked,
            sample_posterior=bool(sample_posterior) and picture is not None,
            variation_strength=check_number("variation_strength", variation_strength),
            ensd=whole("ensd", ensd),
            eta=None if eta is None else check_number("eta", eta),
            discard_penultimate=bool(discard_penultimate),
            zeroed_negative=zeroes,
            original_size=pair_text(sizes.original, "x") if original_size is not None else None,
            crop=pair_text(sizes.crop, ",") if crop is not None else None,
            target_size=pair_text(sizes.target, "x") if target_size is not None else None,
            aesthetic_score=None if aesthetic_score is None else sizes.score,
            negative_aesthetic_score=(
                None if negative_aesthetic_score is None else sizes.negative_score
            ),
            refiner="" if refiner is None else refiner.info.name,
            refiner_start=None if refiner is None else refiner_start,
            model=self.info.name,
            model_hash=self.info.sha256[:10],
            unet=self.unet_name,
            vae=self.vae_name,
            dtype=self.info.components["unet"].dtype,
            bits=self.info.components["unet"].bits,
            version=metadata.program(),
        )
        if settings.variation_strength:
            number = secrets.randbelow(2**32) if variation_seed is None else variation_seed
            settings = replace(settings, variation_seed=whole("variation_seed", number))
        plan = plan_of(self, settings)
        if settings.deep_cache is not None and plan.sampler in FAR_APART:
            notes.append(f"{plan.sampler}'s steps are far apart: deep_cache spoils the picture")
        given = {
            "latents": None if latents is None else read_array("latents", latents, shape),
            "step_noise": None if step_noise is None else read_step_noise(step_noise, plan, shape),
        }
        settings = replace(
            settings,
            sampler=plan.sampler,
            schedule=plan.schedule,
            injected=", ".join(name for name, value in given.items() if value is not None),
        )
        if picture is not None:
            picture = (
                images.fitted(picture, width, height, fit) if area is None else area.part(picture)
            )
        read = read_prompts(self, settings)
        if use == "edit" and (settings.guidance_rescale or len(read["prompt"].parts) > 1):
            raise ValueError("a model that edits by instruction takes no guidance_rescale, no AND.")
        for text in texts_of(each for each in read.values() if each is not None):
            encode_prompt(self.tokenizer, text, syntax=settings.syntax)  # or raise, at once
        notes += left_out(read["prompt"], read["negative"])
        chosen = read_loras(self, loras, read["prompt"])
        if chosen is not None:
            settings = replace(settings, loras=chosen.said or None)
            notes += chosen.notes
        job = Job(
            settings=seeded(settings, count),
            plan=plan,
            size=size,
            shape=shape,
            guidance_scale=guidance,
            clip_skip=skipped,
            form=form,
            **read,
            loras=chosen,
            picture=picture,
            mask=None if mask is None else read_mask(self, mask, size, fit, mask_blur, area, notes),
            area=area,
            edited=edited,
            depth=None if depth_image is None else images.to_grey(depth_image),
            controls=controls,
            image_prompts=prompted,
            told=told,
            image_guidance=image_guidance,
            sizes=sizes,
            refiner=refiner,
            refiner_start=refiner_start,
            preview=preview_kind(self, preview),
            notes=notes,
            **given,
        )
        if hires_scale is not None:
            second = {"scale": hires_scale, "strength": hires_strength, "steps": hires_steps}
            texts = {"prompt": hires_prompt, "negative_prompt": hires_negative_prompt}
            job = with_second(self, job, second, texts, hires_upscaler)
        elif hires_prompt is not None or hires_negative_prompt is not None:
            notes.append("no hires_scale: nothing is drawn again, by a prompt of its own or not")
        return run(self, job)
