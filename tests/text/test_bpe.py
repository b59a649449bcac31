import hashlib
import importlib.util
import json
import os
import re
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_maple.text import Tokenizer, VocabularyError, tokenizer
from mlx_maple.text.unicode_tables import LETTER, NUMBER, SPACE, YOUNGER_MARK

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "golden_tokens.json").read_text())
START, END = "<|startoftext|>", "<|endoftext|>"


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.bundled()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Tokenizer:
    spec = importlib.util.spec_from_file_location("curated", HERE / "curated.py")
    curated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(curated)
    return Tokenizer.from_files(*curated.write_small_vocabulary(tmp_path_factory.mktemp("small")))


def test_bundled_vocabulary_is_clips(clip):
    assert (clip.bos, clip.eos, clip.pad, clip.vocab_size) == (49406, 49407, 49407, 49408)


@pytest.mark.weights
def test_bundled_vocabulary_equals_the_published_list(clip, weights):
    import gzip

    published = gzip.decompress((weights / "clip_vocab/bpe_simple_vocab_16e6.txt.gz").read_bytes())
    merges = published.decode().split("\n")[1:48895]
    assert list(clip._ranks) == merges
    tokens = list(clip._vocab)
    assert tokens[512:-2] == [merge.replace(" ", "") for merge in merges]
    assert len(set(tokens)) == len(tokens) == 49408


def test_licence_and_notice_ship_with_the_vocabulary():
    folder = Path(tokenizer.__file__).parent / "vocabulary"
    assert "Copyright (c) 2021 OpenAI" in (folder / "LICENSE").read_text()
    assert "bpe_simple_vocab_16e6.txt" in (folder / "NOTICE").read_text()


@pytest.mark.parametrize("name", ["full", "small"])
def test_golden_ids(name, clip, small):
    chosen = {"full": clip, "small": small}[name]
    wrong = [p["text"] for p in GOLDEN["prompts"] if chosen.encode(p["text"]) != p[name]]
    assert not wrong
    assert len(GOLDEN["prompts"]) >= 300


def test_golden_ids_see_a_broken_transform(clip, monkeypatch):
    """Negative controls: each of these is a mistake that ports have made."""

    def wrong() -> int:
        fresh = Tokenizer(clip._vocab, list(clip._ranks))
        return sum(fresh.encode(p["text"]) != p["full"] for p in GOLDEN["prompts"])

    word = tokenizer._WORD
    breaks = {
        "no NFC": ("_nfc", lambda text: text),
        "final sigma": ("_LOWER", {k: v for k, v in tokenizer._LOWER.items() if k != 0x3A3}),
        "Python's white space": ("_WORD", re.compile(word.pattern.replace(f"[^{SPACE}", r"[^\s"))),
        "numbers joined": (
            "_WORD",
            re.compile(word.pattern.replace(f"[{NUMBER}]|", f"[{NUMBER}]+|")),
        ),
        "all marks sorted": ("_OLDER", re.compile("(?s).+")),
        "special tokens split": ("_SPECIAL", re.compile("(?!)")),
    }
    assert wrong() == 0
    for mistake, (attribute, value) in breaks.items():
        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, attribute, value)
            if mistake == "all marks sorted" and unicodedata.combining("\u0897") == 0:
                continue  # this Python does not know the younger marks either
            assert wrong() > 0, mistake


def test_every_code_point_has_rusts_class_and_normal_form():
    """Fails where a later Python's tables disagree with what the ids were made with."""
    classes = [(n, re.compile(f"[{c}]")) for n, c in (("S", SPACE), ("L", LETTER), ("N", NUMBER))]
    names = ["O"] * 0x110000
    for name, pattern in classes:
        for match in pattern.finditer("".join(map(chr, range(0x110000)))):
            names[match.start()] = name
    digest = hashlib.sha256()
    for code in range(0x110000):
        if not 0xD800 <= code <= 0xDFFF:
            digest.update(f"{names[code]} {tokenizer._normal(chr(code))}\n".encode())
    assert digest.hexdigest() == GOLDEN["characters_sha256"]


def test_younger_marks_hold_no_old_character():
    marks = re.compile(f"[{YOUNGER_MARK}]")
    old = "\u0301\u0307\u0323\u0345\u093c\u09bc\u3099\u0bd7\u11a8éå\u1eb9 ab中"
    assert not marks.search(old)
    assert marks.fullmatch("\u0897")


