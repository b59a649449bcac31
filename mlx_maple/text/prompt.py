"""A prompt to the chunks of ids that a text encoder reads.

This is the one place that knows how a prompt is written. Today it is plain text, cut to one chunk,
as CLIP's authors and diffusers do it. A syntax with weights and several chunks a prompt needs no
new form of the result: callers already take a list of chunks, a weight for every id, and the text
that did not fit.
"""

from dataclasses import dataclass

from mlx_maple.text.tokenizer import Tokenizer

CHUNK = 77  # positions of CLIP's text encoder, the ids that start and end the chunk included


@dataclass(frozen=True)
class EncodedPrompt:
    """What a text encoder needs of one prompt.

    Attributes:
        ids: chunks of equal length, each with its start, its end and its padding.
        weights: one factor for each of those ids.
        truncated: the end of the prompt that found no room, as it was written; "" where all fits.
    """

    ids: list[list[int]]
    weights: list[list[float]]
    truncated: str


def encode_prompt(tokenizer: Tokenizer, text: str, *, length: int = CHUNK) -> EncodedPrompt:
    """Encode a plain prompt into one chunk of ``length`` ids, every weight 1.

    Raises:
        ValueError: if ``length`` leaves no room for a start and an end.
    """
    if length < 2:
        raise ValueError(f"[encode_prompt] a chunk has at least 2 ids, got length {length}.")
    room = length - 2
    ids = tokenizer.encode(text)
    truncated = tokenizer.tail(text, room) if len(ids) > room else ""
    return EncodedPrompt(
        ids=[_chunk(tokenizer, ids[:room], length)],
        weights=[[1.0] * length],
        truncated=truncated,
    )


def _chunk(tokenizer: Tokenizer, ids: list[int], length: int) -> list[int]:
    chunk = [tokenizer.bos, *ids, tokenizer.eos]
    return chunk + [tokenizer.pad] * (length - len(chunk))
