"""Seconds a UNet step takes on this CPU: mlx-maple, diffusers on torch, mlx-examples on MLX.

    python benchmarks/cpu_networks.py --mlx-examples PATH_TO_A_CHECKOUT [--case tiny] [--case full]

Float32, random weights, a batch of two (one step with guidance). Every rival runs in a process of
its own with the same number of threads; the processes take turns, so that a busy minute of the
machine falls on all of them. A figure is the median over all turns of synchronised steps after
warm-up; CPU seconds are those of all threads, and stand where other work disturbs the clock. Rivals
that are not installed are left out.
"""

import mlx_maple  # noqa: F401, I001  (first: it preloads OpenBLAS before mlx.core is imported)

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "cpu_networks.json"
TOKENS = 77
STEPS = (937.0, 521.25, 41.0)  # timesteps in turn: no rival may reuse the last one's embedding


@dataclass(frozen=True)
class Case:
    """One size of network and latents."""

    widths: tuple[int, ...]
    context: int
    latent_size: int
    turns: int
    steps: int  # timed ones a turn
    warm_up: int = 1


CASES = {
    "tiny": Case((64, 128, 64, 64), 128, latent_size=16, turns=3, steps=15, warm_up=3),
    "full-32": Case((320, 640, 1280, 1280), 768, latent_size=32, turns=2, steps=3),
    "full": Case((320, 640, 1280, 1280), 768, latent_size=64, turns=1, steps=3),
}
RIVALS = {
    "mlx-maple": "this project's UNet",
    "mlx-maple compiled": "the same under mx.compile",
    "diffusers": "diffusers' UNet2DConditionModel on torch, eager",
    "diffusers channels_last": "the same with channels-last weights and latents",
    "mlx-examples": "the UNet of ml-explore/mlx-examples' stable_diffusion, on the same MLX",
}

Step = Callable[[float], None]  # runs one forward pass at a timestep, to the end


def maple_step(case: Case, compiled: bool) -> Step:
    import mlx.core as mx

    from mlx_maple.models import UNet, UNetConfig

    unet = UNet(UNetConfig(block_out_channels=case.widths, cross_attention_dim=case.context))
    mx.eval(unet.parameters())
    latents, context = (mx.array(a) for a in inputs(case))
    call = mx.compile(unet.__call__) if compiled else unet
    return lambda t: mx.eval(call(latents, mx.array([t, t]), context))


def diffusers_step(case: Case, channels_last: bool) -> Step:
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    unet = UNet2DConditionModel(
        block_out_channels=case.widths,
        cross_attention_dim=case.context,
        attention_head_dim=8,
        sample_size=case.latent_size,
    ).eval()
    latents, context = (torch.from_numpy(a) for a in inputs(case))
    latents = latents.permute(0, 3, 1, 2)
    if channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    else:
        latents = latents.contiguous()

    def step(t: float) -> None:
        with torch.inference_mode():
            unet(latents, torch.tensor([t, t]), context)

    return step


def mlx_examples_step(case: Case, checkout: Path) -> Step:
    import mlx.core as mx

    # Its package imports a downloader and a tokenizer at the top: take the two files needed only.
    folder = checkout / "stable_diffusion" / "stable_diffusion"
    spec = importlib.util.spec_from_loader("stable_diffusion", loader=None, is_package=True)
    assert spec is not None
    spec.submodule_search_locations = [str(folder)]
    sys.modules["stable_diffusion"] = importlib.util.module_from_spec(spec)
    theirs = importlib.import_module("stable_diffusion.unet")

    crossed, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    config = theirs.UNetConfig(
        block_out_channels=case.widths,
        num_attention_heads=(8,) * 4,
        cross_attention_dim=(case.context,) * 4,
        down_block_types=(crossed, crossed, crossed, plain),
        up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
    )
    unet = theirs.UNetModel(config)
    mx.eval(unet.parameters())
    latents, context = (mx.array(a) for a in inputs(case))
    return lambda t: mx.eval(unet(latents, mx.array([t, t]), context))


