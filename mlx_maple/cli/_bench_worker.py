"""One process's measurements for `maple bench`: cases by name, a line of JSON for each."""

import os
import time

import mlx_maple  # noqa: F401  (first: it preloads OpenBLAS before mlx.core is imported)

BEGUN = float(os.environ.get("MAPLE_BENCH_BEGUN") or time.time())

import argparse  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
from collections.abc import Callable  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Any, cast  # noqa: E402

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mlx_maple.cli import describe  # noqa: E402
from mlx_maple.cli._bench_cases import Case  # noqa: E402
from mlx_maple.engine.compiled import made_ready  # noqa: E402
from mlx_maple.engine.count import count  # noqa: E402
from mlx_maple.engine.measure import (  # noqa: E402
    GuidedStep,
    Timing,
    UNetStep,
    random_sd15,
    random_sdxl_unet,
    timed,
)
from mlx_maple.engine.prepare import PreparedUNet  # noqa: E402
from mlx_maple.loading import DTYPES, dtype_name, load  # noqa: E402
from mlx_maple.models import UNet  # noqa: E402
from mlx_maple.pipeline import StableDiffusion  # noqa: E402
from mlx_maple.sampling import NoiseSchedule  # noqa: E402
from mlx_maple.text.prompt import encode_prompt  # noqa: E402
from mlx_maple.text.tokenizer import Tokenizer  # noqa: E402

IMPORTED = time.time()

STEPS = 20
PROMPT = "a red maple leaf"
FORMS = ("prepared", "plain")


class Worker:
    """A model in one of its forms, and what its parts take.

    Args:
        model: a path or hub name; None is SD 1.5's architecture with random weights, of which only
            the networks that are asked for are made.
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
        self._networks: dict[str, Any] = {}
        self._loaded = 0.0
        self._steps: dict[int, float] = {}  # seconds of a UNet call in a row, by picture size

    def network(self, part: str) -> Any:
        """One network, made or loaded when it is first asked for; alone where it can be."""
        if self.model is not None and part != "xl":
            return getattr(self.sd, part)
        if part not in self._networks:
            dtype = DTYPES[self.dtype]
            is_xl = part == "xl"
            network = random_sdxl_unet(dtype) if is_xl else random_sd15(dtype, parts=[part])[part]
            self._networks[part] = network if self.form == "plain" else made_ready(network)
        return self._networks[part]

    @property
    def sd(self) -> StableDiffusion:
        """The whole model, made or loaded when it is first asked for."""
        if self._sd is None:
            if self.model is not None:
                self._sd = load(self.model, dtype=self.dtype)
            else:
                self._sd = StableDiffusion(
                    text_encoder=self.network("text_encoder"),
                    unet=self.network("unet"),
                    vae=self.network("vae"),
                    tokenizer=Tokenizer.bundled(),
                    noise_schedule=NoiseSchedule.from_betas(),
                    name="SD 1.5 with random weights",
                )
            self._loaded = time.time()
        return self._sd

    def measure(self, case: Case) -> dict[str, Any]:
        """The figures of one case."""
        return getattr(self, f"_{case.kind}")(case)

    def _unet(self, case: Case) -> dict[str, Any]:
        unet, size = self.network(case.kind), case.size
        step: Callable[[], mx.array]
        if isinstance(unet, PreparedUNet) and case.batch % 2 == 0:
            step = GuidedStep(unet, case.batch // 2, size, size)
        else:
            step = UNetStep(unet, case.batch, size, size, DTYPES[self.dtype])
        row = timed(step, **self.times).row() | counted(step, unet)
        if case.kind == "unet" and case.batch == 2:
            self._steps[case.size] = row["in_a_row_s"] or row["median_s"] or 0.0
        return row

    _xl = _unet

    def _vae(self, case: Case) -> dict[str, Any]:
        vae = self.network("vae")
        side = case.size // vae.config.downscale
        latents = mx.random.normal((case.batch, side, side, vae.config.latent_channels))
        latents = latents.astype(DTYPES[self.dtype])

        def decode() -> mx.array:
            return vae.decode(latents)

        return timed(decode, **self.times).row() | counted(decode, vae.decoder)

    def _text(self, case: Case) -> dict[str, Any]:
        encoder = self.network("text_encoder")
        tokenizer = Tokenizer.bundled() if self.model is None else self.sd.tokenizer
        ids = [mx.array(encode_prompt(tokenizer, text).ids) for text in (PROMPT, "")]
        return timed(lambda: [encoder(each).last for each in ids], **self.times).row()

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
        loaded, begun = self._loaded, 0.0
        unet = sd.unet
        call = unet.begin if isinstance(unet, PreparedUNet) else unet

        def first(*arguments: Any) -> Any:
            nonlocal begun
            begun = begun or time.time()
            return call(*arguments)

        if isinstance(unet, PreparedUNet):
            cast(Any, unet).begin = first
        else:
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


def counted(call: Callable[[], mx.array], network: nn.Module) -> dict[str, Any]:
    """What one call asks of the device, as a row's figures."""
    weights = cast(list[tuple[str, mx.array]], tree_flatten(network.parameters()))
    steps: Any = network.steps if isinstance(network, PreparedUNet) else None
    steps = steps or SimpleNamespace(in_parts=False)
    in_parts = steps.in_parts
    try:
        steps.in_parts = False  # the first would be under way before it is described
        found = count(call, weights=dict(weights), on_a_gpu=False)
    except (RuntimeError, ValueError, TypeError) as error:  # no reason to lose the times
        return {"count_error": str(error).splitlines()[0][:200]}
    finally:
        steps.in_parts = in_parts
    return {
        "primitives": found.kernels,
        "views": found.views,
        "weight_bytes": found.weight_bytes,
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
    try:
        _ = worker.sd if args.model else None
    except Exception as error:
        code, line = describe(error)
        print(json.dumps({"error": line, "exit_code": code}))
        raise
    for case in args.cases:
        row: dict[str, Any] = {"case": case.name, "dtype": worker.dtype}
        try:
            row |= worker.measure(case)
        except RuntimeError as error:  # out of memory at one size says nothing of the others
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
