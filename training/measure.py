"""Measurements on pictures: reconstruction error, specks, and colours of object and background.

Legend   Pictures are (B, 3, 128, 128) in [-1, 1].
"""

from __future__ import annotations

import math

import torch
from captions import BACKGROUNDS
from render import main_colour
from torch import Tensor
from torch.nn import functional as F

OVERSHOOT = 0.25  # of full scale, beyond anything within 4 pixels of the truth


def psnr(truth: Tensor, copy: Tensor) -> float:
    """PSNR in dB of the mean squared error over all pictures (stricter than the mean of PSNRs)."""
    error = (copy.clamp(-1, 1) - truth).float().square().mean().item() / 4
    return round(-10 * math.log10(max(error, 1e-12)), 3)


def overshoots(copy: Tensor, truth: Tensor) -> float:
    """Share of pictures with a speck: a pixel far outside the values around it in the truth.

    Blur never leaves the range of the neighbourhood, so that lost detail does not count.
    """
    x, y = truth.float() / 2 + 0.5, copy.float().clamp(-1, 1) / 2 + 0.5
    highest = F.max_pool2d(x, 9, 1, 4)
    lowest = -F.max_pool2d(-x, 9, 1, 4)
    beyond = torch.maximum(y - highest, lowest - y).amax((1, 2, 3))
    return round((beyond > OVERSHOOT).float().mean().item(), 4)


def lone_colours(pictures: Tensor) -> float:
    """Share of pictures with a speck, judged without the truth.

    A speck is a pixel whose colourfulness (largest minus smallest channel) is above that of every
    pixel on the 11x11 ring around it by 0.35. Artwork has some such dots: compare with its share.
    """
    found = []
    for some in pictures.split(64):
        x = some.float().clamp(-1, 1) / 2 + 0.5
        colourful = (x.amax(1) - x.amin(1))[:, None]
        patches = F.unfold(F.pad(colourful, (5, 5, 5, 5), mode="replicate"), 11)
        patches = patches.view(len(x), 11, 11, -1)
        rows, columns = patches[:, [0, -1]].amax((1, 2)), patches[:, :, [0, -1]].amax((1, 2))
        ring = torch.maximum(rows, columns)
        found.append((colourful.flatten(1) - ring > 0.35).any(1))
    return round(torch.cat(found).float().mean().item(), 4)


def colours(pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What is seen: (B,) the object's colour or -1, (B,) the background's index, (B,) object share.

    The background is the median colour of the border, named by the nearest of the first twelve
    BACKGROUNDS; the object is what differs from it by more than 0.16 in some channel.
    """
    x = pictures.float().clamp(-1, 1) / 2 + 0.5
    border = torch.cat([x[..., :3, :].flatten(2), x[..., -3:, :].flatten(2),
                        x[..., :3].flatten(2), x[..., -3:].flatten(2)], 2)  # fmt: skip
    ground = border.median(2).values  # (B, 3)
    known = torch.tensor([rgb for _, rgb, _ in BACKGROUNDS[:12]], device=x.device)
    background = torch.cdist(ground, known).argmin(1)
    mask = (x - ground[..., None, None]).abs().amax(1) > 0.16
    colour, _ = main_colour(x, mask)
    share = mask.float().mean((1, 2))
    return torch.where(share > 0.02, colour, torch.full_like(colour, -1)), background, share