@pytest.mark.parametrize("name", ["full", "small"])
@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_encodes_into_the_vocabulary(name, text, clip, small):
    chosen = {"full": clip, "small": small}[name]
    ids = chosen.encode(text)
    assert all(0 <= number < chosen.vocab_size for number in ids)
    chosen.decode(ids)


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="ascii"), max_size=60), cut=st.integers(0, 30))
def test_tail_of_plain_text_reads_as_the_rest_of_the_tokens(text, cut, clip):
    ids = clip.encode(text)
    tail = clip.tail(text, cut)
    assert text.endswith(tail)
    assert bool(tail) == (len(ids) > cut)
    squeezed = re.sub(r"[\0-\x20\x7f]", "", clip.decode(ids[cut:])) if len(ids) > cut else ""
    assert re.sub(r"[\0-\x20\x7f]", "", tail.lower()) == squeezed


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=40), cut=st.integers(0, 20))
def test_tail_of_any_text_is_an_end_of_it(text, cut, clip):
    tail = clip.tail(text, cut)
    assert text.endswith(tail)
    assert bool(tail) == (len(clip.encode(text)) > cut)


@pytest.mark.parametrize(
    ("text", "count", "tail"),
    [
        ("a red maple leaf", 2, "maple leaf"),
        ("A  Red\tMAPLE leaf ", 2, "MAPLE leaf "),
        ("a red maple leaf", 4, ""),
        ("a cat<|endoftext|>Dog", 2, "<|endoftext|>Dog"),
        ("a cat<|endoftext|>Dog", 3, "Dog"),
        ("cafe\u0301 Cre\u0300me BRU\u0302LE\u0301E", 1, "Cre\u0300me BRU\u0302LE\u0301E"),
        ("İİ x", 1, "İİ x"),  # "i" fits, its dot does not: the letter is left over whole
        ("x<|ENDOFTEXT|>y", 1, "<|ENDOFTEXT|>y"),
        ("x<|ENDOFTEXT|>y", 3, "ENDOFTEXT|>y"),
        ("\ud800 Red\udcff", 1, "Red\udcff"),
    ],
)
def test_tail_is_in_the_users_own_letters(text, count, tail, clip):
    assert clip.tail(text, count) == tail


def test_tail_never_splits_a_character(clip):
    text = "😀" * 3 + "🪿" * 3  # the last one is four tokens each in CLIP's vocabulary
    for count in range(len(clip.encode(text)) + 1):
        assert text.endswith(clip.tail(text, count))


def test_lone_surrogates_are_replacement_characters(clip):
    assert clip.encode("a\udcffb") == clip.encode("a\ufffdb")


def test_decode_is_the_text_in_lower_case(clip):
    ids = clip.encode("Hello, World! 42 naïve 日本 🍁")
    assert clip.decode(ids) == "hello , world ! 4 2 naïve 日本 🍁"
    assert clip.decode([clip.bos, *clip.encode("cat"), clip.eos]) == START + "cat " + END
    assert clip.decode([]) == ""
    assert clip.decode(clip.encode("🪿")[:1]) == "\ufffd"  # three bytes of four


@pytest.mark.parametrize("bad", [-1, 49408])
def test_decode_refuses_unknown_ids(bad, clip):
    with pytest.raises(ValueError, match=str(bad)):
        clip.decode([bad])


@pytest.mark.parametrize(
    "text",
    [
        "a" * 100_000,
        "ab" * 50_000,
        "漢" * 30_000,
        "a" + "\u0345\u0334\u0f73" * 30_000,
        "a1 " * 30_000,
    ],
    ids=["one letter", "one word", "CJK", "marks out of order", "short words"],
)
def test_long_texts_take_linear_time(text, clip):
    """0.1 to 0.5 s each; a quadratic merge or CPython's own ordering of marks takes minutes."""
    start = time.perf_counter()
    clip.encode(text)
    assert time.perf_counter() - start < 10


def test_cache_is_bounded(clip, monkeypatch):
    monkeypatch.setattr(tokenizer, "CACHED_WORDS", 10)
    fresh = Tokenizer(clip._vocab, list(clip._ranks))
    words = [f"w{a}{b}" for a in "abcdefgh" for b in "abcdefgh"]
    assert fresh.encode(" ".join(words)) == clip.encode(" ".join(words))
    assert len(fresh._cache) <= 10
    fresh.encode("x" * 1000)
    assert not any(len(word) > tokenizer.CACHED_WORD for word in fresh._cache)


def test_unknown_letters_are_the_end_token_each(small):
    assert small.encode("zzz") == [small.eos] * 3
    assert small.decode(small.encode("a zoo")).startswith("a " + END)


# A folder's own files: all that a stranger's folder can hold.

VOCAB = {START: 0, END: 1, "a": 2, "b</w>": 3, "ab</w>": 4, "a</w>": 5}


def files(folder: Path, vocab: str | bytes | None = None, merges: str | bytes = "a b</w>\n"):
    vocab = json.dumps(VOCAB) if vocab is None else vocab
    for name, content in (("vocab.json", vocab), ("merges.txt", merges)):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / "vocab.json", folder / "merges.txt"


