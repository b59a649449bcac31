"""From a prompt, and perhaps a picture, to pictures: the parts put together, step by step.

Legend   n pictures at once; H, W pixel rows and columns; h, w latent rows and columns; C latent
         channels; T prompt tokens; D their width. Channels last.
Source   The order of things is diffusers 0.42.1's (pipelines/stable_diffusion: pipeline_
         stable_diffusion.py, _img2img.py, _inpaint.py with a 4-channel UNet); which seed draws what
         is AUTOMATIC1111's (modules/rng.py), as mlx_maple/sampling/noise.py tells.
Differs  img2img starts from the posterior's mean unless told to sample it. What inpainting leaves
         alone is put back in pixels, so that it does not pass through the autoencoder.

This is the only place that evaluates: the networks and samplers below only describe the work. One
step is one evaluation. Nothing here knows where a model came from.
"""

import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from numpy.typing import NDArray
from PIL import Image

from mlx_maple import enlarge, images, metadata
from mlx_maple.adapters import Adapters, Choice, Chosen
from mlx_maple.conditioning import Conditioning, TextEncoders
from mlx_maple.control import (
    IMAGE_GUIDANCE,
    NOTHING,
    Control,
    Shown,
    Steering,
    control_name,
    describe_controls,
    image_guided,
    input_channels,
    read_controls,
    read_hint,
    steers_alike,
    use_of_channels,
)
from mlx_maple.engine import quantize
from mlx_maple.engine.compiled import guided_steps, made_ready, room
from mlx_maple.engine.low_memory import Networks, Reload
from mlx_maple.engine.prepare import PreparedUNet, PreparedVAE
from mlx_maple.forms import HAVE_FORMS, PARTS, PLAIN, Form, freeu_text, read_form
from mlx_maple.guidance import EMPHASES, Prompts, encoded, guided_model
from mlx_maple.metadata import Settings, check_number
from mlx_maple.models import (
    TAESD,
    AutoencoderKL,
    CLIPTextEncoder,
    ControlNet,
    T2IAdapter,
    UNet,
)
from mlx_maple.sampling import SAMPLERS, NoiseSchedule, Plan, Step, guided, make_plan
from mlx_maple.sampling.denoiser import Model
from mlx_maple.sampling.noise import (
    NOISE_SOURCES,
    initial_noise,
    noise_generator,
    step_noise_generator,
)
from mlx_maple.sampling.schedule import SigmaGrid
from mlx_maple.sampling.windows import windowed
from mlx_maple.sizes import REFINER, Sizes, read_pair, with_vector, zeroed
from mlx_maple.text.language import SYNTAXES, Prompt, left_out, read_prompt
from mlx_maple.text.prompt import encode_prompt
from mlx_maple.text.tokenizer import Tokenizer

PREVIEWS = ("linear", "taesd")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
REFINER_START = 0.8
LEFT_OUT = 200  # characters of a prompt's end that a note repeats
# img2img without a size: at most this many times the pixels that the model was made for
LARGEST_SHARE = 2.25
# What models with more input channels cannot do without.
_NEEDS = {
    "edit": "the picture that it changes by instruction",
    "depth": "the depth map that it follows",
}
# What a model of the family does where its own files do not say.
DEFAULTS: dict[str, Any] = {
    "width": 512,
    "height": 512,
    "steps": 20,
    "guidance_scale": 7.5,
    "guidance_rescale": 0.0,
    "sampler": "dpmpp_2m",
    "schedule": "karras",
}

FloatArray = NDArray[np.float32]
Picture = Image.Image | NDArray[Any]
StepNoise = Callable[[int, tuple[int, ...]], Any]


@dataclass(frozen=True, kw_only=True)
class Component:
    """One network of a model: how large it is and what it computes in.

    Attributes:
        parameters: how many numbers.
        bytes: that they take.
        dtype: what it computes in.
        bits: of its quantised weights, 8 or 4; None where they are not quantised.
    """

    parameters: int
    bytes: int
    dtype: str
    bits: int | None = None


