"""Textual inversion: words of which only the vectors are known, behind a text encoder's table.

Legend   V rows of the table that the model came with; D width of a row.
Source   Gal et al. 2022 (arXiv:2208.01618). In prompts a word is found by the ids that spell its
         name, the longest name first, so that capitals and what stands beside it do not matter:
         AUTOMATIC1111/stable-diffusion-webui modules/textual_inversion/textual_inversion.py
         (find_embedding_at_position).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_maple.models import CLIPTextEncoder

Vectors = Mapping[str, NDArray[np.float32]]  # by text encoder: (n, D)


@dataclass(frozen=True, eq=False)
class Word:
    """A learned word.

    Attributes:
        name: as it is written in prompts.
        vectors: for each of the model's text encoders, (n, D); n is the same for all.
    """

    name: str
    vectors: Vectors

    @property
    def count(self) -> int:
        """How many vectors, which is how many of a chunk's places it takes."""
        return len(next(iter(self.vectors.values())))

    def within(self, encoders: Collection[str]) -> "Word":
        """The word for a model that has these text encoders of ours and no others."""
        return Word(self.name, {part: self.vectors[part] for part in encoders})


def set_words(encoder: CLIPTextEncoder, part: str, words: Sequence[Word]) -> None:
    """Have a text encoder know some words, and no others, beside its own vocabulary.

    Their vectors get the ids from V on, in order. Without words the table is the model's own again.

    Args:
        encoder: changed in place.
        part: its name among the model's networks.
        words: with vectors for it.
    """
    table = encoder.embeddings.token_embedding
    own = table.weight[: encoder.config.vocab_size]
    if words:
        vectors = mx.array(np.concatenate([word.vectors[part] for word in words]))
        own = mx.concatenate([own, vectors.astype(own.dtype)])
    table.weight = own
    mx.eval(table.weight)


def ids_of(words: Sequence[Word], vocab_size: int) -> list[range]:
    """The ids of each word's vectors, when they are set in this order."""
    ranges: list[range] = []
    start = vocab_size
    for word in words:
        ranges.append(range(start, start + word.count))
        start += word.count
    return ranges


def spelled(ids: Sequence[int], name: Sequence[int]) -> bool:
    """Whether the ids of a name stand in a row somewhere among the ids of a text."""
    length = len(name)
    return bool(length) and any(
        list(ids[start : start + length]) == list(name) for start in range(len(ids) - length + 1)
    )
