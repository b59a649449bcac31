"""Write docs/benchmarks.md from the results that are kept in benchmarks/results/.

    python benchmarks/make_page.py [--check]

Every file of results has a section, which says how to have it made again. ``--check`` writes
nothing, and ends with 1 where the page is not what the results make it.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
PUBLISHED = ROOT / "mlx_maple" / "cli" / "published.json"

HEAD = """# Benchmarks

This page is made by `python benchmarks/make_page.py` from the files in `benchmarks/results/`; a
test fails where the two differ. A time is the median of single calls that were each waited for,
after a warm-up that does not count, unless its table says otherwise. Times of different machines,
or of one machine on different days, are not set against each other: a table was measured in one
run, or says which commits it is of. To measure a machine of your own, with a plot:

```sh
# needs: minutes, and some gigabytes of memory
maple bench --plot bench.png --output bench.json
maple bench --against diffusers      # the same work on torch, where that is installed
```
"""


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    lines += ["| " + " | ".join("" if v is None else str(v) for v in row) + " |" for row in rows]
    return "\n".join(lines)


def ms(seconds: float | None) -> str | None:
    """Milliseconds, with three digits that count."""
    if seconds is None:
        return None
    value = 1e3 * seconds
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def command(text: str, needs: str) -> str:
    """How to make a section's figures again; the tests run no block that needs something."""
    return f"```sh\n# needs: {needs}\n{text}\n```"


# Sections ----------------------------------------------------------------------------------------

WORDS = {
    "unet-512-b2": "guided step, 512x512",
    "unet-512-b8": "guided step, 512x512, 4 pictures",
    "unet-768-b2": "guided step, 768x768",
    "unet-1024-b2": "guided step, 1024x1024",
    "xl-1024-b2": "guided step of SDXL, 1024x1024",
    "vae-512": "decoding to 512x512",
    "text": "prompt and negative prompt",
    "image-512": "whole picture, 512x512, 20 steps",
    "start": "from the start of the command to the first step",
}


def gpu_networks(report: Mapping[str, Any]) -> str:
    found = [
        """## Networks on a GPU

SD 1.5's architecture, random weights, float16. Milliseconds, and in brackets those of a call in a
row, when nobody waits between 20 of them. A guided step is a batch of two a picture; ours holds the
guidance too, reads the prompt once beforehand, and is one compiled function."""
    ]
    devices = list(dict.fromkeys(row["device"] for row in report["rows"]))
    for device in devices:
        rows = [row for row in report["rows"] if row["device"] == device]
        rivals = list(dict.fromkeys(row["rival"] for row in rows))
        cases = [c for c in WORDS if any(row["case"] == c for row in rows)]
        cases += list(dict.fromkeys(r["case"] for r in rows if r["case"] not in WORDS))
        by = {(row["rival"], row["case"]): row for row in rows}
        found.append(f"### {device}")
        body = []
        for case in cases:
            line: list[str | None] = [WORDS.get(case, case)]
            for rival in rivals:
                row = by.get((rival, case), {})
                if "error" in row:
                    line.append("failed")
                elif not row:
                    line.append(None)
                else:
                    own = row.get("in_a_row_s")
                    line.append(f"{ms(row['median_s'])}" + (f" ({ms(own)})" if own else ""))
            body.append(line)
        found.append(table(["", *rivals], body))
        others = [rival for rival in rivals if not rival.startswith("mlx-maple")]
        ratios = []
        for case in cases:
            ours = by.get(("mlx-maple", case), {}).get("median_s")
            if ours and any(by.get((rival, case), {}).get("median_s") for rival in others):
                line = [WORDS.get(case, case)]
                for rival in others:
                    theirs = by.get((rival, case), {}).get("median_s")
                    line.append(f"{theirs / ours:.2f}" if theirs else None)
                ratios.append(line)
        if ratios:
            found.append("How many times ours they take, both waited for:")
            found.append(table(["", *others], ratios))
        found.append(_turns(by))
        found.append(_whole(by))
        facts = list(dict.fromkeys(_facts(row["facts"]) for row in rows))
        found.append("Measured with " + "; and with ".join(facts) + ".")
    found.append(
        command(
            "python benchmarks/gpu_networks.py --mlx-examples CHECKOUT",
            "an NVIDIA card, torch, diffusers, a checkout of ml-explore/mlx-examples",
        )
    )
    return "\n\n".join(part for part in found if part)


