"""Networks that enlarge pictures, by their file or by their name in the models' folders."""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from PIL import Image

from maple_convert.errors import UnreadableFile, UnsupportedCheckpoint, one_line
from maple_convert.upscaler import open_upscaler
from mlx_maple import images, model_folders
from mlx_maple.enlarge import enlarged
from mlx_maple.models.esrgan import ESRGAN, ESRGANConfig

SIDE = {"cpu": 96, "gpu": 256}  # pixels of a piece; what a layer unfolds grows with its square
MARGIN = 16  # pixels around a piece that it sees and whose result is thrown away


class Upscaler:
    """A network that enlarges pictures, piece by piece.

    Args:
        network: with its weights.
        name: to call it by.
    """

    def __init__(self, network: ESRGAN, name: str = "") -> None:
        self.network = network
        self.name = name

    @property
    def scale(self) -> float:
        """How many times larger a picture becomes."""
        return self.network.config.scale

    def __call__(
        self,
        image: Image.Image,
        progress: Callable[[int, int], None] | None = None,
        side: int | None = None,
    ) -> Image.Image:
        """Enlarge a picture.

        Args:
            image: any.
            progress: is told of pieces: how many are done, and how many there are.
            side: pixels of a piece; None suits the device.

        Raises:
            ValueError: if the result would have too many pixels.
        """
        image = images.to_rgb(image)
        width, height = enlarged(image.size, self.scale)
        is_cpu = mx.default_device() == mx.Device(mx.DeviceType.cpu)
        side = SIDE["cpu" if is_cpu else "gpu"] if side is None else side
        shuffle = self.network.config.shuffle
        side = max(side // shuffle, 1) * shuffle
        pixels = np.asarray(image, np.float32) / 255
        # So that every piece begins and ends where pixels are folded, and the margin with it.
        more = [(0, -pixels.shape[axis] % shuffle) for axis in (0, 1)]
        pixels = np.pad(pixels, [*more, (0, 0)], mode="edge")
        out = np.empty((height, width, 3), np.uint8)
        corners = [
            (top, left)
            for top in range(0, pixels.shape[0], side)
            for left in range(0, pixels.shape[1], side)
        ]
        for number, (top, left) in enumerate(corners):
            if progress is not None:
                progress(number, len(corners))
            self._piece(pixels, out, top, left, side)
        return Image.fromarray(out)

    def _piece(self, pixels: np.ndarray, out: np.ndarray, top: int, left: int, side: int) -> None:
        """Enlarge one piece into its place."""
        margin = MARGIN // self.network.config.shuffle * self.network.config.shuffle
        bottom, right = min(top + side, pixels.shape[0]), min(left + side, pixels.shape[1])
        above, before = max(top - margin, 0), max(left - margin, 0)
        seen = pixels[above : bottom + margin, before : right + margin]
        made = np.array(self.network(mx.array(seen)[None]).astype(mx.float32))[0]
        rows, columns = (
            slice(round((start - edge) * self.scale), round((end - edge) * self.scale))
            for start, end, edge in ((top, bottom, above), (left, right, before))
        )
        place = out[
            round(top * self.scale) : round(bottom * self.scale),
            round(left * self.scale) : round(right * self.scale),
        ]
        piece = made[rows, columns][: place.shape[0], : place.shape[1]]
        place[:] = np.clip(np.nan_to_num(piece) * 255, 0, 255).round()


def open_named(name: str | Path, dtype: mx.Dtype | None = None) -> Upscaler:
    """A network by its path or by its name in the models' folders.

    Args:
        name: a path that exists goes before a name.
        dtype: that it computes in; None is float32 on the CPU and float16 elsewhere.

    Raises:
        ConvertError: if it is not there, cannot be read, or is another network.
    """
    path = _found(str(name))
    file = open_upscaler(path)
    try:
        network = ESRGAN(ESRGANConfig(**file.config))
    except ValueError as error:
        raise UnsupportedCheckpoint(path, str(error)) from None
    weights = [(key, mx.array(tensor.array)) for key, tensor in file.tensors.items()]
    network.load_weights(weights, strict=True)
    if dtype is None:
        is_cpu = mx.default_device() == mx.Device(mx.DeviceType.cpu)
        dtype = mx.float32 if is_cpu else mx.float16
    network.set_dtype(dtype)
    return Upscaler(network, path.stem)


def _found(name: str) -> Path:
    path = Path(name)
    try:
        path = path.expanduser()
        if path.is_file():
            return path
    except (OSError, RuntimeError, ValueError):  # too long, "~nobody", a NUL
        pass
    named = model_folders.find("upscaler", name)
    if named is None:
        known = ", ".join(list(model_folders.list("upscaler"))[:3]) or "which has none"
        reason = "no such file, and no network that enlarges by that name in "
        raise UnreadableFile(
            one_line(name, 200) or "''", f"{reason}${model_folders.VARIABLE} ({known})"
        )
    return named
