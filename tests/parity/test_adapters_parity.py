"""LoRAs and textual inversions against diffusers and LyCORIS, live, on the same files.

diffusers reads diffusers' and PEFT's names, and kohya's where every layer has the same alpha: where
alphas differ it takes the wrong ones (0.42.1), so such files are held to plain sums in
tests/adapters. LyCORIS is the reference of its own forms.
"""

import gzip
import importlib
import json
import sys
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.loaders import lora_conversion_utils as renaming
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

from maple_convert.embedding import fitted, open_embedding
from maple_convert.layouts import LAYOUTS
from maple_convert.layouts.lora import Names, split
from maple_convert.layouts.parts import AS_IS, OIHW_TO_OHWI, Row
from maple_convert.lora import open_lora
from maple_convert.tensors import Tensor
from maple_convert.updates import Update
from mlx_maple.adapters.lora import Choice, Lora, fold
from mlx_maple.adapters.textual_inversion import Word, set_words
from mlx_maple.models import CLIPTextConfig, CLIPTextEncoder, UNet, UNetConfig
from mlx_maple.text.prompt import encode_prompt
from mlx_maple.text.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "adapters"))
from dialects import ALPHA, CONFIGS, factors, names, unet_attention, written

pytestmark = pytest.mark.parity

BAR = 1e-5  # of merged weights, in float32
SD1 = {
    "unet": {**CONFIGS["unet"], **{k: getattr(UNetConfig(), k) for k in CONFIGS["unet"]}},
    "text_encoder": {k: getattr(CLIPTextConfig(), k) for k in CONFIGS["text_encoder"]},
}


def skeleton(config):
    """diffusers' UNet of a config, all of it without values."""
    widths = config["block_out_channels"]
    attends = [depth > 0 for depth in config["transformer_layers"]]
    with torch.device("meta"):
        return UNet2DConditionModel(
            block_out_channels=widths,
            layers_per_block=config["layers_per_block"],
            cross_attention_dim=config["cross_attention_dim"],
            attention_head_dim=config["num_attention_heads"][0],
            norm_num_groups=config["norm_num_groups"],
            down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]],
        )


def with_values(reference, modules):
    """Give some of its layers random weights; returns them by name."""
    generator = torch.Generator().manual_seed(0)
    given = {}
    for name in modules:
        layer = reference.get_submodule(name)
        weight = (
            torch.randn(layer.weight.shape, generator=generator) / layer.weight[0].numel() ** 0.5
        )
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            layer.bias = torch.nn.Parameter(torch.zeros(layer.bias.shape), requires_grad=False)
        given[name] = weight.numpy().copy()
    return given


def merged_by_diffusers(reference, path, modules, weight=1.0):
    """Weights of some layers after diffusers has loaded and fused a file."""
    state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
        path, return_lora_metadata=True
    )
    prefix = "unet" if any(key.startswith("unet.") for key in state) else None
    reference.load_lora_adapter(
        state, prefix=prefix, network_alphas=alphas, adapter_name="a", metadata=metadata
    )
    reference.fuse_lora(lora_scale=weight, adapter_names=["a"])
    layers = {name: reference.get_submodule(name) for name in modules}
    return {
        name: getattr(layer, "base_layer", layer).weight.numpy() for name, layer in layers.items()
    }


def merged_by_us(config, path, given, weight=1.0):
    """The same through ``fold`` on our UNet, whose other weights are never evaluated."""
    rows = {row.published: row for row in LAYOUTS["unet"].rows(config, "diffusers")}
    network = UNet(UNetConfig(**config))
    mine = [
        (rows[f"{name}.weight"].native, rows[f"{name}.weight"].weights.to_native(value))
        for name, value in given.items()
    ]
    network.load_weights([(name, mx.array(value)) for name, value in mine], strict=False)
    file = open_lora(path, {"unet": config})
    assert not file.unmatched
    lora = Lora("x", file.updates, "x")
    fold(network, "unet", [(lora, Choice("x", weight, weight))])
    weights = dict(tree_flatten(network.parameters()))
    return {
        name: rows[f"{name}.weight"].weights.to_published(
            np.array(weights[rows[f"{name}.weight"].native])
        )
        for name in given
    }


def settings(modules):
    """PEFT's settings as diffusers keeps them; alpha is 3 everywhere."""
    said = {"lora_alpha": 3, "r": 2, "lora_bias": False, "target_modules": modules}
    return json.dumps({f"unet.{key}": value for key, value in said.items()})


def compare(record, label, ours, theirs, given):
    errors = {name: float(np.abs(ours[name] - theirs[name]).max()) for name in theirs}
    changes = [float(np.abs(theirs[name] - given[name]).max()) for name in theirs]
    assert min(changes) > 10 * BAR, "the reference did not change every layer"
    record(label, layers=len(errors), max_error=max(errors.values()), change=max(changes), bar=BAR)
    assert max(errors.values()) <= BAR


