"""Textual inversions: every form of file, the table behind a text encoder, names in prompts."""

import sys
from collections import OrderedDict
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from maple_convert.embedding import fitted, open_embedding
from maple_convert.errors import InvalidCheckpoint, UnsupportedCheckpoint
from mlx_maple.adapters import Adapters, Word
from mlx_maple.adapters.textual_inversion import set_words
from mlx_maple.models import CLIPTextConfig, CLIPTextEncoder
from mlx_maple.text.prompt import encode_prompt
from mlx_maple.text.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "convert"))
from torch_files import Call, Global, Storage, TorchTensor, parameter, write_torch_zip

WIDTH = 16


def vectors(count=2, width=WIDTH):
    return np.random.default_rng(count).standard_normal((count, width)).astype(np.float32)


# Files ----------------------------------------------------------------------------------------


def a1111(path):
    """As the web UI saves it: on a graphics card, among facts of the training."""
    storage = Storage(vectors(), location="cuda:0")
    held = TorchTensor(storage, 0, (2, WIDTH), (WIDTH, 1), requires_grad=True)
    facts = {"string_to_token": {"*": 265}, "name": "inside", "step": 1000, "sd_checkpoint": "ab"}
    write_torch_zip(path, {**facts, "string_to_param": {"*": held}})


def parameter_dict(path):
    """As the method's authors save it."""
    module = Call(
        Global("torch.nn.modules.container", "ParameterDict"),
        (),
        {"training": True, "_parameters": OrderedDict({"*": parameter(vectors())})},
    )
    write_torch_zip(path, {"string_to_token": {"*": 265}, "string_to_param": module})


def diffusers_bin(path):
    write_torch_zip(path, {"<cat-toy>": vectors()})


