"""Converting a checkpoint of SD 1.4's true size: time against ``cp``, and peak resident memory.

    python benchmarks/convert_streaming.py [--folder F] [--rounds N]

Makes a 4.27 GB fp32 .ckpt (the published shapes, random values) in ``--folder``, which needs 13 GB
free. Each round times, on the same file and in turns: ``cp``, ``cp`` with its data brought to the
disk, and ``maple-convert`` to fp16 in a process of its own, which always brings its data to the
disk and computes the source's sha256. The file is read once before, so that all of them find it in
the page cache. Figures are medians; memory is the largest ru_maxrss of the converting processes.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "convert_streaming.json"
sys.path.insert(0, str(ROOT / "tests" / "convert"))

from torch_files import write_torch_zip  # noqa: E402

from maple_convert.layouts import LAYOUTS, files  # noqa: E402

PREFIXES = {
    "text_encoder": ("transformers", "cond_stage_model.transformer."),
    "unet": ("compvis", "model.diffusion_model."),
    "vae": ("compvis", "first_stage_model."),
}


def make_checkpoint(path: Path, *, ema: bool) -> None:
    """Write a zip .ckpt with every tensor of SD 1.4, each a window into the same random numbers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (spelling, prefix) in PREFIXES.items():
        layout = LAYOUTS[name]
        for row in layout.rows(layout.published_config, spelling):
            shapes[prefix + row.published] = row.published_shape
            if ema and name == "unet":
                shapes[files.ema_name(row)] = row.published_shape
    largest = max(int(np.prod(shape)) for shape in shapes.values())
    noise = np.random.default_rng(0).standard_normal(largest, np.float32) * np.float32(0.02)
    state = {key: noise[: int(np.prod(shape))].reshape(shape) for key, shape in shapes.items()}
    write_torch_zip(path, {"global_step": 470000, "state_dict": state})


def timed(command: list[str]) -> tuple[float, int]:
    """Run a command; its seconds and its largest resident memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[0]} ended with {process.returncode}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Make the file, take the times, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ema", action="store_true", help="with an EMA copy: 7.7 GB")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint in --folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        source = (args.folder if args.keep and args.folder else folder) / "sd-v1-4-size.ckpt"
        if not source.exists():
            make_checkpoint(source, ema=args.ema)
            os.sync()
        with open(source, "rb") as file:
            while file.read(1 << 24):
                pass
        convert = [sys.executable, "-m", "maple_convert", str(source), "--quiet"]
        copy, out = folder / "copy.ckpt", folder / "out"
        works = {
            "cp": ["cp", str(source), str(copy)],
            "cp, on the disk": ["sh", "-c", f"cp '{source}' '{copy}' && sync '{copy}'"],
            "maple-convert to float16": [*convert, str(out), "--dtype", "float16"],
            "the same without sha256": [*convert, str(out), "--dtype", "float16", "--no-digest"],
            "maple-convert as stored": [*convert, str(out)],
        }
        taken: dict[str, list[tuple[float, int]]] = {name: [] for name in works}
        for _ in range(args.rounds):
            for name, command in works.items():
                taken[name].append(timed(command))
                copy.unlink(missing_ok=True)
                shutil.rmtree(out, ignore_errors=True)
                os.sync()  # what one leaves to the disk must not slow the next
        gigabytes = source.stat().st_size / 1e9
    base = statistics.median(seconds for seconds, _ in taken["cp"])
    rows = {
        name: {
            "seconds": round(statistics.median(seconds for seconds, _ in runs), 2),
            "all_seconds": [round(seconds, 2) for seconds, _ in runs],
            "times_cp": round(statistics.median(seconds for seconds, _ in runs) / base, 2),
            "max_rss_mb": round(max(rss for _, rss in runs) / 1e6),
        }
        for name, runs in taken.items()
    }
    print(f"{gigabytes:.2f} GB, {os.cpu_count()} cores, median of {args.rounds}\n")
    print(f"{'':28} {'seconds':>8} {'x cp':>6} {'max RSS':>9}")
    for name, row in rows.items():
        print(f"{name:28} {row['seconds']:8.2f} {row['times_cp']:6.2f} {row['max_rss_mb']:6} MB")
    machine = {
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    report = {"gigabytes": round(gigabytes, 2), "ema": args.ema, "machine": machine, "rows": rows}
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
