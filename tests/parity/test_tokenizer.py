"""Token ids against transformers' CLIPTokenizer: a large seeded corpus, three vocabularies."""

import gzip
import importlib.util
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_maple.text import Tokenizer, encode_prompt, tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

pytestmark = [pytest.mark.parity, pytest.mark.weights]

BATCH = 5_000
CODE_POINTS = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
PLANES = [(0, 0x7F), (0x80, 0x24F), (0x250, 0x2FFF), (0x3000, 0xD7FF), (0xE000, 0xFFFF)]
PLANES += [(plane << 16, (plane << 16) + 0xFFFF) for plane in range(1, 17)]
WHITE = "\t\n\v\f\r \x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u2000\u2003\u2007\u200b\u2028\u2029"
WHITE += "\u202f\u205f\u3000\ufeff"
JOINERS = "\u200c\u200d\u2060\ufe0e\ufe0f\u00ad\u034f\u061c\u200e\u202e"
EMOJI = "😀😂❤👍👩👨👧🏳🌈🇯🇵🇩🇪🎉🍁🦀🏽🏿☀✨⚡🪿🫨"
MARKED = "'’\"<|>&;:()[]{}!?.,-_#@/\\+*=~^`$%"


def corpus(words: list[str]) -> Iterator[tuple[str, str]]:
    """(kind, text), always the same ones."""
    draw = random.Random(20261124)
    marks = [chr(c) for c in CODE_POINTS if tokenizer.unicodedata.combining(chr(c))]
    marks += [chr(c) for c in (0x897, 0x1AC1, 0x1DF6, 0xC3C, 0x16FF0, 0x1E4EC, 0x105D2, 0x11930)]
    lower = tokenizers.normalizers.Lowercase().normalize_str
    cased = [chr(c) for c in CODE_POINTS if lower(chr(c)) != chr(c)]

    def anything() -> str:
        first, last = draw.choice(PLANES)
        code = draw.randint(first, last)
        return chr(code) if not 0xD800 <= code <= 0xDFFF else "\ufffd"

    def some(alphabet, most: int) -> str:
        return "".join(draw.choices(alphabet, k=draw.randint(1, most)))

    def word() -> str:
        return draw.choice((str.lower, str.upper, str.title, str.swapcase))(draw.choice(words))

    def accented() -> str:
        letter = draw.choice("aeiouyncszAEIOUdglAaЕегаᄒ\u1161\u11abक\u09c7か")
        return letter + some(marks, 4)

    def special() -> str:
        token = draw.choice(("<|startoftext|>", "<|endoftext|>", "</w>"))
        return draw.choice((token, token, token.upper(), token[1:], token[:-1], token.title()))

    makers = {
        "words": lambda: " ".join(word() for _ in range(draw.randint(1, 30))),
        "words and marks": lambda: "".join(
            word() + some(MARKED + " ", 3) for _ in range(draw.randint(1, 12))
        ),
        "contractions": lambda: "".join(
            draw.choice(("'s", "'T", "'re", "'VE", "'m", "'ll", "'d", "''", word(), " "))
            for _ in range(draw.randint(1, 15))
        ),
        "accents": lambda: "".join(
            draw.choice((accented, word, lambda: " "))() for _ in range(draw.randint(1, 12))
        ),
        "marks alone": lambda: some(marks, 12),
        "emoji": lambda: some(EMOJI + JOINERS + " a", 20),
        "CJK": lambda: "".join(
            chr(
                draw.choice(
                    (
                        draw.randint(0x3040, 0x30FF),
                        draw.randint(0x4E00, 0x9FFF),
                        draw.randint(0xAC00, 0xD7A3),
                        draw.randint(0xFF00, 0xFFEF),
                        draw.randint(0x20000, 0x2A6DF),
                    )
                )
            )
            for _ in range(draw.randint(1, 25))
        ),
        "controls": lambda: "".join(
            draw.choice((chr(draw.randint(0, 0x1F)), chr(draw.randint(0x7F, 0xA0)), word()))
            for _ in range(draw.randint(1, 12))
        ),
        "white space": lambda: "".join(
            draw.choice((some(WHITE, 3), word())) for _ in range(draw.randint(1, 12))
        ),
        "case": lambda: some(cased, 12) + draw.choice(("", " ", "Σ")) + some(cased, 3),
        "numbers": lambda: some("0123456789٠١२²½Ⅳⅷ①𝟙.,-eE ", 20),
        "special tokens": lambda: "".join(
            draw.choice((special, word, anything))() for _ in range(draw.randint(1, 8))
        ),
        "all planes": lambda: "".join(anything() for _ in range(draw.randint(1, 25))),
        "Latin to Indic": lambda: "".join(
            chr(draw.randint(0x20, 0x1FFF)) for _ in range(draw.randint(1, 25))
        ),
    }
    for kind, make in makers.items():
        for _ in range(12_000):
            yield kind, make()
    for first in range(0, len(CODE_POINTS), 16):  # every code point: in a word, alone, after a mark
        chars = [chr(c) for c in CODE_POINTS[first : first + 16]]
        yield "every code point", " ".join(f"a{c}b {c} .{c}" for c in chars)
    for make in makers.values():
        for _ in range(8):
            text = ""
            while len(text) < 10_000:
                text += make() + draw.choice(("", "", " ", "x"))
            yield "10 kB", text[:10_000]
    for letter in (
        "a",
        "é",
        "漢",
        "😀",
        "\u0301",
        "e\u0301",
        " ",
        "'",
        "1",
        "\x1c",
        "<|endoftext|>",
    ):
        yield "10 kB", letter * 10_000


