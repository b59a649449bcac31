"""Pictures in and out: files and PIL images to arrays, sizes, masks, and settings inside files.

Legend   H, W pixel rows and columns; h, w latent ones. Pixels are float32 (H, W, 3) in [-1, 1]
         where the networks see them and 8-bit RGB everywhere else.
Source   Rounding: diffusers 0.42.1 image_processor.py (VaeImageProcessor). Sizes and masks:
         AUTOMATIC1111/stable-diffusion-webui @v1.10.1 modules/images.py (resize_image) and
         modules/processing.py (StableDiffusionProcessingImg2Img). Where settings lie in a file:
         modules/images.py (save_image_with_geninfo, read_info_from_image).
Differs  A transparent picture lies on white (A1111's default; diffusers drops the alpha channel and
         shows whatever colour is under it). What a file says about its orientation is honoured.
"""

import io
import os
import secrets
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFilter, ImageOps, PngImagePlugin

from mlx_maple import metadata
from mlx_maple.metadata import PROGRAM, Recipe, Settings

MAX_PIXELS = 120_000_000  # of a picture that is read: a 108-megapixel photograph passes
READ_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")  # none that runs code
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # written, by ending
FITS = ("stretch", "crop")
MASK_BLUR = 4.0  # pixels; A1111's default
# Pixels that surroundings spread into what is masked, and how often each lies over those before.
FILL_BLURS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2))
BAND = 64  # rows or columns of a picture that are worked on at once in floating point
QUALITY = 95  # of JPEG and WebP

_USER_COMMENT = int(ExifTags.Base.UserComment)
_MAKER_NOTE = int(ExifTags.Base.MakerNote)
_EXIF = int(ExifTags.IFD.Exif)
_MAKER = PROGRAM.encode() + b"\0"  # before our JSON text in the MakerNote
_JPEG_EXIF_BYTES = 65_533 - 2  # a JPEG segment's length is a 16-bit number

FloatArray = NDArray[np.float32]


class ImageError(ValueError):
    """A picture that cannot be used; one line.

    Attributes:
        path: its file, or None where there is none.
        reason: what is wrong with it.
    """

    exit_code = 3

    def __init__(self, reason: str, path: Path | None = None) -> None:
        self.path = path
        self.reason = reason
        super().__init__(reason if path is None else f"{path}: {reason}")


# Files -------------------------------------------------------------------------------------------


def open_image(path: str | Path) -> Image.Image:
    """Read a picture, upright, with its own mode and what its file says.

    Raises:
        ImageError: it is no picture of a kind that is read here, is broken, or is too large.
        OSError: it cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        return _decoded(file, path)


def decode_image(data: bytes, most_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture from a file's bytes, as ``open_image`` reads it from a file.

    Raises:
        ImageError: see ``open_image``.
    """
    return _decoded(io.BytesIO(data), None, most_pixels)