# How it is written, the file's name, and the words that it then holds.
FORMS = {
    "a1111": (a1111, "style.pt", ["style"]),
    "ParameterDict": (parameter_dict, "style.pt", ["style"]),
    "diffusers": (diffusers_bin, "learned_embeds.bin", ["learned_embeds", "<cat-toy>"]),
    "safetensors": (
        lambda path: save_file({"emb_params": vectors()}, path),
        "style.v1.safetensors",
        ["style.v1"],
    ),
    "safetensors, named": (
        lambda path: save_file({"<cat-toy>": vectors()}, path),
        "toy.safetensors",
        ["toy", "<cat-toy>"],
    ),
    "bare": (lambda path: write_torch_zip(path, vectors()), "aesthetic.pt", ["aesthetic"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_vectors_and_the_name(tmp_path, form):
    write, file, names = FORMS[form]
    write(tmp_path / file)
    found = open_embedding(tmp_path / file)
    assert list(found.words) == names
    for name, given in found.words.items():
        mine = fitted(found.path, name, given, {"text_encoder": WIDTH})
        assert np.array_equal(mine["text_encoder"].array, vectors())


def test_one_vector_without_a_row_of_its_own(tmp_path):
    save_file({"<dot>": vectors(1)[0]}, tmp_path / "dot.safetensors")
    word = open_embedding(tmp_path / "dot.safetensors").words["<dot>"]
    mine = fitted(tmp_path, "dot", word, {"text_encoder": WIDTH})
    assert np.array_equal(mine["text_encoder"].array, vectors(1))


@pytest.mark.parametrize("keys", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
def test_a_pair_goes_to_both_encoders(tmp_path, keys):
    one, two = vectors(3), vectors(3, 20)
    save_file(dict(zip(keys, (one, two), strict=True)), tmp_path / "xl.safetensors")
    word = open_embedding(tmp_path / "xl.safetensors").words["xl"]
    widths = {"text_encoder": WIDTH, "text_encoder_2": 20}
    mine = fitted(tmp_path, "xl", word, widths)
    assert np.array_equal(mine["text_encoder"].array, one)
    assert np.array_equal(mine["text_encoder_2"].array, two)


SD1, SD2 = "Stable Diffusion 1 (768 wide)", "Stable Diffusion 2 (1024 wide)"
SDXL = "SDXL (768 and 1280 wide)"


@pytest.mark.parametrize(
    ("tensors", "widths", "theirs", "ours"),
    [
        ({"emb_params": (2, 768)}, [1024], SD1, SD2),
        ({"emb_params": (2, 1024)}, [768], SD2, SD1),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, [768], SDXL, SD1),
        ({"emb_params": (2, 768)}, [768, 1280], SD1, SDXL),
        ({"clip_g": (2, 1280)}, [768, 1280], "the refiner of SDXL (1280 wide)", SDXL),
        ({"emb_params": (2, 5)}, [16], "a model whose text is 5 wide", "a model whose text is 16"),
    ],
)
def test_another_width_says_whose_word_it_is(tmp_path, tensors, widths, theirs, ours):
    save_file({k: np.zeros(s, np.float32) for k, s in tensors.items()}, tmp_path / "w.safetensors")
    found = open_embedding(tmp_path / "w.safetensors")
    names = ["text_encoder", "text_encoder_2"][: len(widths)]
    with pytest.raises(UnsupportedCheckpoint) as caught:
        fitted(found.path, "w", found.words["w"], dict(zip(names, widths, strict=True)))
    assert f"'w' is a word of {theirs}; this model is {ours}" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        ({"emb_params": np.zeros((76, 4), "f4")}, "is no textual inversion"),  # more than a chunk
        ({"a": np.zeros((2, 3, 4), "f4")}, "is no textual inversion"),
        ({"emb_params": np.zeros((2, 4), "i4")}, "is no textual inversion"),
        ({"emb_params": np.zeros((2, 4), "f4"), "other": np.zeros(4, "f4")}, "is no textual inv"),
        ({"a\nb": np.zeros(4, "f4")}, "is no textual inversion"),
        ({"emb_params": np.full((2, 4), np.inf, "f4")}, "holds NaN or infinite values"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, tensors, error):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises((UnsupportedCheckpoint, InvalidCheckpoint)) as caught:
        open_embedding(tmp_path / "x.safetensors")
    assert error in str(caught.value) and "\n" not in str(caught.value)


def test_a_pair_of_unequal_length_is_refused(tmp_path):
    save_file({"clip_l": vectors(2), "clip_g": vectors(3, 20)}, tmp_path / "x.safetensors")
    word = open_embedding(tmp_path / "x.safetensors").words["x"]
    with pytest.raises(InvalidCheckpoint, match="more vectors for one encoder"):
        fitted(tmp_path, "x", word, {"text_encoder": WIDTH, "text_encoder_2": 20})


@pytest.mark.weights
@pytest.mark.parametrize(
    ("file", "names", "count"),
    [
        ("bad-artist.pt", ["bad-artist"], 2),
        ("bad-hands-5.pt", ["bad-hands-5"], 2),
        ("bad-prompt.pt", ["bad-prompt"], 16),
        ("fastai_learned_embeds.bin", ["fastai_learned_embeds", "<birb-style>"], 1),
        ("cloneofsimo_lora_kiriko2.ti.pt", ["cloneofsimo_lora_kiriko2.ti", "<krk>"], 1),
    ],
)
def test_real_files(weights, file, names, count):
    found = open_embedding(weights / "textual_inversion" / file)
    assert list(found.words) == names
    for name, given in found.words.items():
        mine = fitted(found.path, name, given, {"text_encoder": 768})
        assert mine["text_encoder"].array.shape == (count, 768)


@pytest.mark.weights
def test_a_damaged_file_ends_in_one_line(weights):
    with pytest.raises(InvalidCheckpoint) as caught:
        open_embedding(weights / "textual_inversion" / "EasyNegative.utf8-damaged.pt")
    assert "download it again" in str(caught.value) and "\n" not in str(caught.value)


# The table and the prompt ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder():
    mx.random.seed(3)
    made = CLIPTextEncoder(
        CLIPTextConfig(
            hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
    )
    made.eval()
    return made


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.bundled()


def word(name, count=2):
    return Word(name, {"text_encoder": vectors(count)})


def adapters(words=(), shelf=None):
    return Adapters(
        lambda name: pytest.fail(f"no LoRA was asked for, {name}"), shelf or dict, words
    )


def found(made, tokenizer, *texts, notes=None):
    words, _ = made.words_for(texts, tokenizer.encode, 49408, [] if notes is None else notes)
    return words


def test_a_name_is_one_unit_of_its_vectors(tokenizer):
    made = adapters([word("bad-artist", 3)])
    words = found(made, tokenizer, "a cat, bad-artist, ink")
    ids = encode_prompt(tokenizer, "a cat, bad-artist, ink", words=words).ids[0]
    plain = encode_prompt(tokenizer, "a cat, , ink").ids[0]
    place = ids.index(49408)
    assert ids[place : place + 3] == [49408, 49409, 49410]
    assert tokenizer.decode(ids[1:place]) == "a cat ,"
    assert len(ids) == len(plain) == 77


def test_capitals_do_not_matter_and_other_words_stay(tokenizer):
    made = adapters([word("Bad-Artist")])
    for text in ("BAD-ARTIST", "(bad-artist:1.2)", "x bad-artist y"):
        assert found(made, tokenizer, text), text
    for text in ("bad artist", "bad-artists", "badartist", "bad-", ""):
        assert not found(made, tokenizer, text), text


def test_of_two_names_the_longer_one_is_meant(tokenizer):
    made = adapters([word("ink", 1), word("ink wash", 4)])
    words = found(made, tokenizer, "an ink wash, ink")
    ids = encode_prompt(tokenizer, "an ink wash, ink", words=words).ids[0]
    by_count = sorted(words.values(), key=len)
    assert [n for n in ids if n >= 49408] == [*by_count[1], *by_count[0]]


def test_only_words_that_a_prompt_has_are_in_the_table(encoder, tokenizer):
    made = adapters([word("one", 1), word("two-tone", 2)])
    own = np.array(encoder.embeddings.token_embedding.weight)
    assert list(found(made, tokenizer, "two-tone").values()) == [range(49408, 49410)]
    made.set_words(encoder, "text_encoder")
    table = np.array(encoder.embeddings.token_embedding.weight)
    assert np.array_equal(table[:49408], own) and np.array_equal(table[49408:], vectors(2))
    assert not found(made, tokenizer, "a cat")
    made.set_words(encoder, "text_encoder")
    assert np.array_equal(np.array(encoder.embeddings.token_embedding.weight), own)


def test_the_states_are_those_of_the_vectors(encoder):
    """A word whose vectors are a known token's speaks as that token does."""
    known = np.array(encoder.embeddings.token_embedding.weight)[[320, 2368]]
    set_words(encoder, "text_encoder", [Word("x", {"text_encoder": known})])
    plain = [49406, 320, 2368, 49407] + [49407] * 73
    learned = [49406, 49408, 49409, 49407] + [49407] * 73
    one, two = encoder(mx.array([plain])), encoder(mx.array([learned]))
    set_words(encoder, "text_encoder", [])
    assert np.array_equal(np.array(one.last), np.array(two.last))
    # The pooled state is the first end's: the largest id would be the learned word's.
    assert np.array_equal(np.array(one.pooled), np.array(two.pooled))


def test_words_of_the_folders_are_read_when_a_prompt_has_them(tokenizer):
    opened = []

    def opens(name):
        return lambda: opened.append(name) or word(name)

    made = adapters(shelf=lambda: {name: opens(name) for name in ("easy-neg", "other")})
    assert not found(made, tokenizer, "a cat")
    assert opened == []
    assert found(made, tokenizer, "a cat", "easy-neg, blurry")
    assert opened == ["easy-neg"]


def test_a_folders_word_for_another_model_is_text_and_a_note(tokenizer):
    def foreign():
        raise UnsupportedCheckpoint(Path("easy-neg.pt"), "is a word of SDXL")

    notes = []
    made = adapters(shelf=lambda: {"easy-neg": foreign})
    assert not found(made, tokenizer, "easy-neg", notes=notes)
    assert notes == ["read as plain text: easy-neg.pt: is a word of SDXL"]
