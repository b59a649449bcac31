"""Pictures to arrays and files, and back: rounding, orientation, sizes, masks, attacks."""

import os
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from mlx_maple import images
from mlx_maple.images import ImageError
from mlx_maple.metadata import Settings

SETTINGS = Settings(
    prompt="a café, “quoted” \N{MAPLE LEAF}\nsecond line",
    negative_prompt="dog",
    width=64,
    height=64,
    steps=20,
    sampler="ddim",
    schedule="leading",
    guidance_scale=5.0,
    seed=7,
    noise="torch",
    clip_skip=1,
    version="mlx-maple 0",
)


def ramp(width: int = 40, height: int = 24) -> Image.Image:
    """A picture in which every row and column differs."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(
        np.stack([rows * 255 // height, columns * 255 // width, (rows * columns) % 256], -1).astype(
            np.uint8
        )
    )


# Pixels ------------------------------------------------------------------------------------------


def test_every_byte_comes_back():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(np.stack([grey, grey.T, 255 - grey], -1))
    pixels = images.to_pixels(image)
    assert pixels.dtype == np.float32
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert np.array_equal(np.asarray(images.to_image(pixels)), np.asarray(image))


def test_rounding_is_the_references():
    # diffusers: (x / 2 + 0.5).clamp(0, 1), then (x * 255).round(); here also at halves
    values = np.linspace(-1.2, 1.2, 100_001, dtype=np.float32)
    unit = np.clip(values / 2 + np.float32(0.5), 0, 1)
    got = np.asarray(images.to_image(np.repeat(values[:, None, None], 3, 2)))[:, 0, 0]
    assert np.array_equal(got, (unit * np.float32(255)).round().astype(np.uint8))
    assert images.to_image(np.full((1, 1, 3), np.nan, np.float32)).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (255, 0, 0, 255)), (255, 0, 0)),
        (Image.new("LA", (2, 2), (0, 0)), (255, 255, 255)),
        (Image.new("L", (2, 2), 7), (7, 7, 7)),
        (Image.new("1", (2, 2), 1), (255, 255, 255)),
        (Image.new("CMYK", (2, 2), (0, 255, 255, 0)), (255, 0, 0)),
        (Image.new("I;16", (2, 2), 65535), (255, 255, 255)),
        (Image.new("I;16", (2, 2), 257), (1, 1, 1)),
        (Image.new("I;16B", (2, 2), 0), (0, 0, 0)),
        (Image.new("I", (2, 2), 65535), (255, 255, 255)),
        (Image.new("RGB", (2, 2), "red").quantize(2), (255, 0, 0)),
        (np.full((2, 2), 9, np.uint8), (9, 9, 9)),
        (np.full((2, 2, 3), 9, np.uint8), (9, 9, 9)),
        (np.zeros((2, 2, 4), np.uint8), (255, 255, 255)),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_any_mode_becomes_rgb(image, colour):
    rgb = images.to_rgb(image)
    assert rgb.mode == "RGB"
    assert rgb.getpixel((0, 0)) == colour


def test_a_transparent_palette_lies_on_white(tmp_path):
    image = Image.new("P", (2, 2), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 1), 1)
    image.save(tmp_path / "a.png", transparency=0)
    rgb = images.to_rgb(images.open_image(tmp_path / "a.png"))
    assert (rgb.getpixel((0, 0)), rgb.getpixel((1, 1))) == ((255, 255, 255), (0, 255, 0))


@pytest.mark.parametrize(
    "image",
    [
        "picture.png",
        None,
        np.zeros((2, 2, 3)),
        np.zeros((2, 2, 2), np.uint8),
        np.zeros((0, 2, 3), np.uint8),
        np.zeros((1, 2, 2, 3), np.uint8),
        Image.new("F", (2, 2)),
        Image.new("RGB", (0, 0)),
    ],
    ids=lambda value: f"{getattr(value, 'shape', getattr(value, 'size', value))}",
)
def test_what_is_no_picture(image):
    with pytest.raises(ImageError):
        images.to_rgb(image)


# Files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".png", ".jpg", ".JPEG", ".webp"])
def test_settings_come_back(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    assert images.save_image(ramp(), path, SETTINGS) == path
    assert images.read_settings(path).settings == SETTINGS
    assert images.open_image(path).size == (40, 24)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp"])
def test_a1111s_text_alone_is_read(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(images, "PROGRAM", "someone-else")
    monkeypatch.setattr(images, "_MAKER", b"someone-else\0")
    images.save_image(ramp(), tmp_path / f"a{ending}", SETTINGS)
    monkeypatch.undo()
    read = images.read_settings(tmp_path / f"a{ending}").settings
    # A1111 does not write the last layer, which some of its models do not read: the model decides.
    assert read == replace(SETTINGS, clip_skip=None)


def test_pixels_come_back_from_png(tmp_path):
    images.save_image(ramp(), tmp_path / "a.png", SETTINGS)
    assert np.array_equal(np.asarray(images.open_image(tmp_path / "a.png")), np.asarray(ramp()))


def test_png_chunks_are_where_other_tools_look(tmp_path):
    images.save_image(ramp(), tmp_path / "a.png", SETTINGS)
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["parameters"].startswith(
            SETTINGS.prompt + "\nNegative prompt: dog\nSteps"
        )
    data = (tmp_path / "a.png").read_bytes()
    assert b"iTXtparameters\0" in data  # the prompt is not Latin-1
    images.save_image(ramp(), tmp_path / "a.png", Settings(prompt="plain", steps=1))
    assert b"tEXtparameters\0plain" in (tmp_path / "a.png").read_bytes()


def test_user_comment_is_as_a1111_writes_it(tmp_path):
    images.save_image(ramp(), tmp_path / "a.jpg", SETTINGS)
    with Image.open(tmp_path / "a.jpg") as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be").startswith(SETTINGS.prompt)


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + "a\nSteps: 3, Sampler: Euler, Seed: 1".encode("utf-16-be"),
        b"UNICODE\0" + "a\nSteps: 3, Sampler: Euler, Seed: 1".encode("utf-16-le"),
        b"UNICODE\0" + "a\nSteps: 3, Sampler: Euler, Seed: 1".encode("utf-16"),
        b"ASCII\0\0\0" + b"a\nSteps: 3, Sampler: Euler, Seed: 1\0",
        bytes(8) + b"a\nSteps: 3, Sampler: Euler, Seed: 1",
        b"a\nSteps: 3, Sampler: Euler, Seed: 1",
    ],
)
def test_user_comments_of_other_writers(tmp_path, comment):
    exif = Image.Exif()
    exif[0x8769] = {0x9286: comment}
    ramp().save(tmp_path / "a.jpg", exif=exif)
    assert images.read_settings(tmp_path / "a.jpg").settings.steps == 3


def test_odd_characters_do_not_stop_a_picture(tmp_path):
    settings = Settings(prompt="nul \0, lone \ud800, bell \a", steps=2, seed=3, sampler="ddim")
    for ending in (".png", ".jpg", ".webp"):
        images.save_image(ramp(), tmp_path / f"a{ending}", settings)
        read = images.read_settings(tmp_path / f"a{ending}").settings
        assert read == replace(settings, prompt="nul \0, lone ?, bell \a")  # which is no character


def test_settings_too_long_for_a_jpeg(tmp_path):
    settings = Settings(prompt="x" * 40_000)
    with pytest.raises(ValueError, match="more than a JPEG holds"):
        images.save_image(ramp(), tmp_path / "a.jpg", settings)
    assert not os.listdir(tmp_path)
    images.save_image(ramp(), tmp_path / "a.webp", settings)
    assert images.read_settings(tmp_path / "a.webp").settings == settings


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.png, \.jpg"):
        images.save_image(ramp(), tmp_path / "a.gif")


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = images.save_image(ramp(), tmp_path / "a.png")
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        images.save_image(ramp(8, 8), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    path = images.save_image(ramp(), tmp_path / "a.png")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_no_folder_is_made(tmp_path):
    with pytest.raises(FileNotFoundError):
        images.save_image(ramp(), tmp_path / "none" / "a.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_honoured(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    ramp().save(tmp_path / "a.png", exif=exif)
    upright = images.open_image(tmp_path / "a.png")
    assert upright.size == ((40, 24) if orientation < 5 else (24, 40))
    # and once only, though the file's own note is still about it
    assert np.array_equal(np.asarray(images.to_rgb(upright)), np.asarray(upright))


# Hostile files -----------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, rows: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


PIXEL = b"\0\1\2\3"
BOMB = zlib.compress(b"x" * 50_000_000)
HOSTILE = {
    "empty": b"",
    "html": b"<html><body>404</body></html>",
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\nshowpage\n",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "a picture of 10^18 pixels": png(2**30, 2**30),
    "a picture of 144 megapixels": png(12_000, 12_000),
    "truncated": png(1, 1, rows=PIXEL)[:50],
    "no data": png(1, 1),
    "a 10 MB text": png(1, 1, chunk(b"tEXt", b"parameters\0" + b"x" * 10_000_000), rows=PIXEL),
    "a text that unpacks to 50 MB": png(1, 1, chunk(b"zTXt", b"parameters\0\0" + BOMB), rows=PIXEL),
    "an iTXt bomb": png(1, 1, chunk(b"iTXt", b"mlx-maple\0\1\0\0\0" + BOMB), rows=PIXEL),
    "numbers that cannot be true": png(
        1, 1, chunk(b"tEXt", b"parameters\0a\nSteps: 1e999, Sampler: Euler, Seed: 1"), rows=PIXEL
    ),
    "nested JSON": png(1, 1, chunk(b"tEXt", b"mlx-maple\0" + b"[" * 500_000), rows=PIXEL),
    "JSON of the wrong kind": png(1, 1, chunk(b"tEXt", b'mlx-maple\0{"steps": []}'), rows=PIXEL),
    "no settings": png(1, 1, rows=PIXEL),
    "a ComfyUI workflow": png(1, 1, chunk(b"tEXt", b"workflow\0{}"), rows=PIXEL),
    "bad EXIF": png(1, 1, chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"), rows=PIXEL),
    "jpeg of nothing": b"\xff\xd8\xff\xe1\xff\xffExif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(200),
    "riff of nothing": b"RIFF\xff\xff\xff\xffWEBPVP8X\xff\xff\xff\xff" + bytes(64),
    "tiff of nothing": b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 400,
    "gif of nothing": b"GIF89a\xff\xff\xff\xff\xf7\0\0" + bytes(100),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pictures_are_refused_in_one_line(tmp_path, name):
    path = tmp_path / "a.png"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(ImageError) as caught:
        images.read_settings(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 400
    assert (caught.value.path, caught.value.exit_code) == (path, 3)


def test_truncations(tmp_path):
    path = images.save_image(ramp(8, 8), tmp_path / "a.png", Settings(prompt="a", steps=1))
    data = path.read_bytes()
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        try:
            image = images.open_image(path)
        except ImageError:
            assert cut < data.index(b"IEND")
        else:  # all pixels are there, and Pillow asks for no more
            assert cut > data.index(b"IDAT") and image.tobytes() == ramp(8, 8).tobytes()


def test_a_folder_and_a_missing_file_are_faults_of_the_disk(tmp_path):
    with pytest.raises(OSError):
        images.open_image(tmp_path)
    with pytest.raises(FileNotFoundError):
        images.read_settings(tmp_path / "none.png")


def test_settings_after_the_pixels_are_found(tmp_path):
    data = png(1, 1, rows=PIXEL)
    end = chunk(b"IEND", b"")
    text = chunk(b"tEXt", b"parameters\0a\nSteps: 3, Sampler: Euler, Seed: 1")
    (tmp_path / "a.png").write_bytes(data.removesuffix(end) + text + end)
    assert images.read_settings(tmp_path / "a.png").settings.steps == 3


def test_pillows_own_limits_are_untouched():
    assert Image.MAX_IMAGE_PIXELS == 89_478_485
    assert PngImagePlugin.MAX_TEXT_MEMORY == 64 * PngImagePlugin.MAX_TEXT_CHUNK


# Sizes -------------------------------------------------------------------------------------------


def test_the_asked_size_is_left_alone():
    assert np.array_equal(np.asarray(images.fitted(ramp(), 40, 24)), np.asarray(ramp()))


def test_stretch_takes_the_whole_picture():
    image = images.fitted(ramp(40, 24), 64, 64)
    assert image.size == (64, 64)
    assert image.getpixel((0, 0))[1] < 8 and image.getpixel((63, 0))[1] > 235


@pytest.mark.parametrize("size", [(64, 64), (128, 64), (64, 128), (512, 8), (72, 64)])
@pytest.mark.parametrize("own", [(40, 24), (24, 40), (33, 33), (1000, 3), (1, 1)])
def test_crop_keeps_proportions_and_gives_the_size(own, size):
    assert images.fitted(Image.new("RGB", own, "red"), *size, "crop").getcolors() == [
        (size[0] * size[1], (255, 0, 0))
    ]


def test_crop_cuts_equally_on_both_sides():
    image = Image.new("RGB", (300, 100), "white")
    image.paste("red", (0, 0, 100, 100))
    image.paste("blue", (200, 0, 300, 100))
    assert images.fitted(image, 100, 100, "crop").getcolors() == [(10_000, (255, 255, 255))]


def test_an_unknown_fit_is_refused():
    with pytest.raises(ValueError, match="stretch, crop"):
        images.fitted(ramp(), 64, 64, "fill")


@pytest.mark.parametrize("size", [(512, 64), (64, 512), (512, 512), (64, 2048)])
@pytest.mark.parametrize("own", [(1, 16_384), (16_384, 1), (3, 9_999), (1, 1)])
def test_of_a_strip_only_what_is_kept_is_made(monkeypatch, own, size):
    """All of it would take gigabytes: 1x16384 for 512x64 is 512x8388608."""
    resize = Image.Image.resize

    def bounded(image, wanted, *arguments, **more):
        assert wanted[0] * wanted[1] <= images.MAX_PIXELS, wanted
        return resize(image, wanted, *arguments, **more)

    monkeypatch.setattr(Image.Image, "resize", bounded)
    found = images.fitted(Image.new("RGB", own, "red"), *size, "crop")
    assert found.size == size and found.getcolors() == [(size[0] * size[1], (255, 0, 0))]


@pytest.mark.parametrize(
    ("own", "size"),
    [((40, 24), (64, 64)), ((24, 40), (97, 64)), ((7, 90), (120, 33)), ((90, 7), (33, 120))],
)
def test_and_it_is_that_part_of_the_whole(monkeypatch, own, size):
    image = ramp(*own)
    whole = np.asarray(images.fitted(image, *size, "crop")).astype(int)
    monkeypatch.setattr(images, "MAX_PIXELS", 0)
    part = np.asarray(images.fitted(image, *size, "crop")).astype(int)
    assert np.abs(part - whole).max() <= 1  # rounded once otherwise
    assert np.abs(np.roll(part, 2, (0, 1)) - whole).max() > 1  # the control


@pytest.mark.parametrize(
    ("own", "given", "size"),
    [
        ((512, 512), {}, (512, 512)),
        ((513, 519), {}, (512, 512)),
        ((640, 960), {}, (624, 936)),
        ((4032, 3024), {}, (880, 664)),
        ((10, 10), {}, (64, 64)),
        ((100_000, 100), {}, (4096, 64)),
        ((600, 400), {"width": 300}, (300, 200)),
        ((600, 400), {"height": 256}, (384, 256)),
    ],
)
def test_a_size_like_the_pictures(own, given, size):
    assert images.size_like(own, 768 * 768, **given) == size


# Masks -------------------------------------------------------------------------------------------


def half() -> Image.Image:
    mask = Image.new("L", (64, 48), 0)
    mask.paste(255, (32, 0, 64, 48))
    return mask


def test_an_unblurred_mask_is_itself():
    assert np.array_equal(images.blurred(half(), 0), np.asarray(half()) / 255)


def test_blur_is_a_gaussian_that_ends():
    mask = images.blurred(half(), 4)
    reach = 10  # 2.5 standard deviations
    assert (mask[:, : 32 - reach] == 0).all() and (mask[:, 32 + reach :] == 1).all()
    assert (mask == mask[0]).all()  # nothing at the mirrored borders
    edge = mask[0, 32 - reach : 32 + reach]
    assert (np.diff(edge) > 0).all()
    assert np.allclose(edge + edge[::-1], 1, atol=1e-6)
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / 4) ** 2)
    assert edge[reach] == pytest.approx(taps[reach:].sum() / taps.sum(), abs=1e-6)


def test_blur_of_a_mask_smaller_than_the_kernel():
    mask = images.blurred(Image.new("L", (8, 1), 255), 16)
    assert mask.shape == (1, 8) and (mask == 1).all()


def test_the_latent_mask_takes_each_cells_first_pixel():
    mask = np.zeros((16, 24), np.float32)
    mask[8, 16] = 0.5
    mask[0, 0] = 0.49
    mask[1:8, 1:8] = 1
    expected = np.zeros((2, 3, 1), np.float32)
    expected[1, 2] = 1
    assert np.array_equal(images.latent_mask(mask, 8), expected)


def test_what_a_mask_keeps_is_bit_equal():
    generator = np.random.default_rng(0)
    old, new = (
        Image.fromarray(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8)) for _ in range(2)
    )
    mask = images.blurred(half(), 4)
    mixed = np.asarray(images.composited(new, old, mask))
    assert np.array_equal(mixed[mask == 0], np.asarray(old)[mask == 0])
    assert np.array_equal(mixed[mask == 1], np.asarray(new)[mask == 1])
    between = (mask > 0) & (mask < 1)
    expected = np.asarray(old)[between] * (1 - mask[between, None])
    expected = expected + np.asarray(new)[between] * mask[between, None]
    assert np.abs(mixed[between] - expected).max() <= 0.5 + 1e-3


def test_a_masks_transparent_parts_are_black():
    mask = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    mask.putpixel((1, 1), (255, 255, 255, 255))
    grey = np.asarray(images.to_grey(mask))
    assert grey[1, 1] == 255 and grey.sum() == 255


def test_what_is_worked_on_in_bands_is_that_of_the_whole(monkeypatch):
    generator = np.random.default_rng(1)
    mask = Image.fromarray(generator.integers(0, 256, (90, 70), np.uint8))
    drawn, original = (
        Image.fromarray(generator.integers(0, 256, (90, 70, 3), np.uint8)) for _ in range(2)
    )
    found = []
    for band in (7, 64, 1000):
        monkeypatch.setattr(images, "BAND", band)
        values = images.blurred(mask, 3)
        found.append((values, np.asarray(images.composited(drawn, original, values))))
    for values, mixed in found[:-1]:
        assert np.array_equal(values, found[-1][0]) and np.array_equal(mixed, found[-1][1])


# Previews ----------------------------------------------------------------------------------------


def test_factors_of_a_linear_decoder_are_found_exactly():
    generator = np.random.default_rng(1)
    factors = np.concatenate([generator.normal(0, 0.05, (4, 3)), np.full((1, 3), 0.5)])
    latents = generator.standard_normal((2, 6, 5, 4)).astype(np.float32)
    colours = np.clip(latents @ factors[:4] + factors[4], 0, 1)
    pixels = (colours * 2 - 1).repeat(8, 1).repeat(8, 2).astype(np.float32)
    assert np.allclose(images.solve_rgb_factors(latents, pixels), factors, atol=1e-5)


def test_a_linear_preview_shows_the_colours():
    factors = [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5], [0, 0, 0], [0.5, 0.5, 0.5]]
    latents = np.zeros((4, 4, 4), np.float32)
    latents[:, :2, 0] = 9  # red, and beyond what a colour can be
    latents[:, 2:, 2] = np.nan
    preview = images.linear_preview(latents, factors, (32, 32))
    assert preview.size == (32, 32)
    assert preview.getpixel((0, 0)) == (255, 128, 128)


def test_what_is_masked_is_filled_from_around_it():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :32], pixels[:, 32:] = (200, 40, 40), (40, 40, 200)
    pixels[16:48, 16:48] = (0, 255, 0)
    mask = np.zeros((64, 64), np.float32)
    mask[16:48, 16:48] = 1
    filled = np.asarray(images.filled(Image.fromarray(pixels), mask)).astype(int)
    assert np.array_equal(filled[mask == 0], pixels[mask == 0])
    assert (filled[mask == 1][:, 1] < 60).all()  # nothing of the green shows
    near_left, near_right = filled[32, 18], filled[32, 45]
    assert near_left[0] > 150 and near_right[2] > 150
    # What A1111's fill makes of it, red and blue from left to right.
    theirs = [(199, 40), (165, 73), (135, 105), (108, 129), (80, 163), (41, 198)]
    assert np.abs(filled[32, 16:48:6, ::2] - theirs).max() <= 2
    everything = images.filled(Image.fromarray(pixels), np.ones_like(mask))
    assert everything.getextrema() == ((128, 128),) * 3
