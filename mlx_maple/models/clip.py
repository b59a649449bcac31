"""CLIP's text encoder: token ids to the states that the UNet listens to.

Legend   B batch; T tokens; D width. Tokens are (B, T, D).
Source   Radford et al. 2021 (arXiv:2103.00020); openai/CLIP @dcba3cb clip/model.py, the text half
         of class CLIP; names and the choice of states as in transformers 5.23.0
         models/clip/modeling_clip.py.
Differs  Every wanted state comes from one call, and none is computed that is not used.
         Tolerances: tests/parity/test_clip_parity.py.
Names    convert/maple_convert/layouts/clip.py maps published checkpoints onto these.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_maple.models import checks
from mlx_maple.models.attention import attend

NORM_EPS = 1e-5
MAX_VOCABULARY = 1 << 20
MAX_TOKENS = 1 << 14


def quick_gelu(x: mx.array) -> mx.array:
    """OpenAI's GELU, ``x * sigmoid(1.702 x)``: up to 0.02 away from the exact one."""
    return x * mx.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "quick_gelu": quick_gelu,  # CLIP ViT-L/14: SD 1.x
    "gelu": nn.gelu,  # exact, by erf: the OpenCLIP models
}


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """Architecture facts of one published text encoder; the defaults are SD 1.x's ViT-L/14.

    Attributes:
        vocab_size: number of token ids.
        hidden_size: D.
        intermediate_size: width inside the feed-forward layers.
        num_hidden_layers: transformer layers.
        num_attention_heads: heads of each.
        max_position_embeddings: the most tokens in a row.
        hidden_act: "quick_gelu" or "gelu"; they differ visibly, and no tensor tells which.
        projection_dim: width of the pooled state where the file has a projection, else None.
        eos_token_id: the token whose state is the pooled one. (Published configs often say 2,
            which is wrong and kept for old behaviour.)
        pad_token_id: the token that fills a row up; None is the end of text. OpenCLIP's models were
            trained with 0, and look at it.
    """

    vocab_size: int = 49_408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    projection_dim: int | None = None
    eos_token_id: int = 49_407
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        def check(name: str, low: int, high: int) -> None:
            checks.integer("CLIPTextConfig", name, getattr(self, name), low, high)

        check("vocab_size", 1, MAX_VOCABULARY)
        check("hidden_size", 1, checks.MAX_WIDTH)
        check("intermediate_size", 1, 8 * checks.MAX_WIDTH)
        check("num_hidden_layers", 1, checks.MAX_LAYERS)
        check("num_attention_heads", 1, checks.MAX_WIDTH)
        check("max_position_embeddings", 1, MAX_TOKENS)
        check("eos_token_id", 0, self.vocab_size - 1)
        if self.pad_token_id is not None:
            check("pad_token_id", 0, self.vocab_size - 1)
        if self.projection_dim is not None:
            check("projection_dim", 1, checks.MAX_WIDTH)
        checks.multiples(
            "CLIPTextConfig", "hidden_size", [self.hidden_size], self.num_attention_heads, "heads"
        )
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            known, found = " or ".join(ACTIVATIONS), repr(self.hidden_act)[:60]
            raise ValueError(f"[CLIPTextConfig] hidden_act must be {known}, got {found}.")


class TextStates(NamedTuple):
    """What a text encoder says of a prompt.

    Attributes:
        last: (B, T, D), the chosen layer's output, as a rule after the final norm.
        penultimate: (B, T, D), the last layer's input, with no norm.
        pooled: (B, D), the normed last state at the first end of text; projected to
            (B, projection_dim) where the model has a projection.
    """

    last: mx.array
    penultimate: mx.array
    pooled: mx.array


