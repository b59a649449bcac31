"""How a model is best drawn with, where something shows that it is not like its family.

Tensors show a latent consistency model that is told its guidance. A folder's scheduler shows what a
model was distilled or trained for. A bare file's name is all that shows a Turbo, Lightning, Hyper
or LCM model: it is taken as people take it, as a hint that a flag overrides, and every hint is
noted.

Source   The settings are the published ones: latent-consistency/lcm-lora-sdv1-5, stabilityai/
         sdxl-turbo, ByteDance/SDXL-Lightning and ByteDance/Hyper-SD (their pages on the hub); zero
         terminal SNR: Lin et al. 2023 (arXiv:2305.08891), sections 3.2 to 3.4.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maple_convert.errors import one_line

TOLD_GUIDANCE = 8.5  # of the published consistency model that is told its scale
ZERO_SNR = {"sampler": "ddim", "schedule": "trailing", "guidance_rescale": 0.7}
MOST_STEPS = 16  # that a name may ask for: "Lightning_8steps", but no "v50 step"


@dataclass(frozen=True)
class Kind:
    """One way of distilling a model to a few steps.

    Attributes:
        word: that names it, in a file's name.
        title: for people.
        sampler: that it was made for.
        schedule: likewise.
        steps: in which it draws, where its name gives no number.
    """

    word: str
    title: str
    sampler: str
    schedule: str
    steps: int

    @property
    def settings(self) -> dict[str, Any]:
        """As defaults; 1 is unguided: guidance is distilled into all of them."""
        return {
            "sampler": self.sampler,
            "schedule": self.schedule,
            "steps": self.steps,
            "guidance_scale": 1.0,
        }


LCM = Kind("lcm", "latent consistency", "lcm", "trailing", 4)
KINDS = (
    LCM,
    Kind("turbo", "Turbo", "euler_a", "trailing", 4),
    Kind("lightning", "Lightning", "euler", "trailing", 4),
    Kind("hyper", "Hyper", "ddim", "trailing", 8),
)


def recommended(
    path: Path,
    unet: Mapping[str, Any],
    *,
    scheduler: Mapping[str, Any],
    scheduler_class: str = "",
) -> tuple[dict[str, Any], list[str]]:
    """Defaults that differ from the family's, and why, one sentence each.

    Args:
        path: the file or folder; its name counts.
        unet: config of its UNet.
        scheduler: the model's noise schedule and hints.
        scheduler_class: that a folder names, or "".
    """
    name = _name(path)
    if unet.get("time_cond_dim") is not None:
        settings = {**LCM.settings, "guidance_scale": TOLD_GUIDANCE}
        return settings, [f"The UNet is told its guidance: {_said(LCM, settings)}."]
    if scheduler_class == "LCMScheduler":
        return LCM.settings, [f"The folder's scheduler is {scheduler_class}: {_said(LCM)}."]
    for kind in KINDS:
        if (steps := _mentions(name, kind.word)) is not None:
            settings = {**kind.settings, "steps": steps or kind.steps}
            shown = one_line(repr(name), 80)
            return settings, [f"Its name {shown} says {kind.title}: {_said(kind, settings)}."]
    if scheduler["rescale_zero_terminal_snr"]:
        shown = f"{ZERO_SNR['sampler']}, {ZERO_SNR['schedule']}"
        return dict(ZERO_SNR), [
            f"Trained to zero terminal SNR: drawn with {shown} and guidance brought back by "
            f"{ZERO_SNR['guidance_rescale']} unless told otherwise."
        ]
    return {}, []


def _name(path: Path) -> str:
    """What people call it: a file's name without its suffix, a repository's or a folder's name."""
    if path.is_dir() and path.resolve().parent.name == "snapshots":  # of the hub's cache
        return path.resolve().parent.parent.name.rpartition("--")[2]
    return path.resolve().name if path.is_dir() else path.stem


def _mentions(name: str, word: str) -> int | None:
    """The steps that a name gives beside a word, 0 where it gives none, None without the word."""
    if not re.search(rf"(?<![a-z]){word}(?![a-z])", _spaced(name)):
        return None
    found = re.search(r"(?<![\d.])(\d{1,2})[ _-]?steps?(?![a-z])", name.lower())
    steps = int(found[1]) if found else 0
    return steps if steps <= MOST_STEPS else 0


def _spaced(name: str) -> str:
    """In small letters, with a space where capitals begin a word: "DreamShaperXLTurbo"."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return apart.lower()


def _said(kind: Kind, settings: Mapping[str, Any] | None = None) -> str:
    chosen = kind.settings if settings is None else settings
    guidance = "unguided"
    if chosen["guidance_scale"] != 1:
        guidance = f"guidance {chosen['guidance_scale']:g}"
    return (
        f"drawn with {chosen['sampler']}, {chosen['schedule']}, in {chosen['steps']} steps, "
        f"{guidance}, unless told otherwise"
    )
