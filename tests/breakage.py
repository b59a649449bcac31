"""Break one thing at a time, and see which tests fail.

    python tests/breakage.py [NAME ...] [--write docs/testing.md]

Each break is a patch that a port could well be shipped with. It is put in before the tests are
collected, the test files named below run in a process of their own, and the tests that fail are
listed. The first row breaks nothing and must fail nothing: without it the others prove little. The
script ends with 1 where a break is caught by no test. ``make test`` runs every test named here.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = "tests/test_embedded_model.py"
FILES = (
    "tests/models/test_golden.py",
    "tests/sampling/test_denoiser.py",
    "tests/sampling/test_algorithms.py",
    "tests/pipeline/test_pipeline.py",
    f"{EMBEDDED}::test_the_picture_shows_what_the_prompt_says",
    f"{EMBEDDED}::test_dropped_guidance_is_seen",
    f"{EMBEDDED}::test_wrongly_scaled_latents_are_seen",
    f"{EMBEDDED}::test_inpainting_leaves_the_rest_alone",
)
CONTROL = "nothing"
START, END = "<!-- breakage: begin -->", "<!-- breakage: end -->"


# The breaks -----------------------------------------------------------------------------------


def _text_encoder_returns_zeros() -> None:
    import mlx.core as mx

    from mlx_maple.models import CLIPTextEncoder

    plain = CLIPTextEncoder.__call__

    def call(self, *args, **options):
        states = plain(self, *args, **options)
        return type(states)(*(None if s is None else mx.zeros_like(s) for s in states))

    CLIPTextEncoder.__call__ = call


def _guidance_is_dropped() -> None:
    import mlx_maple.pipeline  # noqa: F401  (so that its name for the function is found below)
    from mlx_maple.engine.compiled import GuidedSteps
    from mlx_maple.sampling import denoiser

    plain_model = GuidedSteps.model

    def model(self, positive, negative, guidance_scale, timesteps, **options):
        return plain_model(self, positive, None, 1.0, timesteps, **options)

    GuidedSteps.model = model

    plain = denoiser.guided

    def guided(unet_call, positive, negative, guidance_scale, dtype, **options):
        return plain(unet_call, positive, None, 1.0, dtype, **options)

    for module in list(sys.modules.values()):  # wherever it was imported to
        if module is not None and module.__dict__.get("guided") is plain:
            module.guided = guided


def _group_norm_eps(network: str, right: float, wrong: float) -> Callable[[], None]:
    def apply() -> None:
        from mlx_maple import models
        from mlx_maple.models.layers import GroupNorm

        cls = getattr(models, network)
        plain = cls.__init__

        def init(self, *args, **options):
            plain(self, *args, **options)
            for module in self.modules():
                if isinstance(module, GroupNorm) and module.eps == right:
                    module.eps = wrong

        cls.__init__ = init

    return apply


def _latents_are_not_unscaled() -> None:
    from mlx_maple.models import AutoencoderKL

    plain = AutoencoderKL.decode
    AutoencoderKL.decode = lambda self, latents: plain(self, latents * self.config.scaling_factor)


def _encoded_latents_are_not_scaled() -> None:
    from mlx_maple.models import AutoencoderKL

    plain = AutoencoderKL.encode

    def encode(self, images):
        moments = plain(self, images)
        return moments._replace(mean=moments.mean / self.config.scaling_factor)

    AutoencoderKL.encode = encode


def _starting_noise_is_not_scaled() -> None:
    from mlx_maple.sampling import Plan

    plain = Plan.initial

    def initial(self, noise, clean=None):
        found = plain(self, noise, clean)
        return found / self.grid.noise_scale if clean is None else found

    Plan.initial = initial


BREAKS: dict[str, tuple[str, Callable[[], None]]] = {
    CONTROL: ("nothing is broken (control)", lambda: None),
    "text": ("the text encoder returns zeros", _text_encoder_returns_zeros),
    "guidance": ("guidance is dropped", _guidance_is_dropped),
    "eps-resnets": (
        "GroupNorm eps 1e-6 for 1e-5 in the UNet's resnets",
        _group_norm_eps("UNet", 1e-5, 1e-6),
    ),
    "eps-transformers": (
        "GroupNorm eps 1e-5 for 1e-6 in the UNet's transformers",
        _group_norm_eps("UNet", 1e-6, 1e-5),
    ),
    "eps-vae": (
        "GroupNorm eps 1e-5 for 1e-6 in the autoencoder",
        _group_norm_eps("AutoencoderKL", 1e-6, 1e-5),
    ),
    "scale-decode": ("latents are decoded without unscaling them", _latents_are_not_unscaled),
    "scale-encode": ("an image's latents are not scaled", _encoded_latents_are_not_scaled),
    "scale-noise": ("the starting noise is not scaled", _starting_noise_is_not_scaled),
}


# Inside the test process: this file is a pytest plugin there ------------------------------------

_FAILED: list[str] = []
_COUNT = {"passed": 0}


def pytest_configure(config) -> None:
    """Put the break in, before any test module is imported."""
    if name := os.environ.get("MAPLE_BREAK"):
        import mlx_maple  # noqa: F401

        BREAKS[name][1]()


def pytest_runtest_logreport(report) -> None:
    """Note what fails, in the test or in its set-up."""
    if report.failed and report.nodeid not in _FAILED:
        _FAILED.append(report.nodeid)
    elif report.when == "call" and report.passed:
        _COUNT["passed"] += 1


def pytest_sessionfinish(session, exitstatus) -> None:
    """Leave the result for the parent process."""
    if path := os.environ.get("MAPLE_BREAK_RESULT"):
        Path(path).write_text(json.dumps({"failed": _FAILED, **_COUNT}))


# The parent process -----------------------------------------------------------------------------


def failing(name: str, files: tuple[str, ...] = FILES) -> tuple[list[str], int]:
    """The tests that fail under a break, and how many pass."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        environment = {
            **os.environ,
            "MAPLE_BREAK": name,
            "MAPLE_BREAK_RESULT": str(result),
            "PYTHONPATH": str(ROOT / "tests"),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "breakage", "--no-header", *files]
        marks = ["-m", "not parity and not slow", "-p", "no:cacheprovider", "--tb=no"]
        done = subprocess.run(
            [*command, *marks], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        if not result.exists() or done.returncode not in (0, 1):
            raise SystemExit(f"{name}: pytest ended with {done.returncode}\n{done.stdout[-3000:]}")
        report = json.loads(result.read_text())
    return report["failed"], report["passed"]


def table(rows: dict[str, tuple[list[str], int]]) -> str:
    """What was found, for a page."""
    lines = ["| what is broken | tests that fail | which |", "|---|---|---|"]
    for name, (failed, _) in rows.items():
        tests: dict[str, int] = {}
        for node in failed:
            test = node.partition("::")[2].partition("[")[0]
            tests[test] = tests.get(test, 0) + 1
        which = ", ".join(f"`{t}`" + (f" ({n})" if n > 1 else "") for t, n in tests.items())
        lines.append(f"| {BREAKS[name][0]} | {len(failed)} | {which} |")
    return "\n".join(lines)


def main() -> int:
    """Run the breaks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BREAKS))
    parser.add_argument("--write", type=Path, help="put the table between this page's marks")
    args = parser.parse_args()
    rows = {}
    for name in args.names or BREAKS:
        rows[name] = failing(name)
        print(f"{name}: {len(rows[name][0])} fail, {rows[name][1]} pass", file=sys.stderr)
        for node in rows[name][0]:
            print(f"    {node}", file=sys.stderr)
    text = table(rows)
    print(text)
    if args.write is not None:
        page = args.write.read_text()
        before, rest = page.split(START)
        args.write.write_text(f"{before}{START}\n{text}\n{END}{rest.split(END)[1]}")
    missed = [name for name, (failed, _) in rows.items() if bool(failed) == (name == CONTROL)]
    for name in missed:
        print(f"not as it should be: {BREAKS[name][0]}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