def test_reads_a_folders_files(tmp_path):
    own = Tokenizer.from_files(*map(str, files(tmp_path)))
    assert (own.bos, own.eos, own.pad, own.vocab_size) == (0, 1, 1, 6)
    assert own.encode("ab AB a b c") == [4, 4, 5, 3, 1]


@pytest.mark.parametrize("merges", ["#version: 0.2\na b</w>", "a b</w>\r\n", "\na b</w>\n\n", ""])
def test_merges_in_the_forms_they_come_in(merges, tmp_path):
    own = Tokenizer.from_files(*files(tmp_path, merges=merges))
    assert own.encode("ab") == ([4] if merges else [2, 3])


@pytest.mark.parametrize(
    ("vocab", "reason"),
    [
        (b"", "not JSON"),
        (b"<html></html>", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8"),
        ("[" * 100_000, "not JSON"),
        ('{"a":' * 100_000, "not JSON"),
        ("[1, 2]", "a list"),
        ("null", "a NoneType"),
        ("{}", "is missing"),
        (json.dumps({START: 0, "a": 1}), re.escape(END)),
        (json.dumps(VOCAB | {"x": "3"}), "'x' has no id"),
        (json.dumps(VOCAB | {"x": -1}), "'x' has no id"),
        (json.dumps(VOCAB | {"x": 1.0}), "'x' has no id"),
        (json.dumps(VOCAB | {"x": True}), "'x' has no id"),
        (json.dumps(VOCAB | {"x": 10**9}), "'x' has no id"),
        (json.dumps(VOCAB)[:-1] + ', "x": ' + "9" * 5000 + "}", "not JSON"),
        (json.dumps(VOCAB)[:-1] + ', "x": NaN}', "'x' has no id"),
        (json.dumps(VOCAB | {"x": {"y": {}}}), "'x' has no id"),
        (json.dumps(VOCAB | {"x": 3}), "same id"),
        (json.dumps(VOCAB)[:-1] + ', "a": 9}', "occurs twice"),
        (json.dumps(VOCAB | {"\n\x1b[31m" * 50: None}), r"\\n\\x1b"),
        (" " * (8 * 2**20) + "{}", "larger than 8 MiB"),
    ],
)
def test_unusable_vocabularies_are_refused_by_name(vocab, reason, tmp_path):
    vocab_file, merges_file = files(tmp_path, vocab=vocab)
    with pytest.raises(VocabularyError, match=reason) as caught:
        Tokenizer.from_files(vocab_file, merges_file)
    assert caught.value.path == vocab_file
    assert isinstance(caught.value, ValueError)
    assert str(vocab_file) in str(caught.value)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("merges", "reason"),
    [
        ("a b c\n", "two tokens a line"),
        ("ab\n", "two tokens a line"),
        ("a \n", "two tokens a line"),
        ("a b</w>\n<html>\n", "two tokens a line"),
        ("a x\n", "'x', which has no id"),
        ("a a</w>\n", "'aa</w>', which has no id"),
        (b"a b</w>\n\xff\n", "not UTF-8 at byte 8"),
        ("a b</w>\n" * 2**20 + "\n", "larger than 8 MiB"),
    ],
)
def test_unusable_merges_are_refused_by_name(merges, reason, tmp_path):
    vocab_file, merges_file = files(tmp_path, merges=merges)
    with pytest.raises(VocabularyError, match=re.escape(reason)) as caught:
        Tokenizer.from_files(vocab_file, merges_file)
    assert caught.value.path == merges_file


def test_repeated_merges_count_where_they_stand_last(tmp_path):
    """As the tokenizers library reads them."""
    vocab = VOCAB | {"c</w>": 6, "bc</w>": 7, "b": 8, "ab": 9}
    own = Tokenizer.from_files(*files(tmp_path, json.dumps(vocab), "a b\nb c</w>\na b\n"))
    assert own.encode("abc") == [2, 7]


def test_missing_files_and_folders(tmp_path):
    vocab_file, merges_file = files(tmp_path)
    with pytest.raises(FileNotFoundError):
        Tokenizer.from_files(tmp_path / "none.json", merges_file)
    with pytest.raises(VocabularyError, match="not a file"):
        Tokenizer.from_files(vocab_file, tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(VocabularyError, match="not a file"):
        Tokenizer.from_files(tmp_path / "pipe", tmp_path / "pipe")


@pytest.mark.weights
def test_emoji_trials_own_vocabulary(weights, clip):
    folder = weights / "emoji-trial" / "diffusers" / "tokenizer"
    own = Tokenizer.from_files(folder / "vocab.json", folder / "merges.txt")
    assert (own.vocab_size, own.bos, own.eos) == (6545, 6543, 6544)
    prompt = "a red maple leaf on a blue background"
    assert own.decode(own.encode(prompt)) == clip.decode(clip.encode(prompt)) == prompt
