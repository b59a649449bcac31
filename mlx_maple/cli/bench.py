"""`maple bench`: what this machine takes for each part of the work, and what others take."""

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from mlx_maple import __version__
from mlx_maple.cli import DONE, FAULT, USAGE, Failure, _bench_plot, _outputs, _terminal

OURS = "mlx-maple"
RIVAL_FORMS = {"diffusers eager": [], "diffusers compiled": ["--compiled"]}
RIVAL_NEEDS = ("torch", "diffusers", "transformers")
WORDS = {
    "unet": "UNet, {size}x{size}, batch {batch}",
    "vae": "decoding to {size}x{size}",
    "text": "prompt and negative prompt",
    "image": "whole picture, {size}x{size}, 20 steps",
    "start": "start of the command to the first step",
}
STARTS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add(
        "-m",
        "--model",
        metavar="MODEL",
        help="measure this model (default: SD 1.5's architecture with random weights, no file)",
    )
    add(
        "--size",
        metavar="N",
        type=int,
        action="append",
        help="picture size in pixels, again for more (default: 512, 768 and 1024; 256 on the CPU)",
    )
    add(
        "--batch",
        metavar="N",
        type=int,
        action="append",
        help="the UNet's batch, two a guided picture, again for more (default: 2 and 8; 2)",
    )
    add(
        "--case",
        metavar="CASE",
        action="append",
        help="measure this alone, such as unet-512-b2, vae-512, text, image-512, start",
    )
    add(
        "--against",
        choices=("diffusers",),
        help="measure the same work with diffusers on torch too, which must be installed",
    )
    add("--dtype", choices=("float16", "bfloat16", "float32"), help="type of weights and maps")
    add("--runs", metavar="N", type=int, help="calls that count (default: 20; 3 on the CPU)")
    add("--warm-up", metavar="N", type=int, help="calls before them (default: 5; 1 on the CPU)")
    add(
        "--published",
        action="store_true",
        help="show what others published for Apple chips, elsewhere than on one too",
    )
    add("--output", metavar="FILE", type=Path, help="write the results as JSON")
    add("--plot", metavar="IMAGE", type=Path, help="draw the results as a PNG")
    add("--json", action="store_true", help="print one JSON object")
    add("--quiet", action="store_true", help="show no progress on stderr")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write what is asked for."""
    cases = plan(args)  # a wrong case is told before anything runs
    rivals: dict[str, list[str]] = {OURS: []}
    if args.against:
        rivals |= RIVAL_FORMS
        if lacking := [name for name in RIVAL_NEEDS if importlib.util.find_spec(name) is None]:
            raise Failure(
                FAULT,
                f"--against diffusers needs {', '.join(lacking)}, which is not installed: "
                f"pip install {' '.join(RIVAL_NEEDS)}",
            )
    known = facts(args)
    screen = _terminal.Screen(quiet=args.quiet or args.json)
    if not args.json:
        print(f"{describe(known)}\n\n{HEADING}", flush=True)
    rows: list[dict[str, Any]] = []
    for i, (kind, group) in enumerate(cases.items()):
        for rival in rivals:
            if rival != OURS and (kind == "start" or (kind == "text" and "compiled" in rival)):
                continue  # torch starts otherwise, and its text encoder is not compiled
            screen.progress(f"{kind}, {rival}", i, len(cases))
            for row in measure(rival, rivals[rival], group, args, known["backend"]):
                rows.append({"rival": rival, **row})
                screen.clear()
                if not args.json:
                    print(line(rows[-1], rows), flush=True)
    screen.clear()
    shown = published() if known["backend"] == "metal" or args.published else []
    report = {"facts": known, "rows": rows, "published": shown}
    if not args.json and shown:
        print("\n" + "\n".join(published_lines(shown)))
    write(args, report)
    if args.json:
        print(json.dumps(report))
    if all("error" in row for row in rows):
        raise Failure(FAULT, f"nothing could be measured: {rows[0]['error']}")
    return DONE


def plan(args: argparse.Namespace) -> dict[str, list[str]]:
    """The cases to measure, by kind, in the order in which they run."""
    from mlx_maple.cli._bench_cases import Case

    on_cpu = backend() == "cpu"
    args.runs = (3 if on_cpu else 20) if args.runs is None else args.runs
    args.warm_up = (1 if on_cpu else 5) if args.warm_up is None else args.warm_up
    if args.runs < 1 or args.warm_up < 0:
        raise Failure(USAGE, "--runs must be at least 1 and --warm-up at least 0")
    names = args.case
    if names is None:
        sizes = args.size or ([256] if on_cpu else [512, 768, 1024])
        batches = args.batch or ([2] if on_cpu else [2, 8])
        names = [f"unet-{size}-b{batch}" for size in sizes for batch in batches]
        names += [f"vae-{size}" for size in sizes] + ["text", f"image-{sizes[0]}"]
        names += ["start"] if args.model else []
    elif args.size or args.batch:
        raise Failure(USAGE, "--case says sizes and batches itself: leave --size and --batch out")
    groups: dict[str, list[str]] = {}
    for name in names:
        try:
            case = Case.parse(name)
        except ValueError as error:
            raise Failure(USAGE, f"--case {error}") from error
        groups.setdefault(case.kind, []).append(case.name)
    if "start" in groups and not args.model:
        raise Failure(USAGE, "--case start needs a model to start with: -m MODEL")
    return groups


# Measuring ---------------------------------------------------------------------------------------


def measure(
    rival: str, options: Sequence[str], cases: Sequence[str], args: argparse.Namespace, device: str
) -> Iterator[dict[str, Any]]:
    """A rival's rows for some cases, from a process of its own."""
    rows = 0 if device == "cpu" else 3
    times = [f"--warm-up={args.warm_up}", f"--runs={args.runs}", f"--rows={rows}"]
    dtype = args.dtype or ("float32" if device == "cpu" else "float16")
    if rival == OURS and cases == ["start"]:
        yield start(args.model, dtype)
        return
    if rival == OURS:
        command = [sys.executable, "-m", "mlx_maple.cli._bench_worker", *cases]
        command += [f"--model={args.model}"] if args.model else []
    else:
        script = files("mlx_maple") / "cli" / "rivals" / "torch_diffusers.py"
        torch_device = "mps" if device == "metal" else device
        command = [sys.executable, str(script), *cases, f"--device={torch_device}", *options]
    yield from process([*command, f"--dtype={dtype}", *times], cases)


