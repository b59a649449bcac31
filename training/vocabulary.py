"""CLIP's tokenizer for plain ASCII English, and a vocabulary pruned to the words in use.

The pruned vocabulary keeps CLIP's 512 byte symbols, the merges that fire on the captions' phrases
and the two special tokens, all in CLIP's order: the same text gives the same pieces, under other
ids. `clip_ids.json` maps a pruned id to CLIP's.
Source   openai/CLIP clip/simple_tokenizer.py (MIT) for the format of the merges file.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
from pathlib import Path

LENGTH = 77
_WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+|_+", re.IGNORECASE)


def byte_symbols() -> dict[int, str]:
    """CLIP's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {b: chr(b) for b in printable}
    symbols |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in symbols)}
    return {b: symbols[b] for b in (*printable, *(b for b in range(256) if b not in printable))}


class Tokenizer:
    """Byte-pair encoding by an ordered list of merges."""

    def __init__(self, merges: list[tuple[str, str]]) -> None:
        symbols = list(byte_symbols().values())
        pieces = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges)]
        pieces += ["<|startoftext|>", "<|endoftext|>"]
        self.merges = merges
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        self.bos, self.eos = len(pieces) - 2, len(pieces) - 1
        self.fired: set[int] = set()
        self._ranks = {pair: i for i, pair in enumerate(merges)}
        self._symbols = byte_symbols()
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def from_clip(cls, path: str | Path) -> Tokenizer:
        """The full vocabulary from bpe_simple_vocab_16e6.txt.gz."""
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
        return cls([tuple(line.split()) for line in lines])

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """The pruned vocabulary from merges.txt."""
        lines = Path(folder, "merges.txt").read_text(encoding="utf-8").split("\n")[1:]
        return cls([tuple(line.split()) for line in lines if line])

    def _word(self, word: str) -> list[int]:
        if word not in self._cache:
            parts = [self._symbols[b] for b in word.encode()]
            parts[-1] += "</w>"
            while len(parts) > 1:
                ranked = [
                    (self._ranks.get(p, len(self._ranks)), p) for p in itertools.pairwise(parts)
                ]
                rank, pair = min(ranked)
                if rank == len(self._ranks):
                    break
                self.fired.add(rank)
                joined, i = [], 0
                while i < len(parts):
                    width = 2 if tuple(parts[i : i + 2]) == pair else 1
                    joined.append("".join(parts[i : i + width]))
                    i += width
                parts = joined
            self._cache[word] = [self.ids[p] for p in parts]
        return self._cache[word]

    def encode(self, text: str) -> list[int]:
        """Ids of the text without the special tokens."""
        return [i for word in _WORD.findall(text.lower()) for i in self._word(word)]

    def padded(self, text: str) -> list[int]:
        """77 ids: start, text (cut to 75), end, and end again as padding."""
        ids = [self.bos, *self.encode(text)[: LENGTH - 2]]
        return ids + [self.eos] * (LENGTH - len(ids))


def prune(full: Tokenizer, texts: list[str], folder: str | Path) -> Tokenizer:
    """Write vocab.json, merges.txt and clip_ids.json for the merges that fire on the texts."""
    before = [full.encode(t) for t in texts]
    small = Tokenizer([full.merges[i] for i in sorted(full.fired)])
    names, small_names = list(full.ids), list(small.ids)
    for text, ids in zip(texts, before, strict=True):
        if [names[i] for i in ids] != [small_names[i] for i in small.encode(text)]:
            raise ValueError(f"pruning changed the pieces of {text!r}")
    folder = Path(folder)
    merges = "\n".join(" ".join(m) for m in small.merges)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    (folder / "vocab.json").write_text(json.dumps(small.ids, ensure_ascii=False), encoding="utf-8")
    ids = [full.ids[piece] for piece in small_names]
    if ids != sorted(ids):
        raise ValueError("the pruned vocabulary left CLIP's order")
    (folder / "clip_ids.json").write_text(json.dumps(ids, separators=(",", ":")))
    return small
