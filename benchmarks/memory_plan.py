"""Planned and measured memory of SD 1.5 and SDXL, in every mode, on the device that is here.

    python benchmarks/memory_plan.py [--only NAME]... [--steps N] [--output F.json]

Each case is a process of its own: MLX reads what bounds its batches once. The weights are random
and made on the device in the dtype that they are run in, so that no file is needed. What is counted
is MLX's own peak (``mx.get_peak_memory``), from the first weight to the picture.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "normal 512": {},
    "normal 512, at most 2.5": {"max_memory": 2.5e9},
    "normal 768": {"size": 768},
    "normal 1024": {"size": 1024},
    "normal 512, 8 bit": {"bits": 8},
    "normal 512, 4 bit": {"bits": 4},
    "low-memory 512": {"low_memory": True},
    "low-memory 512, 8 bit": {"low_memory": True, "bits": 8},
    "low-memory 512, 4 bit": {"low_memory": True, "bits": 4},
    "low-memory 1024": {"low_memory": True, "size": 1024},
    "low-memory 1024, 4 bit": {"low_memory": True, "size": 1024, "bits": 4},
    "SDXL normal 1024": {"xl": True, "size": 1024},
    "SDXL low-memory 1024": {"xl": True, "low_memory": True, "size": 1024},
    "SDXL low-memory 1024, 4 bit": {"xl": True, "low_memory": True, "size": 1024, "bits": 4},
}
TARGETS = {  # bytes
    "normal 512": 3.2e9,
    "normal 512, at most 2.5": 2.6e9,
    "low-memory 512": 1.9e9,
    "low-memory 512, 4 bit": 1.2e9,
    "low-memory 1024": 3.0e9,
    "SDXL low-memory 1024, 4 bit": 4.0e9,
}
LAGS = (8, 20, 50, 100, 200)  # the plan's one constant of a backend, to be calibrated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=CASES, help="this case alone")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)  # within its process
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.steps)))
        return
    rows = []
    print(f"{'case':<24} {'plan':>8} {'measured':>8} {'off by':>7}  {'target':>8}")
    for name in args.only or CASES:
        command = [sys.executable, __file__, "--case", name, "--steps", str(args.steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no word"])[-1]
            rows.append({"case": name, "error": reason})
            print(f"{name:<24} {reason}", flush=True)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        off = row["plan"] / row["measured"] - 1
        target = f"{TARGETS[name] / 1e9:.2f} GB" if name in TARGETS else ""
        plan, found = row["plan"] / 1e9, row["measured"] / 1e9
        print(f"{name:<24} {plan:5.2f} GB {found:5.2f} GB {off:+7.1%}  {target:>8}", flush=True)
    if args.output:
        args.output.write_text(json.dumps({"cases": rows}, indent=1) + "\n")


def measure(name: str, steps: int) -> dict[str, Any]:
    """One case in this process: the plan, then the drawing."""
    case = CASES[name]
    low_memory, bits, size = case.get("low_memory", False), case.get("bits"), case.get("size", 512)

    import mlx_maple  # noqa: F401 - before mlx.core
    from mlx_maple.engine import low_memory as little

    if low_memory:
        little.set_environment()
    import mlx.core as mx

    from mlx_maple.engine import memory
    from mlx_maple.engine.attention import running_backend
    from mlx_maple.engine.measure import SDXL
    from mlx_maple.models import CLIPTextConfig, UNetConfig, VAEConfig
    from mlx_maple.pipeline import StableDiffusion
    from mlx_maple.sampling import NoiseSchedule
    from mlx_maple.text.tokenizer import Tokenizer

    configs: dict[str, Any] = {
        "text_encoder": CLIPTextConfig(),
        "unet": UNetConfig(),
        "vae": VAEConfig(),
    }
    is_xl = case.get("xl", False)
    if is_xl:
        configs = {
            "text_encoder": CLIPTextConfig(),
            "text_encoder_2": CLIPTextConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=20,
                hidden_act="gelu",
                projection_dim=1280,
                pad_token_id=0,
            ),
            "unet": SDXL,
            "vae": VAEConfig(scaling_factor=0.13025, force_upcast=True),
        }
    backend = running_backend()
    dtype = mx.float32 if backend == "cpu" else mx.float16
    request = memory.Request(
        configs=configs,
        width=size,
        height=size,
        dtype=dtype,
        bits=bits,
        low_memory=low_memory,
        max_memory=int(case["max_memory"]) if "max_memory" in case else None,
    )
    started = time.perf_counter()
    plan = memory.Plan(request)
    planned = plan.peak
    plan_seconds = time.perf_counter() - started
    by_lag = {}
    if not low_memory:
        for lag in LAGS:
            kept, memory.LAG[backend] = memory.LAG[backend], lag
            by_lag[str(lag)] = {p.name: p.working for p in memory.Plan(request).phases}
            memory.LAG[backend] = kept

    parts = {
        part: partial(
            network,
            part,
            configs[part],
            request.vae_dtype if part == "vae" else dtype,
            bits,
            low_memory,
        )
        for part in configs
    }
    mx.clear_cache()
    mx.reset_peak_memory()
    started = time.perf_counter()
    sd = StableDiffusion(
        **{
            part: load(is_skeleton=True) if low_memory else load()  # type: ignore[arg-type]
            for part, load in parts.items()
        },
        tokenizer=Tokenizer.bundled(),
        noise_schedule=NoiseSchedule.from_betas(),
        family="sdxl" if is_xl else "sd1",
        max_memory=int(case["max_memory"]) if "max_memory" in case else None,
        reload=parts if low_memory else None,
    )
    peaks: dict[str, int] = {"load": mx.get_peak_memory()}
    seconds, before = 0.0, "load"
    for progress in sd.generate("a leaf", width=size, height=size, steps=steps, seed=1):
        stage = progress.stage
        peaks[before] = max(peaks.get(before, 0), mx.get_peak_memory())
        mx.reset_peak_memory()
        seconds = max(seconds, progress.seconds_per_step)
        before = {"text": "text and first step", "sample": "step", "decode": "decode"}.get(
            stage, ""
        )
        if stage == "done":
            assert progress.result is not None
            notes = progress.result.notes
    return {
        "case": name,
        "backend": backend,
        "device": mx.device_info().get("device_name", ""),
        "mlx": mx.__version__,
        "environment": {k: v for k, v in os.environ.items() if k.startswith("MLX_")},
        "plan": planned,
        "measured": max(peaks.values()),
        "target": TARGETS.get(name),
        "planned_phases": [
            {"name": p.name, "weights": p.weights, "working": p.working} for p in plan.phases
        ],
        "measured_phases": peaks,
        "planned_working_by_lag": by_lag,
        "components": plan.components,
        "plan_seconds": round(plan_seconds, 3),
        "seconds_per_step": seconds,
        "drawing_seconds": round(time.perf_counter() - started, 3),
        "notes": notes,
    }


def network(
    part: str,
    config: Any,
    dtype: Any,
    bits: int | None,
    low_memory: bool,
    is_skeleton: bool = False,
) -> Any:
    """A network with random weights that keep its numbers small and its pictures grey."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_maple.engine.quantize import QUANTIZED, as_quantized
    from mlx_maple.engine.tiling import in_stripes
    from mlx_maple.models import AutoencoderKL, CLIPTextEncoder, UNet

    classes = {"unet": UNet, "vae": AutoencoderKL}
    module = classes.get(part, CLIPTextEncoder)(config)
    if bits is not None and part in QUANTIZED:
        as_quantized(module, bits)
    module.set_dtype(dtype)
    if is_skeleton:
        return module
    weights = []
    for name, value in tree_flatten(module.parameters()):
        if value.dtype == mx.uint32:
            made = mx.random.randint(0, 1 << 30, value.shape, mx.uint32)
        elif name.endswith("scales"):
            made = mx.full(value.shape, 0.002, dtype)
        elif name.endswith("biases"):
            made = mx.full(value.shape, -0.002 * 2 ** ((bits or 4) - 1), dtype)
        elif value.ndim == 1:
            made = mx.full(value.shape, 1.0 if name.endswith("weight") else 0.1, dtype)
        elif "embedding" in name and value.ndim == 2 and "linear" not in name:
            made = mx.full(value.shape, 0.02, dtype)
        else:  # one row for all, so that making them takes nothing beside them
            row = mx.random.normal((1, *value.shape[1:]), dtype)
            row = row * (value.size / value.shape[0]) ** -0.5
            made = mx.contiguous(mx.broadcast_to(row, value.shape))
        mx.eval(made)
        weights.append((name, made))
    module.load_weights(weights, strict=True)
    return in_stripes(module) if part == "vae" and low_memory else module


if __name__ == "__main__":
    main()
