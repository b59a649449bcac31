"""CLIP's image encoder: a picture to the states that an image prompt is made of.

Legend   B batch; S side in pixels; P = (S / patch)^2 patches; D width; E width of the projection.
         Pictures are (B, S, S, 3), tokens (B, 1 + P, D): the picture's own first, then the patches
         in reading order.
Source   Radford et al. 2021 (arXiv:2103.00020); names and the choice of states as in transformers
         5.23.0 models/clip/modeling_clip.py, class CLIPVisionModelWithProjection.
Differs  Both states come from one call, and none is computed that is not used.
         Tolerances: tests/parity/test_ip_adapter_parity.py.
Names    convert/maple_convert/layouts/image_encoder.py maps published checkpoints onto these.
"""

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_maple.models import checks
from mlx_maple.models.clip import ACTIVATIONS, NORM_EPS, Encoder


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """Architecture facts of one published image encoder; the defaults are OpenCLIP's ViT-H/14.

    Attributes:
        hidden_size: D.
        intermediate_size: width inside the feed-forward layers.
        num_hidden_layers: transformer layers.
        num_attention_heads: heads of each.
        image_size: S.
        patch_size: pixels a side of a patch.
        projection_dim: E.
        hidden_act: "quick_gelu" (OpenAI's) or "gelu" (OpenCLIP's); no tensor tells which.
    """

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    projection_dim: int = 1024
    hidden_act: str = "gelu"

    def __post_init__(self) -> None:
        owner = "CLIPVisionConfig"

        def check(name: str, high: int) -> None:
            checks.integer(owner, name, getattr(self, name), 1, high)

        check("hidden_size", checks.MAX_WIDTH)
        check("intermediate_size", 8 * checks.MAX_WIDTH)
        check("num_hidden_layers", checks.MAX_LAYERS)
        check("num_attention_heads", checks.MAX_WIDTH)
        check("image_size", 1024)
        check("patch_size", 1024)
        check("projection_dim", checks.MAX_WIDTH)
        checks.multiples(
            owner, "hidden_size", [self.hidden_size], self.num_attention_heads, "heads"
        )
        checks.multiples(owner, "image_size", [self.image_size], self.patch_size, "patches")
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            known, found = " or ".join(ACTIVATIONS), repr(self.hidden_act)[:60]
            raise ValueError(f"[{owner}] hidden_act must be {known}, got {found}.")


class ImageStates(NamedTuple):
    """What an image encoder says of pictures.

    Attributes:
        penultimate: (B, 1 + P, D), the last layer's input, with no norm.
        projected: (B, E), the picture's own token, normed and projected.
    """

    penultimate: mx.array
    projected: mx.array


class Vector(nn.Module):
    """One learned vector (D,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = mx.zeros((width,))


class ImageEmbeddings(nn.Module):
    """Patches as tokens, with their places: (B, S, S, 3) to (B, 1 + P, D)."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = Vector(width)
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        tokens = (config.image_size // patch) ** 2 + 1
        self.position_embedding = nn.Embedding(tokens, width)

    def __call__(self, pixels: mx.array) -> mx.array:
        patches = self.patch_embedding(pixels).flatten(1, 2)
        own = mx.broadcast_to(self.class_embedding.weight, (pixels.shape[0], 1, patches.shape[-1]))
        return mx.concatenate([own, patches], axis=1) + self.position_embedding.weight


class CLIPVisionEncoder(nn.Module):
    """Patches, norm, layers, projection: (B, S, S, 3) to ``ImageStates``."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = ImageEmbeddings(config)
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.encoder = Encoder(config, mask=None)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def __call__(self, pixels: mx.array) -> ImageStates:
        """Encode lazily; nothing runs until the caller evaluates, and only what it evaluates.

        Args:
            pixels: (B, image_size, image_size, 3), less CLIP's mean and divided by its deviation.

        Raises:
            ValueError: on another shape (an NCHW array?).
        """
        checks.channels_last("CLIPVisionEncoder", "pixels", pixels, 3)
        side = self.config.image_size
        if pixels.shape[1:3] != (side, side):
            found = tuple(pixels.shape)
            raise ValueError(f"[CLIPVisionEncoder] expected (B, {side}, {side}, 3), got {found}.")
        pixels = pixels.astype(self.pre_layernorm.weight.dtype)
        states = self.encoder(self.pre_layernorm(self.embeddings(pixels)))
        projected = self.visual_projection(self.post_layernorm(states[-1][:, 0]))
        return ImageStates(penultimate=states[-2], projected=projected)
