"""Redrawing a masked part alone, at the size of a whole drawing: A1111's "Only masked".

The part is cut out with some of what lies around it, drawn at the size that was asked for, and laid
back through the blurred mask: small things get all the pixels that the network draws well.

Legend   H, W rows and columns of the whole picture. A box is (left, top, right, bottom) in its
         pixels, right and bottom just beyond.
Source   AUTOMATIC1111/stable-diffusion-webui @v1.10.1 modules/masking.py (get_crop_region_v2,
         expand_crop_region), modules/images.py (resize_image, "Resize and fill" and back), and
         modules/processing.py (StableDiffusionProcessingImg2Img.init, apply_overlay).
Differs  A mask of another size comes to the picture's first; A1111 takes its box for the picture's.
         Colours are mixed in float32. A black mask leaves the picture as it is, where A1111 then
         redraws all of it. Pictures that steer are cut alike.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlx_maple import images
from mlx_maple.images import FloatArray

Box = tuple[int, int, int, int]
SEEN = 0.5 / 255  # a mask's weight from which it is more than nothing in 8 bits


@dataclass(frozen=True)
class MaskedArea:
    """What is redrawn of a picture.

    Attributes:
        picture: RGB, all of it, at its own size.
        mask: (H, W) of 0 to 1, blurred.
        box: what is cut out.
        size: width and height that it is drawn at.
    """

    picture: Image.Image
    mask: FloatArray
    box: Box
    size: tuple[int, int]

    @property
    def drawn_mask(self) -> FloatArray:
        """The mask of the part, at the size that it is drawn at."""
        whole = Image.fromarray(np.rint(255 * self.mask).astype(np.uint8))
        return (np.asarray(self.part(whole)) / 255).astype(np.float32)

    def part(self, whole: Image.Image) -> Image.Image:
        """The part of the picture, or of one that shows the same, at the size to draw.

        Where the box could not be brought to the drawing's proportions, its edges fill the rest.
        """
        cut = images.fitted(whole, *self.picture.size).crop(self.box)
        width, height = self.size
        is_wider = cut.width * height > width * cut.height
        inner_width = width if is_wider else max(1, cut.width * height // cut.height)
        inner_height = max(1, cut.height * width // cut.width) if is_wider else height
        inner = cut.resize((inner_width, inner_height), Image.Resampling.LANCZOS)
        left, top = width // 2 - inner_width // 2, height // 2 - inner_height // 2
        margins = [(top, height - inner_height - top), (left, width - inner_width - left)]
        values = np.asarray(inner)
        return Image.fromarray(np.pad(values, margins + [(0, 0)] * (values.ndim - 2), "edge"))

    def parts(self, pictures: Any) -> Any:
        """Of a picture, a list of them, or None: the same, each cut alike."""
        if pictures is None:
            return None
        if isinstance(pictures, list | tuple):
            return [self.parts(each) for each in pictures]
        return self.part(images.to_rgb(pictures))

    def pasted(self, drawn: Image.Image) -> Image.Image:
        """The whole picture with what was drawn; bit for bit itself where the mask is 0."""
        left, top, right, bottom = self.box
        fitted = images.fitted(drawn, right - left, bottom - top, "crop")
        mask = self.mask[top:bottom, left:right]
        whole = self.picture.copy()
        whole.paste(images.composited(fitted, self.picture.crop(self.box), mask), (left, top))
        return whole


def masked_area(
    picture: Image.Image,
    mask: Image.Image | NDArray[Any],
    padding: int,
    size: tuple[int, int],
    blur: float,
) -> MaskedArea:
    """What of a picture is redrawn.

    Args:
        picture: RGB.
        mask: what is white of it.
        padding: pixels around the masked part that are shown to the network with it.
        size: width and height to draw at.
        blur: of the mask, in the picture's own pixels.
    """
    grey = images.to_grey(mask)
    if grey.size != picture.size:  # not by Lanczos, whose rings would be parts of the mask
        grey = grey.resize(picture.size, Image.Resampling.BILINEAR)
    values = _blurred(grey, blur)
    box = in_proportion(masked_box(values, padding), size, picture.size)
    return MaskedArea(picture, values, box, size)


def masked_box(mask: FloatArray, padding: int) -> Box:
    """The box of what a mask (H, W) covers, and so many pixels around; a black one's is all."""
    rows, columns = (np.flatnonzero((mask >= SEEN).any(axis)) for axis in (1, 0))
    height, width = mask.shape
    if not rows.size:
        return 0, 0, width, height
    return (
        max(int(columns[0]) - padding, 0),
        max(int(rows[0]) - padding, 0),
        min(int(columns[-1]) + 1 + padding, width),
        min(int(rows[-1]) + 1 + padding, height),
    )


def in_proportion(box: Box, size: tuple[int, int], whole: tuple[int, int]) -> Box:
    """The box grown along one axis to the proportions of a size, as far as the picture goes."""
    left, top, right, bottom = box
    wanted = size[0] / size[1]
    if (right - left) / (bottom - top) > wanted:
        top, bottom = _grown(top, bottom, (right - left) / wanted, whole[1])
    else:
        left, right = _grown(left, right, (bottom - top) * wanted, whole[0])
    return left, top, right, bottom


def _grown(start: int, end: int, length: float, most: int) -> tuple[int, int]:
    """A range of another length around the same middle, moved and cut to lie in 0 .. ``most``."""
    more = int(length - (end - start))
    kept = min(end - start + more, most)
    start = min(max(start - more // 2, 0), most - kept)
    return start, start + kept


def _blurred(mask: Image.Image, radius: float) -> FloatArray:
    """``images.blurred``, working only where anything is white: the mask may be a large photo's."""
    values = np.zeros((mask.height, mask.width), np.float32)
    found = mask.getbbox()
    if found is not None:
        reach = int(2.5 * radius + 0.5) + 1
        left, top = (max(side - reach, 0) for side in found[:2])
        right, bottom = (
            min(side + reach, most) for side, most in zip(found[2:], mask.size, strict=True)
        )
        cut = mask.crop((left, top, right, bottom))
        values[top:bottom, left:right] = images.blurred(cut, radius)
    return values
