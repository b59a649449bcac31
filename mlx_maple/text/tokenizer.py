"""CLIP's byte-level BPE: text to token ids and back.

Source   Radford et al. 2021 (arXiv:2103.00020), section 2.4; openai/CLIP @d05afc4
         clip/simple_tokenizer.py. Ids are those of transformers 5.23 CLIPTokenizer, which is the
         tokenizers library: NFC, lower case, a split pattern, then merges.
Differs  From OpenAI's own code (as transformers does): quotes are not straightened, "&amp;" is not
         unescaped, and "<|endoftext|>" in a prompt is that one token, where it is written exactly
         so. From transformers: a lone surrogate becomes U+FFFD instead of an error.
Unicode  Python's tables change with its version and are not Rust's, so the classes of characters
         come from unicode_tables.py. What remains Python's own (NFC, lower case) is equal on every
         version from 3.10 on, up to the characters of Unicode 17.
"""

import gzip
import json
import re
import stat
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from heapq import heapify, heappop, heappush
from importlib import resources
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from mlx_maple.text import unicode_tables as tables

START = "<|startoftext|>"
END = "<|endoftext|>"
WORD_END = "</w>"  # marks a token that ends a word

MAX_FILE_BYTES = 8 * 2**20  # the published files have 0.9 and 0.5 MB
MAX_TOKENS = 1_000_000
CACHED_WORD = 64  # longer words are not worth keeping
CACHED_WORDS = 16_384  # then the cache starts again
LONG_TEXT = 2_000  # characters from which accents are sorted before NFC sees them

# The pattern of CLIP with Rust's classes in place of \p{L}, \p{N} and \s. Runs of white space fall
# between the matches, so that the reference's replacing them by one space changes nothing.
_WORD = re.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    f"|[{tables.LETTER}]+|[{tables.NUMBER}]|[^{tables.SPACE}{tables.LETTER}{tables.NUMBER}]+"
)
# Lower-casing can make what the pattern takes for a special token ("<|ENDOFTEXT|>"); the reference
# then splits it once more. The real ones never get here.
_SPLIT_AGAIN = {token: ("<|", token[2:-2], "|>") for token in (START, END)}
_SPECIAL = re.compile(f"({re.escape(START)}|{re.escape(END)})")
_SURROGATE = re.compile("[\ud800-\udfff]")
_OLDER = re.compile(f"[^{tables.YOUNGER_MARK}]+")

_LOWER = {
    code: code + distance
    for first, last, distance, step in tables.LATER_LOWER
    for code in range(first, last + 1, step)
}
_LOWER[0x3A3] = 0x3C3  # Python lowers a final capital sigma to a final sigma, Rust does not


class VocabularyError(ValueError):
    """A vocabulary file that cannot be used.

    Attributes:
        path: the file.
        reason: what is wrong with it, without the path.
    """

    def __init__(self, path: Path, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"{path}: {reason}")


