"""What guidance switches and FreeU do to the embedded model's pictures: passes, likeness, judge.

    python benchmarks/switches.py

For each switch: how many times a picture goes through the UNet in a drawing (guided steps count
twice), how near the pictures are to those without it, how many of the judge's names are among its
best five, and the mean of what it gives the right one. No clock: passes are what costs.
"""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import judge
from test_embedded_model import STEPS, WANTED

import mlx_maple

PROMPTS = dict(list(WANTED.items())[:3])
SWITCHES = {
    "none": {},
    "guidance_end=0.8": {"guidance_end": 0.8},
    "guidance_end=0.5": {"guidance_end": 0.5},
    "guidance_rescale=0.7": {"guidance_rescale": 0.7},
    "freeu=(1.2, 1.4, 0.9, 0.2)": {"freeu": (1.2, 1.4, 0.9, 0.2)},
}


def psnr(a, b) -> float:
    """Of two pictures, in dB."""
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def main() -> None:
    """Print the table."""
    mx.set_default_device(mx.Device(mx.DeviceType.cpu))
    sd = mlx_maple.load()
    passes = 0
    plain_call = type(sd.unet).__call__

    def counted(self, latents, *more, **others):
        nonlocal passes
        passes += latents.shape[0]
        return plain_call(self, latents, *more, **others)

    type(sd.unet).__call__ = counted
    first = {}
    print("| switch | passes | PSNR to none, dB | names read | score |\n|---|---|---|---|---|")
    for label, arguments in SWITCHES.items():
        passes, near, read, score = 0, [], 0, []
        for seed, (prompt, (name, _, _)) in enumerate(PROMPTS.items()):
            picture = sd(prompt, seed=seed, steps=STEPS, **arguments).images[0]
            near.append(psnr(picture, first.setdefault(prompt, picture)))
            read += name in judge.best(picture)
            score.append(judge.scores(picture)[name])
        likeness = "" if label == "none" else f"{np.mean(near):.1f}"
        row = f"{passes // len(PROMPTS)} | {likeness} | {read} of {len(PROMPTS)}"
        print(f"| {label} | {row} | {np.mean(score):.2f} |", flush=True)


if __name__ == "__main__":
    main()
