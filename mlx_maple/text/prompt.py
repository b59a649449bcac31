"""A prompt to the chunks of ids that a text encoder reads.

Plain, it is cut to one chunk, as CLIP's authors and diffusers do it. In A1111's language words have
weights, and what does not fit into one chunk goes on in the next.

Source   Where a chunk ends: AUTOMATIC1111/stable-diffusion-webui @v1.10.1
         modules/sd_hijack_clip.py (tokenize_line).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mlx_maple.text.emphasis import fragments
from mlx_maple.text.tokenizer import Tokenizer

CHUNK = 77  # positions of CLIP's text encoder, the ids that start and end the chunk included
MOST_CHUNKS = 128  # 9,600 tokens; a picture's memory grows with them
BACKTRACK = 20  # tokens after a comma that go with the next chunk, so that a phrase stays whole

# Names that stand for learned vectors: the ids that spell one, and the ids of its vectors.
Words = Mapping[tuple[int, ...], Sequence[int]]


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

    def padded(self, tokenizer: Tokenizer, chunks: int) -> "EncodedPrompt":
        """The same prompt with empty chunks behind it, ``chunks`` in all."""
        missing, length = max(0, chunks - len(self.ids)), len(self.ids[0])
        empty = [_chunk(tokenizer, [], length) for _ in range(missing)]
        ones = [[1.0] * length for _ in range(missing)]
        return EncodedPrompt(self.ids + empty, self.weights + ones, self.truncated)


def encode_prompt(
    tokenizer: Tokenizer,
    text: str,
    *,
    length: int = CHUNK,
    syntax: str = "plain",
    words: Words | None = None,
) -> EncodedPrompt:
    """Encode a prompt into chunks of ``length`` ids.

    Args:
        tokenizer: whose ids they are.
        text: without tags, AND and changes: see ``language.read_prompt``.
        length: of a chunk, its start and its end included.
        syntax: "plain" is one chunk and every weight 1; "a1111" reads weights and BREAK, and takes
            as many chunks as it needs.
        words: learned vectors by their names.

    Raises:
        ValueError: if ``length`` leaves no room for a start and an end, if there are more than
            ``MOST_CHUNKS``, or on a weight beyond reason.
    """
    if length < 2:
        raise ValueError(f"[encode_prompt] a chunk has at least 2 ids, got length {length}.")
    room = length - 2
    if syntax == "plain":
        ids = [number for word in _words(tokenizer.encode(text), words) for number in word]
        # What found no room is told as it was written, which learned vectors have hidden.
        truncated = tokenizer.tail(text, room) if len(ids) > room else ""
        return EncodedPrompt(
            ids=[_chunk(tokenizer, ids[:room], length)],
            weights=[[1.0] * length],
            truncated=truncated,
        )
    filled = _Filler(tokenizer, room)
    for fragment in fragments(text):
        if fragment.breaks:
            filled.next_chunk()
        for word in _words(tokenizer.encode(fragment.text), words):
            filled.add(word, fragment.weight)
    chunks = filled.done()
    return EncodedPrompt(
        ids=[_chunk(tokenizer, ids, length) for ids, _ in chunks],
        weights=[[1.0, *weights] + [1.0] * (length - 1 - len(weights)) for _, weights in chunks],
        truncated="",
    )


class _Filler:
    """Chunks that fill up one after the other."""

    def __init__(self, tokenizer: Tokenizer, room: int) -> None:
        self._room = room
        self._comma = tokenizer.encode(",")
        self._chunks: list[tuple[list[int], list[float]]] = []
        self._ids: list[int] = []
        self._weights: list[float] = []
        self._after_comma: int | None = None  # where this chunk goes on after its last comma

    def add(self, word: Sequence[int], weight: float) -> None:
        """One token, or the vectors of one name, which stay together."""
        if len(word) > self._room:
            raise ValueError(f"a name of {len(word)} vectors does not fit a chunk of {self._room}.")
        is_comma = list(word) == self._comma
        begins = False
        if len(self._ids) + len(word) > self._room:
            self._next_phrase(moves=len(self._ids) == self._room and not is_comma)
            begins = True
        if len(self._ids) + len(word) > self._room:
            self.next_chunk()
        self._ids += word
        self._weights += [weight] * len(word)
        if is_comma and not begins:  # as in the original, which forgets one that begins a chunk
            self._after_comma = len(self._ids)

    def _next_phrase(self, *, moves: bool) -> None:
        """The next chunk; where a comma is near, what follows it goes along."""
        start = self._after_comma
        if start is None or not moves or len(self._ids) - start >= BACKTRACK:
            self.next_chunk()
            return
        ids, weights = self._ids[start:], self._weights[start:]
        del self._ids[start:], self._weights[start:]
        self.next_chunk()
        self._ids, self._weights = ids, weights

    def next_chunk(self) -> None:
        """This chunk is full, or ends before it is."""
        if len(self._chunks) == MOST_CHUNKS:
            most = MOST_CHUNKS * self._room
            raise ValueError(f"a prompt has at most {most:,} tokens ({MOST_CHUNKS} chunks).")
        self._chunks.append((self._ids, self._weights))
        self._ids, self._weights, self._after_comma = [], [], None

    def done(self) -> list[tuple[list[int], list[float]]]:
        """All chunks, at least one."""
        if self._ids or not self._chunks:
            self.next_chunk()
        return self._chunks


def _words(ids: Sequence[int], words: Words | None) -> Iterator[Sequence[int]]:
    """Each token in turn, or where a name is spelled, its vectors; the longest name wins."""
    if not words:
        yield from ((number,) for number in ids)
        return
    by_first: dict[int, list[tuple[int, ...]]] = {}
    for name in sorted(words, key=len, reverse=True):
        by_first.setdefault(name[0], []).append(name)
    position = 0
    while position < len(ids):
        names = by_first.get(ids[position], ())
        found = next((n for n in names if tuple(ids[position : position + len(n)]) == n), None)
        yield (ids[position],) if found is None else words[found]
        position += 1 if found is None else len(found)


def _chunk(tokenizer: Tokenizer, ids: list[int], length: int) -> list[int]:
    chunk = [tokenizer.bos, *ids, tokenizer.eos]
    return chunk + [tokenizer.pad] * (length - len(chunk))
