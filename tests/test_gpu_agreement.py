"""The comparison of GPU and CPU finds what it should, with the CPU in both roles."""

from types import SimpleNamespace

import gpu_agreement
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

CPU = mx.DeviceType.cpu


@pytest.fixture(autouse=True)
def _device_stays():
    before = mx.default_device()
    yield
    mx.set_default_device(before)


def test_a_drawing_that_differs_is_told_from_one_that_agrees(monkeypatch):
    case = next(case for case in gpu_agreement.cases() if case[0] == "guided")
    row = gpu_agreement.row_of(case, CPU)
    assert row["passed"] and row["cosine"] > 0.999999 and row["picture"] == 0, row

    latents = np.random.default_rng(0).normal(size=(1, 8, 8, 4))
    black = Image.new("RGB", (8, 8))
    for damage, passes in ((0.0, True), (1.0, False), (np.nan, False)):
        damaged = latents.copy()
        damaged[0, 0, 0] += damage
        drawings = iter([latents, damaged, latents])  # the second: on the GPU, in float32
        monkeypatch.setattr(
            gpu_agreement,
            "drawn",
            lambda *_, d=drawings: SimpleNamespace(latents=next(d), images=[black], notes=[]),
        )
        assert gpu_agreement.row_of(case, CPU)["passed"] == passes


def test_what_fails_to_draw_is_a_row_too(monkeypatch):
    def fails(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu_agreement, "drawn", fails)
    row = gpu_agreement.row_of(("any", {}, {}), CPU)
    assert not row["passed"] and row["error"] == "RuntimeError: no such kernel"
