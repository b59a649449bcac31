"""SD 2.x, SDXL, its refiner and distilled networks beside diffusers' own pipelines, live.

Every family is a file in CompVis names with random weights at small widths. Ours is read from that
file; diffusers' pipeline from the folder that the converter makes of it. Text states, the UNet's
output with all that it is told, and whole drawings are compared; each control breaks one thing that
ports of these families get wrong, and must miss the bar.
"""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import mlx.core as mx
import network_parity as parity
import numpy as np
import picture_parity as pictures
import pytest
import recipe
import torch
from diffusers.loaders import single_file_utils
from mlx.utils import tree_map
from network_parity import NETWORK
from safetensors.numpy import save_file

import mlx_maple
from maple_convert import convert
from maple_convert.layouts import LAYOUTS, NATIVE
from mlx_maple.drawing import autoencode
from mlx_maple.pipeline import StableDiffusion
from mlx_maple.sizes import Sizes, with_vector, zeroed
from mlx_maple.text.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))
import families
import tiny

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

PROMPT, NEGATIVE = "a blue maple leaf on a yellow background", "a red rocket"
VAE = {"block_out_channels": [32, 32, 32, 32]}  # an eighth, as published
SIZE = {"width": 128, "height": 64}
TOKENS = {"vocab_size": 49408, "eos_token_id": 49407}
SEEN = (999.0, 500.25, 20.0)
LOUD = "-loud"


def configs(family: str) -> dict[str, dict[str, Any]]:
    """A family's tiny settings with CLIP's whole vocabulary and an autoencoder of an eighth."""
    more = {"text_encoder": TOKENS, "text_encoder_2": TOKENS, "vae": VAE, "unet": {}}
    return {name: {**c, **more[name]} for name, c in families.FAMILIES[family].items()}


def state_of(family: str, *, loud: bool = False) -> tiny.Arrays:
    """A whole random model in CompVis names; a loud one's autoencoder overflows float16."""
    state: tiny.Arrays = {}
    for name, config in configs(family).items():
        rows = LAYOUTS[name].rows(config, NATIVE)
        arrays = {row.native: recipe.value(row.native, row.native_shape) for row in rows}
        if loud and name == "vae":
            arrays = recipe.louder_autoencoder(arrays)
        state |= tiny.published(name, config, arrays, *families.spelling(family, name))
    if family == "sd2":
        state["v_pred"] = np.zeros(0, np.float32)
    return state


class Models:
    """Ours and diffusers' of each family, made when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ours: dict[tuple[object, ...], StableDiffusion] = {}
        self._theirs: dict[str, Any] = {}
        words, bundled = folder / "words", Tokenizer.bundled()
        words.mkdir()
        (words / "vocab.json").write_text(json.dumps(bundled._vocab), "utf-8")
        merges = ["#version: 0.2", *bundled._ranks]
        (words / "merges.txt").write_text("\n".join(merges) + "\n", "utf-8")
        self.words = {"vocab": words / "vocab.json", "merges": words / "merges.txt"}

    def file(self, family: str) -> Path:
        path = self._folder / f"{family}.safetensors"
        if not path.exists():
            save_file(state_of(family.removesuffix(LOUD), loud=family.endswith(LOUD)), path)
        return path

    def ours(self, family: str, dtype: str = "float32", **how: Any) -> StableDiffusion:
        key = family, dtype, *how.items()
        if key not in self._ours:
            self._ours[key] = mlx_maple.load(self.file(family), dtype=dtype, cache=False, **how)
        return self._ours[key]

    def theirs(self, family: str) -> Any:
        if family not in self._theirs:
            out = self._folder / family
            convert(self.file(family), out, to="diffusers", tokenizer=self.words)
            pipe = diffusers.DiffusionPipeline.from_pretrained(out, torch_dtype=torch.float32)
            pipe.set_progress_bar_config(disable=True)
            self._theirs[family] = pipe
        return self._theirs[family]


@pytest.fixture(scope="module")
def models(family_models) -> Models:
    torch.set_grad_enabled(False)
    yield family_models
    torch.set_grad_enabled(True)


# Text ------------------------------------------------------------------------------------------


def their_text(pipe: Any, prompt: str | None) -> dict[str, np.ndarray]:
    """diffusers' states of a prompt; of a negative prompt that is None, its zeros."""
    if not hasattr(pipe, "tokenizer_2"):
        return {"context": pipe.encode_prompt(prompt, "cpu", 1, False)[0].numpy()}
    if prompt is None:
        found = pipe.encode_prompt("a")[1::2]
    else:
        found = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)[0::2]
    return {name: states.numpy() for name, states in zip(("context", "pooled"), found, strict=True)}