@pytest.mark.weights
@pytest.mark.parametrize("file", ["safetensors", "bin"])
def test_a_real_file_merges_as_diffusers_merges_it(parity_record, weights, file):
    """Attention processors' names, Stable Diffusion 1's true widths; the coarser levels of it."""
    path = weights / "lora" / f"catundchat_pytorch_lora_weights.{file}"
    own = names("unet", "diffusers", SD1)
    levels = ("down_blocks.2.attentions.0", "up_blocks.3.attentions.0", "mid_block", "up_blocks.2")
    modules = [
        published
        for native, (published, _) in own.items()
        if native.startswith(levels) and ".to_" in native
    ]
    reference = skeleton(SD1["unet"])
    everything = [name for native, (name, _) in own.items() if ".to_" in native]
    with_values(reference, [name for name in everything if name not in modules])
    given = with_values(reference, modules)
    theirs = merged_by_diffusers(reference, path, modules, 0.7)
    ours = merged_by_us(SD1["unet"], path, given, 0.7)
    compare(parity_record, f"LoRA, {path.name}", ours, theirs, given)


@pytest.mark.parametrize("dialect", ["kohya", "diffusers PEFT", "diffusers PEFT with settings"])
def test_dialects_merge_as_diffusers_merges_them(parity_record, tmp_path, dialect):
    path = tmp_path / "style.safetensors"
    tensors, metadata = written(dialect)
    tensors = {k: v for k, v in tensors.items() if "unet" in k}
    if dialect == "kohya":  # one alpha for all, which diffusers reads right
        layers = {key.partition(".")[0] for key in tensors}
        tensors |= {f"{name}.alpha": np.array(ALPHA, np.float32) for name in layers}
    own = names("unet", "diffusers")
    modules = [own[native][0] for native in unet_attention()]
    if metadata:
        metadata = {"lora_adapter_metadata": settings(modules)}
    save_file(tensors, path, metadata or None)
    reference = skeleton(CONFIGS["unet"])
    given = with_values(reference, modules)
    theirs = merged_by_diffusers(reference, path, modules)
    ours = merged_by_us(CONFIGS["unet"], path, given)
    compare(parity_record, f"LoRA, {dialect}", ours, theirs, given)
    # The control: the same file with another alpha merges to something else.
    other = merged_by_us(CONFIGS["unet"], _other_alpha(path, tensors, metadata), given)
    assert max(np.abs(other[name] - theirs[name]).max() for name in modules) > 100 * BAR


def _other_alpha(path, tensors, metadata):
    changed = path.with_name("other.safetensors")
    if any(key.endswith(".alpha") for key in tensors):
        tensors = {k: np.asarray(2 * v if k.endswith(".alpha") else v) for k, v in tensors.items()}
    elif metadata:
        text = metadata["lora_adapter_metadata"].replace('alpha": 3', 'alpha": 6')
        metadata = {**metadata, "lora_adapter_metadata": text}
    else:
        metadata = {"lora_adapter_metadata": '{"unet.lora_alpha": 6}'}
    save_file(tensors, changed, metadata or None)
    return changed


def test_convolutions_merge_as_diffusers_merges_them(parity_record, tmp_path):
    """3x3 and 1x1 convolutions, time projections, feed-forwards: every layer of the UNet."""
    own = {
        native: name
        for native, (name, shape) in names("unet", "diffusers").items()
        if len(shape) > 1
    }
    tensors = {}
    for native, name in own.items():
        down, up = factors("unet", native)
        key = "lora_unet_" + name.replace(".", "_")
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors |= {f"{key}.alpha": np.array(ALPHA, np.float32)}
    path = tmp_path / "locon.safetensors"
    save_file(tensors, path)
    reference = skeleton(CONFIGS["unet"])
    given = with_values(reference, own.values())
    # diffusers knows kohya's names of some layers only; it is told its own way.
    renamed = {
        f"unet.{name}.{end}": tensors["lora_unet_" + name.replace(".", "_") + "." + old]
        for name in own.values()
        for old, end in (("lora_down.weight", "lora_A.weight"), ("lora_up.weight", "lora_B.weight"))
    }
    modules, told = list(own.values()), tmp_path / "told.safetensors"
    save_file(renamed, told, {"lora_adapter_metadata": settings(modules)})
    theirs = merged_by_diffusers(reference, told, modules)
    ours = merged_by_us(CONFIGS["unet"], path, given)
    compare(parity_record, "LoRA, every layer of a UNet", ours, theirs, given)


# LyCORIS --------------------------------------------------------------------------------------

