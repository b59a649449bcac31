import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_maple.sampling.noise import (
    NOISE_SOURCES,
    initial_noise,
    noise_generator,
    philox4x32,
    slerp,
    step_noise_generator,
)

GOLDEN = np.load(Path(__file__).with_name("golden_noise.npz"))
SEEDS = [int(name) for name in GOLDEN.files if name != "shapes"]
SHAPES = [tuple(map(int, shape)) for shape in GOLDEN["shapes"]]

# Random123's published known answers (kat_vectors, philox4x32 10): counter, key, result.
PHILOX = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

# torch.randn on a GPU (torch 2.11.0+cu130, NVIDIA H100): seed, then the first three numbers of
# successive draws of these (C, h, w), in that order.
CUDA_SHAPES = ((4, 64, 64), (4, 9, 9), (4, 1, 1), (3, 2, 2), (4, 128, 128))
CUDA = {
    0: [
        (-0.9246624112129211, -0.42534422874450684, -2.643845796585083),
        (0.1808258295059204, -0.5522627830505371, 0.9238133430480957),
        (2.5440971851348877, -0.7163488864898682, -0.493368923664093),
        (0.35158225893974304, -1.4171409606933594, -0.8348873257637024),
        (-0.345167338848114, 0.6273319125175476, 0.5715389847755432),
    ],
    7: [
        (-0.30484700202941895, 1.0453333854675293, -0.2785641849040985),
        (-1.2870116233825684, -0.39583277702331543, 0.37557291984558105),
        (0.1696067899465561, -1.338331937789917, -0.9690669775009155),
        (1.3719311952590942, 0.273054838180542, 0.7054189443588257),
        (-0.10281916707754135, -1.699048638343811, 0.7280974388122559),
    ],
    2**32: [
        (-0.017424920573830605, 0.48645710945129395, 0.7840468287467957),
        (0.435300350189209, -0.11817207932472229, 0.19420278072357178),
        (0.9742624759674072, 0.11203288286924362, -0.22401514649391174),
        (0.06308192014694214, -0.4981072247028351, 2.0882554054260254),
        (-0.2643069624900818, 0.51795494556427, -0.5793163776397705),
    ],
    2**63 - 1: [
        (-0.8442148566246033, 1.742746114730835, 1.1697816848754883),
        (-2.6019914150238037, 1.3708515167236328, 1.334898829460144),
        (-0.7589215636253357, -1.0886880159378052, -0.9738472700119019),
        (-0.41161027550697327, 1.4260283708572388, 0.13968564569950104),
        (-0.6188702583312988, -0.7592238187789917, 1.0800493955612183),
    ],
}


def channels_first(noise: np.ndarray) -> np.ndarray:
    return noise.transpose(2, 0, 1).ravel()


@pytest.mark.parametrize("seed", SEEDS)
def test_torch_stream(seed):
    generator = noise_generator("torch", seed)
    draws = np.concatenate([generator.normal(shape).ravel() for shape in SHAPES])
    assert draws.dtype == np.float32
    np.testing.assert_allclose(draws, GOLDEN[str(seed)], rtol=0, atol=6e-7)


def test_torch_stream_sees_the_wrong_order():
    """Negative control: the same numbers left in (C, h, w) order are another noise."""
    noise = noise_generator("torch", 0).normal((9, 9, 4))
    assert np.abs(channels_first(noise) - GOLDEN["0"][:324]).max() > 1


def test_torch_seeds_are_taken_modulo_64_bits_and_used_modulo_32():
    shape = (4, 4, 4)
    draws = {seed: noise_generator("torch", seed).normal(shape) for seed in (-1, 2**64 - 1, 7)}
    assert np.array_equal(draws[-1], draws[2**64 - 1])
    assert np.array_equal(draws[7], noise_generator("torch", 2**32 + 7).normal(shape))
    assert not np.array_equal(draws[7], draws[-1])


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX)
def test_philox_known_answers(counter, key, expected):
    words = tuple(np.full(3, word, np.uint32) for word in counter)
    result = philox4x32(words, key[1] << 32 | key[0])
    assert all((got == want).all() for got, want in zip(result, expected, strict=True))


def test_nvidia_equals_a1111s_published_numbers():
    """The expected output in the docstring of modules/rng_philox.py, eight digits of it."""
    noise = noise_generator("nvidia", 0).normal((3, 4, 1))[..., 0]
    published = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    np.testing.assert_allclose(noise, published, rtol=0, atol=3e-7)


@pytest.mark.parametrize("seed", CUDA)
def test_nvidia_equals_a_gpus_numbers(seed):
    generator = noise_generator("nvidia", seed)
    for (channels, height, width), expected in zip(CUDA_SHAPES, CUDA[seed], strict=True):
        draw = channels_first(generator.normal((height, width, channels)))
        np.testing.assert_allclose(draw[:3], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31, 2**32 - 1])
def test_numpy_is_bit_equal(seed):
    reference = np.random.RandomState(seed)
    generator = noise_generator("numpy", seed)
    for height, width, channels in SHAPES:
        expected = reference.standard_normal((channels, height, width)).astype(np.float32)
        draw = generator.normal((height, width, channels))
        assert np.array_equal(draw, expected.transpose(1, 2, 0))


