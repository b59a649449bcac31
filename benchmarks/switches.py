"""What switches of a drawing save and what they do to pictures: time, likeness, the judge's word.

    python benchmarks/switches.py [--model FILE] [--output FILE.json] [--sheet FILE.png]
    python benchmarks/switches.py --size sd15 --output FILE.json

Draws the same prompts and seeds with each switch in turn, as `maple generate` would: seconds a step
(sampling alone, the fastest drawing of each switch; on a CPU those of its own that it used, which
neighbours do not stretch), how near a picture is to the one without any switch, and whether a
classifier that was trained apart (tests/judge.py) still reads in it what was asked for. With
``--size`` it draws with random weights of that size, whose pictures show nothing: times only, each
switch once to warm up. Needs no torch, and runs from a checkout. Results are kept in one JSON file:
a run takes the place of the one of the same device, model, size and guidance.
"""

# ruff: noqa: E402  (mlx_maple chooses the BLAS before mlx is imported)

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "convert"), str(ROOT / "tests")]

import mlx_maple as maple  # isort: skip

import argparse
import datetime
import json
import platform
import subprocess
import time
from types import SimpleNamespace
from typing import Any

import judge
import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_maple.drawing import clock
from mlx_maple.engine.measure import random_sd15
from mlx_maple.pipeline import StableDiffusion
from mlx_maple.sampling import NoiseSchedule
from mlx_maple.text.tokenizer import Tokenizer

RESULTS = Path(__file__).parent / "results" / "switches.json"
PROMPTS = {  # what the judge is to read, as in tests/test_embedded_model.py
    "a blue maple leaf on a yellow background": "maple leaf",
    "an orange whale on a light blue background": "whale",
    "a green frog on a purple background": "frog",
    "a red rose on a black background": "rose",
    "a pink elephant on a green background": "elephant",
}
SWITCHES: dict[str, dict[str, Any]] = {
    "none": {},
    "guidance_end=0.8": {"guidance_end": 0.8},
    "guidance_end=0.5": {"guidance_end": 0.5},
    "guidance_rescale=0.7": {"guidance_rescale": 0.7},
    "freeu=(1.2, 1.4, 0.9, 0.2)": {"freeu": (1.2, 1.4, 0.9, 0.2)},
    "tile=xy": {"tile": "xy"},
    "token_merging=0.3": {"token_merging": 0.3},
    "token_merging=0.5": {"token_merging": 0.5},
    "deep_cache=2": {"deep_cache": 2},
    "deep_cache=3": {"deep_cache": 3},
    "deep_cache=5": {"deep_cache": 5},
    "deep_cache=3, branch 2": {"deep_cache": 3, "deep_cache_branch": 2},
    "deep_cache=3, token_merging=0.5": {"deep_cache": 3, "token_merging": 0.5},
}
SIDES = {"sd15": (512, 1024)}  # pixels at which each size is timed
RUNS = 2  # drawings of each switch behind the one that warms up
CELL, GAP = 128, 4  # pixels of a sheet


