"""What a picture becomes before it steers a drawing. OpenCV's own edges: tests/parity."""

import numpy as np
import pytest
from PIL import Image

from mlx_maple.preprocess import PREPROCESSORS, canny, invert, scribble


def picture(pixels) -> Image.Image:
    grey = np.asarray(pixels, np.uint8)
    return Image.fromarray(np.repeat(grey[..., None], 3, axis=2))


def white(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    assert pixels.dtype == np.uint8 and set(np.unique(pixels)) <= {0, 255}
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0] == 255


def test_an_edge_is_one_pixel_wide_and_where_the_step_is():
    pixels = np.zeros((12, 16))
    pixels[:, 9:] = 255
    found = white(canny(picture(pixels)))
    assert (found.sum(axis=1) == 1).all() and found[:, 8].all()


def test_an_edge_of_one_colour_alone_is_seen():
    pixels = np.full((12, 16, 3), 90, np.uint8)
    pixels[:, 9:, 2] = 255
    assert white(canny(Image.fromarray(pixels))).any()


def test_a_weak_edge_stays_where_it_hangs_on_a_strong_one():
    """The step fades to the bottom: below the high threshold, above the low one."""
    pixels = np.zeros((40, 16))
    pixels[:, 8:] = np.linspace(120, 30, 40)[:, None]
    assert white(canny(picture(pixels), 100, 320)).any(axis=1).all()
    assert not white(canny(picture(pixels[20:]), 100, 320)).any()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1)])
def test_small_pictures(size):
    assert not white(canny(picture(np.full(size, 200)))).any()


def test_scribble_and_invert():
    pixels = np.full((4, 4, 3), 255, np.uint8)
    pixels[1, 1] = (255, 20, 255)
    assert white(scribble(Image.fromarray(pixels))).sum() == 1
    assert (np.asarray(invert(Image.fromarray(pixels)))[1, 1] == (0, 235, 0)).all()


def test_sizes_stay():
    for make in PREPROCESSORS.values():
        assert make(picture(np.zeros((5, 9)))).size == (9, 5)
