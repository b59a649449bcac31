"""What steers a UNet from outside, against diffusers, live, on identical weights.

ControlNets and the maps that they add, the features of T2I-Adapters, and the guidance scale that
latent consistency models are told.
"""

import mlx.core as mx
import network_parity as parity
import numpy as np
import pytest
import recipe
import reference
import torch
from diffusers.models.adapter import T2IAdapter as TorchAdapter
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from network_parity import NETWORK
from PIL import Image

from mlx_maple import preprocess
from mlx_maple.models import (
    ControlNet,
    ControlNetConfig,
    T2IAdapter,
    T2IAdapterConfig,
    UNet,
    UNetConfig,
    layers,
)

pytestmark = pytest.mark.parity

UNET = {**recipe.UNET, "block_out_channels": [16, 24, 16], "layers_per_block": 2}
HINT = {"hint_channels": 3, "hint_widths": [8, 12, 16, 20]}
CONTROL = {**UNET, **HINT}
TIMES = [20.5, 856.286]
ROWS, COLUMNS = 5, 6


def control_reference(config: dict) -> torch.nn.Module:
    """ControlNetModel of a native config."""
    facts = reference._tuples(config)
    depths, heads = facts.pop("transformer_layers"), facts.pop("num_attention_heads")
    middle = facts.pop("mid_transformer_layers")
    del facts["out_channels"]
    if (vector := facts.pop("vector_channels", None)) is not None:
        facts |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": vector,
        }
    return reference.fill(
        ControlNetModel(
            conditioning_channels=facts.pop("hint_channels"),
            conditioning_embedding_out_channels=facts.pop("hint_widths"),
            **facts,
            attention_head_dim=heads,
            transformer_layers_per_block=(*(depth or 1 for depth in depths[:-1]), middle),
            down_block_types=tuple(
                "CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths
            ),
        )
    )


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    random = np.random.default_rng(6)
    return {
        "latents": random.standard_normal((2, ROWS, COLUMNS, 4), np.float32),
        "context": random.standard_normal((2, 9, UNET["cross_attention_dim"]), np.float32),
        "hint": random.uniform(0, 1, (1, 8 * ROWS, 8 * COLUMNS, 3)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def expected(inputs) -> list[np.ndarray]:
    """The maps of diffusers' ControlNet, at a weight of 0.8."""
    with torch.no_grad():
        down, middle = control_reference(CONTROL)(
            reference.nchw(inputs["latents"]),
            torch.tensor(TIMES),
            torch.from_numpy(inputs["context"]),
            reference.nchw(np.repeat(inputs["hint"], 2, 0)),
            conditioning_scale=0.8,
            return_dict=False,
        )
    return [reference.nhwc(each) for each in (*down, middle)]


def maps(inputs, hint=None, weight: float = 0.8) -> list[mx.array]:
    net = parity.fill(ControlNet(ControlNetConfig(**CONTROL)))
    embedded = net.embed_hint(mx.array(inputs["hint"] if hint is None else hint))
    found = net(mx.array(inputs["latents"]), mx.array(TIMES), mx.array(inputs["context"]), embedded)
    return [weight * each for each in found]


def test_every_map_of_a_controlnet(inputs, expected, parity_record):
    ours = maps(inputs)
    assert len(ours) == len(expected) == 10
    for n, (found, wanted) in enumerate(zip(ours, expected, strict=True)):
        parity.compare(parity_record, f"ControlNet tiny, map {n}", found, wanted, NETWORK)


def test_every_map_of_an_sdxl_controlnet(inputs, parity_record):
    """No transformers on the finest level, deeper ones below, and a vector beside the time."""
    config = {
        **CONTROL,
        "transformer_layers": [0, 1, 2],
        "mid_transformer_layers": 2,
        "vector_channels": 8 + 6 * 4,
    }
    pooled = np.random.default_rng(9).standard_normal((2, 8), np.float32)
    sizes = np.array([[64, 48, 0, 8, 40, 48]] * 2, np.float32)
    with torch.no_grad():
        model = control_reference(config)
        down, middle = model(
            reference.nchw(inputs["latents"]),
            torch.tensor(TIMES),
            torch.from_numpy(inputs["context"]),
            reference.nchw(np.repeat(inputs["hint"], 2, 0)),
            added_cond_kwargs={
                "text_embeds": torch.from_numpy(pooled),
                "time_ids": torch.from_numpy(sizes),
            },
            return_dict=False,
        )
    waves = layers.sinusoids(mx.array(sizes.reshape(-1)), 4).reshape(2, -1)
    vector = mx.concatenate([mx.array(pooled), waves], axis=-1)
    net = parity.fill(ControlNet(ControlNetConfig(**config)))
    arrays = (mx.array(inputs["latents"]), mx.array(TIMES), mx.array(inputs["context"]))
    hint = net.embed_hint(mx.array(inputs["hint"]))
    found = net(*arrays, hint, vector)
    wanted = [reference.nhwc(each) for each in (*down, middle)]
    for n, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        parity.compare(parity_record, f"ControlNet of SDXL tiny, map {n}", ours, theirs, NETWORK)
    other = net(*arrays, hint, vector * 0.5)[-1]
    parity.control(parity_record, "ControlNet of SDXL, half the vector", other, wanted[-1], NETWORK)


@pytest.mark.parametrize("fault", ["hint in [-1, 1]", "hint BGR", "weight 1", "hint mirrored"])
def test_a_controlnet_misread_is_seen(inputs, expected, parity_record, fault):
    changes = {
        "hint in [-1, 1]": {"hint": inputs["hint"] * 2 - 1},
        "hint BGR": {"hint": inputs["hint"][..., ::-1].copy()},
        "hint mirrored": {"hint": inputs["hint"][:, :, ::-1].copy()},
        "weight 1": {"weight": 1.0},
    }
    ours = maps(inputs, **changes[fault])
    for n in (0, 9):
        name = f"ControlNet, {fault}, map {n}"
        parity.control(parity_record, name, ours[n], expected[n], NETWORK)


def predictions(model: torch.nn.Module, inputs, **added) -> np.ndarray:
    with torch.no_grad():
        out = model(
            reference.nchw(inputs["latents"]),
            torch.tensor(TIMES),
            torch.from_numpy(inputs["context"]),
            **added,
        )
    return reference.nhwc(out.sample)


def ours(inputs, config: dict = UNET, **added) -> mx.array:
    unet = parity.fill(UNet(UNetConfig(**config)))
    arrays = (mx.array(inputs["latents"]), mx.array(TIMES), mx.array(inputs["context"]))
    return unet(*arrays, **added)


def test_a_controlled_unet(inputs, expected, parity_record):
    control = [reference.nchw(each) for each in expected]
    wanted = predictions(
        reference.unet(UNET),
        inputs,
        down_block_additional_residuals=control[:-1],
        mid_block_additional_residual=control[-1],
    )
    added = [mx.array(each) for each in expected]
    found = ours(inputs, control=added)
    parity.compare(parity_record, "UNet tiny under control", found, wanted, NETWORK)
    parity.control(parity_record, "UNet, no control", ours(inputs), wanted, NETWORK)
    late = [*added[:-1], mx.zeros_like(added[-1])]
    name = "UNet, the middle's control lost"
    parity.control(parity_record, name, ours(inputs, control=late), wanted, NETWORK)


@pytest.mark.parametrize("kind", ["SD 1", "SDXL"])
def test_a_unet_with_an_adapters_features(inputs, parity_record, kind):
    """SDXL has no transformers on its finest level, and one feature more, for its middle."""
    is_xl = kind == "SDXL"
    config = {**UNET, "transformer_layers": [0, 1, 1] if is_xl else [1, 2, 0]}
    widths = config["block_out_channels"]
    coarser = [(3, 3), (3, 3), (2, 2), (2, 2)] if is_xl else [(ROWS, COLUMNS), (3, 3), (2, 2)]
    random = np.random.default_rng(7)
    features = [
        random.standard_normal((2, *size, width), np.float32)
        for size, width in zip(coarser, [*widths, widths[-1]], strict=False)
    ]
    wanted = predictions(
        reference.unet(config),
        inputs,
        down_intrablock_additional_residuals=[reference.nchw(each) for each in features],
    )
    found = ours(inputs, config, features=[mx.array(each) for each in features])
    parity.compare(parity_record, f"UNet tiny, adapter of {kind}", found, wanted, NETWORK)
    turned = [mx.array(each[::-1].copy()) for each in features]
    found = ours(inputs, config, features=turned)
    parity.control(parity_record, f"UNet, features of {kind} swapped", found, wanted, NETWORK)


@pytest.mark.parametrize("kind", ["full_adapter", "full_adapter_xl"])
def test_a_t2i_adapter(parity_record, kind):
    is_xl = kind == "full_adapter_xl"
    config = {
        "hint_channels": 1 if is_xl else 3,
        "channels": [8, 12, 16, 16],
        "layers": 2,
        "downscale": 16 if is_xl else 8,
        "halves": [2] if is_xl else [1, 2, 3],
    }
    model = reference.fill(
        TorchAdapter(
            in_channels=config["hint_channels"],
            channels=config["channels"],
            downscale_factor=config["downscale"],
            adapter_type=kind,
        ).adapter
    )
    random = np.random.default_rng(8)
    hint = random.uniform(0, 1, (2, 80, 48, config["hint_channels"])).astype(np.float32)
    net = parity.fill(T2IAdapter(T2IAdapterConfig(**config)))
    wanted = [reference.nhwc(each) for each in model(reference.nchw(hint))]
    found = net(mx.array(hint))
    turned = net(mx.array(hint.transpose(0, 2, 1, 3).copy()))
    assert len(found) == len(wanted) == 4
    for n, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        parity.compare(parity_record, f"{kind} tiny, feature {n}", ours, theirs, NETWORK)
    name = f"{kind}, rows for columns"
    parity.control(parity_record, name, turned[0].transpose(0, 2, 1, 3), wanted[0], NETWORK)


def test_a_guidance_scale_that_is_told(inputs, parity_record, monkeypatch):
    config = {**UNET, "time_cond_dim": 12}
    theirs = {**UNET, "time_cond_proj_dim": 12}
    scales = [4.0, 8.5]
    embed = StableDiffusionPipeline.get_guidance_scale_embedding
    told = embed(None, torch.tensor(scales) - 1, embedding_dim=12)
    wanted = predictions(reference.unet(theirs), inputs, timestep_cond=told)
    found = ours(inputs, config, guidance=mx.array(scales))
    parity.compare(parity_record, "UNet tiny, guidance embedded", found, wanted, NETWORK)
    found = ours(inputs, config, guidance=mx.array(scales) + 1)
    parity.control(parity_record, "UNet, guidance not less 1", found, wanted, NETWORK)
    waves = layers.guidance_waves
    monkeypatch.setattr(
        "mlx_maple.models.layers.guidance_waves",
        lambda scales, width: mx.roll(waves(scales, width), width // 2, axis=1),
    )
    found = ours(inputs, config, guidance=mx.array(scales))
    parity.control(parity_record, "UNet, guidance's cosines first", found, wanted, NETWORK)


def test_what_does_not_fit_is_refused(inputs):
    with pytest.raises(ValueError, match="expected 10 maps of control, got 2"):
        ours(inputs, control=[mx.zeros((1, 1))] * 2)
    with pytest.raises(ValueError, match="takes no guidance scale"):
        ours(inputs, guidance=mx.array([1.0]))
    with pytest.raises(ValueError, match="is told a guidance scale"):
        ours(inputs, {**UNET, "time_cond_dim": 12})


def test_cannys_edges_are_opencvs(weights, parity_record):
    cv2 = pytest.importorskip("cv2")
    for path in sorted((weights / "photos").iterdir()):
        if path.suffix not in (".png", ".jpg"):
            continue
        picture = Image.open(path).convert("RGB")
        wanted = cv2.Canny(np.asarray(picture), 100, 200)
        found = np.asarray(preprocess.canny(picture))[..., 0]
        differ = int((found != wanted).sum())
        edges = int((wanted > 0).sum())
        parity_record(f"canny, {path.name}", edges=edges, differ=differ, bar="0 differ")
        assert edges > 1000 and differ == 0
        assert (np.asarray(preprocess.canny(picture, 50, 100))[..., 0] != wanted).any()
