"""IP-Adapter: pictures as prompts, looked at beside the text in every cross-attention.

Legend   B batch; n pictures at once; T tokens of an encoded picture, D their width; S tokens of the
         prompt that is made of it, C' width of the UNet's context; C channels of an attention.
Source   Ye et al. 2023 (arXiv:2308.06721), equation 5; tencent-ailab/IP-Adapter ip_adapter/
         ip_adapter.py (ImageProjModel, MLPProjModel) and resampler.py (Resampler, after Flamingo's
         perceiver, arXiv:2204.14198).
Differs  Keys and values are made once a picture and handed to the UNet, whose ``Context`` they are
         part of; no layer of it is changed. Tolerances: tests/parity/test_ip_adapter_parity.py.
Names    convert/maple_convert/layouts/ip_adapter.py maps published checkpoints onto these.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_maple.models import checks
from mlx_maple.models.attention import attend
from mlx_maple.models.clip_vision import ImageStates
from mlx_maple.models.unet import UNetConfig, attention_channels

NORM_EPS = 1e-5
HEAD_WIDTH = 64  # of a resampler
MAX_ATTENTIONS = 256


@dataclass(frozen=True, kw_only=True)
class IPAdapterConfig:
    """Architecture facts of one published adapter; the defaults are SD 1.x's plain one.

    Attributes:
        projection: "linear": some tokens of the whole picture; "mlp": each of its tokens by itself;
            "resampler": learned questions to them.
        image_dim: D, or the width of the encoder's projection for "linear".
        cross_attention_dim: C'.
        tokens: S; None for "mlp", which has as many as the encoder.
        inner_dim: width of a resampler, else None.
        num_attention_heads: of a resampler, else None.
        num_layers: of a resampler, else None.
        channels: C of each cross-attention: those on the way down, those on the way up, and last
            the middle's.
    """

    projection: str = "linear"
    image_dim: int = 1024
    cross_attention_dim: int = 768
    tokens: int | None = 4
    inner_dim: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    channels: tuple[int, ...] = (
        *(320, 320, 640, 640, 1280, 1280),
        *(1280, 1280, 1280, 640, 640, 640, 320, 320, 320, 1280),
    )

    def __post_init__(self) -> None:
        owner = "IPAdapterConfig"
        if self.projection not in PROJECTIONS:
            known, found = ", ".join(PROJECTIONS), repr(self.projection)[:60]
            raise ValueError(f"[{owner}] projection must be one of {known}, got {found}.")
        checks.integer(owner, "image_dim", self.image_dim, 1, checks.MAX_WIDTH)
        checks.integer(owner, "cross_attention_dim", self.cross_attention_dim, 1, checks.MAX_WIDTH)
        if self.projection != "mlp":
            checks.integer(owner, "tokens", self.tokens, 1, 1024)
        if self.projection == "resampler":
            checks.integer(owner, "inner_dim", self.inner_dim, 1, checks.MAX_WIDTH)
            heads = self.num_attention_heads
            checks.integer(owner, "num_attention_heads", heads, 1, checks.MAX_WIDTH)
            checks.integer(owner, "num_layers", self.num_layers, 1, checks.MAX_LAYERS)
        if not isinstance(self.channels, list | tuple) or not (
            1 <= len(self.channels) <= MAX_ATTENTIONS
        ):
            raise ValueError(f"[{owner}] channels must have 1 to {MAX_ATTENTIONS} entries.")
        widths = checks.integers(
            owner, "channels", self.channels, 1, checks.MAX_WIDTH, len(self.channels)
        )
        object.__setattr__(self, "channels", widths)


class LinearProjection(nn.Module):
    """A whole picture as some tokens: (n, E) to (n, S, C')."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        width = config.cross_attention_dim
        assert config.tokens is not None
        self.proj = nn.Linear(config.image_dim, config.tokens * width)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def __call__(self, states: ImageStates) -> mx.array:
        tokens = self.proj(states.projected)
        return self.norm(tokens.reshape(tokens.shape[0], -1, self.norm.weight.shape[0]))


class TokenProjection(nn.Module):
    """Each token of a picture by itself: (n, T, D) to (n, T, C')."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.proj_in = nn.Linear(config.image_dim, config.image_dim)
        self.proj_out = nn.Linear(config.image_dim, config.cross_attention_dim)
        self.norm_out = nn.LayerNorm(config.cross_attention_dim, eps=NORM_EPS)

    def __call__(self, states: ImageStates) -> mx.array:
        return self.norm_out(self.proj_out(nn.gelu(self.proj_in(states.penultimate))))


class ResamplerFeedForward(nn.Module):
    """Two layers on each token: (n, S, C) to the same, by way of 4C."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(channels, 4 * channels, bias=False)
        self.proj_out = nn.Linear(4 * channels, channels, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj_out(nn.gelu(self.proj_in(x)))


class ResamplerLayer(nn.Module):
    """Questions look at the picture's tokens and at one another: (n, S, C), (n, T, C) to (n, S, C).

    Args:
        channels: C.
        heads: of the attention, each ``HEAD_WIDTH`` wide; together they may be wider than C.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        inner = heads * HEAD_WIDTH
        self.norm1 = nn.LayerNorm(channels, eps=NORM_EPS)  # of the picture's
        self.norm2 = nn.LayerNorm(channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, inner, bias=False)
        self.to_kv = nn.Linear(channels, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, channels, bias=False)
        self.norm3 = nn.LayerNorm(channels, eps=NORM_EPS)
        self.ff = ResamplerFeedForward(channels)
        self.heads = heads

    def __call__(self, latents: mx.array, picture: mx.array) -> mx.array:
        asking = self.norm2(latents)
        seen = mx.concatenate([self.norm1(picture), asking], axis=1)
        keys, values = mx.split(self.to_kv(seen), 2, axis=-1)
        latents = latents + self.to_out(attend(self.to_q(asking), keys, values, self.heads))
        return latents + self.ff(self.norm3(latents))


class Resampler(nn.Module):
    """Learned questions, answered by a picture's tokens: (n, T, D) to (n, S, C')."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        inner, heads, layers = config.inner_dim, config.num_attention_heads, config.num_layers
        assert inner is not None and heads is not None and layers is not None
        self.latents = Questions(config.tokens or 0, inner)
        self.proj_in = nn.Linear(config.image_dim, inner)
        self.layers = [ResamplerLayer(inner, heads) for _ in range(layers)]
        self.proj_out = nn.Linear(inner, config.cross_attention_dim)
        self.norm_out = nn.LayerNorm(config.cross_attention_dim, eps=NORM_EPS)

    def __call__(self, states: ImageStates) -> mx.array:
        picture = self.proj_in(states.penultimate)
        questions = self.latents.weight
        latents = mx.broadcast_to(questions, (picture.shape[0], *questions.shape[1:]))
        for layer in self.layers:
            latents = layer(latents, picture)
        return self.norm_out(self.proj_out(latents))


class Questions(nn.Module):
    """A learned table (1, S, C)."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.weight = mx.zeros((1, tokens, width))


PROJECTIONS: dict[str, Callable[[IPAdapterConfig], Any]] = {
    "linear": LinearProjection,
    "mlp": TokenProjection,
    "resampler": Resampler,
}


class KeysAndValues(nn.Module):
    """What one cross-attention sees of an image prompt: (B, S, C') to (B, S, 2C), keys first."""

    def __init__(self, context_channels: int, channels: int) -> None:
        super().__init__()
        self.to_k = nn.Linear(context_channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels, channels, bias=False)

    def __call__(self, tokens: mx.array, scale: float) -> mx.array:
        # The scale of the attention's result is as well one of its values.
        return mx.concatenate([self.to_k(tokens), self.to_v(tokens) * scale], axis=-1)


class IPAdapter(nn.Module):
    """An encoded picture to the keys and values of a UNet's ``image`` argument."""

    def __init__(self, config: IPAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.image_proj = PROJECTIONS[config.projection](config)
        self.layers = [KeysAndValues(config.cross_attention_dim, c) for c in config.channels]

    @property
    def sees_patches(self) -> bool:
        """Whether it reads the encoder's tokens, and not the projection of the whole picture."""
        return self.config.projection != "linear"

    def prompt(self, states: ImageStates) -> mx.array:
        """Pictures to tokens beside the text's: (n, S, C')."""
        return self.image_proj(states)

    def keys_values(self, tokens: mx.array, unet: UNetConfig, scale: float = 1.0) -> list[mx.array]:
        """What each cross-attention of a UNet sees of tokens (B, S, C'): (B, S, 2C) each.

        Args:
            tokens: of one picture, or of several one after the other.
            unet: whose order the layers come in.
            scale: how strongly it counts.

        Raises:
            ValueError: if the UNet has other cross-attentions.
        """
        if attention_channels(unet) != self.config.channels:
            raise ValueError("[IPAdapter] its cross-attentions are not this UNet's.")
        made = [layer(tokens, scale) for layer in self.layers]
        # A UNet comes to its middle before the way up.
        middle = unet.mid_transformer_layers or 0
        down = sum(unet.transformer_layers) * unet.layers_per_block
        end = len(made) - middle
        return [*made[:down], *made[end:], *made[down:end]]
