"""float16 beside float32 on this device: the gallery's pictures, and many seeds.

    python benchmarks/fp16_fidelity.py [--seeds 200] [--output FILE.json]
    python benchmarks/fp16_fidelity.py --families [--output FILE.json]

Draws each of the gallery's prompts with its seed in float16 and in float32, both on MLX's default
device, and compares latents (cosine) and pictures (PSNR); then draws ``--seeds`` further pictures
in float16 and counts those that are black, flat or not finite, or that were decoded in float32
because float16 failed. Ends with 1 where a picture is at or below 30 dB or one of the seeds is bad.
Needs no torch, and runs from a checkout. A GPU takes seconds; a CPU, whose float16 is slow,
minutes: --prompts 2 --seeds 8. ``--families`` compares the networks of SD 2.1 and SDXL instead, at
their true size with random weights, in float16 and bfloat16, and an autoencoder that overflows
float16; 16 GB are enough. Ends with 1 where a cosine misses its bar.
"""

# ruff: noqa: E402  (what MLX reads from the environment is set before it is imported)

import os
import sys
from pathlib import Path

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # float32 is to mean float32 on CUDA
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT), str(ROOT / "convert")]

import mlx_maple as maple  # isort: skip  (before mlx.core: it chooses the BLAS)

import argparse
import json
import platform
import subprocess
import time
from typing import Any

import mlx.core as mx
import numpy as np
from gallery import PROMPTS

LEAST_PSNR = 30.0
LEAST_SPREAD = (
    8  # of 255: between the darkest and the brightest value of a picture that shows something
)


def main() -> int:
    """Draw, compare, print one line a picture and the summary as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default=None, help="what to draw with; the embedded one if left out"
    )
    parser.add_argument("--seeds", type=int, default=200, help="pictures to look for faults in")
    parser.add_argument("--batch", type=int, default=8, help="pictures at once among the seeds")
    parser.add_argument("--steps", type=int, default=None, help="as the model likes it if left out")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="of the gallery")
    parser.add_argument("--families", action="store_true", help="SD 2.1's and SDXL's networks")
    parser.add_argument(
        "--cells", type=int, default=None, help="latents along a side for --families"
    )
    parser.add_argument("--output", type=Path, default=None, help="write the JSON here too")
    args = parser.parse_args()

    if args.families:
        report = families(args.cells)
        return written({**kept(args.output), "families": report}, args.output, report["passes"])
    half = maple.load(args.model, dtype="float16")
    full = maple.load(args.model, dtype="float32")
    started = time.perf_counter()
    pictures = [compared(half, full, *each, args.steps) for each in PROMPTS[: args.prompts]]
    compared_in = time.perf_counter() - started

    started = time.perf_counter()
    bad = faults(half, args.seeds, args.batch, args.steps)
    report = {
        "machine": machine(),
        "model": half.info.name,
        "least_psnr": min(row["psnr"] for row in pictures),
        "least_cosine": min(row["cosine"] for row in pictures),
        "bar_psnr": LEAST_PSNR,
        "pictures": pictures,
        "seeds": args.seeds,
        "faults": bad,
        "seconds": {
            "compared": round(compared_in, 2),
            "seeds": round(time.perf_counter() - started, 2),
        },
    }
    if (networks := kept(args.output).get("families")) is not None:
        report["families"] = networks
    return written(report, args.output, report["least_psnr"] > LEAST_PSNR and not bad)


def kept(output: Path | None) -> dict[str, Any]:
    """An older report, of which a run keeps the half that it does not make."""
    return {} if output is None or not output.exists() else json.loads(output.read_text())


def machine() -> dict[str, str]:
    """What the figures are of."""
    return {
        "device": str(mx.device_info().get("device_name", mx.default_device())),
        "system": f"{platform.system()} {platform.machine()}",
        "mlx": mx.__version__,
        "maple": maple.__version__,
    }


def written(report: dict[str, Any], output: Path | None, passes: bool) -> int:
    """Print the report, keep it where that is wished; the exit code."""
    text = json.dumps(report, indent=1)
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")
    return 0 if passes else 1


def families(cells: int | None) -> dict[str, Any]:
    """Every network's rows, each told as it is done.

    Each network has a process of its own: after SDXL's in float32, MLX 0.32.4 failed inside cuDNN
    in a convolution that works by itself.
    """
    import fp16_families

    started, found = time.perf_counter(), []
    for name in fp16_families.true_sizes.NETWORKS:
        command = [sys.executable, fp16_families.__file__, name, *([str(cells)] if cells else [])]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        for row in map(json.loads, run.stdout.splitlines()):
            cosines = "  ".join(f"{what} {value:.7f}" for what, value in row["cosine"].items())
            verdict = "" if row["passes"] else "  MISSES"
            line = f"{row['network']}, {row['dtype']}  {cosines}{verdict}"
            print(line, file=sys.stderr, flush=True)
            found.append(row)
    seconds = round(time.perf_counter() - started, 1)
    passes = all(row["passes"] for row in found)
    return {"machine": machine(), "networks": found, "passes": passes, "seconds": seconds}


def compared(half, full, prompt: str, seed: int, steps: int | None) -> dict[str, object]:
    """One prompt in both types."""
    results = [sd(prompt, seed=seed, steps=steps) for sd in (half, full)]
    a, b = (result.latents.ravel().astype(np.float64) for result in results)
    x, y = (np.asarray(result.images[0], np.float64) for result in results)
    row = {
        "prompt": prompt,
        "seed": seed,
        "psnr": round(float(10 * np.log10(255**2 / max(np.square(x - y).mean(), 1e-6))), 2),
        "cosine": float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
        "largest_difference": float(np.abs(a - b).max()),
        "notes": list(results[0].notes),
    }
    print(
        f"{row['psnr']:6.2f} dB  cosine {row['cosine']:.6f}  {prompt}", file=sys.stderr, flush=True
    )
    return row


def faults(sd, seeds: int, batch: int, steps: int | None) -> list[dict[str, object]]:
    """What is wrong with which of ``seeds`` pictures, the gallery's prompts in turn."""
    found: list[dict[str, object]] = []
    for first in range(0, seeds, batch):
        prompt, _ = PROMPTS[first // batch % len(PROMPTS)]
        count = min(batch, seeds - first)
        result = sd(prompt, seed=1000 + first, count=count, steps=steps)
        if result.notes:
            found.append({"seed": 1000 + first, "prompt": prompt, "fault": "; ".join(result.notes)})
        for i, image in enumerate(result.images):
            pixels = np.asarray(image, np.int16)
            if not np.isfinite(result.latents[i]).all():
                fault = "latents are not finite"
            elif pixels.max() - pixels.min() < LEAST_SPREAD:
                fault = "black" if pixels.max() < LEAST_SPREAD else "of one colour"
            else:
                continue
            found.append({"seed": 1000 + first + i, "prompt": prompt, "fault": fault})
    return found


if __name__ == "__main__":
    sys.exit(main())
