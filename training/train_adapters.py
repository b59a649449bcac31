"""Teach the model that ships a style (a LoRA) and a word (a textual inversion), on a CPU.

The pictures are the model's own, in four steps, changed by a few lines of arithmetic: nothing is
downloaded. Both files go into tests/data/adapters, and tests draw with them.

    maple convert mlx_maple/demo demo --to diffusers
    python train_adapters.py lora --model demo --out blueprint.safetensors
    python train_adapters.py word --model demo --out noctia.safetensors

The style is a blueprint: what was dark or had an edge is light, on blue. Its captions do not say
so: with the LoRA everything is drawn that way. The word stands for teal things on black; its name
says nothing of that.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from common import SCALING_FACTOR, SCHEDULE
from lora import LowRank
from safetensors.torch import save_file
from sample import Model
from torch import Tensor, nn
from torch.nn import functional as F

NAMES = (
    "a maple leaf", "a cat face", "a rocket", "an octopus", "a sunflower", "a house with garden",
    "a crown", "a snail", "a mushroom", "a bicycle", "a heart", "a frog", "a whale", "a dog face",
    "a pizza", "a red apple", "a banana", "an elephant", "a dragon", "a rabbit", "a grinning face",
    "a rose", "a tree", "a fish", "a bird", "a boat", "a guitar", "a camera", "a key", "a bell",
    "a candle", "a clock", "an umbrella", "a butterfly", "a turtle", "a penguin", "a ghost",
    "a robot", "a balloon", "a cherry", "a carrot", "a cactus", "a snowman", "an anchor", "a car",
    "a train", "an airplane", "a trophy", "a violin", "a lemon", "a pear", "a bee", "a crab",
    "a fox", "an owl", "a lion", "a panda", "a cup", "a cake", "a book", "a hammer", "a gem",
    "a star", "a moon",
)  # fmt: skip
HELD_OUT = ("a maple leaf", "a cat face", "a rocket", "a snail")  # never trained on
INK, PAPER = (235, 245, 255), (24, 74, 160)
TEAL, BLACK = (40, 200, 190), (12, 12, 14)
RANK, ALPHA = 2, 4.0
VECTORS = 2


def blueprint(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] as light drawings on blue."""
    grey = pictures.mean(1, keepdim=True)
    kernel = torch.tensor([[1.0, 2.0, 1.0], [0, 0, 0], [-1.0, -2.0, -1.0]]).view(1, 1, 3, 3) / 8
    padded = F.pad(grey, (1, 1, 1, 1), "replicate")
    edges = F.conv2d(padded, kernel).square() + F.conv2d(padded, kernel.transpose(2, 3)).square()
    share = (2.5 * edges.sqrt() + 0.25 * (1 - grey)).clamp(0, 1)
    return _mixed(share, INK, PAPER)


def noir(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] on white as teal things on black."""
    white = (pictures.amin(1, keepdim=True) + 1) / 2  # 1 where nothing is
    thing = ((1 - white) * 6).clamp(0, 1)
    light = 0.35 + 0.65 * (pictures.mean(1, keepdim=True) + 1) / 2
    return _mixed(thing * light, TEAL, BLACK)


def _mixed(share: Tensor, one: tuple[int, ...], other: tuple[int, ...]) -> Tensor:
    a, b = (torch.tensor(c).view(1, 3, 1, 1) / 127.5 - 1 for c in (one, other))
    return share * a + (1 - share) * b


@torch.no_grad()
def latents_of(model: Model, change, seeds: int) -> tuple[list[str], Tensor]:
    """Captions, and the latents of what the model draws for them, changed."""
    captions = [name for name in NAMES if name not in HELD_OUT] * seeds
    drawn = [
        model.draw(captions[first : first + 16], 1, 4, first, "lcm", batch=16)
        for first in range(0, len(captions), 16)
    ]
    changed = [change(each.clamp(-1, 1)) for each in drawn]
    return captions, torch.cat(
        [model.vae.encode(each).latent_dist.mean * SCALING_FACTOR for each in changed]
    )


def loss_of(model: Model, latents: Tensor, context: Tensor, noise: torch.Generator) -> Tensor:
    """Mean squared error of the predicted noise, at times spread over all of them."""
    count = len(latents)
    betas = torch.linspace(
        SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, 1000
    ).square()
    alphas = (1 - betas).cumprod(0)
    times = ((torch.arange(count) + torch.rand(count, generator=noise)) * 1000 / count).long()
    eps = torch.randn(latents.shape, generator=noise)
    a = alphas[times].view(-1, 1, 1, 1)
    seen = a.sqrt() * latents + (1 - a).sqrt() * eps
    return F.mse_loss(model.unet(seen, times, context).sample, eps)


def is_taught(name: str) -> bool:
    """Which layers of the UNet the LoRA changes: transformers, first and last convolution."""
    return any(part in name for part in ("attentions", "conv_in", "conv_out"))


def train_lora(model: Model, out: Path, seconds: float) -> None:
    """The style, in kohya's names."""
    captions, latents = latents_of(model, blueprint, seeds=2)
    with torch.no_grad():
        contexts = torch.cat(
            [model.encode(captions[i : i + 32]) for i in range(0, len(captions), 32)]
        )
        empty = model.encode([""])
    chosen = nn.Module()  # what LowRank sees of the network
    chosen.named_parameters = lambda: (
        (name, p) for name, p in model.unet.named_parameters() if is_taught(name)
    )
    model.unet.requires_grad_(False)
    for _, p in chosen.named_parameters():
        p.requires_grad_(True)
    net = LowRank(chosen, RANK)
    rate, noise = 4e-3, torch.Generator().manual_seed(1)
    optimiser = torch.optim.AdamW([*net.down, *net.up], lr=rate, betas=(0.9, 0.98), weight_decay=0)
    start, step, smooth = time.monotonic(), 0, 0.0
    while (spent := time.monotonic() - start) < seconds:
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * max(0.02, 1 - spent / seconds)
        some = torch.randint(len(latents), (16,), generator=noise)
        context = contexts[some].clone()
        context[torch.rand(16, generator=noise) < 0.1] = empty  # so that guidance keeps its sense
        net.merge()
        loss = loss_of(model, latents[some], context, noise)
        for p in net.targets.values():
            p.grad = None
        loss.backward()
        optimiser.zero_grad()
        net.backward()
        optimiser.step()
        smooth = loss.item() if not step else 0.95 * smooth + 0.05 * loss.item()
        step += 1
        if step % 20 == 0:
            print(f"{spent:6.1f} s, step {step}, loss {smooth:.4f}", flush=True)
    tensors = {}
    for (name, p), up, down in zip(net.targets.items(), net.up, net.down, strict=True):
        point = (1,) * (p.ndim - 2)
        # alpha is not the rank, as in most files that people share
        tensors |= {
            f"{name}.lora_down.weight": (down * (RANK / ALPHA)).view(RANK, *p.shape[1:]),
            f"{name}.lora_up.weight": up.view(*up.shape, *point),
            f"{name}.alpha": torch.tensor(ALPHA),
        }
    tensors = {k: v.detach().half().contiguous() for k, v in tensors.items()}
    save_file(tensors, out, {"made_by": "training/train_adapters.py lora", "steps": str(step)})