def our_text(sd: StableDiffusion, text: str) -> dict[str, mx.array]:
    made = sd.text_encoders.encode(sd.text_encoders.tokenize(text))
    found = {"context": made.context, "pooled": made.pooled}
    return {name: states for name, states in found.items() if states is not None}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_text(family, models, parity_record):
    for text in (PROMPT, ""):
        expected = their_text(models.theirs(family), text)
        ours = our_text(models.ours(family), text)
        assert ours.keys() == expected.keys()
        for name, states in ours.items():
            label = f"{family}: {name} of {text[:6]!r}"
            parity.compare(parity_record, label, states, expected[name], NETWORK)


def test_zeros_for_no_negative_prompt(models, parity_record):
    expected = their_text(models.theirs("sdxl"), None)
    sd = models.ours("sdxl")
    ours = zeroed(sd.text_encoders.encode(sd.text_encoders.tokenize("")))
    assert np.array_equal(np.array(ours.context), expected["context"])
    assert ours.pooled is not None and np.array_equal(np.array(ours.pooled), expected["pooled"])
    assert not expected["context"].any()


def padded_with_the_end(sd: StableDiffusion):
    return mock.patch.object(list(sd.text_encoders.tokenizers.values())[-1], "pad", 49407)


def normed(sd: StableDiffusion):
    return mock.patch.object(sd.text_encoders, "is_normed", not sd.text_encoders.is_normed)


def sigmoid_gelu(sd: StableDiffusion):
    from mlx_maple.models.clip import ACTIVATIONS

    return mock.patch.dict(ACTIVATIONS, {"gelu": ACTIVATIONS["quick_gelu"]})


TEXT_CONTROLS = {
    "padded with the end of text": padded_with_the_end,
    "another norm at the end": normed,
    "GELU by sigmoid": sigmoid_gelu,
}


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
@pytest.mark.parametrize("name", TEXT_CONTROLS)
def test_broken_text_is_seen(family, name, models, parity_record):
    sd = models.ours(family)
    expected = their_text(models.theirs(family), PROMPT)["context"]
    with TEXT_CONTROLS[name](sd):
        ours = our_text(sd, PROMPT)["context"]
    parity.control(parity_record, f"{family}: {name}", ours, expected, NETWORK)


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_openclip_is_split_as_diffusers_splits_it(family, models):
    """diffusers' own reading of the file's packed and transposed tensors, array by array."""
    part = {"sd2": "text_encoder", "sdxl": "text_encoder_2"}[family]
    pipe, state = models.theirs(family), state_of(family)
    prefix = families.spelling(family, part)[1]
    theirs = single_file_utils.convert_open_clip_checkpoint(
        getattr(pipe, part),
        {key: torch.from_numpy(np.asarray(value)) for key, value in state.items()},
        prefix,
    )
    ours = getattr(pipe, part).state_dict()  # from the folder that our converter wrote
    assert len(theirs) > 30
    for name, values in theirs.items():
        name = name if name in ours else name.removeprefix("text_model.")
        assert torch.equal(ours[name], values), name


# UNet ------------------------------------------------------------------------------------------


def their_numbers(pipe: Any, sizes: Sizes, family: str) -> torch.Tensor:
    """diffusers' own time ids: (1, 6), or (1, 5) of the refiner."""
    original, crop, target = (
        pair[::-1] for pair in (sizes.original or (0, 0), sizes.crop, sizes.target or (0, 0))
    )
    arguments: list[Any] = [original, crop, target]
    if family == "sdxl-refiner":
        arguments += [sizes.score, sizes.negative_score, original, crop, target]
    pooled = pipe.text_encoder_2.config.projection_dim
    found = pipe._get_add_time_ids(
        *arguments, dtype=torch.float32, text_encoder_projection_dim=pooled
    )
    return found[0] if isinstance(found, tuple) else found