def test_numpy_takes_the_seeds_that_numpy_refuses():
    shape = (3, 3, 4)
    draw = noise_generator("numpy", 2**32 + 5).normal(shape)
    assert np.array_equal(draw, noise_generator("numpy", 5).normal(shape))
    assert np.isfinite(noise_generator("numpy", -1).normal(shape)).all()


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3])
def test_mlx_is_mlx(seed):
    mx.random.seed(seed)
    generator = noise_generator("mlx", seed)
    for shape in SHAPES:
        assert np.array_equal(generator.normal(shape), np.array(mx.random.normal(shape)))


@pytest.mark.parametrize("kind", NOISE_SOURCES)
def test_every_source_is_unit_normal_repeatable_and_moves_on(kind):
    generator = noise_generator(kind, 42)
    first, second = generator.normal((64, 64, 4)), generator.normal((64, 64, 4))
    assert first.shape == (64, 64, 4)
    assert first.dtype == np.float32
    assert first.flags.c_contiguous
    assert abs(first.mean()) < 0.03
    assert abs(first.std() - 1) < 0.03
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.03
    again = noise_generator(kind, 42)
    assert np.array_equal(again.normal((64, 64, 4)), first)
    assert np.array_equal(again.normal((64, 64, 4)), second)
    assert not np.array_equal(noise_generator(kind, 43).normal((64, 64, 4)), first)


@pytest.mark.parametrize("kind", NOISE_SOURCES)
def test_numpy_integers_are_seeds(kind):
    draw = noise_generator(kind, np.int64(5)).normal((2, 2, 4))
    assert np.array_equal(draw, noise_generator(kind, 5).normal((2, 2, 4)))


def test_latents_of_512_pixels_take_milliseconds():
    start = time.perf_counter()
    noise_generator("torch", 1).normal((64, 64, 4))
    assert time.perf_counter() - start < 0.5  # about 1 ms


def test_refusals():
    with pytest.raises(ValueError, match=r"unknown source 'cuda'.*torch, nvidia, numpy, mlx"):
        noise_generator("cuda", 0)
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match=str(seed)):
            noise_generator("torch", seed)
    with pytest.raises(TypeError):
        noise_generator("torch", 1.5)
    for kind in NOISE_SOURCES:
        for shape in ((1, 64, 64, 4), (64, 64), (0, 64, 4), (64, -1, 4)):
            with pytest.raises(ValueError, match="expected a shape"):
                noise_generator(kind, 0).normal(shape)


# Variations and step noise, as A1111 keeps them.

SHAPE = (8, 6, 4)


def test_variation_runs_from_the_seed_to_the_variation_seed():
    low, high = (noise_generator("torch", seed).normal(SHAPE) for seed in (3, 4))

    def at(strength: float) -> np.ndarray:
        return initial_noise("torch", 3, SHAPE, variation_seed=4, variation_strength=strength)

    assert np.array_equal(at(0), low)
    np.testing.assert_allclose(at(1), high, atol=1e-6)
    halfway = at(0.5)
    assert halfway.dtype == np.float32
    assert 0.7 < halfway.std() < 1.3
    assert np.array_equal(initial_noise("torch", 3, SHAPE), low)


def test_slerp_turns_each_column_of_each_channel_by_its_own_angle():
    low, high = (noise_generator("numpy", seed).normal(SHAPE) for seed in (1, 2))
    got = slerp(0.3, low, high)
    for x in range(SHAPE[1]):
        for c in range(SHAPE[2]):
            a, b = (v[:, x, c].astype(np.float64) for v in (low, high))
            omega = np.arccos(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
            want = (np.sin(0.7 * omega) * a + np.sin(0.3 * omega) * b) / np.sin(omega)
            np.testing.assert_allclose(got[:, x, c], want, atol=1e-5)


def test_slerp_of_nearly_equal_noises_keeps_a1111s_weights():
    low = noise_generator("numpy", 1).normal(SHAPE)
    high = low * np.float32(2)  # the same direction
    np.testing.assert_allclose(slerp(0.25, low, high), low * 0.25 + high * 0.75, atol=1e-6)


def test_slerp_of_one_row_is_finite():
    low, high = (noise_generator("numpy", seed).normal((1, 9, 4)) for seed in (1, 2))
    mixed = slerp(0.25, low, high)
    np.testing.assert_allclose(mixed, 0.75 * low + 0.25 * high, atol=1e-6)


@pytest.mark.parametrize("kind", NOISE_SOURCES)
def test_step_noise_goes_on_after_the_initial_noise(kind):
    generator = noise_generator(kind, 11)
    generator.normal(SHAPE)
    steps = step_noise_generator(kind, 11, SHAPE)
    for _ in range(3):
        assert np.array_equal(steps.normal(SHAPE), generator.normal(SHAPE))


@pytest.mark.parametrize("kind", NOISE_SOURCES)
def test_step_noise_with_ensd_starts_from_the_sum(kind):
    generator = noise_generator(kind, 11 + 31337)
    steps = step_noise_generator(kind, 11, SHAPE, ensd=31337)
    for _ in range(3):
        assert np.array_equal(steps.normal(SHAPE), generator.normal(SHAPE))
