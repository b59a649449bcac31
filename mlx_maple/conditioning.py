"""What the UNet is told beside the latents and the time: a prompt as arrays.

Legend   n chunks of a prompt; T = 77 n tokens; D width of all encoders' states together; P width
         of the pooled state; V width of the added vector.
Source   Which states are read: Rombach et al. 2022 (arXiv:2112.10752) and Podell et al. 2023
         (arXiv:2307.01952), section 2.2; Stability-AI/generative-models sgm/modules/encoders/
         modules.py. Weights on tokens: AUTOMATIC1111/stable-diffusion-webui @v1.10.1
         modules/sd_hijack_clip.py (process_tokens) and sd_emphasis.py (EmphasisOriginal).

A prompt's text is text/prompt.py's business; here it is chunks of ids already.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_maple.models import CLIPTextEncoder
from mlx_maple.text.prompt import Words, encode_prompt
from mlx_maple.text.tokenizer import Tokenizer

Chunks = list[list[int]]  # (n, 77) ids
Weights = list[list[float]]  # (n, 77), a factor for each id


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """One prompt, as the UNet takes it.

    Attributes:
        context: (B, T, D) states.
        vector: (B, V) float32, of models that take one beside the time.
        pooled: (B, P), the whole prompt in one state, of encoders that make the vector.
    """

    context: mx.array
    vector: mx.array | None = None
    pooled: mx.array | None = None

    def arrays(self) -> list[mx.array]:
        """All that is there, to be evaluated."""
        return [x for x in (self.context, self.vector, self.pooled) if x is not None]


class TextEncoders:
    """A model's text encoders with their tokenizers: chunks of ids to ``Conditioning``.

    Attributes:
        tokenizers: by the encoder's name, in the order in which their states are joined.
        is_normed: whether states pass the final norm.
        words: learned vectors: the ids that spell a name to the ids of its vectors.
    """

    def __init__(
        self,
        tokenizers: Mapping[str, Tokenizer],
        encoder: Callable[[str], CLIPTextEncoder],
        *,
        is_normed: bool = True,
    ) -> None:
        """Take the tokenizers and a function that gives an encoder by its name.

        Args:
            tokenizers: by name, the first encoder's first.
            encoder: name to network; it may load it.
            is_normed: SD 1 and 2 read a layer's output after the final norm, and the last
                encoder's pooled state is not used. SDXL reads the last layer's input without a
                norm, and the last encoder's pooled state beside it.
        """
        self.tokenizers = dict(tokenizers)
        self.is_normed = is_normed
        self.words: Words = {}
        self._encoder = encoder

    @property
    def clip_skip(self) -> int:
        """The layer that is read where no one asks for another, counted from the end."""
        return 1 if self.is_normed else 2

    def tokenize(self, text: str) -> list[list[list[int]]]:
        """Plain text as chunks of ids for each encoder; they differ in padding only."""
        return [encode_prompt(tokenizer, text).ids for tokenizer in self.tokenizers.values()]

    def encode(
        self,
        chunks: Sequence[Chunks],
        weights: Weights | None = None,
        clip_skip: int | None = None,
    ) -> Conditioning:
        """States of one prompt, its chunks one after the other; not evaluated.

        Args:
            chunks: for each encoder its chunks of ids (n, 77).
            weights: (n, 77), how strongly each id speaks; each chunk keeps its mean. None is 1.
            clip_skip: the layer that is read, counted from the end; 1 is the last.

        Returns:
            ``context`` (1, 77 n, D); ``pooled`` (1, P) of the first chunk where it is used. The
            ``vector`` is the caller's, who knows the sizes.
        """
        skip = self.clip_skip if clip_skip is None else clip_skip
        joined, pooled = [], None
        for name, ids in zip(self.tokenizers, chunks, strict=True):
            found = self._encoder(name)(mx.array(ids), clip_skip=skip, normed=self.is_normed)
            states = found.last
            if weights is not None:
                states = weighted(states, mx.array(weights))
            joined.append(states.reshape(1, -1, states.shape[-1]))
            pooled = None if self.is_normed else found.pooled[:1]
        context = joined[0] if len(joined) == 1 else mx.concatenate(joined, axis=-1)
        return Conditioning(context=context, pooled=pooled)


def weighted(states: mx.array, weights: mx.array) -> mx.array:
    """States (n, T, D), each times its token's weight (n, T), each chunk brought to its old mean.

    Without a weight that is not 1 the states come back as they are.
    """
    if bool((weights == 1).all()):
        return states
    wide = states.astype(mx.float32)
    louder = wide * weights[..., None]
    means = [x.mean(axis=(1, 2), keepdims=True) for x in (wide, louder)]
    # As in the original, which divides by whatever the new mean is; at zero there is nothing to do.
    ratio = mx.where(means[1] == 0, 1.0, means[0] / mx.where(means[1] == 0, 1.0, means[1]))
    return (louder * ratio).astype(states.dtype)
