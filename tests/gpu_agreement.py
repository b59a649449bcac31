"""Draw with every feature on the GPU and on the CPU, and see that they agree.

    python tests/gpu_agreement.py [--only WORD] [--output FILE.json]

A GPU draws with other code than a CPU: networks made ready, kernels of our own, compiled steps.
Each row is one drawing of a tiny random model in float32 on both, whose final latents must agree
(cosine 0.9999), and in float16 on the GPU alone, which must be finite. Ends with 1 where one does
not, and says so where there is no GPU. `make gpu-check` runs it: on a Mac it says in a few minutes
whether that machine draws what it should.
"""

# ruff: noqa: E402  (what MLX reads from the environment is set before it is imported)

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # float32 is to mean float32 on CUDA
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "convert"), str(ROOT / "tests"), str(ROOT / "tests/convert")]

import mlx_maple as maple  # isort: skip  (before mlx.core: it chooses the BLAS)

import families
import ip_adapters
import mlx.core as mx
import numpy as np
import tiny
import tiny_model
from PIL import Image
from safetensors.numpy import save_file

from maple_convert import convert
from maple_convert.layouts import LAYOUTS
from mlx_maple import images
from mlx_maple.engine.quantize import Quantizer
from mlx_maple.loading import DEMO

COSINE = 0.9999
# A number halfway between two steps goes up on one device and down on the other: one of 1000.
ON_LOAD, COSINE_ON_LOAD = "bits, packed on the device", 0.999
SMALL = {"width": 64, "height": 64, "steps": 3, "seed": 1, "guidance_scale": 5.0}
ADAPTERS = ROOT / "tests" / "data" / "adapters"
TOKENS = {"vocab_size": 49408, "eos_token_id": 49407}

# (what is drawn, what `load` is given, what the drawing is asked for)
Case = tuple[str, dict[str, Any], dict[str, Any]]


@cache
def folder() -> Path:
    """Where files that are made here lie until the end."""
    return Path(tempfile.mkdtemp(prefix="maple-gpu-"))


@cache
def quantized(source: Path, bits: int) -> Path:
    """A model in few bits, as a CPU packs them."""
    before = mx.default_device()
    mx.set_default_device(mx.Device(mx.DeviceType.cpu))
    path = folder() / f"{source.name}-{bits}"
    convert(source, path, quantizer=Quantizer(bits))
    mx.set_default_device(before)
    return path


@cache
def of_family(name: str) -> Path:
    """A tiny model of a family, in one file."""
    parts = families.FAMILIES[name]
    for part in parts:
        if part.startswith("text_encoder"):
            parts[part] = {**parts[part], **TOKENS}
    parts["vae"] = {**parts["vae"], "block_out_channels": [32] * 4}
    path = folder() / f"{name}.safetensors"
    tiny.save_safetensors(path, families.compvis(name, np.float16))
    return path


@cache
def steering(kind: str, spelling: str) -> Path:
    """A ControlNet or a T2I-Adapter for the tiny model."""
    random = np.random.default_rng(3)
    prefix = "control_model." if kind == "controlnet" else ""
    path = folder() / f"{kind}.safetensors"
    save_file(
        {
            prefix + row.published: random.normal(0, 0.1, row.published_shape).astype("f")
            for row in LAYOUTS[kind].rows(tiny_model.CONFIGS[kind], spelling)
        },
        path,
    )
    return path


def photo() -> Image.Image:
    return images.open_image(tiny_model.folder() / "photo.png").convert("RGB").resize((64, 64))


def mask() -> Image.Image:
    half = Image.new("L", (64, 64), 0)
    half.paste(255, (0, 0, 32, 64))
    return half


