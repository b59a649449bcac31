"""Pictures from scenes, on whatever device the icons lie on.

Legend   B pictures; all pictures 128x128, channels first, [0, 1] inside this file and [-1, 1] as
         the networks see them. A scene arrives as the row of numbers that captions.scene_row makes.
"""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from captions import CHROMATIC, COLOURS, THING_FIELDS, Catalogue
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

SIZE = 128
WHITE = COLOURS.index("white")
# hue, saturation, value of the twelve recolouring targets
TARGETS = (
    (0.99, 0.85, 0.90), (0.075, 0.90, 0.98), (0.138, 0.85, 0.98), (0.36, 0.75, 0.70),
    (0.49, 0.75, 0.74), (0.605, 0.80, 0.92), (0.76, 0.62, 0.78), (0.915, 0.45, 1.00),
    (0.07, 0.60, 0.52), (0.0, 0.03, 0.58), (0.0, 0.03, 0.97), (0.0, 0.05, 0.20),
)  # fmt: skip
HUE, TINT = 1, 2  # how an icon takes a colour: its main hue is turned, or its greys are tinted


def hsv(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, 3, H, W) in [0, 1] to hue (0..1), saturation and value, each (B, H, W)."""
    value, _ = rgb.max(1)
    delta = value - rgb.min(1).values
    red, green, blue = rgb.unbind(1)
    safe = delta.clamp_min(1e-4)
    hue = torch.where(
        value == red,
        ((green - blue) / safe) % 6,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return hue / 6, delta / value.clamp_min(1e-4), value


def rgb_of(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """The inverse of hsv: three (B, H, W) to (B, 3, H, W)."""
    channels = []
    for n in (5, 3, 1):
        k = (n + hue * 6) % 6
        channels.append(value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


def colour_names(rgb: Tensor) -> Tensor:
    """The name (index into COLOURS) a person would give each pixel: (B, 3, H, W) to (B, H, W)."""
    hue, s, v = hsv(rgb)
    h = hue * 360
    name = {c: i for i, c in enumerate(COLOURS)}
    out = torch.full_like(h, name["pink"])
    out[(h < 345)] = name["pink"]
    out[(h < 345) & (v < 0.6)] = name["purple"]
    out[h < 300] = name["purple"]
    out[h < 250] = name["blue"]
    out[h < 192] = name["teal"]
    out[h < 162] = name["green"]
    out[(h < 66) & (v > 0.7)] = name["yellow"]
    out[(h < 52) & (v <= 0.7)] = name["brown"]
    out[h < 42] = name["orange"]
    out[(h < 42) & ((v < 0.68) | ((s < 0.6) & (v < 0.85)))] = name["brown"]
    red = (h < 14) | (h >= 345)
    out[red] = name["red"]
    out[red & (v < 0.4)] = name["brown"]
    out[(red | (h < 24)) & (s < 0.55) & (v > 0.75)] = name["pink"]
    pale = (s < 0.15) | (s * v < 0.09)
    out[pale] = name["gray"]
    out[pale & (v > 0.85)] = name["white"]
    out[(pale & (v < 0.36)) | (v < 0.2)] = name["black"]
    return out.long()


def main_colour(rgb: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The colour an object is, by its pixels' names.

    Args:
        rgb: (B, 3, H, W) in [0, 1].
        mask: (B, H, W) boolean, the object's pixels.

    Returns:
        (B,) index into COLOURS, or -1 when no colour stands out; and (B, 12) shares of the names.
        A hue stands out when it is the commonest hue, half of all hued pixels and a quarter of the
        object; black, white or gray when it is the commonest name and two fifths of the object.
    """
    names = F.one_hot(colour_names(rgb), len(COLOURS)).float() * mask[..., None]
    count = names.sum((1, 2))
    share = count / mask.sum((1, 2)).clamp_min(1)[:, None]
    hued = share[:, :CHROMATIC]
    best_hue = hued.argmax(1)
    top = hued.amax(1)
    is_hue = (top >= 0.25) & (top >= 0.5 * hued.sum(1))
    best = share.argmax(1)
    is_grey = (best >= CHROMATIC) & (share.amax(1) >= 0.4)
    none = torch.full_like(best, -1)
    return torch.where(is_hue, best_hue, torch.where(is_grey, best, none)), share


_GOALS: dict[torch.device, Tensor] = {}


def _goals(device: torch.device) -> Tensor:
    if device not in _GOALS:
        _GOALS[device] = torch.tensor(TARGETS, device=device)
    return _GOALS[device]


