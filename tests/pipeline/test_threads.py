"""A model draws in any thread, though MLX binds what was not read yet to the one that loaded."""

import threading

import mlx.core as mx
import numpy as np
import pytest
import tiny_model
from PIL import Image

import mlx_maple
from mlx_maple.drawing.model import DiffusionModel
from mlx_maple.engine.compiled import GuidedSteps
from mlx_maple.engine.prepare import prepare_unet, prepare_vae
from mlx_maple.models import AutoencoderKL, VAEConfig

QUICK = {"seed": 1, "steps": 1, "width": 64, "height": 64}


def in_a_thread(work):
    """What ``work`` returns or raises in a thread of its own."""
    found = []

    def run():
        try:
            found.append(work())
        except Exception as error:
            found.append(error)
        mx.clear_streams()  # or a thread that ran something compiled ends the process at its exit

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def test_a_model_draws_wherever_it_was_loaded(monkeypatch, tmp_path):
    """In one thread after another, from text and from a picture, with another form between."""
    monkeypatch.setenv("MAPLE_CACHE", str(tmp_path))
    source = tiny_model.folder() / "model.ckpt"
    picture = {"image": Image.new("RGB", (64, 64), "red")}
    cases = [{}, {"tile": "x"}, picture]
    sd = mlx_maple.load(source)
    expected = [sd("a leaf", **QUICK, **case).latents for case in cases]
    moved = mlx_maple.load(source)
    for case, latents in zip(cases, expected, strict=True):
        assert np.array_equal(
            in_a_thread(lambda c=case: moved("a leaf", **QUICK, **c)).latents, latents
        )
    assert np.array_equal(moved("a leaf", **QUICK, **picture).latents, expected[2])
    bound = mlx_maple.load(source)  # the control: without the move MLX refuses
    monkeypatch.setattr(DiffusionModel, "come_here", lambda self: None)
    with pytest.raises(RuntimeError, match="in the thread alone that opened them"):
        in_a_thread(lambda: bound("a leaf", **QUICK))


def test_what_was_made_ready_draws_there_too(build):
    sd = build()
    sd.unet, sd.vae = prepare_unet(sd.unet), prepare_vae(sd.vae)
    sd.unet.steps = GuidedSteps(sd.unet, compiles=True)
    mx.eval(sd.unet.parameters(), sd.vae.parameters())
    expected = sd("a leaf", **QUICK).latents
    assert np.array_equal(in_a_thread(lambda: sd("a leaf", **QUICK)).latents, expected)


def test_weights_that_no_one_can_read_there_are_named(build):
    sd = build()
    sd.vae = AutoencoderKL(VAEConfig(block_out_channels=(8, 8), norm_num_groups=4))  # lazy, by hand
    with pytest.raises(RuntimeError, match=r"evaluate them there first, mx.eval"):
        in_a_thread(lambda: sd("a leaf", **QUICK))
