"""SD 2.1's and SDXL's networks at their true size beside the reference's, each in its own process.

Weights are random, made from the parameters' names on both sides, in float32; what is compared
travels in files, so that the larger of the two decides how much memory is needed: 12 GB for SDXL's
UNet. From the checkout's root, with the ``parity`` extra installed:

    python tests/parity/true_sizes.py                  # all of them, half an hour on two cores
    python tests/parity/true_sizes.py sdxl-unet --json true_sizes.json

The bars are those of ``make parity``. Exit code 1 where one is missed.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
import recipe

from maple_convert.layouts import LAYOUTS, NATIVE, diffusers_config

_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "mid_transformer_layers": 1,
}
_TEXT = {
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "eos_token_id": 49407,
    "pad_token_id": 0,
}
# Component, family, parameters, and what tensors do not say too.
NETWORKS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "sd21-unet": (
        "unet",
        "sd2",
        865_910_724,
        {
            **_UNET,
            "block_out_channels": [320, 640, 1280, 1280],
            "transformer_layers": [1, 1, 1, 0],
            "num_attention_heads": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
        },
    ),
    "sdxl-unet": (
        "unet",
        "sdxl",
        2_567_463_684,
        {
            **_UNET,
            "block_out_channels": [320, 640, 1280],
            "transformer_layers": [0, 2, 10],
            "mid_transformer_layers": 10,
            "num_attention_heads": [5, 10, 20],
            "cross_attention_dim": 2048,
            "vector_channels": 2816,
        },
    ),
    "sd21-text": (
        "text_encoder",
        "sd2",
        340_387_840,
        {
            **_TEXT,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "projection_dim": None,
        },
    ),
    "sdxl-text-2": (
        "text_encoder_2",
        "sdxl",
        694_659_840,
        {
            **_TEXT,
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "projection_dim": 1280,
        },
    ),
    "sdxl-vae": (
        "vae",
        "sdxl",
        83_653_863,
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "scaling_factor": 0.13025,
            "force_upcast": True,
        },
    ),
}
LATENTS = 32  # cells along a side
TIMES = (999.0, 500.25)


def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """As ``recipe.value``, from a generator five times as quick."""
    generator = np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))
    noise = generator.standard_normal(shape, np.float32)
    *module, kind = name.split(".")
    if len(shape) == 1:
        noise *= 0.1 if kind == "weight" else 0.1 * recipe.QUIET
        return noise + np.float32(kind == "weight")
    if module[-1].endswith("embedding"):
        return noise * np.float32(recipe.QUIET)
    quiet = module[-1] in recipe.QUIETENED and module[-2:] != ["ff", "proj_in"]
    noise *= np.float32((recipe.QUIET if quiet else 1) / np.sqrt(np.prod(shape[1:])))
    return noise


def inputs(component: str, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What both sides are given; channels last."""
    random = np.random.default_rng(4)
    if component == "vae":
        return {
            "latents": random.standard_normal((1, LATENTS, LATENTS, 4), np.float32),
            "images": random.uniform(-1, 1, (1, 256, 256, 3)).astype(np.float32),
        }
    if component == "unet":
        width, vector = config["cross_attention_dim"], config.get("vector_channels")
        found = {
            "latents": random.standard_normal((1, LATENTS, LATENTS, 4), np.float32),
            "context": random.standard_normal((1, 77, width), np.float32),
        }
        if vector is not None:
            found["pooled"] = random.standard_normal((1, vector - 6 * 256), np.float32)
            found["numbers"] = np.array([[768, 1024, 8, 16, 1024, 1024]], np.float32)
        return found
    ids = random.integers(1, 49405, (2, 77))
    ids[:, 0] = 49406
    for row, length in zip(ids, (12, 76), strict=True):
        row[length] = 49407
        row[length + 1 :] = 0
    return {"ids": ids}


# The two sides --------------------------------------------------------------------------------


