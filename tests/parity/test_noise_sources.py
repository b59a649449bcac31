"""Noise against torch.randn on the CPU. numpy and Philox are tested exactly in tests/sampling."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from mlx_maple.sampling import noise
from mlx_maple.sampling.noise import noise_generator, slerp, step_noise_generator

pytestmark = pytest.mark.parity

# noise.py rounds as torch's AVX2 code does; torch's own scalar code (Apple Silicon) does not.
VECTORISED = torch.backends.cpu.get_cpu_capability().startswith("AVX")
BAR = 1e-6 if VECTORISED else 4e-6

SEEDS = [0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63)]
SEEDS += [random.Random(5).randrange(-(2**63), 2**64) for _ in range(200)]
SHAPES = [
    (64, 64, 4),
    (9, 9, 4),
    (1, 1, 4),
    (2, 2, 3),
    (5, 3, 1),
    (4, 4, 1),
    (1, 17, 1),
    (1, 31, 1),
]
SHAPES += [(1, 3, 1), (1, 1, 1), (13, 11, 4), (96, 64, 4), (2, 4, 9), (33, 1, 1)]


def torch_noise(generator: torch.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    height, width, channels = shape
    drawn = torch.randn((channels, height, width), generator=generator)
    return drawn.permute(1, 2, 0).numpy()


def largest_error(kind_of_generator=noise._Torch, seeds=SEEDS) -> float:
    """One stream a seed through all shapes, so that short draws and their spare halves mix."""
    largest = 0.0
    for seed in seeds:
        reference = torch.Generator("cpu").manual_seed(seed)
        ours = kind_of_generator(seed % 2**64)
        for shape in random.Random(seed).sample(SHAPES, len(SHAPES)):
            error = np.abs(ours.normal(shape) - torch_noise(reference, shape)).max()
            largest = max(largest, float(error))
    return largest


def test_torch_noise(parity_record):
    error = largest_error()
    numbers = len(SEEDS) * sum(h * w * c for h, w, c in SHAPES)
    parity_record(
        f"torch.randn, CPU, {len(SEEDS)} seeds x {len(SHAPES)} shapes",
        max_error=error,
        numbers=numbers,
        bar=f"<= {BAR}",
    )
    assert error <= BAR


def test_torch_noise_of_many_numbers(parity_record):
    error = 0.0
    for seed in range(1000, 1016):
        reference = torch_noise(torch.Generator("cpu").manual_seed(seed), (1024, 256, 4))
        ours = noise_generator("torch", seed).normal((1024, 256, 4))
        error = max(error, float(np.abs(ours - reference).max()))
    parity_record("torch.randn, CPU, 16.8 million numbers", max_error=error, bar=f"<= {BAR}")
    assert error <= BAR


def test_broken_forms_are_seen(parity_record):
    """Negative controls: each is a way in which ports have gone wrong."""

    class ChannelsLastOrder(noise._Torch):
        def normal(self, shape):
            height, width, channels = shape
            return super().normal((height * width * channels, 1, 1)).reshape(shape)

    class DoubleAngle(noise._Torch):
        def _box_muller(self, uniforms):
            pairs = uniforms.reshape(-1, 2, 8).astype(np.float64)
            radius = np.sqrt(-2 * np.log(1 - pairs[:, 0]))
            angle = 2 * np.pi * pairs[:, 1]
            normals = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
            return normals.astype(np.float32).reshape(-1)

    class TailNotRedrawn(noise._Torch):
        def _filled(self, count):
            return super()._filled(count + -count % 16)[:count]

    class SpareForgotten(noise._Torch):
        def normal(self, shape):
            self._spare = None
            return super().normal(shape)

    for broken in (ChannelsLastOrder, DoubleAngle, TailNotRedrawn, SpareForgotten):
        error = largest_error(broken, SEEDS[:40])
        parity_record(f"  broken on purpose: {broken.__name__}", max_error=error)
        assert error > 1e-6


@pytest.mark.skipif(not VECTORISED, reason="this torch has only the scalar code")
def test_torchs_scalar_code_is_this_far_from_its_vector_code(parity_record):
    """Why 1e-6 cannot hold on every machine: torch does not keep it against itself."""
    program = (
        "import sys, torch; torch.manual_seed(0);"
        "sys.stdout.buffer.write(torch.randn(4000000).numpy().tobytes())"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    output = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=True
    ).stdout
    scalar = np.frombuffer(output, np.float32)
    vector = torch.randn(4_000_000, generator=torch.Generator("cpu").manual_seed(0)).numpy()
    ours = noise_generator("torch", 0).normal((4_000_000, 1, 1)).ravel()
    parity_record(
        "torch.randn, scalar code",
        from_its_vector_code=float(np.abs(scalar - vector).max()),
        from_ours=float(np.abs(scalar - ours).max()),
        bar="<= 4e-6",
    )
    assert np.abs(scalar - ours).max() <= 4e-6


def test_slerp_in_torch(parity_record):
    """A1111's arithmetic on (C, h, w) tensors: unit columns, per-column angle."""
    error = 0.0
    for seed, t in enumerate((0.0, 0.05, 0.3, 0.5, 0.9, 1.0)):
        generator = torch.Generator("cpu").manual_seed(seed)
        low, high = (torch.randn((4, 64, 48), generator=generator) for _ in range(2))
        cosine = torch.nn.functional.cosine_similarity(low, high, dim=1, eps=0)
        angle = torch.acos(cosine)[:, None]
        expected = torch.sin((1 - t) * angle) * low + torch.sin(t * angle) * high
        expected = (expected / torch.sin(angle)).permute(1, 2, 0).numpy()
        ours = slerp(t, *(x.permute(1, 2, 0).numpy() for x in (low, high)))
        error = max(error, float(np.abs(ours - expected).max()))
    parity_record("variation seed (slerp)", max_error=error, bar="<= 4e-6")
    assert error <= 4e-6


def test_step_noise_is_a1111s_stream():
    """One torch generator a picture: the initial noise, then one draw a step; ENSD starts anew."""
    shape = (32, 24, 4)
    for seed, ensd in ((7, 0), (7, 31337), (2**32 - 3, 31337)):
        reference = torch.Generator("cpu").manual_seed(seed)
        torch_noise(reference, shape)
        if ensd:
            reference = torch.Generator("cpu").manual_seed(seed + ensd)
        ours = step_noise_generator("torch", seed, shape, ensd=ensd)
        for _ in range(4):
            assert np.abs(ours.normal(shape) - torch_noise(reference, shape)).max() <= BAR
