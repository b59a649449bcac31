"""Pictures as prompts against diffusers and transformers, live, on identical weights.

CLIP's image encoder and what it is shown; each projection of an adapter, from the original's names
as diffusers reads them; the UNet that looks at pictures; and whole drawings by ``load_ip_adapter``.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import network_parity as parity
import numpy as np
import picture_parity as pictures
import pytest
import recipe
import reference
import torch
from network_parity import NETWORK
from PIL import Image
from safetensors.numpy import save_file
from test_families_parity import NOISE, Models, our_drawing, their_drawing
from transformers import CLIPVisionConfig as TorchConfig
from transformers import CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import mlx_maple
from maple_convert import open_model
from mlx_maple.drawing import denoise
from mlx_maple.engine.kernels import Plain
from mlx_maple.engine.prepare import Recipe, prepare_unet
from mlx_maple.image_prompt import clip_pixels
from mlx_maple.models import (
    CLIPVisionConfig,
    CLIPVisionEncoder,
    ImageStates,
    IPAdapter,
    IPAdapterConfig,
    UNet,
    UNetConfig,
    clip,
)
from mlx_maple.models.unet import attention_channels

sys.path.insert(0, str(Path(__file__).parents[1]))
import ip_adapters

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

UNET = recipe.UNET
WIDTHS = list(attention_channels(UNetConfig(**UNET)))
RESAMPLER = {"num_layers": 4, "num_attention_heads": 2}  # diffusers builds four layers, always


@pytest.fixture(scope="module", autouse=True)
def no_gradients():
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(True)


def photo(width: int, height: int) -> Image.Image:
    return pictures.photo().resize((width, height))


# What looks at pictures ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def looking(tmp_path_factory):
    """transformers' encoder, saved as it saves itself, and the folder."""
    torch.manual_seed(1)
    place = tmp_path_factory.mktemp("encoder") / "image_encoder"
    theirs = CLIPVisionModelWithProjection(TorchConfig(**ip_adapters.ENCODER)).eval()
    for name, values in theirs.named_parameters():  # its own start is too quiet to tell
        if values.ndim > 1 and "embedding" not in name:
            values.copy_(torch.randn(values.shape) / values[0].numel() ** 0.5)
    theirs.save_pretrained(place)
    return theirs, place


def encoder(place: Path) -> CLIPVisionEncoder:
    with open_model(place) as model:
        part = model.components["image_encoder"]
        ours = CLIPVisionEncoder(CLIPVisionConfig(**part.config))
        ours.load_weights([(name, mx.array(t.array)) for name, t in part.tensors()])
    return ours


@pytest.fixture(scope="module")
def shown() -> np.ndarray:
    return np.stack([clip_pixels(photo(*size), 16) for size in ((20, 33), (64, 64))])


def test_an_image_encoder(looking, shown, parity_record, monkeypatch):
    theirs, place = looking
    found = theirs(reference.nchw(shown), output_hidden_states=True)
    expected = {"penultimate": found.hidden_states[-2], "projected": found.image_embeds}
    ours = encoder(place)
    for name, states in expected.items():
        made = getattr(ours(mx.array(shown)), name)
        parity.compare(parity_record, f"image encoder: {name}", made, states.numpy(), NETWORK)
    penultimate = expected["penultimate"].numpy()

    def broken(name: str) -> None:
        made = ours(mx.array(shown)).penultimate
        parity.control(parity_record, name, made, penultimate, NETWORK)

    with monkeypatch.context() as patch:
        patch.setitem(clip.ACTIVATIONS, "gelu", clip.quick_gelu)
        broken("image encoder, GELU by sigmoid")
    with monkeypatch.context() as patch:
        for layer in ours.encoder.layers:
            patch.setattr(layer.self_attn, "mask", "causal")
        broken("image encoder, patches see those before them")
    parity.set_weight(ours, "pre_layernorm.weight", lambda weight: 1.001 * weight)
    broken("image encoder, a norm off by a thousandth")


