"""Weighted and long prompts against transformers' encoder, with the weights put on by hand.

What a prompt's runs and chunks are is written out here for each prompt, from the rules that
tests/text/test_prompt_language.py names; this holds what becomes of them: states of each chunk,
multiplied and brought back to the chunk's mean, one after the other, and empty chunks at the end of
the shorter of two prompts. Where a chunk's mean is next to nothing, as in eighty times the same
word, the quotient of two such means magnifies the rounding of both: no such prompt is here.
"""

from pathlib import Path

import network_parity as parity
import pytest
import torch
from network_parity import NETWORK
from transformers import CLIPTextModel, CLIPTokenizer

import mlx_maple
from mlx_maple.guidance import encoded
from mlx_maple.text.language import read_prompt

pytestmark = [pytest.mark.parity, pytest.mark.weights]

LESS = 1 / 1.1
PROMPTS = {
    "a (red:1.3) maple leaf": [[("a", 1), ("red", 1.3), ("maple leaf", 1)]],
    "[a blue leaf] BREAK (a ((star)):0.8)": [
        [("a blue leaf", LESS)],
        [("a", 0.8), ("star", 0.8 * 1.21)],
    ],
    "(a red maple leaf:1.2) " + "on a table " * 25: [
        [("a red maple leaf", 1.2), ("on a table " * 23 + "on a", 1)],
        [("table on a table", 1)],
    ],
    "leaf " * 60 + ", red " + "star " * 14: [
        [("leaf " * 60 + ",", 1)],
        [("red " + "star " * 14, 1)],
    ],
}


@pytest.fixture(scope="module")
def folder(weights: Path) -> Path:
    return weights / "emoji-trial" / "diffusers"


@pytest.fixture(scope="module")
def sd(folder):
    return mlx_maple.load(folder, dtype="float32", cache=False)


@pytest.fixture(scope="module")
def theirs(folder):
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32)
    return encoder.eval(), CLIPTokenizer.from_pretrained(folder / "tokenizer")


def reference(theirs, chunks, *, layer=1, chunks_in_all=0, keeps_mean=True, off=1.0):
    encoder, tokenizer = theirs
    states = []
    for runs in [*chunks, *[[]] * (chunks_in_all - len(chunks))]:
        ids, weights = [tokenizer.bos_token_id], [1.0]
        for text, weight in runs:
            found = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += found
            weights += [weight * off if weight != 1 else 1.0] * len(found)
        ids += [tokenizer.eos_token_id] * (77 - len(ids))
        weights += [1.0] * (77 - len(weights))
        with torch.no_grad():
            out = encoder(torch.tensor([ids]), output_hidden_states=True)
            text_model = getattr(encoder, "text_model", encoder)
            z = text_model.final_layer_norm(out.hidden_states[-layer])
        louder = z * torch.tensor(weights)[None, :, None]
        states.append(louder * (z.mean() / louder.mean()) if keeps_mean else louder)
    return torch.cat(states, 1).numpy()


def ours(sd, prompt, negative="", clip_skip=1):
    read = read_prompt(prompt, 10), read_prompt(negative, 10, is_negative=True)
    found = encoded(sd.text_encoders, *read, syntax="a1111", clip_skip=clip_skip)
    return found.states[prompt.strip() if prompt.strip() in found.states else prompt].context


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("layer", [1, 2])
def test_states(sd, theirs, parity_record, prompt, layer):
    wanted = reference(theirs, PROMPTS[prompt], layer=layer)
    found = ours(sd, prompt, clip_skip=layer)
    name = f"prompt {prompt[:24]!r}, layer {layer}"
    parity.compare(parity_record, name, found, wanted, NETWORK)


def test_the_shorter_prompt_is_padded_with_empty_chunks(sd, theirs, parity_record):
    wanted = reference(theirs, [[("snow", 1)]], chunks_in_all=2)
    found = ours(sd, "snow", negative="leaf " * 80)
    parity.compare(parity_record, "prompt padded to two chunks", found, wanted, NETWORK)
    other = reference(theirs, [[("snow", 1)], [("snow", 1)]])
    parity.control(parity_record, "prompt repeated", found, other, NETWORK)


@pytest.mark.parametrize("change", [{"keeps_mean": False}, {"off": 1.01}, {"layer": 2}], ids=str)
def test_one_thing_wrong_is_seen(sd, theirs, parity_record, change):
    prompt = "a (red:1.3) maple leaf"
    wrong = reference(theirs, PROMPTS[prompt], **change)
    parity.control(parity_record, f"prompt, {change}", ours(sd, prompt), wrong, NETWORK)
