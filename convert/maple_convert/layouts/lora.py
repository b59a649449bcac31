"""Names in files of differences (LoRA and its kin): which module a key means, and what it holds.

Source   kohya-ss/sd-scripts networks/lora.py and library/sdxl_model_util.py; huggingface/diffusers
         0.42 loaders/lora_conversion_utils.py and, for the oldest names, 0.14 loaders.py; PEFT
         0.17; KohakuBlueleaf/LyCORIS @main lycoris/modules; cloneofsimo/lora @main
         lora_diffusion/lora.py.
Names    A key is a prefix, a module and a role. Kohya writes the dots of a module as underscores,
         which cannot be undone by looking at it ("proj_in", "to_out_0"): every name is made from
         the network's own table instead and looked up whole. SDXL's UNet goes by CompVis numbers
         there, all others by diffusers' names.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from maple_convert.layouts import LAYOUTS, Row

# The end of a key and the role of its tensor. The longest that fits counts.
ROLES: Mapping[str, str] = {
    # kohya and LoCon; the middle one is Tucker's core
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    # diffusers: attention processors, then layers of their own, then PEFT
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    # LyCORIS
    ".hada_w1_a": "hada_w1_a",
    ".hada_w1_b": "hada_w1_b",
    ".hada_w2_a": "hada_w2_a",
    ".hada_w2_b": "hada_w2_b",
    ".hada_t1": "hada_t1",
    ".hada_t2": "hada_t2",
    ".lokr_w1": "lokr_w1",
    ".lokr_w1_a": "lokr_w1_a",
    ".lokr_w1_b": "lokr_w1_b",
    ".lokr_w2": "lokr_w2",
    ".lokr_w2_a": "lokr_w2_a",
    ".lokr_w2_b": "lokr_w2_b",
    ".lokr_t2": "lokr_t2",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "diff",
    ".b_norm": "diff_b",
}
# Kinds that are not read; they are told by name.
UNREAD: Mapping[str, str] = {
    ".oft_blocks": "OFT",
    ".oft_diag": "OFT",
    ".on_input": "IA3",
    ".a1.weight": "GLoRA",
    ".b1.weight": "GLoRA",
    ".lora_B.bias": "a LoRA with biases",
}

# What stands before a module's name, for each network; the first that leads to a module counts.
PREFIXES: tuple[tuple[str, str], ...] = (
    ("lora_unet_", "unet"),
    ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("unet.", "unet"),
    ("text_encoder.", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
    ("base_model.model.unet.", "unet"),
    ("base_model.model.text_encoder.", "text_encoder"),
    ("base_model.model.text_encoder_2.", "text_encoder_2"),
    ("base_model.model.", "unet"),
    ("base_model.model.", "text_encoder"),
    ("diffusion_model.", "unet"),
    ("model.diffusion_model.", "unet"),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ("lycoris_", "unet"),
    ("", "unet"),
    ("", "text_encoder"),
)

# The oldest diffusers files name a processor's layers, not the model's.
_PROCESSORS = {
    "attn1.to_q": "attn1.processor.to_q",
    "attn1.to_k": "attn1.processor.to_k",
    "attn1.to_v": "attn1.processor.to_v",
    "attn1.to_out.0": "attn1.processor.to_out",
    "attn2.to_q": "attn2.processor.to_q",
    "attn2.to_k": "attn2.processor.to_k",
    "attn2.to_v": "attn2.processor.to_v",
    "attn2.to_out.0": "attn2.processor.to_out",
    "self_attn.q_proj": "self_attn.to_q",
    "self_attn.k_proj": "self_attn.to_k",
    "self_attn.v_proj": "self_attn.to_v",
    "self_attn.out_proj": "self_attn.to_out",
}

# How wide the text is that a family's UNet listens to, and what to call the family.
FAMILIES: Mapping[int, str] = {
    768: "Stable Diffusion 1",
    1024: "Stable Diffusion 2",
    1280: "the refiner of SDXL",
    2048: "SDXL",
}
# Pieces of names that no Stable Diffusion UNet has.
STRANGERS: Mapping[str, str] = {
    "double_blocks": "Flux",
    "single_transformer_blocks": "Flux",
    "joint_blocks": "Stable Diffusion 3",
    "adaLN_modulation": "a diffusion transformer",
    "lora_prior": "Stable Cascade",
    "lora_unet_double_blocks": "Flux",
    "transformer.transformer_blocks": "a diffusion transformer",
}


@dataclass(frozen=True)
class Module:
    """One layer that can be changed, as one spelling has it.

    Attributes:
        component: text_encoder, text_encoder_2 or unet.
        weights: name, shape and layout of its weight; of several where a spelling keeps the rows of
            several layers in one tensor.
        biases: likewise, as many or none.
    """

    component: str
    weights: tuple[Row, ...]
    biases: tuple[Row, ...]

    @property
    def native(self) -> str:
        """The layer's name here, the first one's of several."""
        return self.weights[0].native.removesuffix(".weight")


class Names:
    """Every name that the layers of some networks have in files of differences.

    Args:
        configs: of each network by name, as a model's components have them.
    """

    def __init__(self, configs: Mapping[str, Mapping[str, Any]]) -> None:
        self.modules: dict[str, list[Module]] = {}
        self._names: dict[str, dict[str, Module]] = {}
        for component in ("unet", "text_encoder", "text_encoder_2"):
            if component in configs:
                self._add(component, configs[component])

    def _add(self, component: str, config: Mapping[str, Any]) -> None:
        layout, names = LAYOUTS[component], dict[str, Module]()
        own: dict[str, Module] = {}
        for spelling in layout.spellings:
            rows: dict[str, tuple[list[Row], list[Row]]] = {}
            for row in layout.rows(config, spelling):
                for n, ending in enumerate(("weight", "bias")):
                    name = row.published.removesuffix(ending)
                    if name != row.published and name[-1:] in (".", "_"):
                        rows.setdefault(name[:-1], ([], []))[n].append(row)
            for name, (weights, biases) in rows.items():
                module = Module(component, tuple(weights), tuple(biases))
                for form in (name, *_older(name)):
                    names.setdefault(form, module)
                    names.setdefault(form.replace(".", "_"), module)
                if len(weights) == 1:
                    own.setdefault(module.native, module)
        for native, module in own.items():
            names.setdefault(native, module)
        self.modules[component] = list(own.values())
        self._names[component] = names

    def find(self, name: str) -> Module | None:
        """The layer that a name with its prefix means, or None."""
        for prefix, component in PREFIXES:
            if name.startswith(prefix) and component in self._names:
                module = self._names[component].get(name[len(prefix) :])
                if module is not None:
                    return module
        return None

    def in_cloneofsimos_order(self) -> Iterator[tuple[str, list[Module]]]:
        """The layers that files without names mean by their order, one list for each choice.

        They were collected from diffusers' networks of early 2023, which held their middle block
        last, and in a block of a transformer: attention to itself, feed-forward, attention to the
        text. Whether the feed-forward's gate is among them changed.
        """
        rank = {"down_blocks": 0, "up_blocks": 1, "mid_block": 2}
        unet = {module.native: module for module in self.modules.get("unet", ())}
        blocks = sorted(
            {name.rpartition(".attn1.")[0]: None for name in unet if ".attn1." in name},
            key=lambda name: rank.get(name.partition(".")[0], 3),
        )
        attention = ("to_q", "to_k", "to_v", "to_out")
        first = [f"attn1.{layer}" for layer in attention]
        last = [f"attn2.{layer}" for layer in attention]
        if blocks:
            for layers in ([*first, "ff.proj_in", *last], [*first, *last]):
                yield "unet", [unet[f"{block}.{layer}"] for block in blocks for layer in layers]
        text = {module.native: module for module in self.modules.get("text_encoder", ())}
        places = [name.rpartition(".")[0] for name in text if name.endswith("self_attn.k_proj")]
        if places:
            layers = ("k_proj", "v_proj", "q_proj", "out_proj")
            yield "text_encoder", [text[f"{place}.{layer}"] for place in places for layer in layers]


def split(key: str) -> tuple[str, str] | None:
    """A key's module and role; None for a tensor that belongs to no difference."""
    return _split(key, ROLES)


def unread(key: str) -> str | None:
    """What kind of difference a key belongs to that is not read, or None."""
    found = _split(key, UNREAD)
    return None if found is None else found[1]


def _split(key: str, table: Mapping[str, str]) -> tuple[str, str] | None:
    endings = [ending for ending in table if key.endswith(ending)]
    if not endings:
        return None
    ending = max(endings, key=len)
    return key[: -len(ending)], table[ending]


def _older(published: str) -> Iterator[str]:
    """Other names of an attention's layer."""
    for name, older in _PROCESSORS.items():
        if published.endswith("." + name):
            yield published[: -len(name)] + older