@pytest.mark.parametrize("size", [(300, 200), (90, 224), (224, 224), (37, 41)])
def test_what_clip_is_shown(size, parity_record):
    image = photo(*size)
    wanted = CLIPImageProcessorPil()(image, return_tensors="np")["pixel_values"][0]
    ours = clip_pixels(image, 224)
    error = float(np.abs(ours - wanted.transpose(1, 2, 0)).max())
    parity_record(f"CLIP's pixels of {size[0]}x{size[1]}", max_error=error, bar="<= 1e-6")
    assert error <= 1e-6
    other = clip_pixels(image.resize((224, 224)), 224)  # without its proportions
    if size[0] != size[1]:
        assert np.abs(other - wanted.transpose(1, 2, 0)).max() > 1e-2


# What adapters make of it -------------------------------------------------------------------------


def config(kind: str, **changes: Any) -> dict[str, Any]:
    found = {**ip_adapters.KINDS[kind], "cross_attention_dim": UNET["cross_attention_dim"]}
    found |= {"channels": WIDTHS, **(RESAMPLER if kind == "resampler" else {}), **changes}
    return found


def adapter(path: Path, settings: dict[str, Any], seed: int = 3) -> tuple[IPAdapter, dict]:
    """Ours, read from a file, and what diffusers is given: the file's two dictionaries."""
    state = ip_adapters.state("ip_adapter", settings, "original", seed)
    save_file(state, path)
    with open_model(path) as model:
        part = model.components["ip_adapter"]
        assert part.config == settings
        ours = IPAdapter(IPAdapterConfig(**part.config))
        ours.load_weights([(name, mx.array(t.array)) for name, t in part.tensors()])
    nested = ip_adapters.nested(state)
    theirs = {p: {n: torch.from_numpy(v) for n, v in t.items()} for p, t in nested.items()}
    return ours, theirs


