"""What quantised weights do to pictures: PSNR against unquantised ones, same prompts and seeds.

    python benchmarks/quantized_fidelity.py [-m MODEL] [--steps N] [--output F.json]

The embedded model draws unless another is named. 8 prompts, seeds 1 to 8.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

import mlx_maple as maple

PROMPTS = (
    "a red maple leaf on a yellow background",
    "a blue car",
    "a green frog",
    "a slice of pizza on a white background",
    "a yellow star on a purple background",
    "a brown dog",
    "a red heart",
    "an orange cat on a blue background",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    plain, rows = None, []
    for bits in (None, 8, 4):
        sd = maple.load(args.model, quantize=bits)
        started = time.perf_counter()
        drawn = [
            np.array(sd(prompt, seed=seed, steps=args.steps).images[0], np.float64)
            for seed, prompt in enumerate(PROMPTS, 1)
        ]
        row: dict[str, Any] = {
            "bits": bits,
            "bytes": sd.info.bytes,
            "unet_bytes": sd.info.components["unet"].bytes,
            "seconds": round(time.perf_counter() - started, 2),
        }
        if plain is None:
            plain = drawn
        else:
            row["psnr"] = [round(psnr(a, b), 2) for a, b in zip(plain, drawn, strict=True)]
        rows.append(row)
        print(json.dumps(row), flush=True)
    if args.output:
        report = {"prompts": PROMPTS, "steps": args.steps, "rows": rows}
        args.output.write_text(json.dumps(report, indent=1) + "\n")


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((one - other) ** 2), 1e-12)))


if __name__ == "__main__":
    main()