class LayersConfig(Protocol):
    """What the layers need to know, of whichever of CLIP's two encoders."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def hidden_act(self) -> str: ...


class Embeddings(nn.Module):
    """Each id's vector plus its place's: (B, T) ids to (B, T, D)."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def __call__(self, ids: mx.array) -> mx.array:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class SelfAttention(nn.Module):
    """Each token gathers from itself and those before it: (B, T, D) to the same.

    Without a mask, as for a picture's patches, it gathers from all.
    """

    def __init__(self, channels: int, heads: int, mask: str | None = "causal") -> None:
        super().__init__()
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)
        self.heads = heads
        self.mask = mask

    def __call__(self, x: mx.array) -> mx.array:
        # Causal only: the padding after the prompt is looked at, as in the reference.
        mixed = attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, mask=self.mask)
        return self.out_proj(mixed)


class FeedForward(nn.Module):
    """Two layers on each token: (B, T, D) to the same."""

    def __init__(self, config: LayersConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.hidden_act = config.hidden_act

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(ACTIVATIONS[self.hidden_act](self.fc1(x)))


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each on a norm and added: (B, T, D) to the same."""

    def __init__(self, config: LayersConfig, mask: str | None = "causal") -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.self_attn = SelfAttention(config.hidden_size, config.num_attention_heads, mask)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        self.mlp = FeedForward(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The stack of layers: (B, T, D) to the state before the first and after each of them."""

    def __init__(self, config: LayersConfig, mask: str | None = "causal") -> None:
        super().__init__()
        self.layers = [EncoderLayer(config, mask) for _ in range(config.num_hidden_layers)]

    def __call__(self, x: mx.array) -> list[mx.array]:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states


class CLIPTextEncoder(nn.Module):
    """Embeddings, layers, final norm: (B, T) ids to ``TextStates``."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=NORM_EPS)
        if config.projection_dim is not None:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def __call__(self, ids: mx.array, *, clip_skip: int = 1, normed: bool = True) -> TextStates:
        """Encode lazily; nothing runs until the caller evaluates, and only what it evaluates.

        Args:
            ids: (B, T) integers below ``vocab_size``, T at most ``max_position_embeddings``. An id
                out of range cannot be seen without evaluating, and MLX reads beyond the table:
                who makes the ids answers for them.
            clip_skip: which layer, counted from the end, gives ``last``: 1 is the last (A1111's
                counting; diffusers counts from 0).
            normed: whether ``last`` passes the final norm, whichever layer it is of: SD 1 and 2
                want it so, SDXL does not.

        Returns:
            States in the weights' dtype. ``penultimate`` and ``pooled`` do not depend on
            ``clip_skip``. A row without an end of text is pooled at its first token.

        Raises:
            ValueError: on ids that are no integers or of another shape, or a layer not there.
        """
        self._check(ids, clip_skip)
        states = self.encoder(self.embeddings(ids))
        final = self.final_layer_norm(states[-1])
        last = states[-clip_skip]
        if normed:
            last = final if clip_skip == 1 else self.final_layer_norm(last)

        # The first end of text, by its id. The reference's older ``argmax(ids)`` finds an added
        # token (textual inversion) instead, and padding repeats the id after the first.
        ends = mx.argmax(ids == self.config.eos_token_id, axis=-1)
        pooled = final[mx.arange(ids.shape[0]), ends]
        if "text_projection" in self:
            pooled = self.text_projection(pooled)
        return TextStates(last=last, penultimate=states[-2], pooled=pooled)

    def _check(self, ids: mx.array, clip_skip: int) -> None:
        longest = self.config.max_position_embeddings
        if not mx.issubdtype(ids.dtype, mx.integer):
            raise ValueError(f"[CLIPTextEncoder] expected integer ids, got {ids.dtype}.")
        if ids.ndim != 2 or not 1 <= ids.shape[1] <= longest:
            found = tuple(ids.shape)
            raise ValueError(f"[CLIPTextEncoder] expected ids (B, 1..{longest}), got {found}.")
        layers = self.config.num_hidden_layers
        if not 1 <= clip_skip <= layers:
            raise ValueError(f"[CLIPTextEncoder] clip_skip is 1 to {layers}, got {clip_skip}.")
