"""The networks of SD 2.1 and SDXL at their true size: 16 bits beside float32 on this device.

For fp16_fidelity.py. Weights are random, made from the parameters' names, as in the comparisons
with diffusers at true size (tests/parity/true_sizes.py, whose networks these are). Float32 runs in
the networks' plain form; 16 bits in the form that this device draws with, and its checked kernels.
"""

import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from PIL import Image

from mlx_maple.drawing import autoencode
from mlx_maple.engine.compiled import made_ready
from mlx_maple.images import to_image
from mlx_maple.models import (
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextEncoder,
    UNet,
    UNetConfig,
    VAEConfig,
)
from mlx_maple.pipeline import StableDiffusion
from mlx_maple.sampling import NoiseSchedule
from mlx_maple.text.tokenizer import Tokenizer

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS / "parity"), str(TESTS / "golden")]
import recipe  # noqa: E402
import true_sizes  # noqa: E402

KINDS: dict[str, tuple[type, type]] = {
    "unet": (UNetConfig, UNet),
    "vae": (VAEConfig, AutoencoderKL),
    "text_encoder": (CLIPTextConfig, CLIPTextEncoder),
}
BARS = {"float16": 0.9999, "bfloat16": 0.999}  # of the cosine; bfloat16 has 8 digits for 11
CELLS = {"sd2": 96, "sdxl": 128}  # latents along a side, of the sizes that the families draw
VAE_CELLS = 64  # the plain autoencoder in float32 does not fit 80 GB at 1024x1024, on CUDA
NET = "sdxl-vae, which overflows"


def rows(
    networks: Mapping[str, tuple[str, str, int, dict[str, Any]]] = true_sizes.NETWORKS,
    cells: int | None = None,
) -> Iterator[dict[str, Any]]:
    """One row for each network and type: how far each output is from float32's.

    Args:
        networks: component, family, parameters and config by name.
        cells: latents along a side; None is as the family draws.
    """
    for name, (component, family, _, config) in networks.items():
        usual = VAE_CELLS if component == "vae" else CELLS[family]
        side = usual if cells is None else cells
        settings, kind = KINDS[component.removesuffix("_2")]
        network = filled(kind(settings(**config)))
        given = inputs(component, config, side)
        expected, _ = outputs(network, component, given)
        for dtype, bar in BARS.items():
            half = filled(kind(settings(**config)))
            half.set_dtype(getattr(mx, dtype))
            half = made_ready(half, consumes=True)
            found, seconds = outputs(half, component, given)
            cosines = {what: cosine(found[what], expected[what]) for what in expected}
            yield {
                "network": name,
                "dtype": dtype,
                "cosine": cosines,
                "bar": bar,
                "passes": min(cosines.values()) >= bar,
                "seconds": round(seconds, 3),
            }
            del half, found
            mx.clear_cache()
        if component == "vae":
            yield safety_net(config, given["latents"])
        del network, expected


def filled(network: nn.Module) -> nn.Module:
    """The network with weights made from their names, in float32."""
    flat = cast(list[tuple[str, mx.array]], tree_flatten(network.parameters()))
    network.update(tree_unflatten([(name, value(name, old.shape)) for name, old in flat]))
    mx.eval(network.parameters())
    return network


def value(name: str, shape: tuple[int, ...]) -> mx.array:
    """As ``recipe.value``, made where it is used."""
    noise = mx.random.normal(shape, key=mx.random.key(zlib.crc32(name.encode())))
    *module, kind = name.split(".")
    if len(shape) == 1:
        centre = 1 if kind == "weight" else 0
        return centre + (0.1 if centre else 0.1 * recipe.QUIET) * noise
    if module[-1].endswith("embedding"):
        return recipe.QUIET * noise
    is_quiet = module[-1] in recipe.QUIETENED and module[-2:] != ["ff", "proj_in"]
    return (recipe.QUIET if is_quiet else 1) * noise / float(np.sqrt(np.prod(shape[1:])))


