"""One LoRA, written under the names of every program that makes them."""

import json

import numpy as np

from maple_convert.layouts import LAYOUTS

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "transformer_layers": [1, 0],
    "mid_transformer_layers": 1,
    "cross_attention_dim": 12,
    "num_attention_heads": [2, 2],
    "norm_num_groups": 4,
}
TEXT = {
    "vocab_size": 300,
    "hidden_size": 12,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "max_position_embeddings": 77,
    "projection_dim": None,
    "num_attention_heads": 2,
    "hidden_act": "quick_gelu",
    "eos_token_id": 299,
}
CONFIGS = {"unet": UNET, "text_encoder": TEXT}
RANK = 2
ALPHA = 3.0
ATTENTION = ("to_q", "to_k", "to_v", "to_out")


def names(component, spelling, configs=CONFIGS):
    """Native to published names of every layer with a weight, and its published shape."""
    rows = LAYOUTS[component].rows(configs[component], spelling)
    return {
        row.native.removesuffix(".weight"): (
            row.published.removesuffix(".weight"),
            row.published_shape,
        )
        for row in rows
        if row.native.endswith(".weight") and row.published.endswith(".weight")
    }


def unet_attention():
    """Native names of the attentions' layers, in cloneofsimo's order without feed-forwards."""
    blocks = [
        "down_blocks.0.attentions.0",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
        "mid_block.attentions.0",
    ]
    return [
        f"{block}.transformer_blocks.0.{attn}.{layer}"
        for block in blocks
        for attn in ("attn1", "attn2")
        for layer in ATTENTION
    ]


def text_attention():
    return [
        f"encoder.layers.{n}.self_attn.{layer}"
        for n in range(TEXT["num_hidden_layers"])
        for layer in ("k_proj", "v_proj", "q_proj", "out_proj")
    ]


def factors(component, native, rank=RANK, configs=CONFIGS):
    """Down and up of one layer; always the same for a name."""
    _, shape = names(component, {"unet": "diffusers"}.get(component, "transformers"), configs)[
        native
    ]
    generator = np.random.default_rng(sum(map(ord, component + native)))
    down = generator.standard_normal((rank, *shape[1:])).astype(np.float32)
    up = generator.standard_normal((shape[0], rank, *(1 for _ in shape[2:]))).astype(np.float32)
    return down, up


def difference(component, native, configs=CONFIGS):
    """What those factors make, without an alpha, in float64."""
    down, up = (x.astype(np.float64) for x in factors(component, native, configs=configs))
    return (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(len(up), *down.shape[1:])


def written(dialect):
    """Tensors and metadata of the attentions' layers in one program's names."""
    tensors, metadata = {}, {}
    layers = [("unet", n) for n in unet_attention()] + [
        ("text_encoder", n) for n in text_attention()
    ]
    own = {
        "unet": names("unet", "diffusers"),
        "text_encoder": names("text_encoder", "transformers"),
    }
    for component, native in layers:
        down, up = factors(component, native)
        name = own[component][native][0]
        if dialect == "cloneofsimo":
            order = unet_attention() if component == "unet" else text_attention()
            place = f"{component}:{order.index(native)}"
            tensors |= {f"{place}:down": down, f"{place}:up": up}
            metadata |= {f"{place}:rank": str(RANK), component: '["CrossAttention"]'}
        else:
            start, down_end, up_end = _form(dialect, component, name)
            tensors |= {start + down_end: down, start + up_end: up}
    if dialect == "diffusers PEFT with settings":
        settings = {f"{c}.{k}": v for c in own for k, v in (("lora_alpha", RANK), ("r", RANK))}
        metadata["lora_adapter_metadata"] = json.dumps(settings)
    return tensors, metadata


def _form(dialect, component, name):
    kohya = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[component]
    if dialect == "kohya":
        return kohya + name.replace(".", "_"), ".lora_down.weight", ".lora_up.weight"
    if dialect == "kohya, first of two":
        start = kohya.replace("te_", "te1_") + name.replace(".", "_")
        return start, ".lora_down.weight", ".lora_up.weight"
    if dialect == "kohya, CompVis numbers" and component == "unet":
        native = next(n for n, (p, _) in names("unet", "diffusers").items() if p == name)
        compvis = names("unet", "compvis")[native][0]
        return kohya + compvis.replace(".", "_"), ".lora_down.weight", ".lora_up.weight"
    if dialect == "kohya, CompVis numbers":
        return kohya + name.replace(".", "_"), ".lora_down.weight", ".lora_up.weight"
    if dialect.startswith("diffusers, attention processors"):
        if component == "unet":
            place, _, layer = name.removesuffix(".0").rpartition(".")
            start = f"{place}.processor.{layer}"
        else:
            place, _, layer = name.rpartition(".")
            start = f"{place}.to_{layer.split('_')[0]}"
        prefix = f"{component}." if dialect.endswith("with prefix") or component != "unet" else ""
        return prefix + start, "_lora.down.weight", "_lora.up.weight"
    ends = {
        "diffusers, layers": (".lora.down.weight", ".lora.up.weight"),
        "diffusers, linear layers": (
            ".lora_linear_layer.down.weight",
            ".lora_linear_layer.up.weight",
        ),
        "diffusers PEFT": (".lora_A.weight", ".lora_B.weight"),
        "diffusers PEFT with settings": (".lora_A.weight", ".lora_B.weight"),
    }
    if dialect in ends:
        return f"{component}.{name}", *ends[dialect]
    assert dialect == "PEFT"
    return f"base_model.model.{name}", ".lora_A.weight", ".lora_B.weight"


DIALECTS = (
    "kohya",
    "kohya, first of two",
    "kohya, CompVis numbers",
    "diffusers, attention processors",
    "diffusers, attention processors, with prefix",
    "diffusers, layers",
    "diffusers, linear layers",
    "diffusers PEFT",
    "diffusers PEFT with settings",
    "PEFT",
    "cloneofsimo",
)
