import pytest

from mlx_maple.text import EncodedPrompt, Tokenizer, encode_prompt


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.bundled()


def test_one_chunk_padded_with_the_end(clip):
    encoded = encode_prompt(clip, "a red maple leaf")
    assert encoded == EncodedPrompt(
        ids=[[49406, 320, 736, 10570, 7232] + [49407] * 72], weights=[[1.0] * 77], truncated=""
    )


def test_empty_prompt_is_start_and_ends(clip):
    assert encode_prompt(clip, "").ids == [[49406] + [49407] * 76]


def test_pad_is_the_tokenizers(clip):
    other = Tokenizer(clip._vocab, list(clip._ranks))
    other.pad = 0
    assert encode_prompt(other, "a").ids == [[49406, 320, 49407] + [0] * 74]


@pytest.mark.parametrize("words", [74, 75])
def test_what_fits_is_not_reported(words, clip):
    encoded = encode_prompt(clip, "leaf " * words)
    assert encoded.truncated == ""
    assert encoded.ids[0][words + 1 :] == [49407] * (76 - words)


def test_the_first_75_tokens_stay_and_the_rest_is_reported_as_written(clip):
    encoded = encode_prompt(clip, "leaf " * 75 + "Then  a Maple\tTREE, Éclairs.")
    assert encoded.ids == [[49406] + clip.encode("leaf") * 75 + [49407]]
    assert encoded.truncated == "Then  a Maple\tTREE, Éclairs."


def test_a_word_cut_in_the_middle_is_reported_from_the_cut(clip):
    word = "Supercalifragilistic"  # five tokens or more
    pieces = [clip.decode([number]) for number in clip.encode(word)]
    encoded = encode_prompt(clip, "leaf " * 73 + word)
    assert encoded.truncated == word[len("".join(pieces[:2])) :]


def test_shorter_chunks(clip):
    encoded = encode_prompt(clip, "a red maple leaf", length=5)
    assert encoded.ids == [[49406, 320, 736, 10570, 49407]]
    assert encoded.truncated == "leaf"
    assert encode_prompt(clip, "a", length=2) == EncodedPrompt([[49406, 49407]], [[1.0, 1.0]], "a")
    with pytest.raises(ValueError, match="at least 2"):
        encode_prompt(clip, "a", length=1)
