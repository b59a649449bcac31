"""The masked part of a picture drawn alone: its box, what of it is drawn, and what comes back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlx_maple import images, metadata
from mlx_maple.drawing.masked_area import SEEN, in_proportion, masked_area, masked_box
from mlx_maple.models import AutoencoderKL


def photo(width: int, height: int) -> Image.Image:
    """A picture in which every pixel tells its place."""
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([across, down, across + down], -1).astype(np.uint8))


def painted(width: int, height: int, *box: int) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, box)
    return mask


# The box -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "padding", "expected"),
    [
        ((30, 20, 50, 60), 0, (30, 20, 50, 60)),
        ((30, 20, 50, 60), 8, (22, 12, 58, 68)),
        ((30, 20, 50, 60), 25, (5, 0, 75, 85)),  # the picture ends above
        ((90, 70, 100, 90), 16, (74, 54, 100, 90)),  # and at the right and below
        ((0, 0, 100, 90), 4, (0, 0, 100, 90)),
        ((0, 0, 0, 0), 4, (0, 0, 100, 90)),  # nothing is masked: all
    ],
)
def test_the_box_is_the_masked_part_and_some_around_it(box, padding, expected):
    mask = np.asarray(painted(100, 90, *box), np.float32) / 255
    assert masked_box(mask, padding) == expected


@pytest.mark.parametrize(
    ("box", "size", "whole", "expected"),
    [
        # A strip of 128x32 for a square: 96 more rows, half above and half below.
        ((100, 200, 228, 232), (512, 512), (600, 600), (100, 152, 228, 280)),
        # An odd number of rows: the one over comes below.
        ((0, 50, 11, 60), (64, 64), (100, 100), (0, 50, 11, 61)),
        # It is moved, not cut, where it would go beyond an edge: below, above, right, left.
        ((100, 560, 228, 592), (512, 512), (600, 600), (100, 472, 228, 600)),
        ((100, 8, 228, 40), (512, 512), (600, 600), (100, 0, 228, 128)),
        ((560, 100, 592, 228), (512, 512), (600, 600), (472, 100, 600, 228)),
        ((8, 100, 40, 228), (512, 512), (600, 600), (0, 100, 128, 228)),
        # And cut where the picture is too small for the proportions.
        ((0, 40, 300, 60), (512, 512), (300, 100), (0, 0, 300, 100)),
        ((10, 0, 30, 300), (512, 256), (100, 300), (0, 0, 100, 300)),
        # Twice as wide as high; 2 * 64 - 50 = 78 more columns.
        ((200, 100, 250, 164), (512, 256), (600, 600), (161, 100, 289, 164)),
        # Rows are counted down: 10 / 1.5 is 6.
        ((0, 50, 10, 55), (96, 64), (100, 100), (0, 50, 10, 56)),
        # In proportion already.
        ((10, 10, 50, 30), (128, 64), (100, 100), (10, 10, 50, 30)),
    ],
)
def test_the_box_grows_to_the_drawings_proportions(box, size, whole, expected):
    assert in_proportion(box, size, whole) == expected


@settings(max_examples=60, deadline=None)
@given(
    whole=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    corner=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    extent=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    padding=st.integers(0, 50),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    blur=st.sampled_from([0, 0.7, 4]),
)
def test_any_box_lies_in_the_picture_and_leaves_the_rest_alone(
    whole, corner, extent, padding, size, blur
):
    """Down to pictures of one pixel; the masked part is always in the box, and goes back there."""
    picture, size = photo(*whole), (8 * size[0], 8 * size[1])
    left, top = (int(c * (n - 1)) for c, n in zip(corner, whole, strict=True))
    mask = painted(*whole, left, top, left + extent[0], top + extent[1])
    area = masked_area(picture, mask, padding, size, blur)
    left, top, right, bottom = area.box
    assert 0 <= left < right <= whole[0] and 0 <= top < bottom <= whole[1]
    outside = area.mask.copy()
    outside[top:bottom, left:right] = 0
    assert outside.max() < SEEN
    assert area.part(picture).size == size and area.drawn_mask.shape == size[::-1]
    drawn = np.asarray(area.pasted(Image.new("RGB", size, "red")))
    kept = area.mask < SEEN / 2
    assert np.array_equal(drawn[kept], np.asarray(picture)[kept])
    assert (drawn[area.mask == 1] == (255, 0, 0)).all()


def test_a_blurred_mask_is_that_of_the_whole_picture():
    """Only some of it is worked on; the border is mirrored where the picture ends, and there."""
    for box in ((30, 20, 50, 60), (0, 0, 20, 30), (85, 70, 100, 90)):
        mask = painted(100, 90, *box)
        for blur in (0, 3, 7.5):
            area = masked_area(photo(100, 90), mask, 4, (64, 64), blur)
            assert np.array_equal(area.mask, images.blurred(mask, blur))
            reach = int(2.5 * blur + 0.5)
            assert area.box[0] <= max(box[0] - min(reach, 4), 0)  # the blurred edge is in the box


# What is drawn -----------------------------------------------------------------------------------


def test_the_part_is_brought_to_the_size_and_back():
    area = masked_area(photo(200, 100), painted(200, 100, 60, 30, 80, 50), 6, (128, 128), 0)
    assert area.box == (54, 24, 86, 56)
    part = area.part(area.picture)
    assert part.size == (128, 128)
    middle = np.asarray(part)[2::4, 2::4].astype(int)  # four pixels for one
    assert np.abs(middle - np.asarray(area.picture)[24:56, 54:86]).max() <= 2
    assert area.drawn_mask.shape == (128, 128)
    assert area.drawn_mask[40, 40] == 1 and area.drawn_mask[10, 10] == 0
    back = np.asarray(area.pasted(part)).astype(int)
    assert np.abs(back - np.asarray(area.picture)).max() <= 3


def test_what_is_missing_of_the_proportions_is_filled_with_edges():
    area = masked_area(photo(30, 90), painted(30, 90, 5, 40, 20, 80), 0, (128, 64), 0)
    assert area.box == (0, 40, 30, 80)  # wanted: 80 wide
    part = np.asarray(area.part(area.picture))
    left = 128 // 2 - 48 // 2
    assert (part[:, :left] == part[:, left : left + 1]).all()
    assert (part[:, left + 48 :] == part[:, left + 47 : left + 48]).all()
    red = Image.new("RGB", (128, 64), "red")
    back = np.asarray(area.pasted(red))
    assert (back[40:80, 5:20] == (255, 0, 0)).all()
    untouched = np.ones((90, 30), bool)
    untouched[40:80, 5:20] = False
    assert np.array_equal(back[untouched], np.asarray(area.picture)[untouched])
    same = np.asarray(area.pasted(Image.fromarray(part))).astype(int)  # what was filled is cut off
    assert np.abs(same - np.asarray(area.picture)).max() <= 4


@pytest.mark.parametrize("blur", [0, 3])
def test_only_the_masked_part_is_drawn_and_the_rest_stays_bit_for_bit(sd, monkeypatch, blur):
    whole, mask = photo(200, 160), painted(200, 160, 90, 60, 130, 85)
    encoded = []

    def spy(self, pixels):
        encoded.append(np.array(pixels)[0])
        return plain(self, pixels)

    plain = AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", spy)
    arguments = {"image": whole, "mask": mask, "mask_blur": blur, "strength": 1, "seed": 1}
    result = sd("a", only_masked=12, width=128, height=64, steps=2, count=2, **arguments)
    assert result.latents.shape == (2, 8, 16, 4)  # drawn at the size that was asked for
    area = masked_area(whole, mask, 12, (128, 64), blur)
    left, top, right, bottom = area.box
    assert (right - left) / (bottom - top) == pytest.approx(2, rel=0.03)
    assert np.allclose(encoded[0], images.to_pixels(area.part(whole)), atol=1e-5)
    for image in result.images:
        assert image.size == whole.size
        old, new = np.asarray(whole), np.asarray(image)
        assert np.array_equal(new[area.mask == 0], old[area.mask == 0])
        assert (new[area.mask == 1] != old[area.mask == 1]).any(-1).mean() > 0.5
    assert not np.array_equal(*(np.asarray(image) for image in result.images))
    said = result.settings[0]
    assert (said.width, said.height, said.only_masked) == (128, 64, 12)


def test_without_a_size_it_is_drawn_at_the_models_own(sd, defaults):
    arguments = {"image": photo(200, 160), "mask": painted(200, 160, 90, 60, 130, 85), "steps": 1}
    result = sd("a", only_masked=0, **arguments)
    said = result.settings[0]
    assert (said.width, said.height) == (defaults["width"], defaults["height"])
    assert result.images[0].size == (200, 160) and result.notes == []
    whole = sd("a", **arguments).settings[0]  # as a whole: in its own proportions
    assert (whole.width, whole.height) == (144, 120)


def test_a_black_mask_changes_nothing(sd):
    arguments = {"image": photo(200, 160), "mask": painted(200, 160, 0, 0, 0, 0), "steps": 1}
    result = sd("a", only_masked=8, **arguments)
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(photo(200, 160)))
    assert any("nothing is redrawn" in note for note in result.notes)


def test_without_a_mask_it_is_left_out(sd):
    """A picture's settings are drawn again whether or not its mask is at hand."""
    for more in ({}, {"image": photo(64, 64)}):
        result = sd("a", only_masked=8, steps=1, seed=1, **more)
        assert result.settings[0].only_masked is None
        assert "only_masked is left out: there is no mask" in result.notes
        plain = sd("a", steps=1, seed=1, **more)
        assert np.array_equal(result.latents, plain.latents) and plain.notes == []


