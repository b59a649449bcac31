"""Make golden_samplers.json: what the references do, for tests that run without them.

    python tests/sampling/make_golden.py        (needs torch, diffusers, scipy and k-diffusion)

Holds the levels and timesteps of every kind of grid, and short runs of every sampler on the
synthetic network, step by step, all from diffusers' and k-diffusion's own code.
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import sampler_references as references
import torch
from synthetic import gaussian_noise, predict

import mlx_maple  # noqa: F401  (before mlx.core, so that OpenBLAS is preloaded)
from mlx_maple.sampling import SAMPLERS, NoiseSchedule

COUNTS = (1, 2, 4, 8, 20, 50)
SHAPE = (1, 1, 2, 4)
STEPS = 6
# One sampler for each way of choosing levels.
GRIDS = ("euler", "dpmpp_2m", "ddim", "plms", "unipc", "lcm")


def main():
    alphas = NoiseSchedule.from_betas().alphas_cumprod.astype(np.float32).astype(np.float64)
    golden = {
        "made_with": {
            name: version(name) for name in ("torch", "diffusers", "k-diffusion", "scipy", "numpy")
        },
        "grids": {},
        "runs": {},
    }

    def network(x, t):
        return predict(x, t, torch)

    for sampler in GRIDS:
        for schedule in SAMPLERS[sampler].schedules:
            if sampler == "dpmpp_2m" and schedule not in references.SPACINGS:
                continue  # as euler's
            for n in COUNTS:
                noise = np.zeros(SHAPE, np.float32)
                draws = [noise] * n
                run = references.run(sampler, schedule, n, network, noise, draws, alphas)
                entry = {"timesteps": [round(t, 4) for t in run.timesteps]}
                if run.sigmas is not None:
                    entry["sigmas"] = [float(f"{s:.8g}") for s in run.sigmas]
                golden["grids"][f"{sampler} {schedule} {n}"] = entry

    for sampler, entry in SAMPLERS.items():
        for schedule in dict.fromkeys([entry.schedules[0], "trailing"]):
            for prediction in ("epsilon", "v_prediction"):
                noise = gaussian_noise(0, SHAPE)
                draws = [gaussian_noise(i + 1, SHAPE) for i in range(2 * STEPS)]
                run = references.run(
                    sampler, schedule, STEPS, network, noise, draws, alphas, prediction
                )
                golden["runs"][f"{sampler} {schedule} {prediction}"] = [
                    [float(f"{value:.7g}") for value in latents.ravel()]
                    for latents in (run.start, *run.steps)
                ]

    path = Path(__file__).with_name("golden_samplers.json")
    path.write_text(one_entry_a_line(golden))
    print(f"{path}: {len(golden['grids'])} grids, {len(golden['runs'])} runs")


def one_entry_a_line(golden):
    """JSON whose differences can be read."""
    sections = []
    for title, entries in golden.items():
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items()]
        sections.append(f"{json.dumps(title)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(sections) + "\n}\n"


if __name__ == "__main__":
    main()
