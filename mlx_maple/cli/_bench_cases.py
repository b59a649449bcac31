"""The pieces of work that are measured, by name: KIND-SIZE-bBATCH, as in unet-512-b2.

unet    the UNet's part of a step, guidance included: two in a batch for each picture
xl      the same of SDXL, as in xl-1024-b2; random weights whatever the model
vae     decoding latents to pictures of SIZE by SIZE pixels
text    a prompt and a negative prompt
image   a whole picture: text, 20 guided steps of dpmpp_2m, decoding, a PIL image
start   from the start of a process to the first step begun

Size (512) and batch (1) may be left out.
"""

import re
from dataclasses import dataclass

KINDS = ("unet", "xl", "vae", "text", "image", "start")


@dataclass(frozen=True)
class Case:
    """One piece of work."""

    kind: str
    size: int = 512
    batch: int = 1

    @property
    def name(self) -> str:
        """As it is written."""
        words = [self.kind]
        if self.kind not in ("text", "start"):
            words.append(str(self.size))
        if self.kind in ("unet", "xl") or self.batch > 1:
            words.append(f"b{self.batch}")
        return "-".join(words)

    @classmethod
    def parse(cls, name: str) -> "Case":
        """The case that ``name`` tells.

        Raises:
            ValueError: if it tells none.
        """
        match = re.fullmatch(r"([a-z]+)(?:-(\d+))?(?:-b(\d+))?", name)
        if match is None or match[1] not in KINDS:
            raise ValueError(
                f"{name}: no such case; KIND-SIZE-bBATCH, with KIND one of {', '.join(KINDS)}"
            )
        case = cls(match[1], int(match[2] or 512), int(match[3] or 1))
        if case.size % 8 or not 64 <= case.size <= 4096 or not 1 <= case.batch <= 64:
            raise ValueError(f"{name}: sizes are multiples of 8 up to 4096, batches up to 64")
        return case
