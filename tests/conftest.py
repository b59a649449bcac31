"""Shared fixtures. mlx_maple comes first: it preloads OpenBLAS before mlx.core is imported."""

import os

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # float32 comparisons mean float32
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches the network

from pathlib import Path

import pytest

import mlx_maple  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent


def weights_folder() -> Path:
    """Where third-party test weights lie: $MAPLE_TEST_WEIGHTS, else ../shared/weights."""
    return Path(os.environ.get("MAPLE_TEST_WEIGHTS", ROOT.parent / "shared" / "weights"))


@pytest.fixture(scope="session")
def weights() -> Path:
    folder = weights_folder()
    if not folder.is_dir():
        pytest.skip(f"no test weights at {folder} (set MAPLE_TEST_WEIGHTS)")
    return folder
