"""The prompt language, case by case; each says where its expectation comes from.

Sources of the expectations, all facts about AUTOMATIC1111/stable-diffusion-webui @v1.10.1:

    doctest   written in modules/prompt_parser.py, as that file's own tests
    comment   written there in a comment
    ran       what its parser gave (lark 1.3.1) for the same text, in a run beside ours
    read      follows from modules/extra_networks.py and its LoRA extension's parameters
    chunks    follows from modules/sd_hijack_clip.py, tokenize_line, and was compared likewise
    wiki      its wiki, "Features", "Attention/emphasis" and "Prompt editing"
    ours      a decision of ours: docs/prompts.md, "In detail"
"""

import pytest

from mlx_maple.text import Tokenizer, encode_prompt
from mlx_maple.text.editing import Phase, phase_at, phases
from mlx_maple.text.emphasis import fragments
from mlx_maple.text.language import Part, Tag, read_prompt
from mlx_maple.text.prompt import MOST_CHUNKS


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.bundled()


# Weights -----------------------------------------------------------------------------------------

LESS = 1 / 1.1
WEIGHTS = [
    ("doctest", "normal text", [("normal text", 1.0)]),
    ("doctest", "an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    ("doctest", "(unbalanced", [("unbalanced", 1.1)]),
    ("doctest", r"\(literal\]", [("(literal]", 1.0)]),
    ("doctest", "(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    (
        "doctest",
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [
            *(("a ", 1.0), ("house", 1.573), (" ", 1.1), ("on", 1.0), (" a ", 1.1)),
            *(("hill", 0.55), (", sun, ", 1.1), ("sky", 1.4641), (".", 1.1)),
        ],
    ),
    ("wiki", "a (word:1.5)", [("a ", 1.0), ("word", 1.5)]),
    ("wiki", "a (word:0.25)", [("a ", 1.0), ("word", 0.25)]),
    ("wiki", "a ((word))", [("a ", 1.0), ("word", 1.21)]),
    ("wiki", "a [word]", [("a ", 1.0), ("word", LESS)]),
    ("wiki", r"anime_\(character\)", [("anime_(character)", 1.0)]),
    ("ran", "", [("", 1.0)]),
    ("ran", "(word : 1.5 )", [("word ", 1.5)]),
    ("ran", "(a:-1)", [("a", -1.0)]),
    ("ran", "(a (b:2) c:3)", [("a ", 3.0), ("b", 6.0), (" c", 3.0)]),
    ("ran", "[a:1.2]", [("a:1.2", LESS)]),  # square brackets take no number
    ("ran", "a:1.2)", [("a:1.2)", 1.0)]),
    ("ran", "(a:1.2", [("a:1.2", 1.1)]),
    ("ran", "(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", LESS)]),  # the pairs may cross
    ("ran", "(a)[b)", [("a", 1.1), ("b)", LESS)]),
    ("ran", r"back\\slash \x", [(r"back\slash x", 1.0)]),
    ("ran", "(a:.5)", [("a", 0.5)]),
    ("ours", "(a:1.2.3)", [("a:1.2.3)", 1.1)]),
]


@pytest.mark.parametrize(("source", "text", "expected"), WEIGHTS)
def test_weights(source, text, expected):
    found = fragments(text)
    assert [f.text for f in found] == [word for word, _ in expected], source
    assert [f.weight for f in found] == pytest.approx([weight for _, weight in expected])
    assert not any(f.breaks for f in found)


BREAKS = [
    ("ran", "a BREAK b", [("a", False), ("b", True)]),
    ("ran", "a BREAKER b", [("a BREAKER b", False)]),
    ("ran", "BREAK", [("", False), ("", True)]),
    ("ran", "a\n BREAK\nBREAK b", [("a", False), ("", True), ("b", True)]),
    ("ours", "(a BREAK b:1.2)", [("a", False), ("b", True)]),
]


@pytest.mark.parametrize(("source", "text", "expected"), BREAKS)
def test_breaks(source, text, expected):
    assert [(f.text, f.breaks) for f in fragments(text)] == expected, source