def states(count: int = 2) -> ImageStates:
    random = np.random.default_rng(8)
    encoder = ip_adapters.ENCODER
    tokens = (encoder["image_size"] // encoder["patch_size"]) ** 2 + 1
    made = ((count, tokens, encoder["hidden_size"]), (count, encoder["projection_dim"]))
    return ImageStates(*(mx.array(random.standard_normal(shape, np.float32)) for shape in made))


@pytest.mark.parametrize("kind", ip_adapters.KINDS)
def test_a_projection(kind, parity_record, tmp_path):
    ours, theirs = adapter(tmp_path / "a.safetensors", config(kind))
    unet = reference.unet(UNET)
    projection = unet._convert_ip_adapter_image_proj_to_diffusers(theirs["image_proj"])
    seen = states()
    read = seen.penultimate if ours.sees_patches else seen.projected
    expected = projection(torch.from_numpy(np.array(read))).numpy()
    found = ours.prompt(seen)
    parity.compare(parity_record, f"IP-Adapter, {kind}: tokens", found, expected, NETWORK)
    if kind == "resampler":
        for layer in ours.image_proj.layers:
            layer.norm1, layer.norm2 = layer.norm2, layer.norm1
        name = "IP-Adapter, resampler: norms of questions and picture for one another"
        parity.control(parity_record, name, ours.prompt(seen), expected, NETWORK)


def their_unet(adapters: list[dict], scales: list[float], seen: list[ImageStates], context):
    """diffusers' UNet with adapters, the pictures of each looked at together."""
    unet = reference.unet(UNET)
    unet._load_ip_adapter_weights(adapters)
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = scales
    read = [
        torch.from_numpy(
            np.array(s.projected if "proj.weight" in a["image_proj"] else s.penultimate)
        )
        for a, s in zip(adapters, seen, strict=True)
    ]
    # One batch of two drawings, each with all of the pictures.
    told = {"image_embeds": [each[None].repeat(2, *[1] * each.ndim) for each in read]}
    latents = reference.nchw(recipe.inputs()["latents"])
    times = torch.from_numpy(recipe.inputs()["timesteps"])
    return reference.nhwc(
        unet(latents, times, torch.from_numpy(context), added_cond_kwargs=told)[0]
    )


def test_a_unet_that_looks_at_pictures(parity_record, tmp_path):
    """Two adapters with scales of their own; the second has two pictures."""
    made = [
        adapter(tmp_path / f"{kind}.safetensors", config(kind)) for kind in ("linear", "resampler")
    ]
    seen, scales = [states(1), states(2)], [0.7, 0.4]
    inputs = recipe.inputs()
    expected = their_unet([theirs for _, theirs in made], scales, seen, inputs["context"])
    plain = parity.fill(UNet(UNetConfig(**UNET)))
    ready = prepare_unet(plain, Recipe("cpu", Plain()))

    def told(change: Callable[[list], list] = lambda layers: layers, scales=scales) -> list:
        found = []
        for (ours, _), states, scale in zip(made, seen, scales, strict=True):
            tokens = ours.prompt(states)
            tokens = mx.repeat(tokens.reshape(1, -1, tokens.shape[-1]), 2, 0)
            found.append(change(ours.keys_values(tokens, plain.config, scale)))
        return found

    def predict(image: list, unet: Any = plain) -> mx.array:
        given = (inputs["latents"], inputs["timesteps"], inputs["context"])
        return unet(*map(mx.array, given), image=image)

    label = "UNet with IP-Adapters"
    for name, unet in {"plain": plain, "made ready": ready}.items():
        parity.compare(parity_record, f"{label}, {name}", predict(told(), unet), expected, NETWORK)

    def broken(name: str, image: list) -> None:
        parity.control(parity_record, f"{label}, {name}", predict(image), expected, NETWORK)

    broken("scales swapped", told(scales=[0.4, 0.7]))
    broken("two layers swapped", told(lambda layers: [layers[-1], *layers[1:-1], layers[0]]))
    broken(
        "keys for values", told(lambda layers: [mx.roll(x, x.shape[-1] // 2, -1) for x in layers])
    )


# Drawings -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("models"))


CASES = {"sd2": "resampler", "sdxl": "linear"}


@pytest.mark.parametrize("family", CASES)
def test_a_drawing(family, models, looking, parity_record, monkeypatch):
    """Guided, with two pictures for one adapter."""
    place, kind = looking[1].parent, CASES[family]
    unet = models.ours(family).configs["unet"]
    changes = {"cross_attention_dim": unet.cross_attention_dim}
    settings = config(kind, **changes, channels=list(attention_channels(unet)))
    path = place / f"{family}.safetensors"
    save_file(ip_adapters.state("ip_adapter", settings, "original"), path)
    noise = np.random.default_rng(7).integers(0, 256, (64, 40, 3), np.uint8)
    photos = [photo(128, 96), Image.fromarray(noise)]

    pipe = models.theirs(family)
    pipe.load_ip_adapter(str(place), subfolder="", weight_name=path.name)
    pipe.feature_extractor = CLIPImageProcessorPil(size=16, crop_size=16)
    pipe.set_ip_adapter_scale(0.6)
    expected = their_drawing(pipe, NOISE, ip_adapter_image=[photos], num_inference_steps=3)
    pipe.unload_ip_adapter()

    sd = mlx_maple.load(models.file(family), dtype="float32", cache=False, ip_adapter=path)
    draw = {"steps": 3, "ip_image": photos, "ip_scale": 0.6}
    result = our_drawing(sd, NOISE, **draw)
    pictures.compare(parity_record, f"{family}: prompted with pictures, {kind}", result, *expected)

    def broken(name: str, **change: Any) -> None:
        found = pictures.figures(our_drawing(sd, NOISE, **{**draw, **change}), *expected)
        parity_record(f"control: {family} with pictures, {name}", **found, bar="must miss one")
        assert not pictures.passes(found), name

    for name, change in {
        "another scale": {"ip_scale": 0.5},
        "one of the pictures": {"ip_image": photos[0]},
        "up to two thirds of the steps": {"ip_end": 0.67},
    }.items():
        broken(name, **change)
    made = denoise.image_prompt

    def seen_by_both(*given: Any) -> Any:
        prompt = made(*given)
        return replace(prompt, avoided=prompt.wanted)

    monkeypatch.setattr(denoise, "image_prompt", seen_by_both)
    broken("seen beside what is avoided, too")
