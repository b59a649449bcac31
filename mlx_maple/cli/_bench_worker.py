"""One process's measurements for `maple bench`: cases by name, a line of JSON for each.

A case is written KIND-SIZE-bBATCH, as in unet-512-b2; size (512) and batch (1) may be left out.

unet    the UNet's part of a step: two pictures in a batch for each that is drawn with guidance
vae     decoding latents to a picture of SIZE by SIZE pixels
text    a prompt and a negative prompt
image   a whole picture: text, 20 guided steps of dpmpp_2m, decoding, a PIL image
start   from the start of this process to the first step begun; alone in its process
"""

import os
import time

import mlx_maple  # noqa: F401  (first: it preloads OpenBLAS before mlx.core is imported)

BEGUN = float(os.environ.get("MAPLE_BENCH_BEGUN") or time.time())

import argparse  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import statistics  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from typing import Any, cast  # noqa: E402

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

from mlx_maple.engine.attention import running_backend  # noqa: E402
from mlx_maple.engine.compiled import compile_works  # noqa: E402
from mlx_maple.engine.measure import (  # noqa: E402
    GuidedStep,
    Timing,
    UNetStep,
    random_sd15,
    timed,
)
from mlx_maple.engine.prepare import PreparedUNet, prepare_unet, prepare_vae  # noqa: E402
from mlx_maple.loading import DTYPES, dtype_name, load  # noqa: E402
from mlx_maple.models import UNet  # noqa: E402
from mlx_maple.pipeline import StableDiffusion  # noqa: E402
from mlx_maple.sampling import NoiseSchedule  # noqa: E402
from mlx_maple.text.tokenizer import Tokenizer  # noqa: E402

IMPORTED = time.time()

STEPS = 20
PROMPT = "a red maple leaf"
KINDS = ("unet", "vae", "text", "image", "start")
FORMS = ("prepared", "plain")


@dataclass(frozen=True)
class Case:
    """One piece of work."""

    kind: str
    size: int = 512
    batch: int = 1

    @property
    def name(self) -> str:
        """As it is written."""
        words = [self.kind]
        if self.kind not in ("text", "start"):
            words.append(str(self.size))
        if self.kind == "unet" or self.batch > 1:
            words.append(f"b{self.batch}")
        return "-".join(words)

    @classmethod
    def parse(cls, name: str) -> "Case":
        """The case that ``name`` tells.

        Raises:
            ValueError: if it tells none.
        """
        match = re.fullmatch(r"([a-z]+)(?:-(\d+))?(?:-b(\d+))?", name)
        if match is None or match[1] not in KINDS:
            raise ValueError(
                f"{name}: no such case; KIND-SIZE-bBATCH, with KIND one of {', '.join(KINDS)}"
            )
        case = cls(match[1], int(match[2] or 512), int(match[3] or 1))
        if case.size % 8 or not 64 <= case.size <= 4096 or not 1 <= case.batch <= 64:
            raise ValueError(f"{name}: sizes are multiples of 8 up to 4096, batches up to 64")
        return case


