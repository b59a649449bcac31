"""Configs: what JSON gives is taken, what a stranger's file might hold is refused in one line."""

import dataclasses
import json
import math

import pytest

from mlx_maple.models import CLIPTextConfig, TAESDConfig, UNetConfig, VAEConfig

CONFIGS = [CLIPTextConfig, UNetConfig, VAEConfig, TAESDConfig]
HUGE = 10**9


@pytest.mark.parametrize("config", CONFIGS)
def test_defaults_survive_json(config: type):
    facts = json.loads(json.dumps(dataclasses.asdict(config())))
    again = config(**facts)
    assert again == config()
    assert hash(again) == hash(config())  # lists have become tuples


@pytest.mark.parametrize("config", CONFIGS)
def test_frozen_and_keyword_only(config: type):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().width = 3
    with pytest.raises(TypeError):
        config(4)
    with pytest.raises(TypeError, match="sample_size"):
        config(sample_size=64)


FIELDS = [(config, field.name) for config in CONFIGS for field in dataclasses.fields(config)]
NONSENSE = [-1, HUGE, math.nan, math.inf, True, "64", {}, [], [[]], ["64"], [HUGE] * 4, [1] * 99]


@pytest.mark.parametrize(("config", "field"), FIELDS)
def test_nonsense_is_refused(config: type, field: str):
    values = NONSENSE if field == "scaling_factor" else [*NONSENSE, 1.5]
    if field == "force_upcast":
        values = [value for value in values if not isinstance(value, bool)]
    for value in values:
        with pytest.raises(ValueError, match=rf"^\[{config.__name__}\] {field}") as caught:
            config(**{field: value})
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 250


def test_long_nonsense_makes_a_short_message():
    with pytest.raises(ValueError) as caught:
        CLIPTextConfig(hidden_act="x" * 10_000)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("config", "facts", "message"),
    [
        (
            UNetConfig,
            {"block_out_channels": (320, 650, 1280, 1280)},
            "multiples of 32 .* got .650.",
        ),
        (UNetConfig, {"num_attention_heads": (8, 7, 8, 8)}, r"multiples of 7 .*, got \[640\]"),
        (UNetConfig, {"num_attention_heads": (8, 8)}, "must have 4 entries, got 2"),
        (UNetConfig, {"num_attention_heads": 8}, "list of integers, got 8"),
        (UNetConfig, {"transformer_layers": (1, 1, 1)}, "must have 4 entries, got 3"),
        (UNetConfig, {"mid_transformer_layers": -1}, "from 0 to 64, got -1"),
        (UNetConfig, {"vector_channels": 0}, "from 1 to 16384, got 0"),
        (UNetConfig, {"up_transformer_layers": (1,) * 11}, "must have 12 entries"),
        (UNetConfig, {"up_transformer_layers": (1, 0, 1) * 4}, "behind every residual block"),
        (UNetConfig, {"norm_num_groups": 7}, "multiples of 7"),
        (VAEConfig, {"block_out_channels": (128, 250)}, r"multiples of 32 .* got \[250\]"),
        (VAEConfig, {"scaling_factor": 0}, "number from 1e-06 to 1000000.0, got 0"),
        (CLIPTextConfig, {"num_attention_heads": 10}, r"multiples of 10 \(heads\), got \[768\]"),
        (CLIPTextConfig, {"hidden_act": "gelu_new"}, "quick_gelu or gelu, got 'gelu_new'"),
        (CLIPTextConfig, {"vocab_size": 100}, "eos_token_id must be an integer from 0 to 99"),
        (CLIPTextConfig, {"projection_dim": 0}, "projection_dim must be an integer from 1"),
    ],
)
def test_what_does_not_fit(config: type, facts: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        config(**facts)


def test_heads_mean_nothing_without_transformers():
    config = {"block_out_channels": (40, 24), "norm_num_groups": 8, "num_attention_heads": (3, 2)}
    UNetConfig(**config, transformer_layers=(0, 1))
    with pytest.raises(ValueError, match=r"multiples of 3 \(heads there\), got \[40\]"):
        UNetConfig(**config, transformer_layers=(1, 0))