def check_header(data: bytes, most_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """The size that a file's bytes declare, without decoding it.

    Raises:
        ImageError: no picture of a kind that is read here, or of more than ``most_pixels``.
    """
    return _decoded(io.BytesIO(data), None, most_pixels, only_header=True).size


def _decoded(
    file: Any, path: Path | None, most_pixels: int = MAX_PIXELS, *, only_header: bool = False
) -> Image.Image:
    Image.init()
    readable = [name for name in READ_FORMATS if name in Image.OPEN]
    with warnings.catch_warnings():  # Pillow warns of what is judged below
        warnings.simplefilter("ignore")
        try:
            image = Image.open(file, formats=readable)
            width, height = image.size
            if width * height > most_pixels:
                size = f"{width}x{height}"
                raise ImageError(f"{size} pixels; {most_pixels:,} at most are read", path)
            if only_header:
                return image
            image.load()
            image.info = dict(image.info)
            # transpose answers a picture without the orientation it has now followed
            return ImageOps.exif_transpose(image)
        except ImageError:
            raise
        except Image.UnidentifiedImageError:
            kinds = ", ".join(readable)
            raise ImageError(f"not a picture of a kind that is read here ({kinds})", path) from None
        except Image.DecompressionBombError:
            raise ImageError(f"more than {most_pixels:,} pixels", path) from None
        except (
            OSError,
            SyntaxError,
            ValueError,
            EOFError,
            IndexError,
            KeyError,
            TypeError,
        ) as error:
            raise ImageError(f"a broken picture ({_first_line(error)})", path) from None


def _first_line(error: BaseException) -> str:
    text = (str(error) or type(error).__name__).splitlines()[0][:200]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def save_image(
    image: Image.Image,
    path: str | Path,
    settings: Settings | None = None,
    *,
    quality: int = QUALITY,
) -> Path:
    """Write a picture with its settings; the file is there whole or not at all.

    Args:
        image: to be written as 8-bit RGB.
        path: ends in .png, .jpg, .jpeg or .webp. Its folder must exist; a file there is replaced.
        settings: go into the file twice, as A1111's text and as JSON.
        quality: of JPEG and WebP, 1 to 100.

    Raises:
        ValueError: for another ending, or settings longer than a JPEG can hold (64 kB).
        OSError: it cannot be written there.
    """
    path = Path(path)
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: pictures are written as {', '.join(FORMATS)}.")
    options: dict[str, Any] = {}
    if kind == "PNG":
        options["pnginfo"] = _png_texts(settings)
    else:
        options["quality"] = quality
        if settings is not None:
            options["exif"] = exif = _exif(settings)
            if kind == "JPEG" and len(exif) > _JPEG_EXIF_BYTES:
                size = f"{len(exif):,} bytes"
                raise ValueError(f"{path}: the settings take {size}, more than a JPEG holds.")
    if kind == "JPEG":
        options["subsampling"] = 0  # colour at full resolution
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, kind, **options)
    write_whole(path, buffer.getvalue())
    return path


def write_whole(path: Path, data: bytes) -> None:
    """Write beside the place, make sure of the bytes, rename."""
    hidden = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(hidden, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)


def read_settings(path: str | Path) -> Recipe:
    """What a picture's file says of its drawing: ours, A1111's, or any tool's that writes A1111's.

    Raises:
        ImageError: no picture, no settings in it, or settings that cannot be true.
        OSError: it cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        return recipe_of(_decoded(file, path), path)


def recipe_of(image: Image.Image, path: Path | None = None) -> Recipe:
    """What a decoded picture says of its drawing; ``path`` is for errors. See ``read_settings``."""
    texts = texts_of(image)
    try:
        if PROGRAM in texts:
            return metadata.from_json(texts[PROGRAM])
        if "parameters" in texts:
            return metadata.from_parameters(texts["parameters"])
    except ValueError as error:
        raise ImageError(f"its settings cannot be used: {error}", path) from None
    other = "; it has a ComfyUI workflow, which is not read" if "workflow" in image.info else ""
    raise ImageError(f"no settings are written in this picture{other}", path)


def _png_texts(settings: Settings | None) -> PngImagePlugin.PngInfo:
    """Two text chunks; ``parameters`` is tEXt where Latin-1 can say it and iTXt (UTF-8) else."""
    chunks = PngImagePlugin.PngInfo()
    if settings is not None:
        chunks.add_text("parameters", _writable(metadata.to_parameters(settings)))
        chunks.add_text(PROGRAM, metadata.to_json(settings))
    return chunks


def _exif(settings: Settings) -> bytes:
    """The UserComment that A1111 reads, and our JSON as MakerNote."""
    comment = _writable(metadata.to_parameters(settings)).encode("utf-16-be")
    exif = Image.Exif()
    exif[_EXIF] = {
        _USER_COMMENT: b"UNICODE\0" + comment,
        _MAKER_NOTE: _MAKER + metadata.to_json(settings).encode("ascii"),
    }
    return exif.tobytes()


def _writable(text: str) -> str:
    """Text that every encoding takes: NUL would end it, lone surrogates are no characters."""
    return (
        text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode("utf-8")
    )


def texts_of(image: Image.Image) -> dict[str, str]:
    """Settings' texts by name, wherever this kind of file keeps them."""
    texts = {
        name: str(value)
        for name in (PROGRAM, "parameters")
        if isinstance(value := image.info.get(name), str)
    }
    try:
        exif = image.getexif().get_ifd(_EXIF)
    except Exception:  # Pillow's reader raises whatever a broken table leads it to
        exif = {}
    note, comment = exif.get(_MAKER_NOTE), exif.get(_USER_COMMENT)
    if isinstance(note, bytes) and note.startswith(_MAKER):
        texts.setdefault(PROGRAM, note.removeprefix(_MAKER).decode("ascii", "replace"))
    if isinstance(comment, bytes):
        texts.setdefault("parameters", _comment_text(comment))
    elif isinstance(comment, str):
        texts.setdefault("parameters", comment)
    return {name: text for name, text in texts.items() if text.strip()}