@dataclass(frozen=True, kw_only=True)
class Info:
    """What is known of a loaded model.

    Attributes:
        name: to call it by.
        sha256: of the file it came from, in hexadecimal; "" where that is not known.
        family: such as sd1.
        layout: of the file it came from.
        prediction: what its UNet predicts, epsilon or v_prediction.
        parameters: of all networks together.
        bytes: that their weights take.
        width: in pixels, of the pictures it was made for.
        height: likewise.
        components: each network by name.
        notes: what the loader had to say.
    """

    name: str
    sha256: str
    family: str
    layout: str
    prediction: str
    parameters: int
    bytes: int
    width: int
    height: int
    components: Mapping[str, Component]
    notes: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a call has drawn.

    Attributes:
        images: RGB.
        latents: (n, h, w, C) float32, the final scaled latents.
        settings: of each image, complete: ``images.save_image`` writes them into its file.
        timings: seconds: text, encode (with an image to start from), sample, step (the mean, but
            for the first of several), decode and total. Time in the caller's hands is not counted.
        notes: one line for each thing that went otherwise than asked.
    """

    images: list[Image.Image]
    latents: FloatArray
    settings: list[Settings]
    timings: dict[str, float]
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a drawing is.

    Attributes:
        index: steps that are done.
        total: steps in all.
        stage: "text", "encode", "sample" (a step was done), "decode" or "done".
        seconds_per_step: so far; 0.0 before the first.
        result: with the stage "done", else None.
    """

    index: int
    total: int
    stage: str
    seconds_per_step: float = 0.0
    result: Result | None = None
    _preview: Callable[[int], Image.Image] | None = None

    def preview(self, image: int = 0) -> Image.Image | None:
        """What is seen so far of one of the images, full size; None before the first step."""
        if self.result is not None:
            return self.result.images[image]
        return None if self._preview is None else self._preview(image)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One call's arguments, checked and complete.

    Attributes:
        settings: of each picture.
        plan: the sampler's.
        size: width and height in pixels.
        shape: (n, h, w, C).
        guidance_scale: 1 is unguided.
        clip_skip: 1 is the last layer.
        form: of the networks.
        prompt: taken apart.
        negative: likewise; None where nothing is avoided.
        loras: that the networks carry; None where the model takes none.
        latents: of ``shape``: starting noise that was given.
        step_noise: the steps' noise that was given.
        picture: RGB, at the size to draw.
        mask: (H, W) of 0 to 1, blurred.
        edited: RGB, at the size to draw: what an instruction changes.
        depth: grey: what the network is to follow.
        controls: pictures that steer.
        told: the guidance scale where the network is told it, else None.
        image_guidance: how far an edit stays with its picture.
        sizes: that SDXL is told; other models are told none.
        refiner: the model that draws the last part, or None.
        refiner_start: share of the way from which it does.
        preview: how to preview.
        notes: what is already known to go otherwise than asked.
        second: a larger drawing that begins with what this one ends with.
        upscale: what enlarges this one's pictures for it; None takes latents or Lanczos.
        is_second: whether it is such a drawing.
    """

    settings: list[Settings]
    plan: Plan
    size: tuple[int, int]
    shape: tuple[int, int, int, int]
    guidance_scale: float
    clip_skip: int
    form: Form
    prompt: Prompt
    negative: Prompt | None
    loras: Chosen | None
    latents: FloatArray | None
    step_noise: StepNoise | None
    picture: Image.Image | None
    mask: FloatArray | None
    edited: Image.Image | None
    depth: Image.Image | None
    controls: list[Control]
    told: float | None
    image_guidance: float | None
    sizes: Sizes
    refiner: "StableDiffusion | None"
    refiner_start: float
    preview: str
    notes: list[str]
    second: "_Job | None" = None
    upscale: enlarge.Upscaler | None = None
    is_second: bool = False

    @property
    def count(self) -> int:
        """How many pictures."""
        return self.shape[0]

    @property
    def is_fresh(self) -> bool:
        """Whether the starting latents are noise alone.

        So also where a masked part is redrawn with strength 1, as in diffusers.
        """
        if self.is_second:
            return False
        return self.picture is None or (self.mask is not None and self.settings[0].strength == 1)

    @property
    def largest(self) -> "_Job":
        """The drawing whose size the pictures have."""
        return self if self.second is None else self.second

    @property
    def prompts(self) -> list[Prompt]:
        """All that is to be encoded for it."""
        own = [prompt for prompt in (self.prompt, self.negative) if prompt is not None]
        return own if self.second is None else own + self.second.prompts


class StableDiffusion:
    """A Stable Diffusion model, 1.x, 2.x or XL, ready to draw.

    Attributes:
        text_encoder: ids (B, 77) to states. SDXL's refiner has none.
        text_encoder_2: SDXL's second one; None in other families.
        text_encoders: all that the model has, with their tokenizers.
        unet: latents (B, h, w, C), timesteps (B,), context (B, T, D) to predictions (B, h, w, C).
        vae: pictures to scaled latents and back.
        taesd: a small autoencoder for previews, or None.
        configs: of each network by name; looking at them loads nothing.
        tokenizer: text to ids.
        noise_schedule: what the UNet was trained on.
        defaults: width, height, steps, guidance_scale, guidance_rescale, sampler and schedule of a
            plain call.
        latent_rgb_factors: of linear previews: C rows of RGB weights and a row of offsets, or None.
        control_names: of each network that steers, in order: what people call it.
        info: what is known of the model.
    """

    def __init__(
        self,
        *,
        text_encoder: CLIPTextEncoder | None,
        unet: UNet,
        vae: AutoencoderKL,
        tokenizer: Tokenizer,
        noise_schedule: NoiseSchedule,
        text_encoder_2: CLIPTextEncoder | None = None,
        taesd: TAESD | None = None,
        controlnets: Mapping[str, ControlNet | T2IAdapter] | None = None,
        defaults: Mapping[str, Any] | None = None,
        latent_rgb_factors: Sequence[Sequence[float]] | None = None,
        name: str = "",
        sha256: str = "",
        vae_name: str = "",
        family: str = "sd1",
        layout: str = "",
        notes: Sequence[str] = (),
        upscalers: Callable[[str], enlarge.Upscaler] | None = None,
        reload: Mapping[str, Reload] | None = None,
        renew: Mapping[str, Reload] | None = None,
        adapters: Adapters | None = None,
        compile: bool = True,
        max_memory: int | None = None,
    ) -> None:
        """Put a model together from its networks.

        Args:
            text_encoder: with its weights; SDXL's refiner has none.
            unet: with its weights.
            vae: with its weights.
            tokenizer: whose ids the text encoders know; each fills up with its own.
            noise_schedule: what the UNet was trained on and what it predicts.
            text_encoder_2: SDXL's second, with its weights.
            taesd: for previews.
            controlnets: what steers, by the name that people know it by.
            defaults: any of the settings in ``DEFAULTS``, as this model likes them.
            latent_rgb_factors: C rows of RGB weights and a row of offsets, for linear previews;
                None has them fitted to what is drawn, which costs some decodings.
            name: of the model, for pictures' settings.
            sha256: of its file, in hexadecimal.
            vae_name: of an autoencoder from elsewhere.
            family: for ``info``.
            layout: for ``info``.
            notes: for ``info``.
            upscalers: what enlarges pictures, by its name or place; an OSError where there is none.
            reload: functions that load a network by name. With them the model is in low-memory
                mode: of those networks only the one in use is held, and what is given here needs
                no weights that were read.
            renew: functions that load a network by name once more, with whatever ``adapters`` has
                put on top of it by then.
            adapters: LoRAs and learned words for this model.
            compile: whether networks may be compiled; they are on a GPU where that works.
            max_memory: bytes of MLX's in all, above which a GPU is waited for; it stays an
                attribute. What one operation needs it takes; nothing is refused.
        """
        self.max_memory = max_memory
        self.tokenizer = tokenizer
        self.noise_schedule = noise_schedule
        self.defaults = {**DEFAULTS, **(defaults or {})}
        self.latent_rgb_factors = latent_rgb_factors
        self._vae_name = vae_name
        self._upscalers = upscalers
        networks: dict[str, Any] = {
            "text_encoder": text_encoder,
            "text_encoder_2": text_encoder_2,
            "unet": unet,
            "vae": vae,
            "taesd": taesd,
        }
        self.control_names: dict[str, str] = {}
        for number, (known_as, network) in enumerate((controlnets or {}).items()):
            networks[part := control_name(number)] = network
            self.control_names[part] = known_as
        present = {part: module for part, module in networks.items() if module is not None}
        components = {part: _component(module) for part, module in present.items()}
        self._compiles = compile
        self._form = PLAIN  # that networks have just now
        reload = dict(reload or {})
        held = {n: m if n in reload else self._ready(m, False) for n, m in present.items()}
        reloads = {
            n: lambda load=load: self._ready(load(), True, True) for n, load in reload.items()
        }
        renewals = {
            n: lambda load=load: self._ready(load(), False, True)
            for n, load in (renew or {}).items()
        }
        self._networks = Networks(held, reloads, renewals)
        self._adapters = adapters
        self.configs = self._networks.configs
        self.text_encoders = TextEncoders(
            {
                part: tokenizer.padded_with(self.configs[part].pad_token_id)
                for part in TEXT_ENCODERS
                if part in present
            },
            self._networks.__getitem__,
            is_normed=self.configs["unet"].vector_channels is None,
        )
        self.info = Info(
            name=name,
            sha256=sha256,
            family=family,
            layout=layout,
            prediction=noise_schedule.prediction,
            parameters=sum(component.parameters for component in components.values()),
            bytes=sum(component.bytes for component in components.values()),
            width=self.defaults["width"],
            height=self.defaults["height"],
            components=components,
            notes=tuple(notes),
        )

    @property
    def text_encoder(self) -> CLIPTextEncoder:
        """Ids (B, 77) to states; in low-memory mode it is loaded when it is asked for."""
        if "text_encoder" not in self._networks:
            raise AttributeError("this model has no text_encoder: see text_encoder_2")
        return self._networks["text_encoder"]

    @text_encoder.setter
    def text_encoder(self, module: CLIPTextEncoder) -> None:
        self._networks["text_encoder"] = self._ready(module)

    @property
    def text_encoder_2(self) -> CLIPTextEncoder | None:
        """SDXL's second text encoder; None in other families."""
        return self._networks["text_encoder_2"] if "text_encoder_2" in self._networks else None

    @text_encoder_2.setter
    def text_encoder_2(self, module: CLIPTextEncoder) -> None:
        self._networks["text_encoder_2"] = self._ready(module)

    @property
    def unet(self) -> UNet:
        """Latents (B, h, w, C), timesteps (B,) and context (B, T, D) to predictions."""
        return self._networks["unet"]

    @unet.setter
    def unet(self, module: UNet) -> None:
        self._networks["unet"] = self._ready(module)

    @property
    def vae(self) -> AutoencoderKL:
        """Pictures to scaled latents and back."""
        return self._networks["vae"]

    @vae.setter
    def vae(self, module: AutoencoderKL) -> None:
        self._networks["vae"] = self._ready(module)

    @property
    def taesd(self) -> TAESD | None:
        """A small autoencoder for previews, or None."""
        return self._networks["taesd"] if "taesd" in self._networks else None

    @taesd.setter
    def taesd(self, module: TAESD | None) -> None:
        self._networks["taesd"] = self._ready(module)

    def _ready(self, network: Any, low_memory: bool | None = None, consumes: bool = False) -> Any:
        """A network as the device that runs draws fastest with."""
        if network is None:
            return None
        if self._form != PLAIN and isinstance(network, HAVE_FORMS):
            return self._form.apply(network)  # what a GPU is prepared for has no other form
        low_memory = self._networks.is_low_memory if low_memory is None else low_memory
        return made_ready(
            network, compiles=self._compiles, low_memory=low_memory, consumes=consumes
        )

    @property
    def is_low_memory(self) -> bool:
        """Whether only the network in use is held."""
        return self._networks.is_low_memory

    def tokenize(self, text: str, *, syntax: str = "a1111") -> list[list[int]]:
        """Chunks of 77 ids, as the text encoder reads them; without tags, AND and changes."""
        return encode_prompt(self.tokenizer, text, syntax=syntax).ids

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
        image_guidance_scale: float | None = None,
        depth_image: Picture | None = None,
        control_image: Picture | Sequence[Picture] | None = None,
        control_weight: float | Sequence[float] = 1.0,
        control_start: float | Sequence[float] = 0.0,
        control_end: float | Sequence[float] = 1.0,
        control_preprocess: str | Sequence[str] = "none",
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
        original_size: Any = None,
        crop: Any = None,
        target_size: Any = None,
        aesthetic_score: float | None = None,
        negative_aesthetic_score: float | None = None,
        refiner: "StableDiffusion | None" = None,
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
                prediction without it, against colours that are too strong; a step takes two
                networks' calls instead of one of both.
            guidance_start: share of the steps before which the prompt alone decides.
            guidance_end: likewise after which; it saves half of those steps' time.
            tile: the axes along which the picture continues at the opposite edge: "x", "y", "xy".
            freeu: FreeU's four factors b1, b2, s1, s2 (for SD 1.5 its authors take 1.5, 1.6, 0.9,
                0.2): more contrast and detail for no more work.
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
            image_guidance_scale: how far an edit stays with ``image``, for models that change a
                picture by instruction; None is 1.5.
            depth_image: a depth map, bright is near, for models that follow one.
            control_image: a picture for the model's ControlNet, or a list of one for each.
            control_weight: how strongly it steers, one for all or a list; so are the next three.
            control_start: share of the steps from which it does.
            control_end: and to which.
            control_preprocess: what is made of the picture first: "none", "canny" (edges),
                "scribble" or "invert".
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
            hires_strength: how far the second leaves the first, 0.01 to 1.
            hires_steps: that the second makes; None is as many as the first.
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
        sizes = self._sizes(
            is_xl,
            {"original_size": original_size, "crop": crop, "target_size": target_size},
            {"score": aesthetic_score, "negative_score": negative_aesthetic_score},
        )
        refiner_start = check_number("refiner_start", refiner_start)
        if refiner is not None:
            self._check_refiner(refiner)
            if tile is not None:
                raise ValueError("tile does not go with a refiner, whose edges stay open.")
        if mask is not None and image is None:
            raise ValueError("a mask needs the image that it covers.")
        if sample_posterior and (variation_strength or ensd):
            raise ValueError("sample_posterior does not go with variation_strength or ensd.")
        if hires_scale is not None and (image is not None or step_noise is not None):
            raise ValueError("hires_scale goes with neither an image nor step_noise.")
        notes: list[str] = []
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
        width, height = size = self._size(picture, width, height, notes)
        factor = self.configs["vae"].downscale
        count = _whole("count", count)
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
        self._check_form(form := read_form(tile, freeu))
        own_layer = self.text_encoders.clip_skip
        skipped = _whole("clip_skip", own_layer if clip_skip is None else clip_skip)
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
            fit=_one_of("fit", fit, images.FITS),
        )
        self._check_steered(controls, size)
        if self.control_names and not controls:
            notes.append("no control_image: the ControlNet is not used")
        if controls and refiner is not None and not self._steers(refiner):
            notes.append("the refiner draws without the ControlNet, which is not made for it")
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
            steps=_whole("steps", self.defaults["steps"] if steps is None else steps),
            sampler=sampler,
            schedule=schedule,
            guidance_scale=guidance if told is None else told,
            guidance_rescale=check_number("guidance_rescale", rescale),
            guidance_start=start,
            guidance_end=end,
            tile=form.tile,
            freeu=freeu_text(form),
            **self._windows(window, window_overlap, tile),
            image_guidance_scale=image_guidance,
            control=describe_controls(controls, self.control_names),
            seed=secrets.randbelow(2**32) if seed is None else _whole("seed", seed),
            noise=_one_of("noise", noise, NOISE_SOURCES),
            clip_skip=skipped,
            syntax=_one_of("syntax", syntax, SYNTAXES),
            emphasis=_one_of("emphasis", emphasis, EMPHASES),
            strength=None if picture is None else check_number("strength", strength),
            fit=None if picture is None else _one_of("fit", fit, images.FITS),
            mask_blur=None if mask is None else check_number("mask_blur", mask_blur),
            sample_posterior=bool(sample_posterior) and picture is not None,
            variation_strength=check_number("variation_strength", variation_strength),
            ensd=_whole("ensd", ensd),
            eta=None if eta is None else check_number("eta", eta),
            discard_penultimate=bool(discard_penultimate),
            zeroed_negative=zeroes,
            original_size=_said(sizes.original, "x") if original_size is not None else None,
            crop=_said(sizes.crop, ",") if crop is not None else None,
            target_size=_said(sizes.target, "x") if target_size is not None else None,
            aesthetic_score=None if aesthetic_score is None else sizes.score,
            negative_aesthetic_score=(
                None if negative_aesthetic_score is None else sizes.negative_score
            ),
            refiner="" if refiner is None else refiner.info.name,
            refiner_start=None if refiner is None else refiner_start,
            model=self.info.name,
            model_hash=self.info.sha256[:10],
            vae=self._vae_name,
            dtype=self.info.components["unet"].dtype,
            bits=self.info.components["unet"].bits,
            version=metadata.program(),
        )
        if settings.variation_strength:
            number = secrets.randbelow(2**32) if variation_seed is None else variation_seed
            settings = replace(settings, variation_seed=_whole("variation_seed", number))
        plan = self._plan(settings)
        given = {
            "latents": None if latents is None else _array("latents", latents, shape),
            "step_noise": None if step_noise is None else _step_noise(step_noise, plan, shape),
        }
        settings = replace(
            settings,
            sampler=plan.sampler,
            schedule=plan.schedule,
            injected=", ".join(name for name, value in given.items() if value is not None),
        )
        if picture is not None:
            picture = images.fitted(picture, width, height, fit)
        read = self._read(settings)
        if use == "edit" and (settings.guidance_rescale or len(read["prompt"].parts) > 1):
            raise ValueError("a model that edits by instruction takes no guidance_rescale, no AND.")
        for text in _texts(each for each in read.values() if each is not None):
            encode_prompt(self.tokenizer, text, syntax=settings.syntax)  # or raise, at once
        notes += left_out(read["prompt"], read["negative"])
        chosen = self._loras(loras, read["prompt"])
        if chosen is not None:
            settings = replace(settings, loras=chosen.said or None)
            notes += chosen.notes
        job = _Job(
            settings=_seeded(settings, count),
            plan=plan,
            size=size,
            shape=shape,
            guidance_scale=guidance,
            clip_skip=skipped,
            form=form,
            **read,
            loras=chosen,
            picture=picture,
            mask=None if mask is None else self._mask(mask, size, fit, mask_blur, notes),
            edited=edited,
            depth=None if depth_image is None else images.to_grey(depth_image),
            controls=controls,
            told=told,
            image_guidance=image_guidance,
            sizes=sizes,
            refiner=refiner,
            refiner_start=refiner_start,
            preview=self._preview_kind(preview),
            notes=notes,
            **given,
        )
        if hires_scale is not None:
            second = {"scale": hires_scale, "strength": hires_strength, "steps": hires_steps}
            job = self._with_second(job, second, hires_upscaler)
        return self._run(job)

    # Checking the arguments ------------------------------------------------------------------

    def _size(
        self,
        picture: Image.Image | None,
        width: int | None,
        height: int | None,
        notes: list[str],
    ) -> tuple[int, int]:
        """The size to draw at."""
        if picture is not None and (width is None or height is None):
            largest = int(LARGEST_SHARE * self.defaults["width"] * self.defaults["height"])
            width, height = images.size_like(picture.size, largest, width=width, height=height)
            if (width, height) != picture.size:
                own = f"{picture.width}x{picture.height}"
                notes.append(f"the image of {own} is drawn at {width}x{height}")
        width = _whole("width", self.defaults["width"] if width is None else width)
        height = _whole("height", self.defaults["height"] if height is None else height)
        multiple = self.configs["vae"].downscale
        for name, value in (("width", width), ("height", height)):
            if value % multiple:
                raise ValueError(f"{name} must be a multiple of {multiple}, got {value}.")
        return width, height

    def _sizes(
        self, is_xl: bool, pairs: Mapping[str, Any], scores: Mapping[str, float | None]
    ) -> Sizes:
        """What was asked of the sizes and scores that SDXL is told."""
        given = {name: value for name, value in pairs.items() if value is not None}
        if given and not is_xl:
            raise ValueError(f"{next(iter(given))} is for SDXL, which is told sizes.")
        said: dict[str, Any] = {
            name.removesuffix("_size"): read_pair(name, value, 0 if name == "crop" else 1)
            for name, value in given.items()
        }
        for name, value in scores.items():
            if value is not None:
                word = name.replace("score", "aesthetic_score")
                said[name] = float(check_number(word, value))
        return Sizes(**said)

    def _check_refiner(self, refiner: "StableDiffusion") -> None:
        """Whether another model can go on with what this one has begun."""
        ours, theirs = self.noise_schedule, refiner.noise_schedule
        if refiner.configs["unet"].in_channels != self.configs["unet"].in_channels:
            raise ValueError("the refiner takes other latents than this model.")
        if ours.prediction != theirs.prediction or ours.train_steps != theirs.train_steps:
            raise ValueError(
                f"the refiner predicts {theirs.prediction} in {theirs.train_steps} steps, "
                f"this model {ours.prediction} in {ours.train_steps}."
            )
        told = {sd.configs["unet"].time_cond_dim is not None for sd in (self, refiner)}
        if len(told) > 1:
            raise ValueError("of this model and the refiner only one is told its guidance.")

    def _check_steered(self, controls: Sequence[Control], size: tuple[int, int]) -> None:
        """Raise unless all that steers can steer a drawing of this size."""
        for each in controls:
            if any(side % (cells := self.configs[each.network].downscale) for side in size):
                name, (width, height) = self.control_names[each.network], size
                raise ValueError(
                    f"{name} steers sizes in multiples of {cells} pixels, not {width}x{height}."
                )

    def _steers(self, refiner: "StableDiffusion") -> bool:
        """Whether what steers this model can steer its refiner, too."""
        return steers_alike(self.configs["unet"], refiner.configs["unet"])

    def _plan(self, settings: Settings) -> Plan:
        """The sampler's plan, with the model's own sampler and schedule where none is named."""
        sampler, schedule = settings.sampler, settings.schedule
        if schedule is None and sampler in (None, self.defaults["sampler"]):
            schedule = self.defaults["schedule"]
        sampler = self.defaults["sampler"] if sampler is None else sampler
        # Redrawing all of a part starts from noise alone, as diffusers' inpainting does.
        is_fresh = settings.mask_blur is not None and settings.strength == 1
        assert settings.steps is not None
        return make_plan(
            self.noise_schedule,
            sampler,
            schedule,
            settings.steps,
            strength=None if is_fresh else settings.strength,
            eta=settings.eta,
            discard_penultimate=settings.discard_penultimate,
        )

    def _windows(self, window: Any, overlap: Any, tile: str | None) -> dict[str, Any]:
        """The settings of windows, checked."""
        overlap = check_number("window_overlap", overlap)
        if window is None:
            return {"window": None, "window_overlap": overlap}
        if self.configs["unet"].in_channels != self.configs["unet"].out_channels:
            raise ValueError("window: this model is shown a whole picture in every step.")
        if self.control_names or tile is not None:
            raise ValueError("window goes with neither a ControlNet nor tile.")
        multiple = self.configs["vae"].downscale
        if (window := _whole("window", window)) % multiple:
            raise ValueError(f"window must be a multiple of {multiple}, got {window}.")
        return {"window": window, "window_overlap": overlap}

    def _check_form(self, form: Form) -> None:
        """Raise unless the networks can be brought into a form."""
        if form.tile is not None and self.is_low_memory:
            raise ValueError("tile does not go with low-memory mode: stripes have edges.")
        is_held = _on_cpu() and not self.is_low_memory
        by_hand = [part for part in PARTS if not self._networks.can_load(part)]
        if form != PLAIN and by_hand and not is_held:
            listed = " and ".join(by_hand)
            raise ValueError(f"tile and freeu need a model that `load` made: {listed} is not.")

    def _shape(self, form: Form) -> None:
        """Have the networks in a form from now on."""
        if form == self._form:
            return
        self._form = form
        for part in PARTS:
            if _on_cpu() and not self.is_low_memory:
                form.apply(self._networks[part])
            else:
                self._networks.drop(part)  # it is read again, in this form, when it is used

    def _read(
        self, settings: Settings, calls: int | None = None, first_calls: int | None = None
    ) -> dict[str, Any]:
        """Both prompts taken apart; the negative one where the drawing needs it.

        Args:
            settings: complete.
            calls: of the network, as prompts count them; None is by the settings.
            first_calls: likewise of a first drawing, where this is the second.
        """
        assert settings.sampler is not None and settings.steps is not None
        calls = settings.steps * SAMPLERS[settings.sampler].calls if calls is None else calls
        read = partial(read_prompt, steps=calls, first_steps=first_calls, syntax=settings.syntax)
        prompt, negative = read(settings.prompt), None
        is_told = self.configs["unet"].time_cond_dim is not None
        if (settings.guidance_scale != 1 and not is_told) or len(prompt.parts) > 1:
            negative = read(settings.negative_prompt, is_negative=True)
        return {"prompt": prompt, "negative": negative}

    def _with_second(self, job: _Job, asked: Mapping[str, Any], upscaler: str) -> _Job:
        """The drawing, and on top of it a larger one."""
        own = job.settings[0]
        asked = {**asked, "steps": own.steps if asked["steps"] is None else asked["steps"]}
        said = {f"hires_{name}": check_number(f"hires_{name}", n) for name, n in asked.items()}
        if not isinstance(upscaler, str):
            raise ValueError(f"hires_upscaler must be a name, got {upscaler!r}.")
        upscale = None
        if upscaler not in enlarge.BUILT_IN:
            if self._upscalers is None:
                listed = ", ".join(enlarge.BUILT_IN)
                raise ValueError(f"unknown hires_upscaler {upscaler!r}: choose from {listed}.")
            upscale = self._upscalers(upscaler)
        vae = self.configs["vae"]
        width, height = enlarge.larger(job.size, said["hires_scale"], vae.downscale)
        for name, value in (("width", width), ("height", height)):
            check_number(name, value)
        self._check_steered(job.controls, (width, height))
        kept, strength = _whole("hires_steps", said["hires_steps"]), said["hires_strength"]
        assert own.sampler is not None and own.steps is not None
        plan = make_plan(
            self.noise_schedule,
            own.sampler,
            own.schedule,
            min(int(kept / min(strength, 0.999)), self.noise_schedule.train_steps),
            strength=strength,
            eta=own.eta,
            discard_penultimate=own.discard_penultimate,
            last=kept,
        )
        words: dict[str, Any] = {**said, "hires_upscaler": upscaler}
        settings = [replace(each, **words) for each in job.settings]
        calls = SAMPLERS[own.sampler].calls
        counts = kept * calls, own.steps * calls
        second = replace(
            job,
            settings=settings,
            plan=plan,
            size=(width, height),
            shape=(job.count, height // vae.downscale, width // vae.downscale, job.shape[3]),
            **self._read(own, *counts),
            latents=None,
            is_second=True,
        )
        return replace(job, settings=settings, second=second, upscale=upscale)

    def _loras(self, loras: Any, prompt: Prompt | None) -> Chosen | None:
        """The drawing's LoRAs, those of its prompt among them."""
        tags = [] if prompt is None else [tag for tag in prompt.tags if tag.kind == "lora"]
        if self._adapters is None:
            if loras or tags:
                raise ValueError("this model takes no LoRAs: it was not made by `load`.")
            return None
        chosen = self._adapters.choose(loras, [Choice(t.name, t.text, t.unet) for t in tags])
        for worn in chosen.worn:
            for part in worn.lora.updates:
                if not self._networks.can_load(part):
                    raise ValueError(f"the {part} was put in by hand: LoRAs cannot change it.")
        return chosen

    def _mask(
        self, mask: Picture, size: tuple[int, int], fit: str, blur: float, notes: list[str]
    ) -> FloatArray:
        """The mask at the drawing's size, blurred."""
        values = images.blurred(images.fitted(images.to_grey(mask), *size, fit), blur)
        if not images.latent_mask(values, self.configs["vae"].downscale).any():
            notes.append("the mask is black, or its white parts are too small: nothing is redrawn")
        return values

    def _preview_kind(self, preview: str | None) -> str:
        if preview is None:
            return "taesd" if "taesd" in self._networks else "linear"
        if _one_of("preview", preview, PREVIEWS) == "taesd" and "taesd" not in self._networks:
            raise ValueError("preview 'taesd' needs a TAESD, and none was loaded.")
        return preview

    # The work ------------------------------------------------------------------------------------

    def _room(self, job: _Job) -> int | None:
        """Bytes beside the networks that MLX may take before it waits for the device."""
        if self.max_memory is not None:
            return self._networks.room_within(self.max_memory)
        return room(job.largest.shape, job.guidance_scale != 1)

    def _run(self, job: _Job) -> Generator[Progress, None, None]:
        """One drawing. Every ``yield`` may be its end; no network is held beyond it in vain."""
        with self._networks.drawing(self._room(job)):
            try:
                yield from self._phases(job)
            finally:
                self._shape(PLAIN)
                self._networks.release(*self.configs)
                if job.refiner is not None:
                    job.refiner._networks.release(*job.refiner.configs)

    def _phases(self, job: _Job) -> Generator[Progress, None, None]:
        """Text, picture, steps, decoding; in low-memory mode each network goes after its phase."""
        clock, total = _Clock(), job.plan.total
        total += 0 if job.second is None else job.second.plan.total
        notes = list(job.notes)

        yield from clock.away(Progress(index=0, total=total, stage="text"))
        self._put_on(job, notes)
        self._shape(job.form)
        prompts = self._prompts(job, notes)
        later = None if job.second is None else self._prompts(job.second, notes)
        self._networks.release(*self.text_encoders.tokenizers)
        clock.mark("text")

        posterior = None
        if job.picture is not None:
            yield from clock.away(Progress(index=0, total=total, stage="encode"))
            posterior = self._encode(job.picture, notes)
            self._networks.release("vae")
            clock.mark("encode")

        latents, previews = yield from self._sampled(
            job, prompts, posterior, notes, clock, 0, total
        )
        if job.second is not None and later is not None:
            clean = yield from self._enlarged(job, latents, clock, notes)
            done, job = job.plan.total, job.second
            latents, previews = yield from self._sampled(
                job, later, clean, notes, clock, done, total
            )

        final = np.array(latents)
        pictures = []
        for i in range(job.count):
            yield from clock.away(
                Progress(
                    index=total,
                    total=total,
                    stage="decode",
                    seconds_per_step=clock.seconds_per_step,
                    _preview=previews.of(total, latents),
                )
            )
            drawn = images.to_image(self._decode(latents[i : i + 1], notes))
            if job.mask is not None and job.picture is not None:
                drawn = images.composited(drawn, job.picture, job.mask)
            pictures.append(drawn)
        clock.mark("decode")

        yield Progress(
            index=total,
            total=total,
            stage="done",
            seconds_per_step=clock.seconds_per_step,
            result=Result(
                images=pictures,
                latents=final,
                settings=job.settings,
                timings=clock.timings(),
                notes=list(dict.fromkeys(notes)),
            ),
        )

    def _sampled(
        self,
        job: _Job,
        prompts: Prompts,
        posterior: tuple[mx.array, mx.array] | None,
        notes: list[str],
        clock: "_Clock",
        done: int,
        total: int,
    ) -> Generator[Progress, None, tuple[mx.array, "_Previews"]]:
        """The steps of one drawing, from ``done`` of ``total`` on: its latents, evaluated."""
        shown = self._shown(job, notes)
        model = self._model(job, prompts, shown)  # not before: it loads the UNet
        model = self._refined(job, model, shown, notes)
        noise, clean, draw = _start(job, posterior)
        blend = None
        if job.mask is not None and clean is not None and not shown.holds_mask:
            inside = images.latent_mask(job.mask, self.configs["vae"].downscale)
            outside = _Outside(job.plan, mx.array(inside) > 0, noise, clean)
            model, blend = outside.watched(model), outside.kept
        x = job.plan.initial(noise, None if job.is_fresh else clean)
        # A GPU works on one step while this side describes the next and the caller looks at the
        # last; a CPU would only get in its own way, and two steps take more memory than one.
        ahead = 0 if _on_cpu() or self._networks.is_low_memory else 1
        latents, previews = x, _Previews(self, job)
        with closing(_evaluated(job.plan.sample(model, x, draw), blend, ahead)) as steps:
            for step in steps:
                latents, done = step.latents, done + 1
                clock.step()
                yield from clock.away(
                    Progress(
                        index=done,
                        total=total,
                        stage="sample",
                        seconds_per_step=clock.seconds_per_step,
                        _preview=previews.of(done, step.denoised),
                    )
                )
        del model, steps
        self._networks.release("unet", *self.control_names)
        if job.refiner is not None:
            job.refiner._networks.release("unet")
        clock.mark("sample")
        return latents, previews

    def _enlarged(
        self, job: _Job, latents: mx.array, clock: "_Clock", notes: list[str]
    ) -> Generator[Progress, None, tuple[mx.array, mx.array]]:
        """A drawing's latents at the size of the second; each with a deviation of nothing."""
        assert job.second is not None
        name, (rows, columns) = job.settings[0].hires_upscaler or "", job.second.shape[1:3]
        total = job.plan.total + job.second.plan.total
        if name == "latent":
            found = mx.array(enlarge.bilinear(np.array(latents), rows, columns))
            clock.mark("enlarge")
            return found, mx.zeros_like(found)
        means = []
        for i in range(job.count):
            yield from clock.away(Progress(index=job.plan.total, total=total, stage="encode"))
            drawn = images.to_image(self._decode(latents[i : i + 1], notes))
            drawn = drawn if job.upscale is None else job.upscale(drawn)
            means.append(self._encode(images.fitted(drawn, *job.second.size), notes)[0])
        self._networks.release("vae")
        clock.mark("enlarge")
        found = mx.concatenate(means)
        return found, mx.zeros_like(found)

    def _put_on(self, job: _Job, notes: list[str]) -> None:
        """Have the networks carry the drawing's LoRAs and know the learned words of its texts."""
        if self._adapters is None or job.loras is None:
            return
        self._networks.drop(*self._adapters.wear(job.loras))
        texts = _texts(job.prompts)
        rows = min(self.configs[part].vocab_size for part in self.text_encoders.tokenizers)
        words, are_new = self._adapters.words_for(texts, self.tokenizer.encode, rows, notes)
        self.text_encoders.words = words
        if are_new:
            for part in self.text_encoders.tokenizers:
                self._adapters.set_words(self._networks[part], part)

    def _prompts(self, job: _Job, notes: list[str]) -> Prompts:
        """The states of the prompt and, where it is guided, of the negative prompt; evaluated."""
        prompts = encoded(
            self.text_encoders,
            job.prompt,
            job.negative,
            syntax=job.settings[0].syntax,
            clip_skip=job.clip_skip,
            emphasis=job.settings[0].emphasis,
            together=not _on_cpu(),  # where a text alone is to be the same as beside others
        )
        for name, text in prompts.truncated.items():
            if text:
                end = " ".join(text.split())
                end = end if len(end) <= LEFT_OUT else f"{end[:LEFT_OUT]}…"
                notes.append(f"the {name} is too long; left out: {end}")
        # The refiner was not trained so: with it an empty text is avoided, as in diffusers.
        if job.settings[0].zeroed_negative and self.info.family != REFINER:
            prompts = prompts.avoiding_nothing(zeroed)
        mx.eval(prompts.arrays())
        return prompts

    def _shown(self, job: _Job, notes: list[str]) -> Shown:
        """All that the UNet is shown beside latents, time and words; evaluated."""
        channels = input_channels(
            use_of_channels(self.configs["unet"]),
            self.configs["vae"],
            job.size,
            encode=lambda pixels: self._moments(pixels, notes)[0],
            picture=job.picture if job.edited is None else job.edited,
            mask=job.mask,
            depth=job.depth,
        )
        self._networks.release("vae")
        steering = []
        for each in job.controls:
            picture = images.fitted(each.picture, *job.size)
            hint = read_hint(self._networks[each.network], picture)
            mx.eval(hint)
            steering.append(
                Steering(
                    network=lambda name=each.network: self._networks[name],
                    hint=hint,
                    weight=each.weight,
                    start=each.start,
                    end=each.end,
                )
            )
        return Shown(
            channels=channels,
            guidance=job.told,
            steering=steering,
            timesteps=tuple(job.plan.grid.timesteps),
            image_guidance=job.image_guidance,
            holds_mask=use_of_channels(self.configs["unet"]) == "inpainting",
        )

    def _model(
        self, job: _Job, prompts: Prompts, shown: Shown = NOTHING, *, first: int = 0
    ) -> Model:
        """What the sampler asks: (n, h, w, C) latents and a timestep to guided predictions."""

        def pair(positive: Conditioning, negative: Conditioning | None, scale: float) -> Model:
            if shown.image_guidance is None or negative is None:
                return self._pair(job, shown, positive, negative, scale)
            return image_guided(
                self._pair(job, shown, positive, None, 1.0),
                self._pair(job, shown, negative, None, 1.0),
                self._pair(job, shown.without_picture(), negative, None, 1.0),
                scale,
                shown.image_guidance,
            )

        settings = job.settings[0]

        def in_windows(*asked: Any) -> Model:
            if settings.window is None:
                return pair(*asked)
            cells = settings.window // self.configs["vae"].downscale
            return windowed(pair(*asked), cells, settings.window_overlap)

        return guided_model(
            prompts,
            in_windows,
            job.guidance_scale,
            job.plan.model_calls,
            guidance_rescale=settings.guidance_rescale or 0.0,
            interval=(settings.guidance_start, settings.guidance_end),
            first=first,
        )

    def _refined(self, job: _Job, model: Model, shown: Shown, notes: list[str]) -> Model:
        """A model that leaves the last part of the way to the drawing's refiner.

        The border is the timestep at which so much of the way is done, as in diffusers and in
        A1111, whatever the sampler's steps are.
        """
        refiner = job.refiner
        if refiner is None:
            return model
        prompts = refiner._prompts(job, notes)
        refiner._networks.release(*refiner.text_encoders.tokenizers)
        shown = shown if self._steers(refiner) else replace(shown, steering=())
        steps = self.noise_schedule.train_steps
        border = steps - round(job.refiner_start * steps)
        calls, is_refining = 0, False

        def call(latents: mx.array, timestep: float) -> mx.array:
            nonlocal calls, is_refining, model
            calls += 1
            if not is_refining and timestep < border:
                is_refining = True
                del model  # which holds our UNet
                self._networks.release("unet")
                model = refiner._model(job, prompts, shown, first=calls - 1)
            return model(latents, timestep)

        return call

    def _with_vectors(
        self, job: _Job, positive: Conditioning, negative: Conditioning | None
    ) -> tuple[Conditioning, Conditioning | None]:
        """Both with what SDXL is told beside its prompts; of other models as they are."""
        channels = self.configs["unet"].vector_channels
        if channels is None:
            return positive, negative
        numbers = partial(job.sizes.numbers, job.size, self.info.family)
        positive = with_vector(positive, numbers(), channels)
        if negative is not None:
            negative = with_vector(negative, numbers(is_negative=True), channels)
        return positive, negative

    def _pair(
        self,
        job: _Job,
        shown: Shown,
        positive: Conditioning,
        negative: Conditioning | None,
        scale: float,
    ) -> Model:
        """The UNet for a batch, following one prompt and avoiding another.

        On the CPU pictures go through the network one by one: BLAS rounds differently with the size
        of a batch, and a picture is to be the same alone and among others.
        """
        unet = self.unet
        positive, negative = self._with_vectors(job, positive, negative)
        contexts = positive.context, None if negative is None else negative.context
        vectors = positive.vector, None if negative is None else negative.vector
        if isinstance(unet, PreparedUNet) and not shown.is_told:
            wanted, avoided = _repeated(contexts, job.count)
            assert wanted is not None
            timesteps = job.plan.grid.timesteps
            first, second = _repeated(vectors, job.count)
            told = None if first is None else (first, second)
            steps = guided_steps(unet)
            return shown.joined(steps.model(wanted, avoided, scale, timesteps, vectors=told))
        del unet

        def of(copies: int) -> Model:
            wanted, avoided = _repeated(contexts, copies)
            assert wanted is not None
            first, second = _repeated(vectors, copies)

            def asked(latents: mx.array, timestep: float) -> mx.array:
                model = guided(
                    shown.call(self._predict, timestep),
                    wanted,
                    avoided,
                    scale,
                    self._dtype("unet"),
                    # In turn where memory is short; but see above for the CPU.
                    together=_on_cpu() or not self._networks.is_low_memory,
                    vectors=None if first is None else (first, second),
                )
                return model(latents, timestep)

            return shown.joined(asked)

        if not _on_cpu():
            return of(job.count)
        single = of(1)

        def one_by_one(latents: mx.array, timestep: float) -> mx.array:
            return mx.concatenate(
                [single(latents[i : i + 1], timestep) for i in range(latents.shape[0])]
            )

        return one_by_one

    def _predict(
        self,
        latents: mx.array,
        timesteps: mx.array,
        context: mx.array,
        vector: mx.array | None = None,
        **told: Any,
    ) -> mx.array:
        return self.unet(latents, timesteps, context, vector, **told)

    def _dtype(self, part: str) -> mx.Dtype:
        """What a network computes in."""
        return getattr(mx, self.info.components[part].dtype)

    def _encode(self, picture: Image.Image, notes: list[str]) -> tuple[mx.array, mx.array]:
        """Mean and standard deviation of a picture's latents, each (1, h, w, C) float32."""
        return self._moments(images.to_pixels(picture), notes)

    def _moments(self, values: FloatArray, notes: list[str]) -> tuple[mx.array, mx.array]:
        """The same of pixels (H, W, 3) in [-1, 1]."""
        pixels = mx.array(values)[None]

        def moments() -> tuple[mx.array, mx.array]:
            vae: Any = self.vae
            if isinstance(vae, TAESD):  # it knows one answer, and no other near it
                mean = vae.encode(pixels).astype(mx.float32)
                found = mean, mx.zeros_like(mean)
            else:
                mean, logvar = vae.encode(pixels)
                found = mean.astype(mx.float32), mx.exp(logvar.astype(mx.float32) / 2)
            mx.eval(found)
            return found

        found = moments()
        if not bool(mx.isfinite(found[0]).all()) and self._dtype("vae") != mx.float32:
            notes.append(
                f"encoding the image overflowed {_name(self._dtype('vae'))}: done in float32"
            )
            with _in_float32(self.vae):
                found = moments()
        return found

    def _decode(self, latents: mx.array, notes: list[str]) -> FloatArray:
        """Latents (1, h, w, C) to pixels (H, W, 3); in float32 where the weights' dtype fails."""
        if isinstance(self.vae, PreparedVAE):
            self.vae.decoder.wait(self.max_memory is not None)
        pixels = np.array(self.vae.decode(latents).astype(mx.float32))[0]
        if fault := _fault(pixels):
            dtype = self._dtype("vae")
            if not bool(mx.isfinite(latents).all()):
                name = _name(self._dtype("unet"))
                notes.append(f"the latents are not finite, the picture is lost (UNet in {name})")
            elif dtype == mx.float32:
                notes.append(f"the picture was decoded {fault}")
            else:
                with _in_float32(self.vae):
                    pixels = np.array(self.vae.decode(latents))[0]
                again = f", and is {_fault(pixels)} there too" if _fault(pixels) else ""
                name = _name(dtype)
                notes.append(f"the picture was decoded {fault} in {name}: done in float32{again}")
        return pixels


def fit_latent_rgb_factors(vae: AutoencoderKL, latents: FloatArray) -> list[list[float]]:
    """The linear preview that suits an autoencoder: C rows of weights and a row of offsets.

    Args:
        vae: its decoder is run once.
        latents: (B, h, w, C) scaled latents of pictures such as the model draws. A linear map is no
            decoder: it fits well the colours that it was fitted to.
    """
    pixels = np.array(vae.decode(mx.array(latents)).astype(mx.float32))
    return images.solve_rgb_factors(latents, np.nan_to_num(pixels))


class _Previews:
    """What can be seen of one drawing while it goes on.

    A model that brings no factors for linear previews has them fitted to the picture as far as it
    is drawn: when the first preview is asked for, and again at twice as many steps.
    """

    def __init__(self, sd: StableDiffusion, job: _Job) -> None:
        self._sd = sd
        self._is_taesd = job.preview == "taesd"
        self._factors = sd.latent_rgb_factors
        self._is_fitted = self._factors is None
        self._fitted_at = 0
        self._size = job.size

    def of(self, index: int, denoised: mx.array) -> Callable[[int], Image.Image]:
        """A function from a picture's number to its preview, after ``index`` steps."""

        def preview(image: int) -> Image.Image:
            if self._is_taesd and self._sd.taesd is not None:
                decoded = self._sd.taesd.decode(denoised[image : image + 1]).astype(mx.float32)
                return images.to_image(np.array(decoded)[0])
            # These latents are evaluated, and numpy does not wait for the step that runs now.
            seen = np.array(denoised)[image]
            if self._factors is None or (self._is_fitted and index >= 2 * self._fitted_at):
                self._factors = fit_latent_rgb_factors(self._sd.vae, seen[None])
                self._sd._networks.release("vae")
                self._fitted_at = index
            return images.linear_preview(seen, self._factors, self._size)

        return preview


# Steps -------------------------------------------------------------------------------------------


def _evaluated(
    sampler: Generator[Step, Any, None],
    blend: Callable[[Step], mx.array] | None,
    ahead: int,
) -> Generator[Step, None, None]:
    """The sampler's steps, blended and evaluated; the device may be ``ahead`` of the caller."""
    running: deque[Step] = deque()
    with closing(sampler):
        step = next(sampler, None)
        while step is not None:
            if blend is not None:
                step = Step(step.index, blend(step), step.denoised)
            if ahead:
                mx.async_eval(step.latents, step.denoised)
            running.append(step)
            if len(running) > ahead:
                yield _waited(running.popleft())
            try:
                step = sampler.send(step.latents)
            except StopIteration:
                step = None
    while running:
        yield _waited(running.popleft())


def _waited(step: Step) -> Step:
    mx.eval(step.latents, step.denoised)
    return step


class _Outside:
    """Outside the mask stands the picture, noised to the level of each moment.

    That is all a network without a mask channel needs: samplers work on each number by itself, so
    what it sees outside decides how the inside goes on. The noise is the starting noise every time,
    and the last step leaves the clean latents. Some samplers call the network again within a step;
    it sees the picture there too. All of it as in diffusers' inpainting with a 4-channel UNet, but
    that diffusers' KDPM2 (dpm2) takes the wrong level within a step.
    """

    def __init__(self, plan: Plan, inside: mx.array, noise: mx.array, clean: mx.array) -> None:
        self._plan = plan
        self._inside = inside
        self._noise = noise
        self._clean = clean
        self._is_within_a_step = False
        self._sigmas: dict[float, float] = {}
        if isinstance(plan.grid, SigmaGrid):
            self._sigmas = dict(zip(plan.grid.timesteps, plan.grid.sigmas, strict=False))

    def kept(self, step: Step) -> mx.array:
        """The latents to go on from after a step."""
        self._is_within_a_step = False
        known = self._plan.noised(self._clean, self._noise, step.index)
        return mx.where(self._inside, step.latents, known)

    def watched(self, model: Model) -> Model:
        """The model, seeing the picture in calls within a step too."""

        def call(latents: mx.array, timestep: float) -> mx.array:
            if self._is_within_a_step:
                known = self._at(timestep)
                latents = mx.where(self._inside, latents, known)
            self._is_within_a_step = True
            return model(latents, timestep)

        return call

    def _at(self, timestep: float) -> mx.array:
        """The picture at a timestep's level, in the network's scale of unit variance."""
        sigma = self._sigmas.get(timestep)
        if sigma is None:  # a level between the plan's own
            sigma = float(self._plan.grid.schedule.sigma_at(np.array(timestep)))
        return (self._clean + sigma * self._noise) / math.sqrt(1 + sigma**2)


def _start(
    job: _Job, posterior: tuple[mx.array, mx.array] | None
) -> tuple[mx.array, mx.array | None, StepNoise]:
    """Starting noise (n, h, w, C), the picture's latents likewise or None, the steps' noise."""
    streams = [_Streams(settings, job.shape[1:]) for settings in job.settings]
    noise = np.stack([stream.initial for stream in streams])
    clean = None
    if posterior is not None:
        mean, std = posterior
        clean = mean if job.is_second else mx.repeat(mean, job.count, 0)
        if job.settings[0].sample_posterior:
            clean = clean + std * mx.array(np.stack([stream.posterior for stream in streams]))

    def draw(index: int, shape: tuple[int, ...]) -> FloatArray:
        return np.stack([stream.steps.normal(shape[1:]) for stream in streams])

    return (
        mx.array(noise if job.latents is None else job.latents),
        clean,
        draw if job.step_noise is None else job.step_noise,
    )


class _Streams:
    """One picture's random numbers: for the posterior, for the start, and what the steps draw."""

    def __init__(self, settings: Settings, shape: tuple[int, int, int]) -> None:
        kind, seed = settings.noise, settings.seed
        assert kind is not None and seed is not None
        if settings.sample_posterior:  # diffusers' order: one stream for all
            self.steps = noise_generator(kind, seed)
            self.posterior = self.steps.normal(shape)
            self.initial = self.steps.normal(shape)
            return
        self.posterior = np.zeros(shape, np.float32)
        self.initial = initial_noise(
            kind,
            seed,
            shape,
            variation_seed=settings.variation_seed or 0,
            variation_strength=settings.variation_strength,
        )
        self.steps = step_noise_generator(kind, seed, shape, ensd=settings.ensd)


class _Clock:
    """Seconds by part of the work; what passes in the caller's hands does not count."""

    def __init__(self) -> None:
        self._parts: dict[str, float] = {}
        self._steps: list[float] = []
        self._elapsed = 0.0  # own time until the clock was last looked at
        self._since = time.perf_counter()
        self._last_mark = self._last_step = 0.0

    def away(self, progress: Progress) -> Iterator[Progress]:
        """Hand ``progress`` to the caller, and let no time pass until the answer."""
        self._own()
        yield progress
        self._since = time.perf_counter()

    def mark(self, part: str) -> None:
        """``part`` ends here, and the next one begins."""
        now = self._own()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last_mark
        self._last_mark = self._last_step = now

    def step(self) -> None:
        """A step ends here."""
        now = self._own()
        self._steps.append(now - self._last_step)
        self._last_step = now

    @property
    def seconds_per_step(self) -> float:
        """The mean; the first step also warms up, and counts only while it is alone."""
        steps = self._steps[1:] or self._steps
        return sum(steps) / len(steps) if steps else 0.0

    def timings(self) -> dict[str, float]:
        """Each part, the step and the total."""
        return {**self._parts, "step": self.seconds_per_step, "total": sum(self._parts.values())}

    def _own(self) -> float:
        now = time.perf_counter()
        self._elapsed += now - self._since
        self._since = now
        return self._elapsed


# Small helpers -----------------------------------------------------------------------------------


def _seeded(settings: Settings, count: int) -> list[Settings]:
    """Each picture's settings. With a variation the seed stays and the variation's counts up."""
    name = "variation_seed" if settings.variation_strength else "seed"
    first = getattr(settings, name)
    return [replace(settings, **{name: _whole(name, first + i)}) for i in range(count)]


def _whole(name: str, value: Any) -> int:
    return int(check_number(name, value))


def _texts(prompts: Iterable[Prompt]) -> set[str]:
    """All forms that prompts take."""
    return {phase.text for prompt in prompts for part in prompt.parts for phase in part.phases}


def _one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}: choose from {', '.join(choices)}.")
    return value