def reference(name: str) -> Iterator[tuple[str, np.ndarray, float]]:
    """What diffusers or transformers say: of each quantity its name, values and seconds."""
    import torch

    torch.set_grad_enabled(False)
    component, family, _, config = NETWORKS[name]
    is_linear = component == "unet"
    pooled = config["vector_channels"] - 6 * 256 if "vector_channels" in config else None
    written = diffusers_config.write(
        component, config, 1024, family=family, is_linear=is_linear, pooled=pooled
    )
    with torch.device("meta"):
        model = _built(component, written)
    state = {}
    spelling = {"unet": "diffusers_linear", "vae": "diffusers"}.get(component, "transformers")
    for row in LAYOUTS[component].rows(config, spelling):
        values = row.weights.to_published(value(row.native, row.native_shape))
        state[row.published] = torch.from_numpy(np.ascontiguousarray(values))
    names = set(model.state_dict())
    if not state.keys() <= names:  # transformers from 5.6 leaves out a prefix
        state = {key.removeprefix("text_model."): array for key, array in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    _without_meta(model)
    model.eval()
    given = {key: torch.from_numpy(array) for key, array in inputs(component, config).items()}
    if component == "unet":
        told = None
        if pooled is not None:
            told = {"text_embeds": given["pooled"], "time_ids": given["numbers"]}
        for t in TIMES:
            start = time.perf_counter()
            out = model(
                given["latents"].movedim(-1, 1),
                torch.tensor(t),
                given["context"],
                added_cond_kwargs=told,
            ).sample
            yield f"t={t:g}", out.movedim(1, -1).numpy(), time.perf_counter() - start
    elif component == "vae":
        start = time.perf_counter()
        out = model.decode(given["latents"].movedim(-1, 1) / config["scaling_factor"]).sample
        yield "decoded", out.movedim(1, -1).numpy(), time.perf_counter() - start
        start = time.perf_counter()
        mean = model.encode(given["images"].movedim(-1, 1)).latent_dist.mean
        mean = mean * config["scaling_factor"]
        yield "encoded", mean.movedim(1, -1).numpy(), time.perf_counter() - start
    else:
        start = time.perf_counter()
        out = model(given["ids"], output_hidden_states=True)
        seconds = time.perf_counter() - start
        yield "last", out.last_hidden_state.numpy(), seconds
        yield "penultimate", out.hidden_states[-2].numpy(), seconds
        if config["projection_dim"] is not None:
            yield "pooled", out.text_embeds.numpy(), seconds


def _built(component: str, written: dict[str, Any]) -> Any:
    if component == "unet":
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel.from_config(written)
    if component == "vae":
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_config(written)
    import transformers

    kind = getattr(transformers, written.pop("architectures")[0])
    return kind(transformers.CLIPTextConfig(**written))


def _without_meta(model: Any) -> None:
    """Fill the buffers that no file holds: text encoders count their places."""
    import torch

    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            owner = model.get_submodule(name.rpartition(".")[0])
            counted = torch.arange(buffer.shape[-1]).expand(buffer.shape)
            owner.register_buffer(name.rpartition(".")[2], counted, persistent=False)


def ours(name: str) -> Iterator[tuple[str, np.ndarray, float]]:
    """The same of mlx_maple's networks."""
    from mlx_maple.conditioning import Conditioning
    from mlx_maple.models import (
        AutoencoderKL,
        CLIPTextConfig,
        CLIPTextEncoder,
        UNet,
        UNetConfig,
        VAEConfig,
    )
    from mlx_maple.sizes import with_vector

    component, _, parameters, config = NETWORKS[name]
    import mlx.core as mx  # after ours, which bring a quick BLAS along on Linux

    settings, kind = {
        "unet": (UNetConfig, UNet),
        "vae": (VAEConfig, AutoencoderKL),
        "text_encoder": (CLIPTextConfig, CLIPTextEncoder),
    }[component.removesuffix("_2")]
    network: Any = kind(settings(**config))
    count = 0
    for row in LAYOUTS[component].rows(config, NATIVE):
        array = mx.array(value(row.native, row.native_shape))
        network.load_weights([(row.native, array)], strict=False)
        count += array.size
    assert count == parameters, f"{count:,} parameters, published are {parameters:,}"
    given = {key: mx.array(array) for key, array in inputs(component, config).items()}

    def timed(*arrays: mx.array) -> tuple[list[np.ndarray], float]:
        start = time.perf_counter()
        mx.eval(arrays)
        return [np.array(array) for array in arrays], time.perf_counter() - start

    if component == "unet":
        vector = None
        if "pooled" in given:
            told = Conditioning(context=given["context"], pooled=given["pooled"])
            numbers = inputs(component, config)["numbers"][0].tolist()
            vector = with_vector(told, numbers, config["vector_channels"]).vector
        for t in TIMES:
            (out,), seconds = timed(network(given["latents"], t, given["context"], vector))
            yield f"t={t:g}", out, seconds
    elif component == "vae":
        (out,), seconds = timed(network.decode(given["latents"]))
        yield "decoded", out, seconds
        (mean,), seconds = timed(network.encode(given["images"]).mean)
        yield "encoded", mean, seconds
    else:
        states = network(given["ids"])
        wanted = ["last", "penultimate"] + ["pooled"] * (config["projection_dim"] is not None)
        found, seconds = timed(*(getattr(states, each) for each in wanted))
        for each, array in zip(wanted, found, strict=True):
            yield each, array, seconds


# Comparing them -------------------------------------------------------------------------------


def work(side: str, name: str, out: Path) -> None:
    """One side's answers into a file, with its seconds and peak memory."""
    made = list({"reference": reference, "ours": ours}[side](name))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    facts = {"seconds": {n: seconds for n, _, seconds in made}, "peak_bytes": peak}
    np.savez(out, facts=json.dumps(facts), **{n: array for n, array, _ in made})


def compared(name: str, folder: Path) -> dict[str, Any]:
    """Both sides' answers of one network, and how far apart they are."""
    answers: dict[str, dict[str, Any]] = {}
    for side in ("reference", "ours"):
        out = folder / f"{name}-{side}.npz"
        subprocess.run([sys.executable, __file__, "--work", side, name, str(out)], check=True)
        with np.load(out) as file:
            answers[side] = {key: file[key] for key in file.files}
        out.unlink()
    facts = {side: json.loads(str(found.pop("facts"))) for side, found in answers.items()}
    is_vae = NETWORKS[name][0] == "vae"
    rms_bar, max_bar = (3e-5, 1e-3) if is_vae else (2e-5, 2.4e-4)
    quantities = {}
    for key, expected in answers["reference"].items():
        error = answers["ours"][key].astype(np.float64) - expected
        rms = float(np.sqrt(np.mean(error**2)) / expected.std(dtype=np.float64))
        largest = float(np.abs(error).max())
        quantities[key] = {
            "rms": rms,
            "max_error": largest,
            "passes": rms <= rms_bar and largest <= max_bar,
        }
    return {"parameters": NETWORKS[name][2], "quantities": quantities, **facts}


def main() -> int:
    """Compare the networks that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NETWORKS))
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        side, name, out = args.work
        work(side, name, Path(out))
        return 0
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.names or NETWORKS:
            found[name] = result = compared(name, Path(folder))
            sides = ", ".join(
                f"{side} {sum(set(facts['seconds'].values())):.1f} s "
                f"{facts['peak_bytes'] / 2**30:.2f} GiB"
                for side in ("ours", "reference")
                for facts in [result[side]]
            )
            print(f"{name}  {result['parameters']:,} parameters  {sides}", flush=True)
            for key, figures in result["quantities"].items():
                verdict = "passes" if figures["passes"] else "MISSES"
                errors = f"rms {figures['rms']:.2e}  max {figures['max_error']:.2e}"
                print(f"  {key:<12} {errors}  {verdict}", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    passes = [q["passes"] for result in found.values() for q in result["quantities"].values()]
    return 0 if all(passes) else 1


if __name__ == "__main__":
    sys.exit(main())