def _turns(by: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """The rounds of those that took turns, of which the tables have the middle."""
    said: dict[str, list[str]] = {}
    for (rival, case), row in by.items():
        if row.get("rounds_s"):
            rounds = ", ".join(ms(seconds) for seconds in row["rounds_s"])
            said.setdefault(case, []).append(f"{rival} {rounds}")
    lines = [f"- {WORDS.get(case, case)}: {'; '.join(each)}" for case, each in said.items()]
    told = (
        "The rivals took turns, for a host that others share is slower for seconds at a time, and "
    )
    told += "the tables have the middle of"
    return f"{told}\n\n" + "\n".join(lines) if lines else ""


def _whole(by: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """What a whole picture takes beside its UNet calls, and a start."""
    said = []
    picture = by.get(("mlx-maple", "image-512"), {})
    if picture.get("without_unet_s"):
        said.append(
            f"A whole picture takes {ms(picture['without_unet_s'])} ms with a UNet that answers at "
            f"once"
            + (
                f", and {ms(picture['minus_unet_s'])} ms more than 20 steps in a row."
                if picture.get("minus_unet_s") is not None
                else "."
            )
        )
    start = by.get(("mlx-maple", "start"), {})
    if start.get("parts_s"):
        parts = ", ".join(f"{k} {ms(v)}" for k, v in start["parts_s"].items())
        said.append(f"Of a start: {parts} ms, with the files in the page cache.")
    return "\n".join(said)


def _facts(facts: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items() if v)
    at = f"commit {facts['commit']}" if facts.get("commit") else "an unnamed commit"
    return f"{versions}, Python {facts['python']}, {at}, {facts['date']}"


def cpu_networks(report: Mapping[str, Any]) -> str:
    facts = report["facts"]
    rows = [
        [
            f"{row['case']}, {row['rival']}",
            f"{row['median_s']:.3g}",
            f"{row['median_cpu_s']:.3g}",
            f"{row['fastest_s']:.3g}",
            f"{row['slowest_s']:.3g}",
            f"{row['peak_gib']:.2f}",
        ]
        for row in report["rows"]
    ]
    heads = ["seconds a step", "median", "CPU time", "fastest", "slowest", "peak GiB"]
    return "\n\n".join(
        [
            """## Networks on a CPU

A UNet's call on a batch of two in float32: `tiny` is a small UNet at 16x16 latents, `full` SD 1.5's
at 64x64, `full-32` the same at 32x32.""",
            table(heads, rows),
            f"{facts['machine']}, {facts['threads']} threads; load before and after: "
            f"{facts['load_before'][0]}, {facts['load_after'][0]}. {_facts(facts)}.",
            command(
                "python benchmarks/cpu_networks.py --mlx-examples CHECKOUT",
                "torch, diffusers, a checkout of ml-explore/mlx-examples, a calm half hour",
            ),
        ]
    )


def convert_streaming(report: Mapping[str, Any]) -> str:
    rows = [
        [name, f"{row['seconds']:.2f}", f"{row['times_cp']:.2f}", row["max_rss_mb"]]
        for name, row in report["rows"].items()
    ]
    machine = report["machine"]
    return "\n\n".join(
        [
            f"""## Converting

A checkpoint of SD 1.4's size, {report["gigabytes"]} GB in float32, with its file in the page cache.
A conversion always brings its data to the disk, and computes the source's sha256 unless told not
to.""",
            table(["", "seconds", "times `cp`", "peak resident MB"], rows),
            f"{machine['cores']} cores, {machine['system']}, Python {machine['python']}, numpy "
            f"{machine['numpy']}.",
            command("python benchmarks/convert_streaming.py", "13 GB of disk"),
        ]
    )


def counts(report: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{row['what']}, {row['size']}x{row['size']}, {row['form']}",
            row["kernels"],
            row["views"],
            f"{row['weight_bytes'] / 1e9:.3f}",
        ]
        for row in report["rows"]
    ]
    return "\n\n".join(
        [
            """## Primitives

How many of MLX's primitives SD 1.5's networks evaluate in float16, as published and as they are
made ready for a backend. Views are apart: they only see memory in another shape. A test keeps these
from growing (tests/engine/test_count.py).""",
            table(["", "kernels", "views", "GB of weights read"], rows),
            f"Counted with MLX {report['mlx']}.",
            command("python benchmarks/counts.py", "two gigabytes of memory, half a minute"),
        ]
    )


def memory_plan(report: Mapping[str, Any]) -> str:
    def gigabytes(value: int | None) -> str | None:
        return f"{value / 1e9:.2f}" if value else None

    rows = [
        [
            row["case"],
            gigabytes(row["plan"]),
            gigabytes(row["measured"]),
            f"{row['plan'] / row['measured'] - 1:+.1%}" if row["measured"] else None,
            gigabytes(row.get("target")),
        ]
        for row in report["cases"]
    ]
    first = report["cases"][0]
    missing = dict.fromkeys(
        n for row in report["cases"] if not row["measured"] for n in row["notes"]
    )

    def place(row: Mapping[str, Any]) -> str:
        commit = f", commit {row['commit']}" if "commit" in row else ""
        return f"{row['device']}, MLX {row['mlx']} ({row['backend']}){commit}"

    others = [row for row in report["cases"] if place(row) != place(first)]
    return "\n\n".join(
        [
            """## Memory

The peak of drawing one guided picture with SD 1.5's architecture and random weights, by MLX's own
count, against what `maple doctor --plan` says beforehand; the plan's constants for CUDA were set by
these figures. GB are 1e9 bytes.""",
            table(["", "planned", "measured", "off by", "target"], rows),
            *(f"Where no figure stands: {note}." for note in missing),
            f"{place(first)}.",
            *(f"{row['case']}: {place(row)}." for row in others),
            command("python benchmarks/memory_plan.py", "a GPU, or minutes"),
        ]
    )


def fp16_fidelity(report: Mapping[str, Any]) -> str:
    rows = [
        [row["prompt"], row["seed"], f"{row['psnr']:.1f}", f"{row['cosine']:.6f}"]
        for row in report["pictures"]
    ]
    machine = report["machine"]
    return "\n\n".join(
        [
            f"""## float16 beside float32

The gallery's pictures, drawn by the model `{report["model"]}` in both types on one device: PSNR of
the pictures in dB, cosine of the final latents. Among {report["seeds"]} further pictures in
float16, {len(report["faults"])} are black, of one colour or not finite.""",
            table(["prompt", "seed", "PSNR", "cosine"], rows),
            f"{machine['device']}, MLX {machine['mlx']}.",
            command("python benchmarks/fp16_fidelity.py", "a GPU, or a quarter of an hour"),
            *(fp16_families(report["families"]) if "families" in report else ()),
        ]
    )


def switches(report: Mapping[str, Any]) -> str:
    found = [
        """## Switches

What switches of a drawing save and what they do to pictures: milliseconds a step, how many times
faster that is than without any, how near the pictures are to those without (PSNR of all and of the
farthest, in dB), in how many of them a classifier still reads what was asked for, and how sure it
is. Where weights are random there are times alone."""
    ]
    for run in report["runs"]:
        first = run["rows"][0]["step_s"]
        body = []
        for row in run["rows"]:
            line = [f"`{row['switch']}`", ms(row["step_s"]), f"{first / row['step_s']:.2f}"]
            if not run["is_random"]:
                near = row["psnr"], row["least_psnr"]
                line += ["" if value is None else f"{value:.1f}" for value in near]
                line += [f"{row['read']} of {run['prompts']}", f"{row['score']:.2f}"]
            body.append(line)
        heads = ["", "ms a step", "times faster"]
        heads += [] if run["is_random"] else ["PSNR", "least", "names read", "score"]
        weights = ", random weights" if run["is_random"] else ""
        found += [
            f"### {run['model']}{weights}, {run['side']}x{run['side']}, guidance "
            f"{run['guidance_scale']:g}, {run['device']}",
            table(heads, body),
            f"{run['steps']} steps of {run['sampler']} ({run['schedule']}), {run['prompts']} "
            f"prompts, seconds {run['seconds']}; MLX {run['mlx']}, commit {run['commit']}, "
            f"{run['date']}.",
            *(f"{note[0].upper()}{note[1:]}." for note in run.get("notes", ())),
        ]
    again = """python benchmarks/switches.py
python benchmarks/switches.py --size sd15"""
    return "\n\n".join([*found, command(again, "a quarter of an hour; the second a GPU")])


def fp16_families(report: Mapping[str, Any]) -> list[str]:
    """SD 2.1's and SDXL's networks, in the section of the pictures."""
    rows = [
        [f"{row['network']}, {row['dtype']}", what, f"{value:.6f}", row["bar"]]
        for row in report["networks"]
        for what, value in row["cosine"].items()
    ]
    machine = report["machine"]
    return [
        """The networks of SD 2.1 and SDXL at their true size with random weights: cosine of each
output in 16 bits, as this device draws, with the plain network's in float32. The last row is an
autoencoder whose feature maps overflow float16: the drawing sees it and decodes in float32.""",
        table(["network", "output", "cosine", "bar"], rows),
        f"{machine['device']}, MLX {machine['mlx']}.",
        command("python benchmarks/fp16_fidelity.py --families", "a GPU with 20 GB"),
    ]


def bench(report: Mapping[str, Any]) -> str:
    """A user's own `maple bench --output`, kept as bench_NAME.json."""
    facts = report["facts"]
    rows = [
        [
            f"{row['case']}, {row['rival']}",
            ms(row.get("median_s")) or "failed",
            ms(row.get("in_a_row_s")),
            f"{row['peak_bytes'] / 1e9:.2f}" if row.get("peak_bytes") else None,
            row.get("primitives"),
        ]
        for row in report["rows"]
    ]
    return "\n\n".join(
        [
            f"## maple bench on {facts['device']}\n\n{facts['model']}, {facts['dtype']}.",
            table(["milliseconds", "median", "in a row", "peak GB", "primitives"], rows),
            f"{facts['processor']}, {facts['memory']}; {_facts(facts)}.",
            command("maple bench", "minutes, and some gigabytes of memory"),
        ]
    )


SECTIONS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "gpu_networks": gpu_networks,
    "counts": counts,
    "memory_plan": memory_plan,
    "fp16_fidelity": fp16_fidelity,
    "switches": switches,
    "cpu_networks": cpu_networks,
    "convert_streaming": convert_streaming,
}


def published() -> str:
    """What others have published, as context."""
    rows = json.loads(PUBLISHED.read_text())
    lines = [[row["device"], row["stack"], row["work"], row["text"], row["source"]] for row in rows]
    heads = ["device", "stack", "work", "figure", "source"]
    text = "\n".join(
        ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
        + ["| " + " | ".join(line) + " |" for line in lines]
    )
    return (
        "## Published figures for Apple chips\n\n"
        "Read in the sources named, not measured here: what a `maple bench` on a Mac can be set\n"
        f"against.\n\n{text}"
    )


def page(results: Path = RESULTS) -> str:
    """The whole page.

    Raises:
        KeyError: for a file of results that no section tells of.
    """
    files = {path.stem: path for path in results.glob("*.json")}
    order = [*(name for name in SECTIONS if name in files)]
    order += sorted(name for name in files if name not in SECTIONS)
    parts = [HEAD.rstrip()]
    for name in order:
        section = bench if name.startswith("bench_") else SECTIONS[name]
        parts.append(section(json.loads(files[name].read_text())))
    return "\n\n".join([*parts, published()]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it is stale")
    args = parser.parse_args()
    made = page()
    if args.check:
        return int(not PAGE.is_file() or PAGE.read_text() != made)
    PAGE.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
