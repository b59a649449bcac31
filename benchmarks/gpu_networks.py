"""Milliseconds of SD 1.5's networks on this GPU: mlx-maple, torch with diffusers, mlx-examples.

    python benchmarks/gpu_networks.py [--mlx-examples CHECKOUT] [--rival R]... [--case C]...

Float16, random weights, one network after the other on the same card in one run. Every rival has a
process of its own. A figure is the median of 20 calls that were each waited for, after 5 that were
not counted; `in a row` is the time a call takes when 20 are made without a wait between them. With
--rounds the rivals take turns so many times, and a figure is the median of its rounds': a host that
others share is up to twice as slow for some seconds, and MLX, unlike torch's CUDA graphs, needs it
for every kernel. The cases are those of mlx_maple/cli/_bench_cases.py, and `start`: a process on a
converted folder of SD 1.5's size, from its start to the first step begun, with the files in the
page cache.

Results are kept in one JSON file: a run replaces the rows of the same device, rival and case, and
leaves the others. torch.compile's kernels are built beforehand, all cases at once (--no-prebuild
leaves that out): what its first call takes is not what is compared.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "gpu_networks.json"
TORCH = ROOT / "mlx_maple" / "cli" / "rivals" / "torch_diffusers.py"
CASES = (
    *("unet-512-b2", "unet-512-b8", "unet-768-b2", "vae-512", "text", "image-512", "start"),
    "xl-1024-b2",
)
NETWORKS = ("unet", "vae")  # kinds of cases that every rival has
WIDTH, TOKENS = 768, 77
STARTS = 3  # processes that are started for the case of that name


@dataclass(frozen=True)
class Rival:
    """Whose networks are timed, and how a process that times them is started."""

    text: str
    kind: str  # maple, torch or mlx-examples
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    kinds: tuple[str, ...] = NETWORKS


NO_GRAPHS = {"MLX_USE_CUDA_GRAPHS": "0"}
RIVALS = {
    "mlx-maple": Rival(
        "this project, as it draws", "maple", kinds=(*NETWORKS, "xl", "text", "image", "start")
    ),
    "mlx-maple plain": Rival("its networks as they are published", "maple", ("--form", "plain")),
    "torch eager": Rival("diffusers on torch", "torch", kinds=(*NETWORKS, "xl", "text", "image")),
    "torch compiled": Rival(
        "the same under torch.compile(mode='reduce-overhead'), channels last",
        "torch",
        ("--compiled",),
        kinds=(*NETWORKS, "xl", "image"),
    ),
    "mlx-examples": Rival(
        "the UNet and VAE of ml-explore/mlx-examples, on the same MLX as it comes",
        "mlx-examples",
        environment={"MLX_USE_CUDA_GRAPHS": "1"},  # our package, which helps timing, asks for 0
    ),
    "mlx-examples no graphs": Rival(
        "the same with MLX_USE_CUDA_GRAPHS=0", "mlx-examples", environment=NO_GRAPHS
    ),
}


def commands(name: str, cases: list[str], args: argparse.Namespace) -> list[str]:
    """The process that times ``cases`` of a rival."""
    rival = RIVALS[name]
    times = [f"--warm-up={args.warm_up}", f"--runs={args.runs}", f"--rows={args.rows}"]
    dtype = [f"--dtype={args.dtype}"]
    if rival.kind == "maple":
        head = [sys.executable, "-m", "mlx_maple.cli._bench_worker"]
    elif rival.kind == "torch":
        head = [sys.executable, str(TORCH)]
    else:
        head = [sys.executable, __file__, "--worker", f"--mlx-examples={args.mlx_examples}"]
        cases = [f"--case={case}" for case in cases]
    return [*head, *cases, *rival.options, *dtype, *times]


def environment(rival: str) -> dict[str, str]:
    """This process's, with our packages to be found and the rival's own settings."""
    paths = [str(ROOT), str(ROOT / "convert"), os.environ.get("PYTHONPATH", "")]
    return (
        os.environ
        | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        | RIVALS[rival].environment
    )


def rows_of(rival: str, cases: list[str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run a rival's process; its rows as they come, and one with what it died of."""
    done = set()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            commands(rival, cases, args),
            env=environment(rival),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                row = json.loads(line)
                done.add(row["case"])
                yield row
        if process.wait():
            errors.seek(0)
            last = [line for line in errors.read().splitlines() if line.strip()][-1:]
            reason = f"ended with {process.returncode}: {' '.join(last)[:300]}"
            yield from ({"case": case, "error": reason} for case in cases if case not in done)