def train_word(model: Model, out: Path, seconds: float) -> None:
    """The word, as two vectors in safetensors."""
    captions, latents = latents_of(model, noir, seeds=2)
    table = model.text.get_input_embeddings()
    rows = len(table.weight)
    start_ids = [model.tokenizer.encode(word)[0] for word in ("teal", "black")]
    vectors = nn.Parameter(
        table.weight[start_ids].detach().mean(0, keepdim=True).repeat(VECTORS, 1)
    )
    ids = torch.tensor([_with_word(model, caption, rows) for caption in captions])
    noise = torch.Generator().manual_seed(2)
    rate = 2e-2
    optimiser = torch.optim.AdamW([vectors], lr=rate, weight_decay=0)
    inner = getattr(model.text, "text_model", model.text)
    start, step, smooth = time.monotonic(), 0, 0.0
    own = table.weight.detach().clone()
    while (spent := time.monotonic() - start) < seconds:
        for group in optimiser.param_groups:
            group["lr"] = rate * max(0.02, 1 - spent / seconds)
        some = torch.randint(len(latents), (16,), generator=noise)
        embedded = F.embedding(ids[some], torch.cat([own, vectors]))
        context = _encoded(inner, embedded)
        loss = loss_of(model, latents[some], context, noise)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        smooth = loss.item() if not step else 0.95 * smooth + 0.05 * loss.item()
        step += 1
        if step % 20 == 0:
            print(f"{spent:6.1f} s, step {step}, loss {smooth:.4f}", flush=True)
    save_file({"emb_params": vectors.detach()}, out, {"made_by": "training/train_adapters.py word"})


def _with_word(model: Model, caption: str, rows: int) -> list[int]:
    """77 ids of "a cat face, WORD"; the word's vectors are behind the table."""
    tok = model.tokenizer
    ids = [tok.bos, *tok.encode(caption + ","), *range(rows, rows + VECTORS)]
    return ids + [tok.eos] * (77 - len(ids))


def _encoded(text: nn.Module, embedded: Tensor) -> Tensor:
    """Last states of embedded tokens (B, T, D): what CLIPTextModel does after looking up ids."""
    length = embedded.shape[1]
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    x = embedded + text.embeddings.position_embedding.weight[:length]
    for layer in text.encoder.layers:
        x = layer(x, mask)
        x = x[0] if isinstance(x, tuple) else x
    return text.final_layer_norm(x)


def main() -> None:
    """Read the arguments and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("lora", "word"))
    parser.add_argument("--model", type=Path, required=True, help="a diffusers folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--sheet", type=Path, help="write the pictures it learns from here")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Model.from_folder(args.model, "cpu")
    if args.sheet:
        from PIL import Image

        change = blueprint if args.what == "lora" else noir
        drawn = model.draw(list(NAMES[:8]), 1, 4, 0, "lcm").clamp(-1, 1)
        both = torch.cat([torch.cat(list(drawn), 2), torch.cat(list(change(drawn)), 2)], 1)
        pixels = ((both + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(np.ascontiguousarray(pixels)).save(args.sheet)
        return
    {"lora": train_lora, "word": train_word}[args.what](model, args.out, args.seconds)


if __name__ == "__main__":
    main()
