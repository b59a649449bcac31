"""Forms that a network takes for one drawing: closed at its edges, with FreeU, with merged tokens.

A network is brought into a form in place, and keeps its parameters and their names.
"""

from typing import Any, NamedTuple

from mlx_maple.models.freeu import Factors, set_freeu
from mlx_maple.models.seamless import wrap
from mlx_maple.models.taesd import TAESD
from mlx_maple.models.token_merging import set_token_merging
from mlx_maple.models.unet import UNet
from mlx_maple.models.vae import AutoencoderKL


class Form(NamedTuple):
    """How a network is to be.

    Attributes:
        tile: the axes along which pictures continue at the opposite edge; None is none.
        freeu: the factors of FreeU, or None.
        merging: share of a UNet's tokens that look around as one.
    """

    tile: str | None = None
    freeu: Factors | None = None
    merging: float = 0.0


PLAIN = Form()


def set_form(network: Any, form: Form) -> None:
    """Bring a UNet or an autoencoder into a form; any other network stays as it is."""
    if isinstance(network, UNet | AutoencoderKL | TAESD):
        wrap(network, form.tile)
    if isinstance(network, UNet):
        set_freeu(network, form.freeu)
        set_token_merging(network, form.merging)