def starts(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Cold starts of mlx-maple on a converted folder, each in a process of its own."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    sys.path.insert(0, str(ROOT / "convert"))
    from convert_streaming import make_checkpoint

    from maple_convert import convert

    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        source, folder = Path(scratch, "sd15-size.ckpt"), Path(scratch, "sd15-size")
        make_checkpoint(source, ema=False)
        convert(source, folder, dtype=args.dtype)
        source.unlink()
        found: list[dict[str, Any]] = []
        for _ in range(STARTS + 1):  # the first brings the files into the page cache
            command = [
                *(sys.executable, "-m", "mlx_maple.cli._bench_worker", "start"),
                *("--model", str(folder), "--dtype", args.dtype),
            ]
            clock = {"MAPLE_BENCH_BEGUN": repr(time.time())}
            run = subprocess.run(
                command, env=environment("mlx-maple") | clock, capture_output=True, text=True
            )
            if run.returncode:
                reason = (run.stderr.strip().splitlines() or ["?"])[-1]
                yield {"case": "start", "error": f"ended with {run.returncode}: {reason[:300]}"}
                return
            found.append(json.loads(run.stdout.splitlines()[-1]))
    found.sort(key=lambda row: row.get("median_s", 0))
    row = found[len(found) // 2 - (len(found) % 2 == 0)]
    yield row | {"all_s": [one.get("median_s") for one in found], "runs": len(found)}


def prebuild(args: argparse.Namespace, cases: list[str]) -> None:
    """Compile torch's kernels for every case at once, into the cache that its timing reads."""
    running = []
    for case in cases:
        command = [
            *(sys.executable, str(TORCH), case, "--compiled", f"--dtype={args.dtype}"),
            *("--warm-up=1", "--runs=1", "--rows=0"),
        ]
        running.append(
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )
    for process in running:
        process.wait()


# mlx-examples ------------------------------------------------------------------------------------


def mlx_examples(checkout: Path, args: argparse.Namespace) -> None:
    """Time the networks of a checkout's stable_diffusion folder: a line of JSON for each case."""
    sys.path[:0] = [str(ROOT), str(ROOT / "convert")]
    from mlx_maple.cli._bench_cases import Case  # first: it preloads a CPU's matrix library

    import mlx.core as mx  # isort: skip

    from mlx_maple.engine.measure import UNetStep, randomise, timed

    # Its package imports a downloader and a tokenizer at the top: take the files needed only.
    folder = checkout / "stable_diffusion" / "stable_diffusion"
    spec = importlib.util.spec_from_loader("stable_diffusion", loader=None, is_package=True)
    assert spec is not None
    spec.submodule_search_locations = [str(folder)]
    sys.modules["stable_diffusion"] = importlib.util.module_from_spec(spec)
    unets = importlib.import_module("stable_diffusion.unet")
    vaes = importlib.import_module("stable_diffusion.vae")
    configs = importlib.import_module("stable_diffusion.config")
    dtype = getattr(mx, args.dtype)

    class UNet(unets.UNetModel):
        """Theirs, with the config's one name that ``UNetStep`` asks for."""

        class config:
            in_channels, cross_attention_dim = 4, WIDTH

    def make_unet() -> Any:
        return UNet(
            configs.UNetConfig(
                num_attention_heads=(8,) * 4,
                cross_attention_dim=(WIDTH,) * 4,
                down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
                up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
            )
        )

    made: dict[str, Any] = {}

    def network(name: str, make: Callable[[], Any]) -> Any:
        if name not in made:
            made[name] = make()
            randomise(made[name], dtype)
        return made[name]

    for name in args.case:
        case = Case.parse(name)
        if case.kind == "unet":
            unet = network("unet", make_unet)
            call: Any = UNetStep(unet, case.batch, case.size, case.size, dtype)
        else:
            vae = network("vae", lambda: vaes.Autoencoder(configs.AutoencoderConfig()))
            side = case.size // 8
            latents = mx.random.normal((case.batch, side, side, 4)).astype(dtype)
            call = lambda latents=latents, vae=vae: vae.decode(latents)  # noqa: E731
        row: dict[str, Any] = {"case": name, "dtype": args.dtype}
        row |= timed(call, warm_up=args.warm_up, runs=args.runs, rows=args.rows).row()
        print(json.dumps(row), flush=True)


# The table ---------------------------------------------------------------------------------------


def facts() -> dict[str, Any]:
    """The machine, the versions and the commit that figures hold for."""
    versions: dict[str, str | None] = {}
    for name in ("mlx", "torch", "diffusers", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or os.environ.get("MAPLE_COMMIT"),
        "device": gpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
    }


def gpu() -> str:
    """The card's name, or the processor's."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        run = subprocess.run(query, capture_output=True, text=True)
        if run.returncode == 0:
            return run.stdout.splitlines()[0].strip()
    return platform.processor() or platform.machine()


def keep(path: Path, known: list[dict[str, Any]], row: dict[str, Any]) -> None:
    """Put a row in the place of an older one of its kind, and bring all to the file."""
    key = ("device", "rival", "case")
    known[:] = [old for old in known if [old[k] for k in key] != [row[k] for k in key]]
    known.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps({"rows": known}, indent=1) + "\n")
    part.replace(path)


def middle(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of several rounds': the median of each figure, and what the medians were."""
    good = [row for row in rounds if "error" not in row]
    if len(rounds) == 1 or not good:
        return rounds[-1]
    names = [name for name in good[-1] if name.endswith("_s") and name != "parts_s"]
    figures = {
        name: statistics.median(values)
        for name in names
        if (values := [row[name] for row in good if isinstance(row.get(name), float)])
    }
    figures["peak_bytes"] = max(row.get("peak_bytes") or 0 for row in good)
    return good[-1] | figures | {"rounds_s": [row["median_s"] for row in good]}


def show(row: dict[str, Any]) -> None:
    """One line of the table, in milliseconds."""

    def ms(name: str) -> str:
        value = row.get(name)
        return f"{1e3 * value:9.2f}" if value is not None else f"{'':9}"

    if "error" in row:
        figures = row["error"]
    else:
        peak = f"{row['peak_bytes'] / 1e9:8.2f}" if row.get("peak_bytes") else ""
        others = " ".join(
            f"{name.removesuffix('_s')}={1e3 * row[name]:.1f}"
            for name in ("without_unet_s", "minus_unet_s", "first_step_done_s")
            if row.get(name) is not None
        )
        names = ("median_s", "in_a_row_s", "fastest_s", "slowest_s", "first_s")
        figures = "".join(map(ms, names)) + f" {peak} {others}"
    print(f"{row['rival']:<23}{row['case']:<13}{figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rival", action="append", choices=RIVALS, help="default: all there are")
    parser.add_argument("--case", action="append", help=f"default: {', '.join(CASES)}")
    parser.add_argument("--mlx-examples", type=Path, help="a checkout of ml-explore/mlx-examples")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1, help="turns that the rivals take")
    parser.add_argument("--folder", type=Path, help="where the folder for `start` is made")
    parser.add_argument("--no-prebuild", action="store_true", help="see above")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        mlx_examples(args.mlx_examples, args)
        return

    wanted = args.case or list(CASES)
    names = args.rival or [
        name for name, rival in RIVALS.items() if rival.kind != "mlx-examples" or args.mlx_examples
    ]
    run = facts()
    print(json.dumps(run))
    print(
        f"{'milliseconds':<36}"
        + "".join(f"{c:>9}" for c in ("median", "in a row", "fastest", "slowest", "first"))
        + "  peak GB"
    )
    known: list[dict[str, Any]] = []
    if args.output.is_file():
        known = json.loads(args.output.read_text())["rows"]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for turn, name in ((turn, name) for turn in range(args.rounds) for name in names):
        cases = [case for case in wanted if case.split("-")[0] in RIVALS[name].kinds]
        alone = "start" in cases and RIVALS[name].kind == "maple" and not turn
        cases = [case for case in cases if case != "start"]
        is_built = bool(turn) or args.no_prebuild
        if RIVALS[name].kind == "torch" and RIVALS[name].options and not is_built:
            begun = time.perf_counter()
            prebuild(args, [case for case in cases if not case.startswith("image")])
            print(f"torch.compile built its kernels in {time.perf_counter() - begun:.0f} s")
        produced = [rows_of(name, cases, args)] if cases else []
        if alone:
            produced.append(starts(args))
        for rows in produced:
            for row in rows:
                row = {"rival": name, **row, **{"device": run["device"], "facts": run}}
                show(row)
                rounds = found.setdefault((name, row["case"]), [])
                rounds.append(row)
                keep(args.output, known, middle(rounds))
    if args.rounds > 1:
        print("the middle of all rounds")
        for rounds in found.values():
            show(middle(rounds))


if __name__ == "__main__":
    main()
