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
from functools import partial

import mlx.core as mx
import numpy as np

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
        is_avoided: whether the drawing stays away from it, so that no image prompt goes with it.
    """

    context: mx.array
    vector: mx.array | None = None
    pooled: mx.array | None = None
    is_avoided: bool = False

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
        return self.encode_all([chunks], [weights], clip_skip)[0]

    def encode_all(
        self,
        prompts: Sequence[Sequence[Chunks]],
        weights: Sequence[Weights | None],
        clip_skip: int | None = None,
        *,
        keeps_mean: bool = True,
        together: bool = False,
    ) -> list[Conditioning]:
        """The states of several prompts, as ``encode`` gives each.

        Args:
            prompts: for each prompt, for each encoder, its chunks of ids (n, 77).
            weights: for each prompt.
            clip_skip: as for ``encode``.
            keeps_mean: whether a chunk whose tokens have weights is brought back to its mean.
            together: one call of an encoder for all prompts: faster, and rounded otherwise.
        """
        skip = self.clip_skip if clip_skip is None else clip_skip
        contexts: list[list[mx.array]] = [[] for _ in prompts]
        pooled: list[mx.array | None] = [None for _ in prompts]
        for i, name in enumerate(self.tokenizers):
            encode = partial(self._encoder(name), clip_skip=skip, normed=self.is_normed)
            rows = [prompt[i] for prompt in prompts]
            if together:
                found = encode(mx.array([ids for each in rows for ids in each]))
                ends = np.cumsum([len(each) for each in rows])[:-1].tolist()
                lasts, pools = mx.split(found.last, ends), mx.split(found.pooled, ends)
            else:
                each_found = [encode(mx.array(each)) for each in rows]
                lasts, pools = zip(*((one.last, one.pooled) for one in each_found), strict=True)
            for k, states in enumerate(lasts):
                states = weighted(states, weights[k], keeps_mean=keeps_mean)
                contexts[k].append(states.reshape(1, -1, states.shape[-1]))
                pooled[k] = None if self.is_normed else pools[k][:1]
        return [
            Conditioning(
                context=parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1),
                pooled=pooled[k],
            )
            for k, parts in enumerate(contexts)
        ]


def weighted(states: mx.array, weights: Weights | None, *, keeps_mean: bool = True) -> mx.array:
    """States (n, T, D), each times its token's weight (n, T), each chunk brought to its old mean.

    Where ``keeps_mean`` is False they stay as the weights make them (A1111's "No norm").
    Without a weight that is not 1 the states come back as they are.
    """
    if weights is None or all(weight == 1 for row in weights for weight in row):
        return states
    wide = states.astype(mx.float32)
    louder = wide * mx.array(weights)[..., None]
    if not keeps_mean:
        return louder.astype(states.dtype)
    means = [x.mean(axis=(1, 2), keepdims=True) for x in (wide, louder)]
    # As in the original, which divides by whatever the new mean is; at zero there is nothing to do.
    ratio = mx.where(means[1] == 0, 1.0, means[0] / mx.where(means[1] == 0, 1.0, means[1]))
    return (louder * ratio).astype(states.dtype)