def inputs(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Latents (2, h, w, 4) and context (2, T, D) of unit variance."""
    generator = np.random.default_rng(0)
    latents = generator.standard_normal((2, case.latent_size, case.latent_size, 4), np.float32)
    return latents, generator.standard_normal((2, TOKENS, case.context), np.float32)


def worker(rival: str, case: Case, checkout: Path | None) -> dict[str, object]:
    """One turn of one rival: the seconds of each step and the process's peak memory."""
    if rival.startswith("mlx-maple"):
        step = maple_step(case, compiled=rival.endswith("compiled"))
    elif rival.startswith("diffusers"):
        step = diffusers_step(case, channels_last=rival.endswith("channels_last"))
    else:
        assert checkout is not None
        step = mlx_examples_step(case, checkout)
    for t in STEPS[: case.warm_up]:
        step(t)
    seconds, cpu_seconds = [], []
    for i in range(case.steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        step(STEPS[i % len(STEPS)])
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gib": peak}


def run_case(name: str, rivals: list[str], threads: int, checkout: Path | None) -> list[dict]:
    """All turns of all rivals on one case: a row for each rival."""
    turns: dict[str, list[dict]] = {rival: [] for rival in rivals}
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }
    for turn in range(CASES[name].turns):
        for rival in rivals:
            print(f"{name}: turn {turn + 1} of {CASES[name].turns}, {rival}", file=sys.stderr)
            command = [sys.executable, __file__, "--worker", rival, "--case", name]
            if checkout is not None:
                command += ["--mlx-examples", str(checkout)]
            done = subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            )
            turns[rival].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for rival, results in turns.items():
        seconds, cpu_seconds = (
            [s for result in results for s in result[key]] for key in ("seconds", "cpu_seconds")
        )
        rows.append(
            {
                "case": name,
                "rival": rival,
                "median_s": statistics.median(seconds),
                "median_cpu_s": statistics.median(cpu_seconds),
                "fastest_s": min(seconds),
                "slowest_s": max(seconds),
                "steps": len(seconds),
                "peak_gib": max(result["peak_gib"] for result in results),
            }
        )
    return rows


def available(checkout: Path | None) -> list[str]:
    torch = all(importlib.util.find_spec(name) is not None for name in ("torch", "diffusers"))
    return [
        rival
        for rival in RIVALS
        if rival.startswith("mlx-maple")
        or (rival.startswith("diffusers") and torch)
        or (rival == "mlx-examples" and checkout is not None)
    ]


def facts(threads: int) -> dict[str, object]:
    """What the figures hold for: machine, load before the run, versions, commit."""
    versions = {}
    for name in ("mlx", "torch", "diffusers", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or None,
        "machine": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": versions,
        "dtype": "float32",
        "batch": 2,
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", choices=CASES, help="default: tiny and full")
    parser.add_argument("--mlx-examples", type=Path, help="a checkout of ml-explore/mlx-examples")
    parser.add_argument("--rival", action="append", choices=RIVALS, help="default: all there are")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=RIVALS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cases = args.case or ["tiny", "full"]
    if args.worker:
        print(json.dumps(worker(args.worker, CASES[cases[0]], args.mlx_examples)))
        return

    report: dict = {"facts": facts(args.threads), "rows": []}
    rivals = args.rival or available(args.mlx_examples)
    for name in cases:
        report["rows"] += run_case(name, rivals, args.threads, args.mlx_examples)
    report["facts"]["load_after"] = [round(load, 2) for load in os.getloadavg()]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")

    print(json.dumps(report["facts"]))
    columns = ("median_s", "median_cpu_s", "fastest_s", "slowest_s", "peak_gib")
    print(f"{'case':<8} {'rival':<24}" + "".join(f"{column:>13}" for column in columns))
    for row in report["rows"]:
        figures = "".join(f"{row[column]:>13.3f}" for column in columns)
        print(f"{row['case']:<8} {row['rival']:<24}{figures}")


if __name__ == "__main__":
    main()
