"""Other forms of a model's networks, for one drawing: closed at their edges, or with FreeU.

Both change what plain layers do, which the form that a GPU draws with has rearranged. There the
networks are read once more and left plain: such a drawing takes longer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_maple.metadata import check_number
from mlx_maple.models import TAESD, AutoencoderKL, UNet
from mlx_maple.models.freeu import Factors, set_freeu
from mlx_maple.models.seamless import AXES, wrap

PARTS = ("unet", "vae")  # that have other forms
HAVE_FORMS = (UNet, AutoencoderKL, TAESD)


@dataclass(frozen=True)
class Form:
    """How networks are to be.

    Attributes:
        tile: the axes along which pictures continue at the opposite edge; None is none.
        freeu: the factors of FreeU, or None.
    """

    tile: str | None = None
    freeu: Factors | None = None

    def apply(self, network: Any) -> Any:
        """Bring a plain network into this form, in place."""
        if isinstance(network, HAVE_FORMS):
            wrap(network, self.tile)
        if isinstance(network, UNet):
            set_freeu(network, self.freeu)
        return network


PLAIN = Form()


def read_form(tile: Any, freeu: Any) -> Form:
    """What was asked for, checked.

    Args:
        tile: one of ``seamless.AXES``, or None.
        freeu: four numbers, or a text of them, or None.

    Raises:
        ValueError: in one line, for anything else.
    """
    if tile is not None and tile not in AXES:
        raise ValueError(f"unknown tile {tile!r}: choose from {', '.join(AXES)}.")
    if freeu is None:
        return Form(tile)
    values = freeu.split() if isinstance(freeu, str) else freeu
    if not isinstance(values, Sequence) or len(values) != 4:
        raise ValueError("freeu takes four numbers: b1, b2, s1 and s2.")
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        raise ValueError("freeu takes four numbers: b1, b2, s1 and s2.") from None
    return Form(tile, Factors(*(check_number("freeu", number) for number in numbers)))


def freeu_text(form: Form) -> str | None:
    """The factors as settings write them."""
    return None if form.freeu is None else " ".join(f"{value:g}" for value in form.freeu)
