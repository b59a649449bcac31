"""The text encoder against transformers, live, on identical weights."""

from pathlib import Path

import mlx.core as mx
import network_parity as parity
import numpy as np
import pytest
import recipe
import reference
import torch
from mlx.utils import tree_flatten
from network_parity import NETWORK
from transformers import CLIPTextModel

from mlx_maple.models import CLIPTextConfig, CLIPTextEncoder

pytestmark = pytest.mark.parity

OPEN_CLIP_KIND = {**recipe.CLIP, "hidden_act": "gelu", "projection_dim": 12}
VIT_L = vars(CLIPTextConfig())


def _ids(config: dict, batch: int = 3) -> np.ndarray:
    """Prompts of several lengths, begun, ended and padded as the tokenizer does."""
    random = np.random.default_rng(2)
    tokens, eos = config["max_position_embeddings"], config["eos_token_id"]
    ids = random.integers(0, eos - 1, (batch, tokens))
    for row, length in zip(ids, (tokens // 3, tokens - 1, 2), strict=False):
        row[length:] = eos
    return ids


def _reference(model: torch.nn.Module, ids: np.ndarray) -> dict[str, np.ndarray]:
    with torch.no_grad():
        out = model(torch.from_numpy(ids), output_hidden_states=True)
    norm = dict(model.named_modules())
    norm = norm.get("final_layer_norm") or norm["text_model.final_layer_norm"]
    return {
        "last": out.last_hidden_state.numpy(),
        "penultimate": out.hidden_states[-2].numpy(),
        "pooled": (out.text_embeds if "text_embeds" in out else out.pooler_output).numpy(),
        # What diffusers' pipelines do for clip_skip 2 (their 1): an inner layer, the final norm.
        "clip skip 2": norm(out.hidden_states[-2]).detach().numpy(),
    }


def _ours(clip: CLIPTextEncoder, ids: np.ndarray) -> dict[str, mx.array]:
    tokens = mx.array(ids)
    return {**clip(tokens)._asdict(), "clip skip 2": clip(tokens, clip_skip=2).last}


def _compare(record, label: str, clip: CLIPTextEncoder, model: torch.nn.Module, ids: np.ndarray):
    expected = _reference(model, ids)
    for name, states in _ours(clip, ids).items():
        parity.compare(record, f"text {name}, {label}", states, expected[name], NETWORK)
    clip = parity.half(clip)
    for name, states in _ours(clip, ids).items():
        parity.compare_half(record, f"text {name}, {label}, fp16", states, expected[name])


def test_trained(weights: Path, parity_record):
    folder = weights / "emoji-trial" / "diffusers"
    clip = parity.trained(folder, "text_encoder", lambda c: CLIPTextEncoder(CLIPTextConfig(**c)))
    model = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    ids = _ids(vars(clip.config))
    _compare(parity_record, "emoji-trial", clip, model, ids)


@pytest.mark.parametrize("config", [recipe.CLIP, OPEN_CLIP_KIND], ids=["quick_gelu", "gelu"])
def test_tiny(config: dict, parity_record):
    clip = parity.fill(CLIPTextEncoder(CLIPTextConfig(**config)))
    label = f"tiny {config['hidden_act']}"
    _compare(parity_record, label, clip, reference.clip(config), _ids(config))


def test_added_token_above_the_end(parity_record):
    """Textual inversion: an id above the end of text must not become the pooled place."""
    config = {**recipe.CLIP, "vocab_size": 100}
    ids = _ids(config)
    ids[:, 1] = 99
    clip = parity.fill(CLIPTextEncoder(CLIPTextConfig(**config)))
    expected = _reference(reference.clip(config), ids)["pooled"]
    parity.compare(
        parity_record, "text pooled, added token", clip(mx.array(ids)).pooled, expected, NETWORK
    )
    at_largest = clip(mx.array(ids)).last[:, 1]
    parity.control(parity_record, "pooled at the largest id", at_largest, expected, NETWORK)


class TestControls:
    ids = _ids(recipe.CLIP)

    @pytest.fixture
    def expected(self) -> np.ndarray:
        return _reference(reference.clip(recipe.CLIP), self.ids)["last"]

    def _last(self) -> mx.array:
        return parity.fill(CLIPTextEncoder(CLIPTextConfig(**recipe.CLIP)))(mx.array(self.ids)).last

    def test_gelu_kind(self, expected, parity_record, monkeypatch):
        from mlx_maple.models.clip import ACTIVATIONS

        monkeypatch.setitem(ACTIVATIONS, "quick_gelu", ACTIVATIONS["gelu"])
        parity.control(parity_record, "text, exact GELU", self._last(), expected, NETWORK)

    def test_norm_eps(self, expected, parity_record, monkeypatch):
        monkeypatch.setattr("mlx_maple.models.clip.NORM_EPS", 1e-6)
        parity.control(parity_record, "text, norm eps 1e-6", self._last(), expected, NETWORK)

    def test_causal_mask(self, expected, parity_record, monkeypatch):
        from mlx_maple.models.attention import attend

        monkeypatch.setattr(
            "mlx_maple.models.clip.attend", lambda q, k, v, heads, mask: attend(q, k, v, heads)
        )
        parity.control(parity_record, "text, no causal mask", self._last(), expected, NETWORK)

    def test_transposed_weight(self, expected, parity_record):
        clip = parity.fill(CLIPTextEncoder(CLIPTextConfig(**recipe.CLIP)))
        parity.set_weight(clip, "encoder.layers.1.self_attn.v_proj.weight", mx.transpose)
        last = clip(mx.array(self.ids)).last
        parity.control(parity_record, "text, v_proj transposed", last, expected, NETWORK)

    def test_lost_key_bias_shows_only_in_the_arrays(self, expected, parity_record):
        """A softmax does not see a constant: no output can tell, so the arrays are compared."""
        model = reference.clip(recipe.CLIP)
        clip = parity.fill(CLIPTextEncoder(CLIPTextConfig(**recipe.CLIP)))
        assert _same_arrays(clip, model)
        parity.set_weight(clip, "encoder.layers.0.self_attn.k_proj.bias", mx.zeros_like)
        found = parity.figures(clip(mx.array(self.ids)).last, expected)
        parity_record("text, no k bias: unseen in outputs", **found, bar="arrays differ")
        assert NETWORK.passes(found)
        assert not _same_arrays(clip, model)


def _same_arrays(clip: CLIPTextEncoder, model: torch.nn.Module) -> bool:
    theirs = {name.replace("text_model.", ""): p for name, p in model.named_parameters()}
    ours = dict(tree_flatten(clip.parameters()))
    return set(ours) == set(theirs) and all(
        np.array_equal(ours[name], theirs[name].numpy()) for name in ours
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_true_size(parity_record):
    """CLIP ViT-L/14's text half: 123,060,480 parameters."""
    ids = _ids(VIT_L)
    model = reference.clip(VIT_L)
    clip = parity.fill(CLIPTextEncoder(CLIPTextConfig(**VIT_L)))
    assert sum(a.size for _, a in tree_flatten(clip.parameters())) == 123_060_480
    assert _same_arrays(clip, model)
    _compare(parity_record, "ViT-L/14", clip, model, ids)