def cases() -> Iterator[Case]:
    """Every feature whose arithmetic is another on a GPU."""
    plain = {"source": tiny_model.maple_folder()}
    yield "unguided", plain, {"guidance_scale": 1.0}
    yield "guided", plain, {"negative_prompt": "a dog"}
    yield "three at once", plain, {"count": 3}
    for sampler in ("euler", "euler_a", "heun", "dpmpp_2m", "dpmpp_2m_sde", "plms", "unipc", "lcm"):
        yield f"sampler {sampler}", plain, {"sampler": sampler}
    # Of a trained model: random states have a mean near nothing, and are divided by it.
    yield "a long prompt with weights", {"source": None}, {"prompt": "a (red:1.3) apple, " * 30}
    yield "two prompts at once", plain, {"prompt": "a cat AND a dog :0.6"}
    yield "a prompt that changes", plain, {"prompt": "[a cat:a dog:0.5] [red|blue]"}
    yield (
        "guidance rescaled, in an interval",
        plain,
        {
            "guidance_rescale": 0.7,
            "guidance_start": 0.2,
            "guidance_end": 0.8,
        },
    )
    yield "seamless", plain, {"tile": "xy"}
    yield "FreeU", plain, {"freeu": (1.2, 1.4, 0.9, 0.2)}
    yield "token merging", plain, {"token_merging": 0.5}
    yield "DeepCache", plain, {"deep_cache": 2, "steps": 5}
    yield "a second drawing, latent", plain, {"hires_scale": 1.5, "hires_strength": 0.6}
    yield (
        "a second drawing, pixels",
        plain,
        {
            "hires_scale": 2.0,
            "hires_strength": 0.6,
            "hires_upscaler": "lanczos",
        },
    )
    yield "windows", plain, {"width": 128, "window": 64}
    yield "from a picture", plain, {"image": photo(), "strength": 0.7}
    yield "inside a mask", plain, {"image": photo(), "mask": mask(), "strength": 0.8}
    yield "clip skip", plain, {"clip_skip": 2}
    yield "a LoRA", {"source": None, "loras": [ADAPTERS / "blueprint.safetensors"]}, {}
    yield (
        "a learned word",
        {"source": None, "embeddings": [ADAPTERS / "noctia.safetensors"]},
        {"prompt": "a rocket, noctia"},
    )
    for kind, spelling in (("controlnet", "compvis"), ("t2i_adapter", "diffusers")):
        given = {**plain, "controlnet": steering(kind, spelling)}
        yield kind, given, {"control_image": photo()}
        yield f"{kind}, canny", given, {"control_image": photo(), "control_preprocess": "canny"}
    for kind in ip_adapters.KINDS:
        path = ip_adapters.folder() / f"{kind}.safetensors"
        yield f"IP-Adapter, {kind}", {**plain, "ip_adapter": path}, {"ip_image": photo()}
    for name, parts in families.FAMILIES.items():
        channels, more = parts["unet"].get("in_channels", 4), {}
        if channels == 9:
            more = {"image": photo(), "mask": mask()}
        elif channels == 8:
            more = {"image": photo()}
        elif channels == 5:
            more = {"image": photo(), "depth": photo().convert("L")}
        yield f"family {name}", {"source": name}, more
    for bits in (8, 4):
        yield f"{bits} bits", {"source": quantized(tiny_model.maple_folder(), bits)}, {}
    yield "4 bits, the embedded model", {"source": quantized(DEMO, 4)}, {}
    yield "low memory", {**plain, "low_memory": True}, {}
    few = quantized(tiny_model.maple_folder(), 4)
    yield "low memory, 4 bits", {"source": few, "low_memory": True}, {}
    for bits in (8, 4):
        yield f"{bits} {ON_LOAD}", {**plain, "quantize": bits}, {}
    yield "TAESD decodes", {**plain, "vae": tiny_model.folder() / "taesd.safetensors"}, {}
    yield "not compiled", {**plain, "compile": False}, {}


def drawn(device: mx.DeviceType, dtype: str, given: dict[str, Any], asked: dict[str, Any]) -> Any:
    """One drawing on a device, by a model that was loaded for it."""
    mx.set_default_device(mx.Device(device))
    given = dict(given)
    source = given.pop("source")
    if isinstance(source, str) and source in families.FAMILIES:
        source = of_family(source)
    sd = maple.load(source, dtype=dtype, cache=False, **given)
    asked = {**SMALL, **asked}
    return sd(asked.pop("prompt", "a red apple"), **asked)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    a, b = one.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def row_of(case: Case, gpu: mx.DeviceType) -> dict[str, Any]:
    """Figures of one case, or what went wrong."""
    name, given, asked = case
    row: dict[str, Any] = {"case": name}
    started = time.perf_counter()
    try:
        wanted = drawn(mx.DeviceType.cpu, "float32", given, asked)
        found = drawn(gpu, "float32", given, asked)
        half = drawn(gpu, "float16", given, asked)
        row["cosine"] = cosine(found.latents, wanted.latents)
        row["picture"] = max(
            int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())
            for a, b in zip(found.images, wanted.images, strict=True)
        )
        row["cosine_float16"] = cosine(half.latents, wanted.latents)
        row["notes"] = sorted({*found.notes, *half.notes} - {*wanted.notes})
        is_finite = bool(np.isfinite(half.latents).all())
        bar = COSINE_ON_LOAD if name.endswith(ON_LOAD) else COSINE
        row["passed"] = row["cosine"] >= bar and is_finite  # NaN is not
    except Exception as error:  # whatever it is, the other rows are of use
        row["error"] = f"{type(error).__name__}: {error}"[:300]
        row["trace"] = traceback.format_exc(limit=-2)
        row["passed"] = False
    row["seconds"] = round(time.perf_counter() - started, 2)
    return row


def main(gpu: mx.DeviceType = mx.DeviceType.gpu) -> int:
    """Draw all cases, print a line each, and say at the end which failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name has this word in it")
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    if not mx.is_available(mx.Device(gpu)):
        print("there is no GPU that MLX knows here: nothing to compare")
        return 0
    rows = []
    chosen: Callable[[Case], bool] = lambda case: args.only in case[0]  # noqa: E731
    for case in filter(chosen, cases()):
        rows.append(row := row_of(case, gpu))
        verdict = "agrees" if row["passed"] else "DIFFERS"
        figures = row.get("error") or (
            f"cosine {row['cosine']:.7f}  picture {row['picture']:3d}  "
            f"float16 {row['cosine_float16']:.5f}  {'; '.join(row['notes'])}"
        )
        print(f"{verdict:8}{row['case']:<36}{row['seconds']:6.1f} s  {figures}", flush=True)
    failed = [row["case"] for row in rows if not row["passed"]]
    print(f"{len(rows)} cases, {len(failed)} differ{': ' if failed else ''}{', '.join(failed)}")
    if args.output:
        facts = {"device": str(mx.device_info().get("device_name", "")), "mlx": version("mlx")}
        args.output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
