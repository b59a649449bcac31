"""Write a trained model as a diffusers folder and as one CompVis-layout .ckpt.

    python export.py --data data --vae vae --ldm ldm --out final

The folder has the pruned vocabulary; the .ckpt has all 49,408 rows of CLIP's, where rows that were
never trained hold the unknown word's, and the schedule buffers that SD 1.x files carry.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

import numpy as np
import torch
from captions import Catalogue
from common import SCHEDULE, Captioner, half, load_parts, make_text, make_unet, make_vae
from safetensors.torch import load_file
from torch import Tensor, nn

CLIP_ROWS = 49408


def load_model(data: Path, vae_folder: Path, ldm: Path, preset: str, stem: str = "unet"):
    """The three networks in float32 from a training's files, and the captioner."""
    captioner = Captioner(data, Catalogue(data))
    vae, unet = make_vae(preset), make_unet(preset)
    text = make_text(preset, captioner.tokenizer)
    vae.load_state_dict(
        {k: v.float() for k, v in load_file(vae_folder / "vae.safetensors").items()}
    )
    unet.load_state_dict({k: v.float() for k, v in load_parts(ldm / stem).items()})
    weights = {k: v.float() for k, v in load_parts(ldm / "text").items()}
    missing, extra = text.load_state_dict(weights, strict=False)
    if extra or any("position_ids" not in k for k in missing):
        raise ValueError(f"text encoder: missing {missing}, unexpected {extra}")
    return text, unet, vae, captioner


def write_folder(out: Path, data: Path, text: nn.Module, unet: nn.Module, vae: nn.Module) -> None:
    """A StableDiffusionPipeline folder in float16."""
    out.mkdir(parents=True, exist_ok=True)
    for name, net in (("text_encoder", text), ("unet", unet), ("vae", vae)):
        net.half().save_pretrained(out / name, safe_serialization=True)
        net.float()
    (out / "tokenizer").mkdir(exist_ok=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(data / name, out / "tokenizer" / name)
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    settings = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True,
        "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>", **ends,
    }  # fmt: skip
    _write(out / "tokenizer" / "tokenizer_config.json", settings)
    (out / "scheduler").mkdir(exist_ok=True)
    scheduler = {"_class_name": "DDIMScheduler", "timestep_spacing": "leading", **SCHEDULE}
    _write(out / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "StableDiffusionPipeline", "feature_extractor": [None, None],
        "image_encoder": [None, None], "requires_safety_checker": False,
        "safety_checker": [None, None], "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    _write(out / "model_index.json", index)


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


def unet_key(key: str) -> str:
    """A diffusers UNet key under CompVis's name."""
    fixed = {
        "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2", "conv_norm_out": "out.0", "conv_out": "out.2",
    }  # fmt: skip
    stem, _, leaf = key.rpartition(".")
    if stem in fixed:
        return f"{fixed[stem]}.{leaf}"
    if match := re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", key):
        side, level, part, index, rest = match.groups()
        level, index = int(level), int(index)
        if side == "down":
            place = f"input_blocks.{3 * level + 1 + (2 if part == 'downsamplers' else index)}"
            slot = {"resnets": 0, "attentions": 1, "downsamplers": 0}[part]
        else:
            place = f"output_blocks.{3 * level + (2 if part == 'upsamplers' else index)}"
            slot = {"resnets": 0, "attentions": 1, "upsamplers": 1 if level == 0 else 2}[part]
        if part == "downsamplers":
            rest = rest.replace("conv", "op")
    elif match := re.match(r"mid_block\.(\w+)\.(\d)\.(.*)", key):
        part, index, rest = match.groups()
        place, slot = "middle_block", 1 if part == "attentions" else 2 * int(index)
    else:
        raise KeyError(key)
    if part == "resnets":
        name, _, leaf = rest.rpartition(".")
        rest = f"{RESNET[name]}.{leaf}"
    return f"{place}.{slot}.{rest}"


def vae_key(key: str) -> str:
    """A diffusers AutoencoderKL key under CompVis's name; its up blocks count the other way."""
    key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = key.replace("mid_block.attentions.0.", "mid.attn_1.").replace(
        "attn_1.group_norm", "attn_1.norm"
    )
    for ours, theirs in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")):
        key = key.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
    return key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def compvis(
    data: Path, text: nn.Module, unet: nn.Module, vae: nn.Module, unknown: int
) -> dict[str, Tensor]:
    """The whole model under CompVis's names, float16, with CLIP's full vocabulary."""
    out = {f"model.diffusion_model.{unet_key(k)}": v for k, v in half(unet).items()}
    for key, value in half(vae).items():
        # attention is made of 1x1 convolutions there
        square = ".mid_block.attentions.0.to_" in f".{key}" and value.ndim == 2
        out[f"first_stage_model.{vae_key(key)}"] = value[:, :, None, None] if square else value
    ids = torch.tensor(json.loads((data / "clip_ids.json").read_text()))
    for key, value in half(text).items():
        key = key if key.startswith("text_model.") else f"text_model.{key}"
        if key.endswith("token_embedding.weight"):
            full = value[unknown].repeat(CLIP_ROWS, 1)
            full[ids] = value
            value = full
        if "position_ids" not in key:
            out[f"cond_stage_model.transformer.{key}"] = value
    out["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return out | schedule_buffers()


def schedule_buffers() -> dict[str, Tensor]:
    """The diffusion schedule as SD 1.x checkpoints store it."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    bar = np.cumprod(1 - betas)
    before = np.append(1.0, bar[:-1])
    variance = betas * (1 - before) / (1 - bar)
    values = {
        "betas": betas, "alphas_cumprod": bar, "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(bar), "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - bar),
        "log_one_minus_alphas_cumprod": np.log(1 - bar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / bar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / bar - 1), "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(before) / (1 - bar),
        "posterior_mean_coef2": (1 - before) * np.sqrt(1 - betas) / (1 - bar),
    }  # fmt: skip
    return {k: torch.tensor(v, dtype=torch.float32) for k, v in values.items()}


def main() -> None:
    """Write both forms."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--ldm", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="maple-emoji")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--unet", default="unet", help="stem of the UNet's files")
    args = parser.parse_args()
    text, unet, vae, captioner = load_model(args.data, args.vae, args.ldm, args.preset, args.unet)
    write_folder(args.out / "diffusers", args.data, text, unet, vae)
    steps = sum(r["steps"] for r in json.loads((args.ldm / "ldm.json").read_text())["runs"])
    state = compvis(args.data, text, unet, vae, captioner.unknown)
    torch.save({"state_dict": state, "global_step": steps}, args.out / f"{args.name}.ckpt")
    size = sum(f.stat().st_size for f in (args.out / "diffusers").rglob("*") if f.is_file())
    print(f"{len(state)} tensors; folder {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