class Worker:
    """A model in one of its forms, and what its parts take.

    Args:
        model: a path or hub name; None is SD 1.5's architecture with random weights.
        form: "prepared" as pictures are drawn, or "plain" as the networks are published.
        dtype: of the weights; None is this device's usual one.
        warm_up: calls before those that count.
        runs: calls that count.
        rows: rows of as many calls without a wait between.
    """

    def __init__(
        self, model: str | None, form: str, dtype: str | None, warm_up: int, runs: int, rows: int
    ) -> None:
        self.model = model
        self.form = form
        self.dtype = dtype_name(dtype)
        self.times = {"warm_up": warm_up, "runs": runs, "rows": rows}
        self._sd: StableDiffusion | None = None
        self._steps: dict[int, float] = {}  # seconds of a UNet call in a row, by picture size

    @property
    def sd(self) -> StableDiffusion:
        """The model, loaded when it is first asked for."""
        if self._sd is None:
            self._sd = load_for_bench(self.model, self.form, self.dtype)
        return self._sd

    def measure(self, case: Case) -> dict[str, Any]:
        """The figures of one case."""
        return getattr(self, f"_{case.kind}")(case)

    def _unet(self, case: Case) -> dict[str, Any]:
        unet, size = self.sd.unet, case.size
        step: Callable[[], mx.array]
        if isinstance(unet, PreparedUNet) and case.batch % 2 == 0:
            compiles = compile_works(running_backend())[0]
            step = GuidedStep(unet, case.batch // 2, size, size, compiles)
        else:
            step = UNetStep(unet, case.batch, size, size, DTYPES[self.dtype])
        row = timed(step, **self.times).row()
        if case.batch == 2:
            self._steps[case.size] = row["in_a_row_s"] or row["median_s"] or 0.0
        return row

    def _vae(self, case: Case) -> dict[str, Any]:
        vae = self.sd.vae
        side = case.size // vae.config.downscale
        latents = mx.random.normal((case.batch, side, side, vae.config.latent_channels))
        latents = latents.astype(DTYPES[self.dtype])
        return timed(lambda: vae.decode(latents), **self.times).row()

    def _text(self, case: Case) -> dict[str, Any]:
        ids = [mx.array(self.sd.tokenize(text)) for text in (PROMPT, "")]
        return timed(lambda: [self.sd.text_encoder(i).last for i in ids], **self.times).row()

    def _image(self, case: Case) -> dict[str, Any]:
        """Whole pictures; then with a UNet that answers at once, to know what all else takes."""
        sd = self.sd
        arguments: dict[str, Any] = {
            "width": case.size,
            "height": case.size,
            "count": case.batch,
            "steps": STEPS,
            "guidance_scale": 7.5,
            "sampler": "dpmpp_2m",
        }

        def draw(count: int) -> list[tuple[float, dict[str, float]]]:
            taken = []
            for seed in range(count):
                start = time.perf_counter()
                result = sd(PROMPT, seed=seed, **arguments)
                taken.append((time.perf_counter() - start, result.timings))
            return taken

        mx.reset_peak_memory()
        warm_up = draw(min(2, self.times["warm_up"]))
        taken = draw(self.times["runs"])
        timing = Timing(
            [seconds for seconds, _ in warm_up],
            [seconds for seconds, _ in taken],
            peak_bytes=mx.get_peak_memory(),
        )
        row: dict[str, Any] = timing.row()
        row["parts_s"] = {
            part: statistics.median(parts[part] for _, parts in taken) for part in taken[0][1]
        }
        unet = sd.unet
        sd.unet = cast(UNet, StandIn(unet, self.dtype, lambda latents, *_: latents))
        try:
            draw(2)
            row["without_unet_s"] = statistics.median(s for s, _ in draw(self.times["runs"]))
        finally:
            sd.unet = unet
        if case.size in self._steps and case.batch == 1:
            row["minus_unet_s"] = row["median_s"] - STEPS * self._steps[case.size]
        return row

    def _start(self, case: Case) -> dict[str, Any]:
        """Import, loading, the prompt's states: all that a person waits for before the steps."""
        sd = self.sd
        loaded, begun = time.time(), 0.0
        unet = sd.unet

        def first(latents: mx.array, *others: mx.array) -> mx.array:
            nonlocal begun
            begun = begun or time.time()
            return unet(latents, *others)

        sd.unet = cast(UNet, StandIn(unet, self.dtype, first))
        for progress in sd.generate(PROMPT, seed=0, steps=STEPS):
            if progress.stage == "sample":
                break
        return {
            "median_s": begun - BEGUN,
            "first_step_done_s": time.time() - BEGUN,
            "parts_s": {
                "import": IMPORTED - BEGUN,
                "load": loaded - IMPORTED,
                "text": begun - loaded,
            },
            "runs": 1,
            "peak_bytes": mx.get_peak_memory(),
        }


class StandIn(nn.Module):
    """Takes the UNet's place in the pipeline, to watch its calls or to answer at once."""

    def __init__(self, unet: nn.Module, dtype: str, call: Callable[..., mx.array]) -> None:
        super().__init__()
        self.config = unet.config
        self.weight = mx.zeros((1,), dtype=DTYPES[dtype])  # the pipeline asks what it computes in
        self._call = call

    def __call__(self, latents: mx.array, *others: mx.array) -> mx.array:
        return self._call(latents, *others)


def load_for_bench(model: str | None, form: str, dtype: str) -> StableDiffusion:
    """A model in the form asked for; random weights have SD 1.5's architecture."""
    if model is not None:
        return load(model, dtype=dtype)
    networks: dict[str, Any] = random_sd15(DTYPES[dtype])
    if form == "prepared":
        networks["unet"] = prepare_unet(networks["unet"])
        networks["vae"] = prepare_vae(networks["vae"])
        mx.eval(networks["unet"].parameters(), networks["vae"].parameters())
    return StableDiffusion(
        **networks,
        tokenizer=Tokenizer.bundled(),
        noise_schedule=NoiseSchedule.from_betas(),
        name="SD 1.5 with random weights",
    )


def main() -> None:
    """Measure the named cases in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+", type=Case.parse)
    parser.add_argument("--model")
    parser.add_argument("--form", choices=FORMS, default=FORMS[0])
    parser.add_argument("--dtype", choices=tuple(DTYPES))
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rows", type=int, default=3)
    args = parser.parse_args()
    worker = Worker(args.model, args.form, args.dtype, args.warm_up, args.runs, args.rows)
    for case in args.cases:
        row: dict[str, Any] = {"case": case.name, "dtype": worker.dtype}
        try:
            row |= worker.measure(case)
        except RuntimeError as error:  # out of memory at one size says nothing of the others
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
