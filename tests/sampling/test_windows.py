"""Windows: what they cover, and that together they are the whole."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_maple.sampling.windows import starts, windowed


@pytest.mark.parametrize("size", [64, 65, 96, 100, 128, 200, 512])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
def test_windows_cover_all_with_their_overlap(size, overlap):
    found = starts(size, 64, overlap)
    assert found[0] == 0 and found[-1] == size - 64
    steps = np.diff(found)
    assert (steps > 0).all() and (steps <= 64 * (1 - overlap) + 1).all()


def random(*shape):
    return mx.random.normal(shape, key=mx.random.key(0))


@pytest.mark.parametrize("shape", [(1, 8, 20, 4), (2, 20, 8, 4), (1, 19, 33, 4), (1, 5, 40, 4)])
def test_a_network_that_looks_at_each_cell_alone_is_the_same_in_windows(shape):
    def model(latents, timestep):
        return mx.sin(latents) * timestep

    x = random(*shape)
    assert np.allclose(np.array(windowed(model, 8)(x, 3.0)), np.array(model(x, 3.0)), atol=1e-5)


def test_each_window_is_what_is_asked_for_and_small_latents_go_through():
    seen = []

    def model(latents, timestep):
        seen.append(latents.shape[1:3])
        return latents

    windowed(model, 8, 0.5)(random(1, 8, 16, 4), 1.0)
    windowed(model, 8, 0.5)(random(1, 6, 16, 4), 1.0)
    assert seen == [(8, 8)] * 3 + [(6, 8)] * 3
    x = random(1, 8, 8, 4)
    assert windowed(model, 8)(x, 1.0) is x


def test_where_windows_differ_the_nearer_one_counts_for_more():
    """Each window says a number of its own: the seam is a slope, not a step."""
    numbers = iter((0.0, 1.0))

    def model(latents, timestep):
        return mx.full(latents.shape, next(numbers))

    line = np.array(windowed(model, 8, 0.5)(mx.zeros((1, 8, 12, 1)), 1.0))[0, 0, :, 0]
    assert (line[:4] == 0).all() and (line[8:] == 1).all()
    assert (np.diff(line[3:9]) > 0).all() and np.diff(line).max() < 0.4


def test_other_windows_are_refused():
    for window, overlap in ((0, 0.5), (8, 1.0), (8, -0.1)):
        with pytest.raises(ValueError, match="not possible"):
            windowed(lambda x, t: x, window, overlap)
