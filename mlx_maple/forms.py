"""Forms of a model's networks, for one drawing: what is asked for, and a network brought into it.

A form is arithmetic alone: no network is read again for it, and one that was made ready for a GPU
stays so (engine/prepared_forms.py).
"""

from collections.abc import Sequence
from typing import Any

from mlx_maple.engine import prepared_forms
from mlx_maple.engine.prepare import PreparedUNet, PreparedVAE
from mlx_maple.metadata import check_number
from mlx_maple.models import forms as plain_forms
from mlx_maple.models.forms import PLAIN as PLAIN
from mlx_maple.models.forms import Form
from mlx_maple.models.freeu import Factors
from mlx_maple.models.seamless import AXES

PARTS = ("unet", "vae")  # of a model, that have other forms


def set_form(network: Any, form: Form) -> None:
    """Bring a network into a form, in place, whether it was made ready or not."""
    if isinstance(network, PreparedUNet | PreparedVAE):
        prepared_forms.set_form(network, form)
    else:
        plain_forms.set_form(network, form)


def read_form(tile: Any, freeu: Any, token_merging: Any = 0.0) -> Form:
    """What was asked for, checked.

    Args:
        tile: one of ``seamless.AXES``, or None.
        freeu: four numbers, or a text of them, or None.
        token_merging: share of the tokens.

    Raises:
        ValueError: in one line, for anything else.
    """
    if tile is not None and tile not in AXES:
        raise ValueError(f"unknown tile {tile!r}: choose from {', '.join(AXES)}.")
    merging = check_number("token_merging", token_merging)
    if freeu is None:
        return Form(tile, None, merging)
    values = freeu.split() if isinstance(freeu, str) else freeu
    if not isinstance(values, Sequence) or len(values) != 4:
        raise ValueError("freeu takes four numbers: b1, b2, s1 and s2.")
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        raise ValueError("freeu takes four numbers: b1, b2, s1 and s2.") from None
    factors = Factors(*(check_number("freeu", number) for number in numbers))
    return Form(tile, factors, merging)


def freeu_text(form: Form) -> str | None:
    """The factors as settings write them."""
    return None if form.freeu is None else " ".join(f"{value:g}" for value in form.freeu)