class Tokenizer:
    """Text to token ids, as many as it takes; chunks and padding are prompt.py's business.

    Attributes:
        bos: id that starts a chunk.
        eos: id that ends it.
        pad: id that fills it up; CLIP's own is ``eos`` (OpenCLIP, in SD2 and SDXL, pads with "!").
        vocab_size: rows a token embedding needs: the highest id + 1.
    """

    def __init__(self, vocab: dict[str, int], merges: Sequence[str]) -> None:
        """Take a vocabulary that is known to be sound.

        Args:
            vocab: token to id; every merge's parts and result are in it, and both special tokens.
            merges: "left right", the first merge first.
        """
        self.bos = vocab[START]
        self.eos = vocab[END]
        self.pad = self.eos
        self.vocab_size = max(vocab.values()) + 1
        self._vocab = vocab
        self._ranks = dict(zip(merges, range(len(merges)), strict=True))
        self._tokens: dict[int, str] | None = None  # made when something is decoded
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def bundled(cls) -> "Tokenizer":
        """CLIP's own vocabulary of 49,408 tokens, which ships with the package."""
        packed = resources.files("mlx_maple.text").joinpath("vocabulary/merges.txt.gz").read_bytes()
        text = gzip.decompress(packed).decode("utf-8")
        letters = list(_byte_letters().values())
        tokens = [
            *letters,
            *(letter + WORD_END for letter in letters),
            *text.replace(" ", "").split("\n"),
            START,
            END,
        ]
        return cls(dict(zip(tokens, range(len(tokens)), strict=True)), text.split("\n"))

    @classmethod
    def from_files(
        cls, vocab_json: str | PathLike[str], merges_txt: str | PathLike[str]
    ) -> "Tokenizer":
        """A model folder's own vocabulary.

        Args:
            vocab_json: an object of token to id.
            merges_txt: one "left right" a line, lines that start with "#version" left out.

        Raises:
            VocabularyError: if a file is too large or not what it should be; it names the file.
            OSError: if a file cannot be read.
        """
        vocab = _read_vocab(Path(vocab_json))
        return cls(vocab, _read_merges(Path(merges_txt), vocab))

    def padded_with(self, pad: int | None) -> "Tokenizer":
        """The same vocabulary with another id to fill up with; None is as it is."""
        if pad is None or pad == self.pad:
            return self
        other = copy(self)  # the vocabulary and what was looked up in it are shared
        other.pad = pad
        return other

    def encode(self, text: str) -> list[int]:
        """Ids of a text of any length, without the ids that start and end a chunk."""
        ids: list[int] = []
        for segment in _segments(text):
            if segment.special:
                ids.append(self._vocab[segment.normal])
                continue
            for match in _WORD.finditer(segment.normal):
                for word in _SPLIT_AGAIN.get(match[0], (match[0],)):
                    ids += self._word_ids(word)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids: lower-cased, a space after every word, bytes of no character as U+FFFD.

        Raises:
            ValueError: for an id that the vocabulary lacks.
        """
        if self._tokens is None:
            self._tokens = {number: token for token, number in self._vocab.items()}
        text = bytearray()
        for number in ids:
            if number not in self._tokens:
                raise ValueError(f"[Tokenizer] the vocabulary has no id {number}.")
            text += _token_bytes(self._tokens[number])
        return text.decode("utf-8", errors="replace").replace(WORD_END, " ").strip()

    def tail(self, text: str, count: int) -> str:
        """What of ``text``, in its own letters, is left after the first ``count`` tokens.

        A character of which only some bytes fit is left over whole.
        """
        for segment in _segments(text):
            source = text[segment.start :]
            if segment.special:
                if count == 0:
                    return source
                count -= 1
                continue
            for match in _WORD.finditer(segment.normal):
                position = match.start()
                for word in _SPLIT_AGAIN.get(match[0], (match[0],)):
                    pieces = self._merged(word)
                    if len(pieces) > count:
                        position += _characters(word, pieces[:count])
                        return source[_source_position(source, position) :]
                    count -= len(pieces)
                    position += len(word)
        return ""

    def _word_ids(self, word: str) -> list[int]:
        ids = self._cache.get(word)
        if ids is None:
            ids = [self._vocab[piece] for piece in self._merged(word)]
            if len(word) <= CACHED_WORD:
                if len(self._cache) >= CACHED_WORDS:
                    self._cache.clear()
                self._cache[word] = ids
        return ids

    def _merged(self, word: str) -> list[str]:
        """The tokens of one word: neighbours are joined, the earliest merge first.

        Of equal merges the leftmost comes first. A heap of candidates over a linked list takes
        n log n steps for n bytes; candidates that a merge has made void are passed over when they
        come up.
        """
        pieces = list(word.encode("utf-8").decode("latin-1").translate(_BYTE_LETTERS))
        pieces[-1] += WORD_END
        for i, piece in enumerate(pieces):
            if piece not in self._vocab:
                pieces[i] = END  # the unknown token, one for each byte
        ranks = self._ranks
        size = len(pieces)
        right = list(range(1, size + 1))  # where the next piece starts; size after the last
        left = list(range(-1, size - 1))
        heap: list[tuple[int, int]] = []
        for i in range(size - 1):
            rank = ranks.get(f"{pieces[i]} {pieces[i + 1]}")
            if rank is not None:
                heap.append((rank, i))
        heapify(heap)
        while heap:
            rank, i = heappop(heap)
            j = right[i]
            if not pieces[i] or j == size or ranks.get(f"{pieces[i]} {pieces[j]}") != rank:
                continue
            pieces[i] += pieces[j]
            pieces[j] = ""  # gone
            after = right[i] = right[j]
            if after < size:
                left[after] = i
                rank = ranks.get(f"{pieces[i]} {pieces[after]}")
                if rank is not None:
                    heappush(heap, (rank, i))
            before = left[i]
            if before >= 0:
                rank = ranks.get(f"{pieces[before]} {pieces[i]}")
                if rank is not None:
                    heappush(heap, (rank, before))
        return [piece for piece in pieces if piece]


class _Segment(NamedTuple):
    start: int  # position in the text
    normal: str
    special: bool  # one of the two special tokens, written out


def _segments(text: str) -> Iterator[_Segment]:
    """Split at special tokens as they are written; what lies between is normalised alone."""
    start = 0
    for part in _SPECIAL.split(_SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)):
        if part in _SPLIT_AGAIN:
            yield _Segment(start, part, special=True)
        elif part:
            yield _Segment(start, _normal(part), special=False)
        start += len(part)


def _normal(text: str) -> str:
    """NFC and lower case, character for character as the tokenizers library makes them."""
    if text.isascii():
        return text.lower()
    composed = _OLDER.sub(lambda run: _nfc(run[0]), text)
    return composed.translate(_LOWER).lower()


def _nfc(text: str) -> str:
    """NFC in linear time.

    CPython puts the marks on one letter in order by insertion, which takes 16 s for 100,000 of
    them. In a long text they are therefore sorted first; NFC of equivalent texts is the same.
    """
    if len(text) >= LONG_TEXT:
        parts = "".join(unicodedata.normalize("NFD", char) for char in text)
        runs = groupby(parts, key=lambda char: unicodedata.combining(char) == 0)
        text = "".join("".join(sorted(run, key=unicodedata.combining)) for _, run in runs)
    return unicodedata.normalize("NFC", text)


def _characters(word: str, pieces: Sequence[str]) -> int:
    """How many characters of ``word`` lie wholly within its first pieces."""
    count = sum(1 if piece == END else len(piece.removesuffix(WORD_END)) for piece in pieces)
    return len(word.encode("utf-8")[:count].decode("utf-8", errors="ignore"))


def _source_position(text: str, position: int) -> int:
    """Where in a text its normal form reaches ``position``: the last place that is not beyond."""
    ends = range(len(text) + 1)
    return bisect_right(ends, position, key=lambda end: len(_normal(text[:end]))) - 1


def _byte_letters() -> dict[int, str]:
    """Each byte's letter in the files: itself where that prints, else one from U+0100 on.

    The order is the vocabulary's: the printing ones first.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {byte: chr(byte) for byte in printing} | {
        byte: chr(0x100 + i) for i, byte in enumerate(others)
    }