def _step_noise(step_noise: Any, plan: Plan, shape: tuple[int, ...]) -> StepNoise:
    """The steps' noise that was given, as a callable that checks what it hands on."""
    if callable(step_noise):
        return lambda i, shape: _array("step_noise", step_noise(i, shape), shape)
    found = np.shape(step_noise)
    steps = max(plan.draws, found[0] if found else 0)
    noise = _array("step_noise", step_noise, (steps, *shape))
    return lambda i, shape: noise[i]


def _array(name: str, values: Any, shape: tuple[int, ...]) -> FloatArray:
    """A caller's array as float32 of ``shape``; numpy's, MLX's or nested lists."""
    if isinstance(values, mx.array):
        values = np.array(values.astype(mx.float32))
    try:
        array = np.asarray(values, np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be an array of numbers of shape {shape}.") from None
    if array.shape != shape:
        is_nchw = array.shape == (*shape[:-3], shape[-1], *shape[-3:-1])
        hint = " It looks like NCHW: move axis 1 last." if is_nchw else ""
        raise ValueError(f"{name} must have the shape {shape}, got {array.shape}.{hint}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite numbers; there is NaN or infinity among them.")
    return array


def _fault(pixels: FloatArray) -> str:
    """What is wrong with decoded pixels: "as NaN", "black", or nothing."""
    if not np.isfinite(pixels).all():
        return "as NaN"
    brightest = np.full((1, 1, 3), pixels.max(), np.float32)
    return "black" if not images.to_image(brightest).getbbox() else ""


@contextmanager
def _in_float32(module: nn.Module) -> Iterator[None]:
    """The module with its weights in float32 for a while."""
    kept = module.parameters()
    module.update(tree_map(lambda weight: weight.astype(mx.float32), kept))
    try:
        yield
    finally:
        module.update(kept)


def _said(pair: tuple[int, int] | None, between: str) -> str | None:
    return None if pair is None else between.join(map(str, pair))


def _repeated(arrays: Sequence[mx.array | None], count: int) -> list[mx.array | None]:
    """Each array, where there is one, ``count`` times along its first axis."""
    return [None if array is None else mx.repeat(array, count, 0) for array in arrays]


def _on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu


def _weights(module: nn.Module) -> list[mx.array]:
    found = tree_flatten(module.parameters())
    assert isinstance(found, list)
    return [weight for _, weight in found]


def _dtype(module: nn.Module) -> mx.Dtype:
    """What a module computes in."""
    return next(w.dtype for w in _weights(module) if mx.issubdtype(w.dtype, mx.floating))


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def _component(module: nn.Module) -> Component:
    weights = _weights(module)
    return Component(
        parameters=quantize.parameter_count(module),
        bytes=sum(weight.nbytes for weight in weights),
        dtype=_name(_dtype(module)),
        bits=quantize.bits_of(module),
    )
