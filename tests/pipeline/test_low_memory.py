"""Low-memory mode: one network at a time, the same pictures, and nothing left behind."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_maple.pipeline import StableDiffusion

PARTS = ("text_encoder", "unet", "vae", "taesd")


@pytest.fixture
def low(build):
    """A model in low-memory mode, and the list of what is loaded and let go of."""

    def make(**more) -> tuple[StableDiffusion, list[str]]:
        events: list[str] = []

        def loader(part: str):
            def load():
                events.append(part)
                return getattr(build(**more), part)

            return load

        return build(reload={part: loader(part) for part in PARTS}, **more), events

    return make


def held(sd: StableDiffusion) -> set[str]:
    return set(sd.networks._held)


ARGUMENTS = {
    "text": {},
    "unguided": {"guidance_scale": 1},
    "batch": {"count": 2},
    "picture": {"image": np.full((64, 128, 3), 90, np.uint8), "strength": 0.6},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_pictures_are_the_same_bit_for_bit(sd, low, arguments):
    plain = sd("a leaf", seed=3, **arguments)
    little = low()[0]("a leaf", seed=3, **arguments)
    assert np.array_equal(plain.latents, little.latents)
    for one, other in zip(plain.images, little.images, strict=True):
        assert np.array_equal(np.array(one), np.array(other))


def test_each_network_is_loaded_when_it_is_used_and_no_two_are_held(low):
    sd, events = low()
    assert held(sd) == set() and events == []
    seen = {}
    for progress in sd.generate("a leaf", image=ARGUMENTS["picture"]["image"], seed=1):
        seen[progress.stage] = held(sd)
    assert events == ["text_encoder", "vae", "unet", "vae"]
    assert seen["sample"] == {"unet"}
    assert all(len(networks) <= 1 for networks in seen.values())
    assert held(sd) == set()


def test_a_cancelled_drawing_holds_nothing(low):
    sd, _ = low()
    limits = mx.set_memory_limit(1 << 40), mx.set_cache_limit(1 << 20)
    try:
        drawing = sd.generate("a leaf", seed=1)
        for progress in drawing:
            if progress.stage == "sample":
                break
        assert held(sd) == {"unet"}
        drawing.close()
        assert held(sd) == set()
        assert mx.set_memory_limit(limits[0]) == 1 << 40  # as it was
        assert mx.set_cache_limit(limits[1]) == 1 << 20
    finally:
        mx.set_memory_limit(limits[0])
        mx.set_cache_limit(limits[1])


def test_limits_come_back_whichever_drawing_ends_first(low):
    (one, _), (other, _) = low(), low()
    limits = mx.set_memory_limit(1 << 40), mx.set_cache_limit(1 << 20)
    try:
        first, second = (sd.generate("a leaf", seed=1) for sd in (one, other))
        next(first), next(second)
        first.close()
        assert mx.set_memory_limit(1 << 30) < 1 << 30  # the second still draws
        second.close()
        assert mx.set_memory_limit(limits[0]) == 1 << 40
        assert mx.set_cache_limit(limits[1]) == 1 << 20
    finally:
        mx.set_memory_limit(limits[0])
        mx.set_cache_limit(limits[1])


def test_the_memory_of_a_network_is_given_back(low):
    sd, _ = low()
    sd("a leaf", seed=1)
    mx.clear_cache()
    before = mx.get_active_memory()
    for progress in sd.generate("a leaf", seed=1):
        if progress.stage == "sample" and progress.index == progress.total:
            assert mx.get_active_memory() > before + sd.info.components["unet"].bytes * 0.9
    del progress
    assert mx.get_active_memory() <= before + 200_000  # the last latents and pictures


def test_previews_load_what_they_need(low):
    sd, events = low()
    for progress in sd.generate("a leaf", seed=1, preview="taesd"):
        if progress.stage == "sample":
            assert progress.preview().size == (128, 64)
    assert events.count("taesd") == 1


def test_a_network_that_is_set_is_kept(low, build):
    sd, events = low()
    mine = build().unet
    sd.unet = mine
    sd("a leaf", seed=1)
    assert sd.unet is mine and "unet" not in events


def test_configs_are_known_without_loading(low, sd):
    little, events = low()
    assert little.configs["unet"] == sd.unet.config
    assert little.info.components == sd.info.components
    little.generate("a leaf", width=64, height=64)  # its arguments are checked
    assert events == []


def test_the_normal_mode_keeps_its_networks(sd):
    unet = sd.unet
    sd("a leaf", seed=1)
    assert sd.unet is unet and held(sd) == set(PARTS)