def process(
    command: Sequence[str], cases: Sequence[str], environment: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """Run a process that prints a line of JSON a case; its rows, and what it died of.

    Args:
        command: to run.
        cases: that it will tell of.
        environment: of the process; None is this one's.
    """
    left = list(cases)
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment
        ) as worker,
    ):
        try:
            assert worker.stdout is not None
            for text in worker.stdout:
                if not text.startswith("{"):
                    continue
                row = json.loads(text)
                if "exit_code" in row:  # the model itself cannot be used
                    raise Failure(row["exit_code"], row["error"])
                left.remove(row["case"])
                yield row
            code = worker.wait()
        except BaseException:  # an interrupt too: nobody is there to read what it prints
            worker.kill()
            raise
        if left:
            said.seek(0)
            last = [text.strip() for text in said.read().splitlines() if text.strip()][-1:]
            reason = f"its process ended with {code}: {' '.join(last)}"[:300]
            yield from ({"case": case, "error": reason} for case in left)


def start(model: str, dtype: str) -> dict[str, Any]:
    """The median start of a process that loads a model, and all that were measured."""
    found = []
    command = [sys.executable, "-m", "mlx_maple.cli._bench_worker", "start"]
    command += [f"--model={model}", f"--dtype={dtype}"]
    for _ in range(STARTS):
        begun = {**os.environ, "MAPLE_BENCH_BEGUN": repr(time.time())}
        rows = list(process(command, ["start"], begun))
        if "error" in rows[0]:
            return rows[0]
        found.append(rows[0])
    found.sort(key=lambda row: row["median_s"])
    seconds = [row["median_s"] for row in found]
    return found[len(found) // 2] | {
        "fastest_s": seconds[0],
        "slowest_s": seconds[-1],
        "runs": len(found),
    }


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """The machine, the versions and the commit that the figures hold for."""
    from mlx_maple.cli import doctor

    found = doctor.examine()
    versions: dict[str, str] = {}
    for name in ("mlx", "numpy", *RIVAL_NEEDS):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "date": datetime.date.today().isoformat(),
        "maple": __version__,
        "commit": commit(),
        "backend": found["mlx_backend"],
        "device": found["mlx_device"],
        "processor": found["processor"],
        "memory": found["memory"],
        "system": found["system"],
        "python": platform.python_version(),
        "versions": versions,
        "model": args.model or "SD 1.5's architecture, random weights",
        "dtype": args.dtype or found["default_dtype"],
        "runs": args.runs,
        "warm_up": args.warm_up,
    }