@pytest.fixture(scope="module")
def official(weights) -> tuple[list[str], object]:
    """CLIP's tokens and transformers' tokenizer, from the published list and nothing of ours."""
    packed = (weights / "clip_vocab" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    merges = [tuple(line.split()) for line in gzip.decompress(packed).decode().split("\n")[1:48895]]
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [*map(chr, printing), *(chr(0x100 + i) for i in range(68))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return tokens, transformers.CLIPTokenizer(vocab=vocab, merges=merges)


@pytest.fixture(scope="module")
def pairs(official, weights, tmp_path_factory) -> dict[str, tuple[Tokenizer, object]]:
    trial = weights / "emoji-trial" / "diffusers" / "tokenizer"
    path = Path(__file__).parents[1] / "text" / "curated.py"
    spec = importlib.util.spec_from_file_location("curated", path)
    curated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(curated)
    small = curated.write_small_vocabulary(tmp_path_factory.mktemp("small"))
    return {
        "CLIP, bundled": (Tokenizer.bundled(), official[1]),
        "emoji-trial, pruned": (
            Tokenizer.from_files(trial / "vocab.json", trial / "merges.txt"),
            transformers.CLIPTokenizer.from_pretrained(trial),
        ),
        "tiny, letters missing": (
            Tokenizer.from_files(*small),
            transformers.CLIPTokenizer(vocab=str(small[0]), merges=str(small[1])),
        ),
    }


@pytest.fixture(scope="module")
def texts(official) -> list[tuple[str, str]]:
    words = [token.removesuffix("</w>") for token in official[0] if token.endswith("</w>")]
    return list(corpus([word for word in words if word.isascii()]))


def reference_ids(reference, texts: list[str]) -> list[list[int]]:
    return reference(texts, add_special_tokens=False)["input_ids"]


def different(ours: Tokenizer, reference, texts: list[str]) -> list[str]:
    wrong: list[str] = []
    for first in range(0, len(texts), BATCH):
        batch = texts[first : first + BATCH]
        expected = reference_ids(reference, batch)
        wrong += [t for t, ids in zip(batch, expected, strict=True) if ours.encode(t) != ids]
    return wrong


@pytest.mark.parametrize(
    ("vocabulary", "every"),
    [("CLIP, bundled", 1), ("emoji-trial, pruned", 4), ("tiny, letters missing", 8)],
)
def test_ids_are_equal(vocabulary, every, pairs, texts, parity_record):
    ours, reference = pairs[vocabulary]
    chosen = [text for _, text in texts[::every]]
    assert len(chosen) * every >= 200_000
    start = time.perf_counter()
    wrong = different(ours, reference, chosen)
    parity_record(
        f"token ids, {vocabulary}",
        strings=len(chosen),
        characters=sum(map(len, chosen)),
        different=len(wrong),
        seconds=round(time.perf_counter() - start),
        bar="all equal",
    )
    assert not wrong, [ascii(text[:80]) for text in wrong[:5]]


def test_bundled_ids_are_the_published_ones(official, pairs):
    assert list(pairs["CLIP, bundled"][0]._vocab) == official[0]


def test_text_comes_back_equal(pairs, texts):
    sample = [text for _, text in texts[::97]]
    for ours, reference in pairs.values():
        for text in sample:
            ids = ours.encode(text)
            assert ours.decode(ids) == reference.decode(ids), ascii(text)


def test_chunks_are_what_diffusers_asks_for(pairs, texts):
    for ours, reference in pairs.values():
        sample = [text for _, text in texts[::211]]
        expected = reference(sample, padding="max_length", max_length=77, truncation=True)
        for text, ids in zip(sample, expected["input_ids"], strict=True):
            assert encode_prompt(ours, text).ids == [ids], ascii(text)


def test_broken_transforms_are_seen(pairs, texts, monkeypatch, parity_record):
    """Negative controls: one transform broken at a time, on the strings of the kind it is for."""
    ours, reference = pairs["CLIP, bundled"]

    def count(kind: str) -> int:
        sample = [text for name, text in texts if name == kind][:3_000]
        return len(different(Tokenizer(ours._vocab, list(ours._ranks)), reference, sample))

    plain_lower = {k: v for k, v in tokenizer._LOWER.items() if k != 0x3A3}
    for attribute, value, kind in (
        ("_nfc", lambda text: text, "accents"),
        ("_LOWER", plain_lower, "case"),
        ("_BYTE_LETTERS", {}, "CJK"),
        ("WORD_END", "", "words"),
    ):
        assert count(kind) == 0
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, attribute, value)
            seen = count(kind)
        parity_record(f"  broken on purpose: {attribute}", different=seen, of=3_000)
        assert seen > 0


def test_every_code_points_class_and_normal_form():
    """Character by character, so that a difference names itself."""
    normal = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFC(), tokenizers.normalizers.Lowercase()]
    )
    wrong = [
        hex(c) for c in CODE_POINTS if tokenizer._normal(chr(c)) != normal.normalize_str(chr(c))
    ]
    assert not wrong
    golden = json.loads((Path(__file__).parents[1] / "text" / "golden_tokens.json").read_text())
    assert golden["tokenizers"] == tokenizers.__version__