def test_a_mask_of_another_size_covers_the_same_part():
    area = masked_area(photo(200, 160), painted(100, 80, 45, 30, 65, 42), 0, (64, 64), 0)
    left, top, right, bottom = masked_box(area.mask, 0)
    assert np.abs(np.subtract((left, top, right, bottom), (90, 60, 130, 84))).max() <= 1


def test_pictures_that_steer_are_cut_alike():
    whole = photo(200, 160)
    area = masked_area(whole, painted(200, 160, 90, 60, 130, 85), 12, (64, 64), 0)
    for cut in (area.parts(whole), area.parts([whole])[0], area.parts(np.asarray(whole))):
        assert np.array_equal(np.asarray(cut), np.asarray(area.part(whole)))
    assert area.parts(None) is None
    larger = area.parts(whole.resize((400, 320), Image.Resampling.LANCZOS))  # shows the same
    assert np.abs(np.asarray(larger, int) - np.asarray(area.part(whole), int)).max() <= 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"image": photo(64, 64), "mask": photo(64, 64), "only_masked": -1},
            "only_masked must be a whole number from 0",
        ),
        (
            {"image": photo(64, 64), "mask": photo(64, 64), "only_masked": True},
            "only_masked must be a whole number",
        ),
    ],
)
def test_what_cannot_be_drawn_is_said(sd, arguments, words):
    with pytest.raises(ValueError, match=words):
        sd.generate("a", **arguments)


# What is written of it ---------------------------------------------------------------------------


def test_it_is_written_and_read_in_a1111s_words():
    said = metadata.Settings(
        prompt="a", width=512, height=512, steps=4, strength=0.5, mask_blur=4.0, only_masked=32
    )
    text = metadata.to_parameters(said)
    assert "Inpaint area: Only masked, Masked area padding: 32" in text
    again = metadata.from_parameters(text).settings
    assert (again.only_masked, again.mask_blur) == (32, 4)
    assert metadata.from_json(metadata.to_json(said)).settings.only_masked == 32
    theirs = "a\nSteps: 4, Denoising strength: 0.5, Inpaint area: Only masked, Version: v1.10.1"
    recipe = metadata.from_parameters(theirs)
    assert (recipe.settings.only_masked, recipe.settings.mask_blur) == (0, 0)
    assert not any("not read" in note for note in recipe.notes)
    for area in (
        "",
        ", Masked area padding: 32",
        ", Inpaint area: Whole picture, Masked area padding: 32",
    ):
        whole = metadata.from_parameters(
            f"a\nSteps: 4, Denoising strength: 0.5, Mask blur: 4{area}"
        )
        assert whole.settings.only_masked is None and whole.settings.mask_blur == 4