def main() -> None:
    """Draw, print a line a switch, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=None, help="what to draw with; the embedded one if none")
    parser.add_argument("--size", choices=SIDES, help="random weights of this size instead")
    parser.add_argument("--side", type=int, action="append", help="pixels, with --size")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, help="scale; the model's own if left out")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many of them")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--sheet", type=Path, help="a picture of all pictures, a row a prompt")
    args = parser.parse_args()
    is_cpu = mx.default_device().type == mx.DeviceType.cpu
    if is_cpu:  # what a drawing used, whoever else runs
        clock.time = SimpleNamespace(perf_counter=time.process_time)

    if args.size:
        sd = random_model()
        found = [timed(sd, side, args.steps) for side in args.side or SIDES[args.size]]
    else:
        sd = maple.load(args.model)
        if args.guidance is not None:
            sd.defaults["guidance_scale"] = args.guidance
        found = [drawn(sd, args)]
    facts = {
        "device": device(),
        "seconds": "of the CPU" if is_cpu else "of the clock",
        "model": args.size or sd_name(args.model),
        "is_random": bool(args.size),
        "steps": args.steps,
        **{name: sd.defaults[name] for name in ("sampler", "schedule", "guidance_scale")},
        "mlx": mx.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    keep(args.output, [{**facts, **each} for each in found])


def drawn(sd: StableDiffusion, args: argparse.Namespace) -> dict[str, Any]:
    """Each switch on all prompts, one prompt after the other: none has all the bad moments."""
    sd(next(iter(PROMPTS)), seed=0, steps=2)
    steps, prompts = args.steps, dict(list(PROMPTS.items())[: args.prompts])
    rows = {label: {"seconds": [], "psnr": [], "score": [], "read": 0} for label in SWITCHES}
    pictures = []
    for seed, (prompt, name) in enumerate(prompts.items()):
        pictures.append([])
        for label, arguments in SWITCHES.items():
            result = sd(prompt, seed=seed, steps=steps, **arguments)
            picture, row = result.images[0], rows[label]
            pictures[-1].append(picture)
            row["seconds"].append(result.timings["sample"] / steps)
            row["psnr"].append(psnr(picture, pictures[-1][0]))
            row["score"].append(judge.scores(picture)[name])
            row["read"] += name in judge.best(picture)
    side = pictures[0][0].width
    if args.sheet is not None:
        save_sheet(pictures, args.sheet)
    found = []
    for label, row in rows.items():
        near = None if label == "none" else round(float(np.mean(row["psnr"])), 2)
        found.append(
            {
                "switch": label,
                "step_s": round(min(row["seconds"]), 5),
                "psnr": near,
                "least_psnr": None if near is None else round(float(min(row["psnr"])), 2),
                "read": row["read"],
                "score": round(float(np.mean(row["score"])), 3),
            }
        )
        print(json.dumps(found[-1]), flush=True)
    return {"side": side, "prompts": len(prompts), "rows": found}


def timed(sd: StableDiffusion, side: int, steps: int) -> dict[str, Any]:
    """Each switch's seconds a step at a size."""
    found = []
    for label, arguments in SWITCHES.items():
        seconds = [
            sd("a", seed=run, steps=steps, width=side, height=side, **arguments).timings["sample"]
            for run in range(1 + RUNS)
        ]
        found.append({"switch": label, "step_s": round(min(seconds[1:]) / steps, 6)})
        print(json.dumps({"side": side, **found[-1]}), flush=True)
    return {"side": side, "prompts": 1, "rows": found}


def random_model() -> StableDiffusion:
    """SD 1.5 with random weights, in the type that this device draws in."""
    dtype = mx.float32 if mx.default_device().type == mx.DeviceType.cpu else mx.float16

    def part(name: str) -> Any:
        return random_sd15(dtype, parts=[name])[name]

    parts = ("text_encoder", "unet", "vae")
    return StableDiffusion(
        **{name: part(name) for name in parts},
        tokenizer=Tokenizer.bundled(),
        noise_schedule=NoiseSchedule.from_betas(),
    )


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Of two pictures, in dB."""
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def save_sheet(pictures: list[list[Image.Image]], path: Path) -> None:
    """All pictures in one: a row a prompt, a column a switch."""
    step = CELL + GAP
    sheet = Image.new("RGB", (step * len(SWITCHES) - GAP, step * len(pictures) - GAP), "white")
    for y, row in enumerate(pictures):
        for x, picture in enumerate(row):
            sheet.paste(picture.resize((CELL, CELL)), (step * x, step * y))
    sheet.save(path, optimize=True)


def keep(path: Path, runs: list[dict[str, Any]]) -> None:
    """Put runs into the file of results, in the place of those of the same device and model."""
    old = json.loads(path.read_text())["runs"] if path.is_file() else []

    def key(run: dict[str, Any]) -> tuple[Any, ...]:
        return run["device"], run["model"], run["side"], run["guidance_scale"]

    new = {key(run): run for run in [*old, *runs]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"runs": list(new.values())}, indent=1) + "\n")


def device() -> str:
    """What draws, by name."""
    if mx.default_device().type == mx.DeviceType.cpu:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else f"CPU, {platform.machine()}"
    return str(mx.device_info().get("device_name", mx.default_device()))


def sd_name(model: str | None) -> str:
    """A model's name for the table."""
    return "demo" if model is None else Path(model).stem


def commit() -> str | None:
    """The checkout's, where git knows it."""
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


if __name__ == "__main__":
    main()