def _comment_text(comment: bytes) -> str:
    """The text of an EXIF UserComment: 8 bytes name its code, which many writers get wrong."""
    code, body = comment[:8], comment[8:]
    if code == b"UNICODE\0":
        if body[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return body.decode("utf-16", "replace")
        # Without a mark: Latin letters show on which side their zero bytes lie.
        little = body[1::2].count(0) > body[0::2].count(0)
        return body.decode("utf-16-le" if little else "utf-16-be", "replace")
    if code in (b"ASCII\0\0\0", bytes(8)):
        return body.decode("utf-8", "replace").rstrip("\0")
    return comment.decode("utf-8", "replace")


# Pixels ------------------------------------------------------------------------------------------


def to_image(pixels: FloatArray) -> Image.Image:
    """Pixels (H, W, 3) in [-1, 1] as an RGB image; what lies outside is clipped, NaN is black.

    Halves round to the even number, as in diffusers.
    """
    unit = np.asarray(pixels, np.float32) * np.float32(0.5)
    unit += np.float32(0.5)
    np.fmax(unit, 0, out=unit)  # which takes the number of a number and NaN
    np.minimum(unit, 1, out=unit)
    unit *= np.float32(255)
    return Image.fromarray(np.rint(unit, out=unit).astype(np.uint8))


def to_pixels(image: Image.Image) -> FloatArray:
    """An RGB image as pixels (H, W, 3) in [-1, 1]."""
    pixels = np.asarray(image).astype(np.float32)
    pixels /= 255
    pixels *= 2
    pixels -= 1
    return pixels


def to_rgb(image: Image.Image | NDArray[Any]) -> Image.Image:
    """Any picture as 8-bit RGB, upright; transparent ones lie on white.

    Args:
        image: a PIL image of any mode but floating point, or a uint8 array (H, W), (H, W, 3) or
            (H, W, 4).

    Raises:
        ImageError: for anything else.
    """
    return _flat(image, "white").convert("RGB")


def to_grey(image: Image.Image | NDArray[Any]) -> Image.Image:
    """A mask's picture as 8-bit grey; where it is transparent it is black. See ``to_rgb``."""
    return _flat(image, "black").convert("L")


def _flat(image: Image.Image | NDArray[Any], background: str) -> Image.Image:
    """The picture upright, 8-bit and opaque, in a mode that converts to RGB and grey."""
    image = _upright(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _to_8_bits(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    try:
        return image.convert("RGB")
    except ValueError:
        raise ImageError(f"pictures of mode {image.mode} are not read") from None


def _upright(image: Image.Image | NDArray[Any]) -> Image.Image:
    if isinstance(image, np.ndarray):
        is_picture = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
        if image.dtype != np.uint8 or not is_picture or not image.size:
            found = f"{image.dtype} {image.shape}"
            raise ImageError(f"an array must be uint8 (H, W), (H, W, 3) or (H, W, 4), not {found}")
        return Image.fromarray(image)
    if not isinstance(image, Image.Image):
        found = type(image).__name__
        raise ImageError(f"expected a PIL image or a uint8 array, got {found}")
    if image.mode == "F":
        raise ImageError("floating-point pictures are not read: their white is not known")
    if not image.width * image.height:
        raise ImageError("the picture has no pixels")
    return ImageOps.exif_transpose(image)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to 8: 65535 becomes 255. Pillow itself would clip at 255."""
    values = np.asarray(image.convert("I"))
    return Image.fromarray(np.clip((values + 128) // 257, 0, 255).astype(np.uint8))


# Sizes -------------------------------------------------------------------------------------------


def fitted(image: Image.Image, width: int, height: int, fit: str = "stretch") -> Image.Image:
    """The picture at another size.

    Args:
        image: RGB or grey.
        width: wanted, in pixels.
        height: wanted, in pixels.
        fit: "stretch" ("Just resize") takes the whole picture; "crop" ("Crop and resize") keeps its
            proportions and cuts what is over, equally on both sides.

    Raises:
        ValueError: for an unknown ``fit``.
    """
    if fit not in FITS:
        raise ValueError(f"fit must be one of {', '.join(FITS)}, got {fit!r}.")
    if image.size == (width, height):
        return image.copy()
    if fit == "stretch":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    is_wider = width * image.height > height * image.width
    full_width = width if is_wider else max(width, image.width * height // image.height)
    full_height = max(height, image.height * width // image.width) if is_wider else height
    left, top = full_width // 2 - width // 2, full_height // 2 - height // 2
    kept = left, top, left + width, top + height
    if full_width * full_height > MAX_PIXELS:
        return _enlarged_part(image, (full_width, full_height), kept)
    return image.resize((full_width, full_height), Image.Resampling.LANCZOS).crop(kept)


def _enlarged_part(
    image: Image.Image, full: tuple[int, int], kept: tuple[int, int, int, int]
) -> Image.Image:
    """A box of the picture at a larger size; only what is seen there is ever made.

    Within rounding it is what cutting the whole gives. A strip of one pixel by thousands would
    take gigabytes for that.
    """
    across, down = image.width / full[0], image.height / full[1]
    seen = [side * scale for side, scale in zip(kept, (across, down) * 2, strict=True)]
    reach = 4  # pixels beside it; Lanczos looks at three
    left, top = (max(int(side) - reach, 0) for side in seen[:2])
    right, bottom = (
        min(int(side) + 1 + reach, most) for side, most in zip(seen[2:], image.size, strict=True)
    )
    box = (
        *(seen[0] - left, seen[1] - top),
        *(min(seen[2] - left, right - left), min(seen[3] - top, bottom - top)),
    )
    size = kept[2] - kept[0], kept[3] - kept[1]
    part = image.crop((left, top, right, bottom))
    return part.resize(size, Image.Resampling.LANCZOS, box=box)


def size_like(
    image_size: tuple[int, int],
    largest: int,
    *,
    width: int | None = None,
    height: int | None = None,
) -> tuple[int, int]:
    """A size to draw at, in multiples of 8, with about the proportions of a given picture.

    Its own size where that has no more than ``largest`` pixels, else smaller. With ``width`` or
    ``height`` given the other one follows it.
    """
    own_width, own_height = image_size
    if width is not None:
        return width, _multiple(own_height * width / own_width)
    if height is not None:
        return _multiple(own_width * height / own_height), height
    scale = min(1.0, (largest / (own_width * own_height)) ** 0.5)
    return _multiple(own_width * scale), _multiple(own_height * scale)


def _multiple(size: float) -> int:
    low, high = (int(bound) for bound in metadata.LIMITS["width"][1:])
    return min(max(int(size) // 8 * 8, low), high)


# Masks -------------------------------------------------------------------------------------------


def blurred(mask: Image.Image, radius: float) -> FloatArray:
    """A grey mask as (H, W) in 0..1, its edges softened by a Gaussian of ``radius`` pixels.

    The kernel ends at 2.5 standard deviations and the border is mirrored, as in A1111 (OpenCV's
    GaussianBlur), so that beyond that distance the mask stays exactly 0 or 1.
    """
    values = np.asarray(mask, np.float64) / 255
    if radius > 0:
        reach = int(2.5 * radius + 0.5)
        taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / radius) ** 2)
        taps /= taps.sum()
        values = _smoothed(_smoothed(values, taps).T, taps).T
        # The taps' sum is 1 only within rounding: what was flat stays flat.
        values = np.round(np.clip(values, 0, 1), 9)
    return values.astype(np.float32)


def _smoothed(values: NDArray[np.float64], taps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each column convolved with ``taps``."""
    rows, reach = len(values), len(taps) // 2
    margin = ((reach, reach), (0, 0))
    total = np.zeros_like(values)
    for start in range(0, values.shape[1], BAND):  # of a large photograph some at a time
        band = slice(start, start + BAND)
        padded = np.pad(values[:, band], margin, mode="reflect" if rows > 1 else "edge")
        for i, tap in enumerate(taps):
            total[:, band] += tap * padded[i : i + rows]
    return total


def latent_mask(mask: FloatArray, factor: int) -> FloatArray:
    """A pixel mask (H, W) as the latents' (h, w, 1), of 0 and 1: one pixel decides for each cell.

    It is the cell's first, floor(i * factor), and counts as white from 0.5, as in diffusers.
    """
    return (mask[::factor, ::factor, None] >= 0.5).astype(np.float32)


def filled(image: Image.Image, mask: FloatArray) -> Image.Image:
    """A picture whose masked parts are made of what lies around them, ever finer to the edge.

    As A1111's "fill" (@v1.10.1 modules/masking.py), within some levels of 255. Where nothing at all
    is known it is black there, and grey here.

    Args:
        image: RGB.
        mask: (H, W), 1 where nothing of the picture is to be seen.
    """
    known = image.convert("RGBA")
    known.putalpha(Image.fromarray(np.rint(255 * (1 - mask)).astype(np.uint8)))
    # Premultiplied: what is hidden has no colour that could spread.
    visible = known.convert("RGBa")
    result = Image.new("RGBA", image.size, (128, 128, 128, 0))  # grey where nothing arrives at all
    for radius, times in FILL_BLURS:
        spread = visible.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        hidden = [(1 - alpha / 255) ** times for alpha in range(256)]
        spread.putalpha(spread.getchannel("A").point([round(255 * (1 - h)) for h in hidden]))
        result.alpha_composite(spread)
    result.alpha_composite(known)
    return result.convert("RGB")


def composited(drawn: Image.Image, original: Image.Image, mask: FloatArray) -> Image.Image:
    """``drawn`` where the mask (H, W) is 1, ``original`` bit for bit where it is 0."""
    result = np.empty((original.height, original.width, 3), np.uint8)
    for start in range(0, original.height, BAND):  # of a large photograph some rows at a time
        band = slice(start, start + BAND)
        rows = 0, start, original.width, min(start + BAND, original.height)
        new, old = (np.asarray(image.crop(rows), np.float32) for image in (drawn, original))
        mixed = old + mask[band, :, None] * (new - old)
        result[band] = np.clip(mixed, 0, 255).round()
    return Image.fromarray(result)


# Previews ----------------------------------------------------------------------------------------


def linear_preview(
    latents: FloatArray, factors: Sequence[Sequence[float]], size: tuple[int, int]
) -> Image.Image:
    """Latents (h, w, C) as a rough picture: each cell one colour, enlarged smoothly.

    Args:
        latents: the clean latents as they are guessed at some step.
        factors: C rows of RGB weights and a row of offsets, to colours in 0..1.
        size: (width, height) of the picture.
    """
    table = np.asarray(factors, np.float32)
    colours = np.nan_to_num(np.clip(latents @ table[:-1] + table[-1], 0, 1)) * 255
    small = Image.fromarray(colours.round().astype(np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def solve_rgb_factors(latents: FloatArray, pixels: FloatArray) -> list[list[float]]:
    """The factors that turn latents (B, h, w, C) best into pictures (B, H, W, 3) in [-1, 1].

    Least squares, where each cell is compared with the mean colour of the pixels that it covers.
    """
    batch, rows, columns, channels = latents.shape
    blocks = pixels.reshape(batch, rows, pixels.shape[1] // rows, columns, -1, 3)
    colours = np.clip(blocks.mean(axis=(2, 4)) / 2 + 0.5, 0, 1).reshape(-1, 3)
    inputs = latents.reshape(-1, channels)
    inputs = np.concatenate([inputs, np.ones((len(inputs), 1), np.float32)], axis=1)
    factors, *_ = np.linalg.lstsq(inputs.astype(np.float64), colours.astype(np.float64), rcond=None)
    return factors.tolist()