_BYTE_LETTERS = _byte_letters()
_LETTER_BYTES = {letter: byte for byte, letter in _BYTE_LETTERS.items()}


def _token_bytes(token: str) -> bytes:
    try:
        return bytes(_LETTER_BYTES[letter] for letter in token)
    except KeyError:  # not made of byte letters: stands for itself
        return token.encode("utf-8", errors="replace")


def _read_vocab(path: Path) -> dict[str, int]:
    def no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            _refuse(path, "a token occurs twice")
        return found

    text = _read_text(path)
    try:
        vocab = json.loads(text, object_pairs_hook=no_doubles)
    except VocabularyError:
        raise
    except (ValueError, RecursionError) as error:
        raise VocabularyError(path, f"not JSON ({type(error).__name__})") from None
    if not isinstance(vocab, dict):
        _refuse(path, f"expected an object of token to id, found a {type(vocab).__name__}")
    if len(vocab) > MAX_TOKENS:
        _refuse(path, f"{len(vocab)} tokens are more than {MAX_TOKENS}")
    for token, number in vocab.items():
        if type(number) is not int or not 0 <= number < MAX_TOKENS:
            _refuse(path, f"token {_shown(token)} has no id between 0 and {MAX_TOKENS - 1}")
    if len(set(vocab.values())) < len(vocab):
        _refuse(path, "two tokens have the same id")
    for token in (START, END):
        if token not in vocab:
            _refuse(path, f"the token {token} is missing: not a vocabulary of CLIP")
    return vocab


def _read_merges(path: Path, vocab: dict[str, int]) -> list[str]:
    lines = _read_text(path).replace("\r\n", "\n").rstrip("\n").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    for merge in merges:
        parts = merge.split(" ")
        if len(parts) != 2 or not all(parts):
            _refuse(path, f"expected two tokens a line, found {_shown(merge)}")
        for token in (*parts, "".join(parts)):
            if token not in vocab:
                _refuse(path, f"{_shown(merge)} needs the token {_shown(token)}, which has no id")
    return merges


def _read_text(path: Path) -> str:
    if not stat.S_ISREG(path.stat().st_mode):
        _refuse(path, "not a file")
    with path.open("rb") as file:
        raw = file.read(MAX_FILE_BYTES + 1)
    if len(raw) > MAX_FILE_BYTES:
        _refuse(path, f"larger than {MAX_FILE_BYTES // 2**20} MiB: not a vocabulary of CLIP")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise VocabularyError(path, f"not UTF-8 at byte {error.start}") from None


def _refuse(path: Path, reason: str) -> NoReturn:
    raise VocabularyError(path, reason)


def _shown(token: str) -> str:
    """A stranger's string, safe to print on one line."""
    return ascii(token if len(token) <= 60 else token[:60] + "...")
