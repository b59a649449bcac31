"""The BLAS under MLX's Linux CPU backend: loaded first, with kernels that fit the processor."""

import os
import subprocess
import sys

import pytest

from mlx_maple import _OPENBLAS, _openblas

AVX2 = {"sse2", "avx", "avx2", "fma"}
AVX512 = AVX2 | {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}


@pytest.mark.parametrize(
    ("picked", "features", "better"),
    [
        ("Prescott", AVX512, "SkylakeX"),
        ("Prescott", AVX2, "Haswell"),
        ("Generic", AVX512 - {"avx512vl"}, "Haswell"),  # an early one, which lacks a part
        ("Prescott", {"sse2", "avx"}, None),  # as good as it gets there
        ("Zen", AVX512, None),  # a choice of OpenBLAS's own
        ("", AVX2, None),
        ("neoversen1", set(), None),
    ],
)
def test_outdated_kernels_are_replaced_by_what_the_processor_can_do(picked, features, better):
    assert _openblas.better_kernels(picked, features) == better


@pytest.mark.skipif(_OPENBLAS is None, reason="no OpenBLAS here")
@pytest.mark.parametrize("insisted", ["", "Prescott"])
def test_what_is_loaded_multiplies_with_them(insisted):
    """In a process of its own, where MLX has not been imported yet."""
    code = """
import ctypes, os, sys
before = os.environ.get("OPENBLAS_CORETYPE")
import mlx_maple
from mlx_maple import _openblas
assert os.environ.get("OPENBLAS_CORETYPE") == before
import mlx.core as mx
import numpy as np
a = np.random.default_rng(0).standard_normal((64, 96)).astype("float32")
b = np.random.default_rng(1).standard_normal((96, 32)).astype("float32")
assert np.allclose(np.array(mx.array(a) @ mx.array(b)), a @ b, atol=1e-4)
print(_openblas.kernels(ctypes.CDLL(mlx_maple._OPENBLAS)))
"""
    environment = {**os.environ, _openblas.CORETYPE: insisted}
    if not insisted:
        del environment[_openblas.CORETYPE]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    picked = done.stdout.strip()
    if insisted and picked in _openblas.OUTDATED:
        return  # whoever sets the variable is left in charge
    assert not insisted or picked == ""
    assert _openblas.better_kernels(picked, _openblas._features()) is None