def recolour(rgb: Tensor, mode: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Turn each icon's main hue (HUE) or tint its greys (TINT) towards a target colour.

    Args:
        rgb: (B, 3, H, W) in [0, 1].
        mode: (B,) 0 leaves the icon alone, HUE or TINT.
        source: (B, 3) the icon's own main hue, saturation and value.
        target: (B,) index into COLOURS.
    """

    def wide(x: Tensor) -> Tensor:
        return x.view(-1, 1, 1)

    hue, saturation, value = hsv(rgb)
    goal = _goals(rgb.device)[target]
    goal_hue, goal_sat, goal_value = goal.unbind(1)
    main_hue, main_sat, main_value = source.unbind(1)
    tint = wide(mode == TINT)
    away = ((hue - wide(main_hue) + 0.5) % 1 - 0.5).abs()
    touched = torch.where(tint, saturation < 0.3, (away < 50 / 360) & (saturation > 0.08))
    touched = touched & wide(mode > 0)
    white = target == WHITE
    gain = torch.where(
        white, torch.full_like(goal_value, 0.35), goal_value / main_value.clamp_min(0.05)
    )
    gain = gain.clamp(0.2, 1.8)
    lift = torch.where(white, 0.97 - 0.35 * main_value, torch.zeros_like(main_value))
    # tinting maps grey main_value to 0.88 of the goal first, so that black icons take a colour too
    gain = torch.where(mode == TINT, goal_value / 0.88, gain)
    lift = torch.where(mode == TINT, (0.88 - main_value) * goal_value / 0.88, lift)
    sat_gain = (goal_sat / main_sat.clamp_min(0.05)).clamp(0.4, 2.2)
    sat_gain = torch.where(target >= CHROMATIC, torch.full_like(sat_gain, 0.04), sat_gain)
    turned = torch.where(tint, wide(goal_hue).expand_as(hue), (hue + wide(goal_hue - main_hue)) % 1)
    saturated = torch.where(tint, wide(goal_sat).expand_as(hue), saturation * wide(sat_gain))
    brightened = value * wide(gain) + wide(lift)
    return rgb_of(
        torch.where(touched, turned, hue),
        torch.where(touched, saturated, saturation).clamp(0, 1),
        torch.where(touched, brightened, value).clamp(0, 1),
    )


class Renderer:
    """All icons on one device, and pictures composed of them."""

    def __init__(self, folder: str | Path, catalogue: Catalogue, device: str) -> None:
        file = np.load(Path(folder, "icons.npz"))
        blob, ends = file["blob"], file["offsets"]

        def decode(i: int) -> np.ndarray:
            image = Image.open(io.BytesIO(blob[ends[i] : ends[i + 1]].tobytes()))
            return np.asarray(image.convert("RGBA"))

        with ThreadPoolExecutor(8) as pool:
            icons = np.stack(list(pool.map(decode, range(len(catalogue.icons)))))
        self.device = device
        self.icons = (
            torch.from_numpy(icons).to(device).permute(0, 3, 1, 2).contiguous()
        )  # (N,4,h,w)
        self.modes = torch.tensor([i["mode"] for i in catalogue.icons], device=device)
        self.mains = torch.tensor([i["main"] for i in catalogue.icons], device=device)
        ramp = torch.linspace(0, 1, SIZE, device=device)
        self._ramp = ramp.view(1, 1, SIZE, 1)

    def _layer(self, table: Tensor) -> Tensor:
        """(B, THING_FIELDS) to a premultiplied RGBA layer (B, 4, 128, 128)."""
        index = table[:, 0].long()
        target = table[:, 1].long()
        icon = self.icons[index].float() / 255
        alpha = icon[:, 3:]
        mode = torch.where(target >= 0, self.modes[index], torch.zeros_like(index))
        rgb = recolour(icon[:, :3], mode, self.mains[index], target.clamp_min(0))
        layer = torch.cat([rgb * alpha, alpha], 1)
        scale, x, y, rotation, mirror = table[:, 2:7].unbind(1)
        cos, sin = rotation.cos(), rotation.sin()
        matrix = torch.stack(
            [
                torch.stack([cos, sin, -(cos * x + sin * y)], 1) * mirror[:, None],
                torch.stack([-sin, cos, sin * x - cos * y], 1),
            ],
            1,
        ) / scale.view(-1, 1, 1)
        grid = F.affine_grid(matrix, list(layer.shape), align_corners=False)
        # shrinking takes the coarser copy, so that nothing is skipped
        out = F.grid_sample(layer, grid, align_corners=False)
        for factor, below in ((2, 0.66), (4, 0.33)):
            coarse = F.grid_sample(F.avg_pool2d(layer, factor), grid, align_corners=False)
            out = torch.where((scale < below).view(-1, 1, 1, 1), coarse, out)
        return out * table[:, 7].view(-1, 1, 1, 1)

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> Tensor:
        """(B, ROW) scene rows, on the CPU, to (B, 3, 128, 128) in [-1, 1]."""
        both = (rows[:, -1] > 1).nonzero()[:, 0].to(self.device, non_blocking=True)
        rows = rows.to(self.device, torch.float32, non_blocking=True)
        tables = rows[:, : 2 * THING_FIELDS].view(-1, 2, THING_FIELDS)
        top, bottom = rows[:, -7:-4], rows[:, -4:-1]
        picture = top[..., None, None] * (1 - self._ramp) + bottom[..., None, None] * self._ramp
        layer = self._layer(tables[:, 0])
        picture = layer[:, :3] + (1 - layer[:, 3:]) * picture
        if len(both):
            layer = self._layer(tables[both, 1])
            picture[both] = layer[:, :3] + (1 - layer[:, 3:]) * picture[both]
        return picture.clamp(0, 1) * 2 - 1


def grid(pictures: Tensor, columns: int, labels: list[str] | None = None) -> Image.Image:
    """Lay out (B, 3, 128, 128) in [-1, 1] on one sheet, a label below each."""
    from PIL import ImageDraw

    pixels = ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    pixels = pixels.permute(0, 2, 3, 1).cpu().numpy()
    text = 24 if labels else 0
    rows = -(-len(pixels) // columns)
    sheet = Image.new("RGB", (columns * (SIZE + 4), rows * (SIZE + 4 + text)), (245, 245, 245))
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pixels):
        x, y = i % columns * (SIZE + 4), i // columns * (SIZE + 4 + text)
        sheet.paste(Image.fromarray(picture), (x, y))
        if labels:
            draw.text((x + 1, y + SIZE), labels[i][:22], fill=(0, 0, 0))
            draw.text((x + 1, y + SIZE + 11), labels[i][22:44], fill=(0, 0, 0))
    return sheet