lycoris = pytest.importorskip("lycoris.modules")


def _layer(shape):
    """A torch layer of a weight's shape, its values random."""
    torch.manual_seed(1)
    if len(shape) == 2:
        return torch.nn.Linear(shape[1], shape[0])
    return torch.nn.Conv2d(shape[1], shape[0], shape[2:], padding=shape[2] // 2)


def _row(shape):
    if len(shape) == 2:
        return Row("x.weight", "x.weight", AS_IS, shape)
    return Row("x.weight", "x.weight", OIHW_TO_OHWI, (shape[0], *shape[2:], shape[1]))


KINDS = {
    "LoCon, Tucker": ("locon", "LoConModule", {"use_tucker": True}),
    "LoHa": ("loha", "LohaModule", {}),
    "LoHa, Tucker": ("loha", "LohaModule", {"use_tucker": True}),
    "LoKr": ("lokr", "LokrModule", {"factor": 4}),
    "LoKr, both factored": ("lokr", "LokrModule", {"decompose_both": True, "factor": 8}),
    "LoKr, Tucker": ("lokr", "LokrModule", {"use_tucker": True, "factor": 4}),
    "LoKr, whole": ("lokr", "LokrModule", {"full_matrix": True}),
    "full": ("full", "FullModule", {}),
    "DoRA": ("locon", "LoConModule", {"weight_decompose": True, "wd_on_out": True}),
    "DoRA of inputs": ("locon", "LoConModule", {"weight_decompose": True, "wd_on_out": False}),
    "LoHa with DoRA": ("loha", "LohaModule", {"weight_decompose": True}),
}
ROLES = {"lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(24, 32), (24, 32, 3, 3)], ids=["linear", "3x3"])
def test_forms_merge_as_lycoris_merges_them(parity_record, kind, shape):
    file, name, options = KINDS[kind]
    cls = getattr(importlib.import_module(f"lycoris.modules.{file}"), name)
    layer = _layer(shape)
    before = layer.weight.detach().clone()
    module = cls("x", layer, 1.0, 3, 2.0, **options)
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        if parameter.ndim > 0:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * (1 + 0.2 * noise) + 0.1 * noise
    state = {key: torch.as_tensor(value) for key, value in module.state_dict().items()}
    if file == "full":
        state = {"diff": module.weight.detach()}
    state = {key: value for key, value in state.items() if not key.startswith("org_module")}
    alpha = state.pop("alpha", None)
    state.pop("scalar", None)
    tensors = {
        ROLES.get(key, key): Tensor("float32", value.detach().numpy())
        for key, value in state.items()
        if value.ndim > 0 and key != "bias"
    }
    row = _row(shape)
    update = Update(row, tensors, None if alpha is None else float(alpha))
    assert update.fits()
    ours = row.weights.to_published(update.changed(row.weights.to_native(before.numpy()), 1.0))
    theirs = _merged_by_lycoris(module, before, options, file)
    error = float(np.abs(ours - theirs).max())
    change = float(np.abs(theirs - before.numpy()).max())
    parity_record(f"{kind}, {'x'.join(map(str, shape))}", max_error=error, change=change, bar=BAR)
    assert error <= BAR < change / 100


@torch.no_grad()
def _merged_by_lycoris(module, before, options, file):
    """What a forward pass multiplies with.

    Not ``get_merged_weight``: in 4.1 that of LoKr multiplies with the scale twice.
    """
    if file == "full":
        return (before + module.weight).numpy()
    if file == "locon":
        difference = module.make_weight() * module.scale
    else:
        difference = module.get_weight(before.shape)
    merged = before + difference.view(before.shape)
    if options.get("weight_decompose"):
        merged = module.apply_weight_decompose(merged)
    return merged.numpy()


@pytest.mark.weights
def test_a_real_lokr_file_is_lycoris_own(parity_record, weights):
    """Every ninth layer of a file of 350, at true widths."""
    from lycoris.functional.lokr import make_kron

    path = weights / "lora" / "lycoris_smart_falcon_4_lokr.safetensors"
    raw = {key: torch.from_numpy(value).float() for key, value in load_file(path).items()}
    updates = open_lora(path, SD1).updates
    found = {update.row.published: update for part in updates.values() for update in part.values()}
    errors, changes = [], []
    for published, update in list(found.items())[::9]:
        start = published.removesuffix(".weight").replace(".", "_")
        (key,) = {k.partition(".")[0] for k in raw if k.partition(".")[0].endswith("_" + start)}
        get = {k.partition(".")[2]: v for k, v in raw.items() if k.startswith(key + ".")}
        one = get["lokr_w1"] if "lokr_w1" in get else get["lokr_w1_a"] @ get["lokr_w1_b"]
        two = get["lokr_w2"] if "lokr_w2" in get else get["lokr_w2_a"] @ get["lokr_w2_b"]
        rank = get.get("lokr_w2_b", get.get("lokr_w1_b"))
        scale = 1.0 if rank is None else float(get["alpha"]) / len(rank)
        theirs = make_kron(one, two, scale).reshape(update.row.published_shape).numpy()
        errors.append(float(np.abs(update.difference() - theirs).max()))
        changes.append(float(np.abs(theirs).max()))
    parity_record("LoKr, real file", layers=len(errors), max_error=max(errors), bar=BAR)
    assert max(errors) <= BAR and np.median(changes) > 10 * BAR


# Textual inversion ----------------------------------------------------------------------------


@pytest.mark.weights
@pytest.mark.parametrize("file", ["bad-artist.pt", "bad-prompt.pt", "fastai_learned_embeds.bin"])
def test_a_word_speaks_as_in_diffusers(parity_record, weights, file):
    """A prompt with a real file's word: the same states from the same text encoder."""
    merges = gzip.decompress(
        resources.files("mlx_maple.text").joinpath("vocabulary/merges.txt.gz").read_bytes()
    ).decode()
    mine, pairs = Tokenizer.bundled(), [tuple(line.split(" ")) for line in merges.split("\n")]
    theirs = transformers.CLIPTokenizer(vocab=dict(mine._vocab), merges=pairs)
    torch.manual_seed(0)
    config = {"hidden_size": 768, "intermediate_size": 256, "num_hidden_layers": 1}
    reference = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**config, num_attention_heads=12)
    ).eval()
    encoder = CLIPTextEncoder(CLIPTextConfig(**config))
    state = {
        key.removeprefix("text_model."): mx.array(value.numpy())
        for key, value in reference.state_dict().items()
        if "position_ids" not in key
    }
    encoder.load_weights(list(state.items()), strict=True)

    class Pipeline(TextualInversionLoaderMixin):
        tokenizer, text_encoder, components, hf_device_map = theirs, reference, {}, None

    path = weights / "textual_inversion" / file
    token = "noctia"
    Pipeline().load_textual_inversion(str(path), token=token)
    prompt = f"a cat, {token}, ink"
    prompt_there = Pipeline().maybe_convert_prompt(prompt, theirs)
    ids = theirs(prompt_there, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = reference(ids).last_hidden_state.numpy()

    name, given = next(iter(open_embedding(path).words.items()))
    vectors = fitted(path, name, given, {"text_encoder": 768})["text_encoder"].array
    set_words(encoder, "text_encoder", [Word(token, {"text_encoder": vectors})])
    spelled = tuple(mine.encode(token))
    words = {spelled: range(49408, 49408 + len(vectors))}
    chunk = encode_prompt(mine, prompt, words=words).ids
    assert chunk == ids.tolist()
    ours = np.array(encoder(mx.array(chunk)).last)
    error = float(np.sqrt(np.mean((ours - expected) ** 2)) / expected.std())
    parity_record(f"textual inversion, {file}", vectors=len(vectors), rms_error=error, bar=2e-5)
    assert error <= 2e-5
    plain = np.array(encoder(mx.array(encode_prompt(mine, prompt).ids)).last)
    assert np.sqrt(np.mean((plain - expected) ** 2)) / expected.std() > 1e-2


# Names ----------------------------------------------------------------------------------------


def test_sdxls_numbers_are_diffusers_blocks(parity_record):
    """kohya's names of SDXL's transformers, through diffusers' own renaming and through ours."""
    config = {
        **SD1["unet"],
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "transformer_layers": [0, 2, 10],
        "mid_transformer_layers": 10,
        "cross_attention_dim": 2048,
    }
    own = {native: name for native, (name, _) in names("unet", "compvis", {"unet": config}).items()}
    layers = [native for native in own if ".transformer_blocks." in native and "norm" not in native]
    keys = {native: "lora_unet_" + own[native].replace(".", "_") for native in layers}
    factor = torch.zeros(1, 1)
    table = Names({"unet": config})
    for native, key in keys.items():
        mapped = renaming._maybe_map_sgm_blocks_to_diffusers(
            {f"{key}.lora_down.weight": factor, f"{key}.lora_up.weight": factor},
            SimpleNamespace(layers_per_block=2),
        )
        converted, _ = renaming._convert_non_diffusers_lora_to_diffusers(mapped)
        (down,) = [key for key in converted if key.endswith(".down.weight")]
        for name in (key, split(down)[0]):  # kohya's, and what diffusers has made of it
            assert table.find(name).native == native, (key, down)
    parity_record("LoRA names of SDXL, kohya to diffusers", layers=len(keys))
