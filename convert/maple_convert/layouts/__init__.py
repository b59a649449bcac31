"""The key tables, one module a component: two-way, exact, and data that a person can read.

docs/layouts holds the same tables as pages; ``python -m maple_convert.layouts`` writes them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from maple_convert.layouts import (
    clip,
    controlnet,
    image_encoder,
    ip_adapter,
    t2i_adapter,
    taesd,
    unet,
    vae,
)
from maple_convert.layouts.parts import NATIVE, Parts, Place, Row, View, rows

__all__ = ["LAYOUTS", "NATIVE", "Layout", "Row", "View"]


@dataclass(frozen=True)
class Layout:
    """One component: its spellings, its places, and how its architecture is read from a file.

    Attributes:
        title: what the component is called in prose.
        spellings: every published way of naming it, the current one of diffusers among them. A
            UNet's and a ControlNet's are each followed by ``parts.LINEAR`` where the file keeps the
            transformers' doors as linear layers.
        places: config to the network's blocks.
        infer: what names and shapes say of the config.
        tables: the parts, for the documentation.
        published_config: the architecture that the documentation spells out.
    """

    title: str
    spellings: tuple[str, ...]
    places: Callable[[Mapping[str, Any]], list[Place]]
    infer: Callable[[View, str], dict[str, Any]]
    tables: tuple[Parts, ...]
    published_config: Mapping[str, Any]

    def rows(self, config: Mapping[str, Any], spelling: str) -> list[Row]:
        """Every parameter in one spelling (or ``NATIVE``), each exactly once."""
        return rows(self.places(config), spelling)


LAYOUTS: Mapping[str, Layout] = {
    "text_encoder": Layout(
        "CLIP text encoder",
        clip.SPELLINGS,
        clip.places,
        clip.infer,
        clip.TABLES,
        clip.PUBLISHED_CONFIG,
    ),
    "text_encoder_2": Layout(
        "second text encoder",
        clip.SPELLINGS,
        clip.places,
        clip.infer,
        clip.TABLES,
        clip.PUBLISHED_CONFIG_2,
    ),
    "unet": Layout(
        "UNet", unet.SPELLINGS, unet.places, unet.infer, unet.TABLES, unet.PUBLISHED_CONFIG
    ),
    "vae": Layout(
        "autoencoder", vae.SPELLINGS, vae.places, vae.infer, vae.TABLES, vae.PUBLISHED_CONFIG
    ),
    "taesd": Layout(
        "TAESD", taesd.SPELLINGS, taesd.places, taesd.infer, taesd.TABLES, taesd.PUBLISHED_CONFIG
    ),
    "t2i_adapter": Layout(
        "T2I-Adapter",
        t2i_adapter.SPELLINGS,
        t2i_adapter.places,
        t2i_adapter.infer,
        t2i_adapter.TABLES,
        t2i_adapter.PUBLISHED_CONFIG,
    ),
    "controlnet": Layout(
        "ControlNet",
        controlnet.SPELLINGS,
        controlnet.places,
        controlnet.infer,
        controlnet.TABLES,
        controlnet.PUBLISHED_CONFIG,
    ),
    "image_encoder": Layout(
        "CLIP image encoder",
        image_encoder.SPELLINGS,
        image_encoder.places,
        image_encoder.infer,
        image_encoder.TABLES,
        image_encoder.PUBLISHED_CONFIG,
    ),
    "ip_adapter": Layout(
        "IP-Adapter",
        ip_adapter.SPELLINGS,
        ip_adapter.places,
        ip_adapter.infer,
        ip_adapter.TABLES,
        ip_adapter.PUBLISHED_CONFIG,
    ),
}
