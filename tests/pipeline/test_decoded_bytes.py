"""Decoded pixels as 8-bit numbers on the device: each is that of ``images.to_image``."""

import gc

import mlx.core as mx
import numpy as np

import mlx_maple as maple
from mlx_maple import images
from mlx_maple.drawing.autoencode import as_bytes
from mlx_maple.engine import low_memory


def test_bytes_of_the_device_are_those_of_numpy():
    borders = ((np.arange(256) + 0.5) / 255 * 2 - 1).astype(np.float32)  # halves round to even
    near = [np.nextafter(borders, np.float32(way)) for way in (-9, 9)]
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 0, -1, 1, -7, 7], np.float32)
    some = np.random.default_rng(0).normal(0, 1, 30_000).astype(np.float32)
    values = np.concatenate([borders, *near, odd, some])
    values = values[: values.size // 3 * 3].reshape(1, -1, 3)
    with np.errstate(invalid="ignore"):
        wanted = np.array(images.to_image(values))
    np.testing.assert_array_equal(np.array(as_bytes(mx.array(values))), wanted)
    assert len(np.unique(wanted)) == 256


def test_a_drawing_without_loras_lets_go_of_nothing(monkeypatch):
    """It took 50 ms a picture to collect what nobody had dropped."""
    sd = maple.load()
    calls = []
    monkeypatch.setattr(gc, "collect", lambda *_: calls.append("collect"))
    monkeypatch.setattr(mx, "clear_cache", lambda: calls.append("clear_cache"))
    held = sd.unet
    sd("a red apple", steps=1, width=64, height=64, seed=0)
    assert calls == []
    sd.networks.drop("unet")
    assert calls == ["collect", "clear_cache"] and sd.unet is not held


def test_what_is_held_is_counted_anew_only_when_it_changes(monkeypatch):
    sd = maple.load()
    networks, counted, count = sd.networks, [], low_memory._bytes
    monkeypatch.setattr(
        low_memory, "_bytes", lambda module: counted.append(module) or count(module)
    )
    whole = networks._held_bytes()
    assert whole == sum(map(count, networks._held.values())) and len(counted) == 3
    assert networks._held_bytes() == whole and len(counted) == 3
    networks.drop("unet")
    less = networks._held_bytes()
    assert less == whole - count(sd.unet) and networks._held_bytes() == whole
    assert len(counted) == 4  # the UNet that was read again