def commit() -> str | None:
    """Of the checkout that runs, or None where there is none."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def backend() -> str:
    """Where MLX works here."""
    from mlx_maple.engine.attention import running_backend

    return running_backend()


# Showing -----------------------------------------------------------------------------------------

COLUMNS = ("median", "fastest", "slowest", "in a row", "first", "peak", "prims", "times")
HEADING = f"{'':<42}{'':<20}" + "".join(f"{name:>10}" for name in COLUMNS)


def line(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """One row of the table."""
    head = f"{words(row['case']):<42}{row['rival']:<20}"
    if "error" in row:
        return f"{head}  {row['error']}"
    names = ("median_s", "fastest_s", "slowest_s", "in_a_row_s", "first_s")
    values = (row.get(name) for name in names)
    figures = "".join(
        f"{'' if value is None else _bench_plot.milliseconds(value):>10}" for value in values
    )
    peak = _terminal.size(row["peak_bytes"]) if row.get("peak_bytes") else ""
    ours = next(
        (
            r["median_s"]
            for r in rows
            if (r["rival"], r["case"]) == (OURS, row["case"]) and r.get("median_s")
        ),
        None,
    )
    ratio = f"{row['median_s'] / ours:.2f}" if ours and row["rival"] != OURS else ""
    text = f"{head}{figures}{peak:>10}{row.get('primitives', ''):>10}{ratio:>10}"
    parts = dict(row.get("parts_s") or {})
    if "without_unet_s" in row:
        parts["all but the UNet"] = row["without_unet_s"]
    if parts:
        said = ", ".join(f"{k} {_bench_plot.milliseconds(v)}" for k, v in parts.items())
        text += f"\n{'':<4}of which: {said}"
    return text


def words(case: str) -> str:
    """A case as people say it."""
    from mlx_maple.cli._bench_cases import Case

    found = Case.parse(case)
    return WORDS[found.kind].format(size=found.size, batch=found.batch)


def describe(known: Mapping[str, Any]) -> str:
    """The facts in three lines."""
    versions = ", ".join(f"{k} {v}" for k, v in known["versions"].items())
    at = f" at {known['commit']}" if known["commit"] else ""
    return (
        f"{known['device']} ({known['backend']}), {known['processor']}, {known['memory']}\n"
        f"maple {known['maple']}{at}, {versions}\n"
        f"{known['model']}, {known['dtype']}; medians of {known['runs']} calls after "
        f"{known['warm_up']}"
    )


def published() -> list[dict[str, Any]]:
    """What others have published for Apple chips."""
    return json.loads((files("mlx_maple") / "cli" / "published.json").read_text())


def published_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """They, for people; not measured here."""
    lines = ["published by others, not measured here:"]
    for row in rows:
        work = f"{row['device']:<24}{row['stack']:<26}{row['work']:<40}"
        lines.append(f"  {work}{row['text']} ({row['source']})")
    return lines


def write(args: argparse.Namespace, report: Mapping[str, Any]) -> None:
    """The files that were asked for."""
    if args.output is not None:
        with _outputs.whole_file(args.output) as hidden:
            hidden.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot is not None:
        known = report["facts"]
        names = {row["case"]: words(row["case"]) for row in report["rows"]}
        groups = _bench_plot.bars_of(report["rows"], report["published"], names)
        title = f"Stable Diffusion on {known['device']}"
        below = (
            f"{known['model']}, {known['dtype']}, mlx {known['versions']['mlx']}, {known['date']}"
        )
        footer = (
            "median of single calls, each waited for; shorter is better; "
            "every group has a scale of its own"
        )
        image = _bench_plot.plot(title, below, groups, footer)
        with _outputs.whole_file(args.plot) as hidden:
            image.save(hidden, format="PNG")