def test_a_weight_beyond_reason_is_refused():
    with pytest.raises(ValueError, match="1000 is the most"):
        fragments("(a:1001)")
    with pytest.raises(ValueError, match="'sky'"):
        fragments("(" * 80 + "sky")


# Changes -----------------------------------------------------------------------------------------

TEN = list(range(1, 11))
CHANGES = [
    ("doctest", "test", [(10, "test")]),
    ("doctest", "a [b:3]", [(3, "a "), (10, "a b")]),
    ("doctest", "a [b: 3]", [(3, "a "), (10, "a b")]),
    ("doctest", "a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
    ("doctest", "[(a:2):3]", [(3, ""), (10, "(a:2)")]),
    ("doctest", "a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
    ("doctest", "a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
    ("doctest", "a [unbalanced", [(10, "a [unbalanced")]),
    ("doctest", "a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
    ("doctest", "((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
    ("doctest", "[a|(b:1.1)]", [(i, "a" if i % 2 else "(b:1.1)") for i in TEN]),
    ("doctest", "[fe|]male", [(i, "female" if i % 2 else "male") for i in TEN]),
    ("doctest", "[fe|||]male", [(i, "female" if i % 4 == 1 else "male") for i in TEN]),
    ("ran", "a [{b|d{:.5] c", [(10, "a [{b|d{:.5] c")]),  # its doctest says what was wished for
    ("ran", "[b::3]", [(3, "b"), (10, "")]),
    ("ran", "[a:b]", [(10, "[a:b]")]),  # no number: brackets that weaken
    ("ran", "[a:b] [c:3]", [(3, "[a:b] "), (10, "[a:b] c")]),
    ("ran", "a | b [c:5]", [(10, "a | b [c:5]")]),  # a bar that separates nothing
    ("ran", "[(a|b):3]", [(10, "[(a|b):3]")]),
    ("ran", "[a:b:c:3]", [(10, "[a:b:c:3]")]),
    ("ran", "(a:b:c) [d:2]", [(2, "(a:b:c) "), (10, "(a:b:c) d")]),
    ("ran", "[(a:3] [c:2]", [(2, "[(a:3] "), (10, "[(a:3] c")]),
    ("ran", "[a[b]:c:2]:d", [(2, "a[b]:d"), (10, "c:d")]),
    ("ran", "[a:-1]", [(10, "a")]),
    ("ran", "[a:b:99]", [(10, "a")]),
    ("ran", "[a:b:1e0]", [(1, "a"), (10, "b")]),
    ("ran", r"[a\:b:3]", [(3, ""), (10, r"a\:b")]),
    ("ran", "[a:3] \\", [(10, "[a:3] \\")]),  # a backslash before nothing
]


@pytest.mark.parametrize(("source", "text", "expected"), CHANGES)
def test_changes(source, text, expected):
    assert [tuple(phase) for phase in phases(text, 10)] == expected, source


COMMENT = (
    "fantasy landscape with a [mountain:lake:0.25] and [an oak:a christmas tree:0.75]"
    "[ in foreground::0.6][ in background:0.25] [shoddy:masterful:0.5]"
)


def test_changes_of_the_comment():
    start = "fantasy landscape with a"
    assert phases(COMMENT, 100) == [
        Phase(25, f"{start} mountain and an oak in foreground shoddy"),
        Phase(50, f"{start} lake and an oak in foreground in background shoddy"),
        Phase(60, f"{start} lake and an oak in foreground in background masterful"),
        Phase(75, f"{start} lake and an oak in background masterful"),
        Phase(100, f"{start} lake and a christmas tree in background masterful"),
    ]


SECOND = [  # of a second, larger drawing
    ("doctest", "a [b:.5] c", [(10, "a b c")]),
    ("doctest", "a [b:1.5] c", [(5, "a  c"), (10, "a b c")]),
    ("ran", "a [b:12] c", [(2, "a  c"), (10, "a b c")]),
]


@pytest.mark.parametrize(("source", "text", "expected"), SECOND)
def test_changes_of_a_second_drawing(source, text, expected):
    assert [tuple(phase) for phase in phases(text, 10, first_steps=10)] == expected, source


def test_the_first_call_does_not_count():
    """It compares the number of the call, from 0, with the step that ends a phase, from 1."""
    found = phases("[a:b:3]", 10)
    assert [phase_at(found, call).text for call in range(10)] == ["a"] * 4 + ["b"] * 6
    found = phases("[a|b]", 4)
    assert [phase_at(found, call).text for call in range(4)] == ["a", "a", "b", "a"]


# AND and tags ------------------------------------------------------------------------------------

PARTS = [
    ("wiki", "a cat :1.2 AND a dog AND a penguin :2.2", [1.2, 1.0, 2.2]),
    ("ran", "a AND b:-1", [1.0, -1.0]),
    ("ran", "SAND AND b", [1.0, 1.0]),
    ("ran", "a AND b: .5 ", [1.0, 0.5]),
    ("ran", "a AND b:c", [1.0, 1.0]),
    ("ours", "a picture in 16:9", [1.0]),
]


@pytest.mark.parametrize(("source", "text", "weights"), PARTS)
def test_prompts_joined_by_and(source, text, weights):
    assert [part.weight for part in read_prompt(text, 10).parts] == weights, source


def test_and_comes_before_changes_and_is_a_word_in_a_negative_prompt():
    parts = read_prompt("[a AND b] :3", 10).parts
    assert parts == [Part(1.0, [Phase(10, "[a ")]), Part(3.0, [Phase(10, " b]")])]
    assert len(read_prompt("a AND b", 10, is_negative=True).parts) == 1


TAGS = [
    ("read", "a <lora:leaf:0.8> b", "a  b", [Tag("lora", "leaf", 0.8, 0.8)]),
    ("read", "<lora:leaf>", "", [Tag("lora", "leaf", 1.0, 1.0)]),
    ("read", "<lora:leaf:0.5:0.8>", "", [Tag("lora", "leaf", 0.5, 0.8)]),
    ("read", "<lora:leaf:1:te=0>", "", [Tag("lora", "leaf", 0.0, 0.0)]),
    ("read", "<lora:leaf:unet=0.3>", "", [Tag("lora", "leaf", 1.0, 0.3)]),
    ("read", "<lyco:leaf:1>", "", [Tag("lora", "leaf", 1.0, 1.0)]),
    ("read", "<hypernet:x:1>", "", [Tag("hypernet", "x")]),
    ("read", "a < b: c > d", "a < b: c > d", []),
]


@pytest.mark.parametrize(("source", "text", "rest", "tags"), TAGS)
def test_tags(source, text, rest, tags):
    found = read_prompt(text, 10)
    assert found.parts == [Part(1.0, [Phase(10, rest)])], source
    assert list(found.tags) == tags


def test_a_tag_with_a_weight_that_is_none_is_refused():
    for text in ("<lora:a:b>", "<lora:a:nan>", "<lora:a:1e9>"):
        with pytest.raises(ValueError, match="no number"):
            read_prompt(text, 10)


def test_plain_reads_nothing_into_a_text():
    text = "a (b:1.2) [c:d:0.5] AND <lora:e:1> BREAK"
    assert read_prompt(text, 10, syntax="plain").parts == [Part(1.0, [Phase(10, text)])]
    with pytest.raises(ValueError, match="unknown syntax 'comfy': choose from a1111, plain"):
        read_prompt(text, 10, syntax="comfy")


# Chunks ------------------------------------------------------------------------------------------

COMMA = 267
LEAF = 7232


def lengths(clip, text, **options):
    """How many tokens each chunk holds."""
    ids = encode_prompt(clip, text, syntax="a1111", **options).ids
    assert all(len(chunk) == 77 and chunk[0] == clip.bos for chunk in ids)
    return [chunk.index(clip.eos) - 1 for chunk in ids]


CHUNKS = [
    ("", [0]),
    ("leaf " * 75, [75]),
    ("leaf " * 76, [75, 1]),
    ("leaf " * 150, [75, 75]),
    ("leaf " * 54 + ", " + "leaf " * 20 + "red", [75, 1]),  # the comma is too far back
    ("leaf " * 55 + ", " + "leaf " * 19 + "red", [56, 20]),
    ("leaf " * 74 + ", red", [75, 1]),
    ("leaf " * 75 + ", red", [75, 2]),
    ("leaf " * 75 + ", " + "leaf " * 74 + "red", [75, 75, 1]),  # a comma that begins is forgotten
    ("a BREAK b", [1, 1]),
    ("BREAK a", [0, 1]),
    ("a BREAK", [1]),
    ("a BREAK BREAK b", [1, 0, 1]),
    ("leaf " * 75 + "BREAK red", [75, 1]),
]


@pytest.mark.parametrize(("text", "expected"), CHUNKS)
def test_chunks(clip, text, expected):
    assert lengths(clip, text) == expected, "chunks"


def test_short_prompts_without_signs_are_the_same_in_both_syntaxes(clip):
    for text in ("", "a red maple leaf", "Éclairs, 20:30! {x} 5 < 6", "leaf " * 75):
        assert encode_prompt(clip, text, syntax="a1111") == encode_prompt(clip, text)


def test_weights_go_with_their_tokens(clip):
    encoded = encode_prompt(clip, "a (red:1.3) leaf", syntax="a1111")
    assert encoded.weights == [[1.0, 1.0, 1.3, *[1.0] * 74]]
    moved = encode_prompt(clip, "leaf " * 60 + ", (" + "leaf " * 14 + ":2) red", syntax="a1111")
    assert lengths(clip, "leaf " * 60 + ", (" + "leaf " * 14 + ":2) red") == [61, 15]
    assert moved.weights[1][:16] == [1.0, *[2.0] * 14, 1.0]
    assert set(moved.weights[0]) == {1.0}


def test_learned_vectors_stand_where_their_name_is_and_stay_together(clip):
    words = {
        tuple(clip.encode("zorb")): (50_000, 50_001),
        tuple(clip.encode("zorb style")): (50_002,) * 30,
    }
    ids = encode_prompt(clip, "a (zorb:1.5) leaf", syntax="a1111", words=words)
    assert ids.ids[0][:6] == [clip.bos, 320, 50_000, 50_001, LEAF, clip.eos]
    assert ids.weights[0][:5] == [1.0, 1.0, 1.5, 1.5, 1.0]
    assert lengths(clip, "leaf " * 50 + "zorb style", words=words) == [50, 30]
    with pytest.raises(ValueError, match="76 vectors"):
        encode_prompt(clip, "zorb", syntax="a1111", words={tuple(clip.encode("zorb")): [1] * 76})


# Hostile prompts ---------------------------------------------------------------------------------

HOSTILE = [
    *("(" * 10_000, ")" * 10_000, "[" * 10_000, "[(" * 5_000, "[a:" * 5_000, "[a|" * 5_000),
    "[" * 5_000 + "a" + ":0.5]" * 5_000,
    "([" * 5_000 + "a" + "])" * 5_000,
    *("[a|b]" * 20_000, "(a:1.0)" * 10_000, "<lora:" * 15_000, "\\" * 100_000, ":" * 100_000),
    *("BREAK " * 15_000, "a AND " * 20_000, "red, " * 20_000, "x" * 100_000, "a:1" * 30_000),
    "(a" * 5_000 + ":1.0)" * 5_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=[f"{t[:12]!r}" for t in HOSTILE])
def test_hostile_prompts_end_in_one_way_or_the_other(clip, text):
    """Without recursion, and in one pass: with the square of 100 kB this would not come back."""
    try:
        for part in read_prompt(text, 20).parts:
            for phase in part.phases[:2]:
                encode_prompt(clip, phase.text, syntax="a1111")
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 200


def test_what_has_no_end_is_refused(clip):
    with pytest.raises(ValueError, match=f"{MOST_CHUNKS} chunks"):
        encode_prompt(clip, "leaf " * 75 * MOST_CHUNKS + "leaf", syntax="a1111")
    with pytest.raises(ValueError, match="prompts are joined by AND"):
        read_prompt("a AND " * 40, 10)
    for weight in ("101", "-100.5", "9" * 400):
        with pytest.raises(ValueError, match="of a prompt must be from -100 to 100"):
            read_prompt(f"a AND b :{weight}", 10)
    assert read_prompt("a AND b :-100", 10).parts[1].weight == -100
    with pytest.raises(ValueError, match="changes 1,000 times"):
        phases("[a|b]" * 10_000, 1000)
