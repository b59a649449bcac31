"""Pictures made larger without drawing them again: by interpolation, or by a network."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageOps

from mlx_maple import images

RESIZERS = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
NOTHING = "None"
PASSES = 3  # of a network, until a picture is large enough


@dataclass(frozen=True, kw_only=True)
class Enlarging:
    """How pictures are enlarged.

    Attributes:
        upscalers: names, one of ``RESIZERS``, ``NOTHING`` or a network in the models' folders, and
            the share that each has in the result: the second is laid over the first, and so on.
        factor: how many times larger.
        size: width and height instead.
        is_cut: whether a picture of other proportions is cut to that size, not stretched.
        most_pixels: of the result.
    """

    upscalers: Sequence[tuple[str, float]]
    factor: float = 2.0
    size: tuple[int, int] | None = None
    is_cut: bool = True
    most_pixels: int = 40_000_000

    def target(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height that a picture of a size gets.

        Raises:
            ValueError: too many pixels.
        """
        if all(name == NOTHING for name, _ in self.upscalers):
            return size
        width, height = self.size or tuple(max(1, int(side * self.factor)) for side in size)
        if width * height > self.most_pixels:
            raise ValueError(f"{width}x{height} is too large: {self.most_pixels:,} pixels at most.")
        return width, height


def enlarged(
    image: Image.Image, how: Enlarging, progress: Callable[[int, int], None] | None = None
) -> Image.Image:
    """One picture, larger.

    Args:
        image: any.
        how: it is enlarged.
        progress: is told of pieces, as ``upscalers.Upscaler`` tells of them.

    Raises:
        ValueError: it would have too many pixels.
        OSError: a network cannot be read.
    """
    image, result = images.to_rgb(image), None
    size = how.target(image.size)
    for name, share in how.upscalers:
        layer = _sized(_by_network(image, name, size, progress), size, name, is_cut=how.is_cut)
        result = layer if result is None else Image.blend(result, layer, share)
    return image if result is None else result


def _by_network(
    image: Image.Image,
    name: str,
    size: tuple[int, int],
    progress: Callable[[int, int], None] | None,
) -> Image.Image:
    """As large as ``size`` at the least, where a network of this name enlarges."""
    if name in (NOTHING, *RESIZERS):
        return image
    from mlx_maple import upscalers

    network = upscalers.open_named(name)
    for _ in range(PASSES):
        if image.width >= size[0] and image.height >= size[1]:
            break
        image = network(image, progress)
    return image


def _sized(image: Image.Image, size: tuple[int, int], name: str, *, is_cut: bool) -> Image.Image:
    if image.size == size:
        return image
    how = RESIZERS.get(name, Image.Resampling.LANCZOS)
    return ImageOps.fit(image, size, how) if is_cut else image.resize(size, how)