TOLD = Sizes(original=(640, 480), crop=(16, 8), target=(1024, 768), score=5.5)


def inputs(config: Any, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(4)
    latents = random.standard_normal((1, *size, config.in_channels), np.float32)
    context = random.standard_normal((1, 77, config.cross_attention_dim), np.float32)
    return latents, context


def their_unet(pipe: Any, family: str, latents, t: float, context, pooled) -> np.ndarray:
    told = None
    if family.startswith("sdxl"):
        numbers = their_numbers(pipe, TOLD, family)
        told = {"text_embeds": torch.from_numpy(pooled), "time_ids": numbers}
    out = pipe.unet(
        pictures.nchw(latents), torch.tensor(t), torch.from_numpy(context), added_cond_kwargs=told
    )
    return np.moveaxis(out.sample.numpy(), 1, -1)


def our_unet(sd: StableDiffusion, latents, t: float, context, pooled, sizes=TOLD) -> mx.array:
    made = sd.text_encoders.encode(sd.text_encoders.tokenize(""))
    made = replace(made, context=mx.array(context), pooled=mx.array(pooled))
    if (channels := sd.configs["unet"].vector_channels) is not None:
        made = with_vector(made, sizes.numbers((1024, 768), sd.info.family), channels)
    return sd.unet(mx.array(latents), t, made.context, made.vector)


POOLED = np.random.default_rng(5).standard_normal((1, 40), np.float32)


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("size", [(8, 16), (9, 13)], ids=["8x16", "9x13"])
def test_unet(family, size, models, parity_record):
    sd, pipe = models.ours(family), models.theirs(family)
    latents, context = inputs(sd.configs["unet"], size)
    for t in SEEN:
        expected = their_unet(pipe, family, latents, t, context, POOLED)
        ours = our_unet(sd, latents, t, context, POOLED)
        label = f"{family}: UNet t={t:g}, {size[0]}x{size[1]}"
        parity.compare(parity_record, label, ours, expected, NETWORK)


SIZE_CONTROLS = {
    "widths before heights": replace(TOLD, original=(480, 640), target=(768, 1024)),
    "top before left": replace(TOLD, crop=(8, 16)),
    "target before original": replace(TOLD, original=(1024, 768), target=(640, 480)),
}


@pytest.mark.parametrize("name", SIZE_CONTROLS)
def test_wrong_sizes_are_seen(name, models, parity_record):
    sd, pipe = models.ours("sdxl"), models.theirs("sdxl")
    latents, context = inputs(sd.configs["unet"], (8, 16))
    expected = their_unet(pipe, "sdxl", latents, 500.0, context, POOLED)
    ours = our_unet(sd, latents, 500.0, context, POOLED, SIZE_CONTROLS[name])
    parity.control(parity_record, f"sdxl: {name}", ours, expected, NETWORK)


# Whole drawings ---------------------------------------------------------------------------------


def their_drawing(pipe: Any, noise: np.ndarray, **more: Any) -> tuple[np.ndarray, list]:
    """diffusers' final latents and its pictures of them."""
    arguments = {"num_inference_steps": 6, "guidance_scale": 5.0, "negative_prompt": NEGATIVE}
    latents = pipe(
        PROMPT, latents=pictures.nchw(noise), output_type="latent", **{**arguments, **SIZE, **more}
    ).images
    return np.moveaxis(latents.numpy(), 1, -1), pictures.decoded(pipe, latents)


def our_drawing(sd: StableDiffusion, noise: np.ndarray, **more: Any):
    arguments = {"steps": 6, "guidance_scale": 5.0, "negative_prompt": NEGATIVE, "sampler": "ddim"}
    arguments |= {"schedule": "leading", **SIZE}
    return sd(PROMPT, latents=noise, **{**arguments, **more})


NOISE = pictures.unit_noise(3, height=8, width=16)


@pytest.mark.parametrize("family", ["sd2", "sdxl", "sdxl-distilled", "sd1-distilled"])
def test_a_drawing(family, models, parity_record):
    expected = their_drawing(models.theirs(family), NOISE)
    result = our_drawing(models.ours(family), NOISE)
    pictures.compare(parity_record, f"{family}: a drawing", result, *expected)


def test_a_drawing_of_given_sizes(models, parity_record):
    """Heights come first in diffusers' pairs, widths in ours."""
    expected = their_drawing(
        models.theirs("sdxl"),
        NOISE,
        original_size=(480, 640),
        crops_coords_top_left=(8, 16),
        target_size=(768, 1024),
        negative_original_size=(480, 640),
        negative_crops_coords_top_left=(8, 16),
        negative_target_size=(768, 1024),
        negative_prompt=None,
    )
    sd, told = models.ours("sdxl"), {"original_size": (640, 480), "crop": (16, 8)}
    told["target_size"] = "1024x768"
    result = our_drawing(sd, NOISE, negative_prompt=None, **told)
    pictures.compare(parity_record, "sdxl: a drawing of given sizes", result, *expected)
    for name, changed in {
        "its own sizes": {"original_size": None},
        "an encoded empty negative prompt": {"negative_prompt": ""},
    }.items():
        result = our_drawing(sd, NOISE, **{"negative_prompt": None, **told, **changed})
        found = pictures.figures(result, *expected)
        parity_record(f"control: sdxl, {name}", **found, bar="must miss one")
        assert not pictures.passes(found), name


def test_noise_taken_for_velocity_is_seen(models, parity_record):
    expected = their_drawing(models.theirs("sd2"), NOISE)
    sd = mlx_maple.load(models.file("sd2"), dtype="float32", cache=False, prediction="epsilon")
    found = pictures.figures(our_drawing(sd, NOISE), *expected)
    parity_record("control: sd2, epsilon for v", **found, bar="must miss one")
    assert not pictures.passes(found)


def refined(
    models: Models, start: float, negative: str | None = NEGATIVE
) -> tuple[np.ndarray, list]:
    """diffusers' base up to ``start``, then its refiner."""
    base, refiner = models.theirs("sdxl"), models.theirs("sdxl-refiner")
    steps = {"num_inference_steps": 6, "guidance_scale": 5.0, "negative_prompt": negative}
    begun = base(
        PROMPT,
        latents=pictures.nchw(NOISE),
        output_type="latent",
        denoising_end=start,
        **steps,
        **SIZE,
    ).images
    told = {"target_size": (64, 128), "original_size": (64, 128)}
    latents = refiner(
        PROMPT, image=begun, denoising_start=start, output_type="latent", **steps, **told
    ).images
    return np.moveaxis(latents.numpy(), 1, -1), pictures.decoded(refiner, latents)


def test_a_drawing_that_is_refined(models, parity_record):
    sd, refiner = models.ours("sdxl"), models.ours("sdxl-refiner")
    expected = refined(models, 0.5)

    def drawn(**more: Any):
        return our_drawing(sd, NOISE, refiner=refiner, **{"refiner_start": 0.5, **more})

    pictures.compare(parity_record, "sdxl: refined from 0.5 on", drawn(), *expected)
    unguarded = refined(models, 0.5, None)
    result = drawn(negative_prompt=None)
    pictures.compare(parity_record, "sdxl: refined, avoiding nothing", result, *unguarded)
    breaks: dict[str, Callable[[], Any]] = {
        "refined a step later": lambda: drawn(refiner_start=0.67),
        "not refined": lambda: drawn(refiner_start=1.0),
        "one score for both prompts": lambda: drawn(negative_aesthetic_score=6.0),
    }
    for name, draw in breaks.items():
        found = pictures.figures(draw(), *expected)
        parity_record(f"control: sdxl, {name}", **found, bar="must miss one")
        assert not pictures.passes(found), name


# Half precision ---------------------------------------------------------------------------------

# bfloat16 has 8 digits where float16 has 11: it is shown for the families that many draw with.
HALVES = {"float16": (parity.FP16_COSINE, list(families.FAMILIES)), "bfloat16": (0.999, ["sdxl"])}
IMAGE = np.asarray(pictures.photo().resize((64, 32)), np.float32)[None] / 127.5 - 1


def in_half(record: Any, name: str, ours: mx.array, expected: np.ndarray, bar: float) -> None:
    found = parity.figures(ours, expected)
    record(name, **found, bar=f"cosine >= {bar}")
    assert found["cosine"] >= bar, f"{name}: {found}"


@pytest.mark.parametrize(
    "dtype, family", [(dtype, family) for dtype, (_, some) in HALVES.items() for family in some]
)
def test_half_precision(family, dtype, models, parity_record):
    """Every network as a user's file gives it, beside diffusers' in float32."""
    sd, pipe, bar = models.ours(family, dtype), models.theirs(family), HALVES[dtype][0]
    assert sd.info.components["unet"].dtype == dtype
    latents, context = inputs(sd.configs["unet"], (4, 8))
    scale = pipe.vae.config.scaling_factor
    decoded = pipe.vae.decode(pictures.nchw(latents) / scale).sample.numpy()
    mean = pipe.vae.encode(pictures.nchw(IMAGE)).latent_dist.mean.numpy() * scale
    quantities = {
        "UNet": (
            our_unet(sd, latents, 500.25, context, POOLED),
            their_unet(pipe, family, latents, 500.25, context, POOLED),
        ),
        "decoded": (sd.vae.decode(mx.array(latents)), np.moveaxis(decoded, 1, -1)),
        "encoded": (sd.vae.encode(mx.array(IMAGE)).mean, np.moveaxis(mean, 1, -1)),
    }
    theirs = their_text(pipe, PROMPT)
    quantities |= {name: (ours, theirs[name]) for name, ours in our_text(sd, PROMPT).items()}
    for name, (ours, expected) in quantities.items():
        in_half(parity_record, f"{family}: {name}, {dtype}", ours, expected, bar)


def test_fewer_digits_are_seen(models, parity_record):
    """The control: with 4 digits of each weight, as 8-bit floats have, the bar is missed."""
    sd, pipe = models.ours("sdxl", "float16"), models.theirs("sdxl")
    latents, context = inputs(sd.configs["unet"], (4, 8))
    expected = their_unet(pipe, "sdxl", latents, 500.25, context, POOLED)
    kept = sd.unet.parameters()
    short = tree_map(lambda w: (w.view(mx.uint16) & 0xFF80).view(mx.float16), kept)
    try:
        sd.unet.update(short)
        found = parity.figures(our_unet(sd, latents, 500.25, context, POOLED), expected)
    finally:
        sd.unet.update(kept)
    parity_record("control: sdxl: UNet, 4 digits", **found, bar="must miss cosine >= 0.999")
    assert found["cosine"] < 0.999


@pytest.mark.parametrize("how", [{}, {"low_memory": True}], ids=["whole", "low-memory"])
@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_no_black_pictures(family, how, models, parity_record, monkeypatch):
    """An autoencoder whose feature maps leave float16, as SDXL's do, in a run in float16.

    SDXL's computes in float32 from the start; SD 2's is seen to overflow and then repeated.
    """
    sd, pipe = models.ours(family + LOUD, "float16", **how), models.theirs(family + LOUD)
    is_kept = family == "sdxl"
    assert (sd.dtype_of("unet"), sd.dtype_of("vae") == mx.float32) == (mx.float16, is_kept)
    for out in (sd.vae.decode(mx.array(NOISE[:, :4, :8])), sd.vae.encode(mx.array(IMAGE)).mean):
        assert bool(mx.isfinite(out).all()) == is_kept
    arguments = {"steps": 2, "width": 64, "height": 64, "sampler": "ddim", "seed": 3}
    arguments |= {"image": pictures.photo(), "strength": 0.5}
    result = sd(PROMPT, **arguments)
    decoded = pictures.decoded(pipe, pictures.nchw(result.latents))
    psnr = pictures.psnr(result.images[0], decoded[0])
    label = f"{family}: overflowing autoencoder{', low memory' if how else ''}"
    parity_record(label, psnr=psnr, notes=len(result.notes), bar="PSNR > 40 dB")
    assert psnr > pictures.PSNR and np.isfinite(result.latents).all()
    repeated = [
        "encoding the image overflowed float16: done in float32",
        "the picture was decoded as NaN in float16: done in float32",
    ]
    assert result.notes == ([] if is_kept else repeated)
    if not is_kept:  # the control: without the net
        monkeypatch.setattr(autoencode, "_in_float32", lambda module: nullcontext())
        notes: list[str] = []
        lost = autoencode.decode(sd, mx.array(result.latents), notes)
        assert lost.getbbox() is None and "there too" in notes[0]
