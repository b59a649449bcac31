"""What several of the engine's tests need."""

import mlx.core as mx
import pytest


@pytest.fixture(scope="module")
def on_the_cpu():
    """The module's tests run on the CPU, whatever the machine has."""
    before = mx.default_device()
    mx.set_default_device(mx.Device(mx.DeviceType.cpu))
    yield
    mx.set_default_device(before)