def inputs(component: str, config: Mapping[str, Any], cells: int) -> dict[str, mx.array]:
    """What both types are given."""
    if component.startswith("text_encoder"):
        return {"ids": mx.array(true_sizes.inputs(component, config)["ids"])}
    found = {"latents": mx.random.normal((1, cells, cells, 4), key=mx.random.key(1))}
    if component == "vae":
        shape = (1, 4 * cells, 4 * cells, 3)
        return {**found, "images": mx.random.uniform(-1, 1, shape, key=mx.random.key(2))}
    width, vector = config["cross_attention_dim"], config.get("vector_channels")
    found["context"] = mx.random.normal((1, 77, width), key=mx.random.key(3))
    if vector is not None:
        found["vector"] = mx.random.normal((1, vector), key=mx.random.key(4))
    return found


def outputs(
    network: Any, component: str, given: Mapping[str, mx.array]
) -> tuple[dict[str, np.ndarray], float]:
    """Every output of a network, and the seconds of all its calls but the first of each."""
    calls: dict[str, Callable[[], mx.array]]
    if component == "unet":
        others = [given["context"], *([given["vector"]] if "vector" in given else [])]
        calls = {
            f"t={t:g}": lambda t=t: network(given["latents"], mx.array([t]), *others)
            for t in true_sizes.TIMES
        }
    elif component == "vae":
        calls = {
            "decoded": lambda: network.decode(given["latents"]),
            "encoded": lambda: network.encode(given["images"]).mean,
        }
    else:
        calls = {"last": lambda: network(given["ids"]).last}
        calls["penultimate"] = lambda: network(given["ids"]).penultimate
        if network.config.projection_dim is not None:
            calls["pooled"] = lambda: network(given["ids"]).pooled
    found, start = {}, 0.0
    for what, call in calls.items():
        found[what] = np.array(call().astype(mx.float32))
        start = start or time.perf_counter()
    return found, time.perf_counter() - start


def cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of two arrays as vectors; NaN where one is not finite."""
    a, b = (array.astype(np.float64).ravel() for array in (ours, theirs))
    with np.errstate(invalid="ignore", over="ignore"):
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def pixels(picture: Image.Image) -> np.ndarray:
    """A picture as numbers around 0."""
    return np.asarray(picture, np.float32) - 127.5


def safety_net(config: Mapping[str, Any], latents: mx.array) -> dict[str, Any]:
    """An autoencoder whose feature maps leave float16, decoding as a drawing does in float16.

    Its maps are 2^17 times as large as the plain one's, and its pictures the same. Left to float16
    it must fail; the drawing must see that and answer in float32.
    """
    plain = AutoencoderKL(VAEConfig(**{**config, "force_upcast": False}))
    weights = dict(cast(list[tuple[str, mx.array]], tree_flatten(plain.parameters())))
    weights = {name: value(name, old.shape) for name, old in weights.items()}
    plain.update(tree_unflatten(list(recipe.louder_autoencoder(weights).items())))
    expected = pixels(to_image(np.array(plain.decode(latents))[0]))
    plain.set_dtype(mx.float16)
    text = {**true_sizes.NETWORKS["sd21-text"][3], "hidden_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 1, "intermediate_size": 64}
    unet = {**true_sizes.NETWORKS["sd21-unet"][3], "block_out_channels": [32, 32]}
    unet |= {"transformer_layers": [1, 0], "num_attention_heads": [1, 1], "cross_attention_dim": 64}
    sd = StableDiffusion(
        text_encoder=CLIPTextEncoder(CLIPTextConfig(**text)),
        unet=UNet(UNetConfig(**unet)),
        vae=plain,
        tokenizer=Tokenizer.bundled(),
        noise_schedule=NoiseSchedule.from_betas(),
    )
    alone = np.array(sd.vae.decode(latents).astype(mx.float32))
    notes: list[str] = []
    start = time.perf_counter()
    found = pixels(autoencode.decode(sd, latents, notes))
    likeness = cosine(found, expected)
    is_seen = not np.isfinite(alone).all() and len(notes) == 1
    return {
        "network": NET,
        "dtype": "float16",
        "cosine": {"decoded": likeness},
        "bar": BARS["float16"],
        "passes": is_seen and likeness >= BARS["float16"],
        "notes": notes,
        "seconds": round(time.perf_counter() - start, 3),
    }


if __name__ == "__main__":
    network, *side = sys.argv[1:]
    chosen = {network: true_sizes.NETWORKS[network]}
    for each in rows(chosen, cells=int(side[0]) if side else None):
        print(json.dumps(each), flush=True)
