"""Train the text encoder and the UNet together, in the trained autoencoder's latents.

    python train_ldm.py --data data --vae vae --out ldm --seconds 560 --total 700
    python train_ldm.py --data data --vae vae --out ldm --seconds 200 --total 700   # goes on

`--total` is the training time of all runs together: the learning rate follows it. A run that finds
the state of an earlier one in --out (state-*.safetensors, in files below 16 MiB) goes on from it;
momentum starts anew when momentum-* is missing. Each run writes the averaged weights in float16
(unet-*, text-*.safetensors), ldm.json and ldm_grid.png.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from captions import Catalogue
from common import (
    PRESETS,
    SCALING_FACTOR,
    START,
    Average,
    Captioner,
    Feed,
    Muon,
    Replay,
    Twin,
    autocast,
    half,
    load_parts,
    log,
    make_text,
    make_unet,
    make_vae,
    parameters,
    save_parts,
    setup,
    trapezoid,
    write_json,
)
from render import Renderer, grid
from safetensors.torch import load_file
from sample import PROMPTS, Model
from torch import Tensor, nn
from torch.nn import functional as F

MIN_SNR = 5.0  # Hang et al. 2023: weights min(SNR, 5) / SNR for eps-prediction


def alphas_cumprod(device: str) -> Tensor:
    """SD1's scaled-linear schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float().to(device)


class LatentPool:
    """Encoded pictures and their captions' ids, refreshed as training goes on."""

    def __init__(self, size: int, vae: nn.Module, render: Renderer, feed: Feed) -> None:
        self.vae, self.render, self.feed, self.device = vae, render, feed, render.device
        self.moments = torch.empty(size, 8, 16, 16, dtype=torch.float16, device=self.device)
        self.ids = torch.empty(size, 77, dtype=torch.int16, device=self.device)
        self.filled = self.cursor = 0

    @torch.no_grad()
    def refill(self) -> None:
        """Draw, encode and store one batch of scenes."""
        rows, ids = self.feed.next()
        with autocast(self.device):
            x = self.render(rows).contiguous(memory_format=torch.channels_last)
            posterior = self.vae.encode(x).latent_dist
        room = len(self.ids) - self.cursor
        moments = torch.cat([posterior.mean.float(), posterior.std.float()], 1) * SCALING_FACTOR
        end = self.cursor + min(room, len(ids))
        self.moments[self.cursor : end] = moments[:room].half()
        self.ids[self.cursor : end] = ids[:room].to(self.device, non_blocking=True)
        self.cursor = end % len(self.ids)
        self.filled = max(self.filled, end)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """(B, 4, 16, 16) sampled scaled latents and (B, 77) ids."""
        pick = torch.randint(self.filled, (size,), device=self.device)
        mean, std = self.moments[pick].float().chunk(2, 1)
        return mean + std * torch.randn_like(mean), self.ids[pick].long()


class PaddedAttention:
    """Attention whose head size is padded to a multiple of 8, as the fast kernels want it.

    Zeros in queries, keys and values change nothing as long as the scale stays the true size's:
    heads of 12 and 4 otherwise fall back to the slow path.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source))
        size = projected[0].shape[-1] // attn.heads
        heads = [x.unflatten(-1, (attn.heads, size)).transpose(1, 2) for x in projected]
        heads = [F.pad(x, (0, -size % 8)) for x in heads]
        out = F.scaled_dot_product_attention(*heads, scale=size**-0.5)[..., :size]
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def pad_heads(unet: nn.Module) -> None:
    """Use PaddedAttention throughout."""
    unet.set_attn_processor(PaddedAttention())


class Denoising:
    """The UNet's forward and backward pass over fixed buffers, on a GPU as one CUDA graph."""

    def __init__(self, twin: Twin, batch: int, width: int, device: str) -> None:
        self.net = twin.net
        dtype = twin.copies[0].dtype
        self.x = torch.randn(batch, 4, 16, 16, device=device, dtype=dtype)
        self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.noise = torch.randn(batch, 4, 16, 16, device=device)
        self.t = torch.zeros(batch, dtype=torch.long, device=device)
        self.context = torch.randn(batch, 77, width, device=device, dtype=dtype, requires_grad=True)
        self.weights = torch.ones(batch, device=device)
        self.replay = Replay(self._run, self._forget)

    def _run(self) -> Tensor:
        guess = self.net(self.x, self.t, self.context).sample.float()
        each = (guess - self.noise).square().mean((1, 2, 3))
        loss = (each * self.weights).mean()
        loss.backward()
        return torch.stack([loss, each.mean()]).detach()

    def _forget(self) -> None:
        self.net.zero_grad(set_to_none=True)
        self.context.grad = None

    def __call__(
        self, x: Tensor, t: Tensor, context: Tensor, noise: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients on the twin's weights; returns (weighted, plain) losses and the context's."""
        with torch.no_grad():
            for buffer, value in (
                (self.x, x), (self.t, t), (self.context, context), (self.noise, noise),
                (self.weights, weights),
            ):  # fmt: skip
                buffer.copy_(value)
        return self.replay(), self.context.grad


def text_weights(text: nn.Module, captioner: Captioner) -> dict[str, Tensor]:
    """The text encoder's weights; rows of ids never trained hold the unknown word's row."""
    weights = half(text)
    weights = {k: v for k, v in weights.items() if "position_ids" not in k}
    table = next(v for k, v in weights.items() if k.endswith("token_embedding.weight"))
    table[captioner.unused] = table[captioner.unknown].clone()
    return weights


def main() -> None:
    """Train until the time is up, then write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True, help="folder with vae.safetensors")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--seconds", type=float, default=560, help="this run, from process start")
    parser.add_argument("--total", type=float, default=700, help="training seconds of all runs")
    parser.add_argument("--reserve", type=float, default=20, help="kept for writing")
    parser.add_argument("--batch", type=int, default=768)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--drop", type=float, default=0.1, help="captions dropped, for guidance")
    parser.add_argument("--pool", type=int, default=262144)
    parser.add_argument("--first", type=int, default=65536, help="pictures encoded before training")
    parser.add_argument("--refresh", type=int, default=8, help="steps between two refills")
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--last", action="store_true", help="end the schedule with this run")
    parser.add_argument("--plain", action="store_true", help="no CUDA graph")
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    facts_path = args.out / "ldm.json"
    facts = (
        json.loads(facts_path.read_text()) if facts_path.exists() else {"runs": [], "losses": []}
    )
    before = sum(r["trained_seconds"] for r in facts["runs"])
    step = sum(r["steps"] for r in facts["runs"])
    device = setup(args.seed + len(facts["runs"]))
    gpu = device == "cuda"
    seed = args.seed + 100 * len(facts["runs"])
    feed = Feed(args.data, "captioned", min(512, args.batch), args.workers, seed)
    catalogue = Catalogue(args.data)
    captioner = Captioner(args.data, catalogue)
    render = Renderer(args.data, catalogue, device)

    vae = make_vae(args.preset)
    vae.load_state_dict({k: v.float() for k, v in load_file(args.vae / "vae.safetensors").items()})
    vae = vae.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    unet = make_unet(args.preset).to(device, memory_format=torch.channels_last)
    text = make_text(args.preset, captioner.tokenizer).to(device)
    facts["parameters"] = {
        "unet": parameters(unet),
        "text": parameters(text),
        "vae": parameters(vae),
    }
    log(facts["parameters"], "total", sum(facts["parameters"].values()))
    named = {
        f"{n}.{k}": p for n, m in (("unet", unet), ("text", text)) for k, p in m.named_parameters()
    }
    optimiser = Muon([unet, text], args.lr)
    state = load_parts(args.out / "state")
    if not state and step:  # only the averaged float16 weights came along
        state = {f"unet.{k}": v for k, v in load_parts(args.out / "unet").items()}
        state |= {f"text.{k}": v for k, v in load_parts(args.out / "text").items()}
    if state:
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(state[name])
        log("weights of step", step)
    average = Average([unet, text], 0.999)
    by_identity = {id(p): name for name, p in named.items()}
    if mean := load_parts(args.out / "mean"):
        for target, p in zip(average.mean, average.live, strict=True):
            target.copy_(mean[by_identity[id(p)]])
        average.count = step
    if momentum := load_parts(args.out / "momentum"):
        for (_, group), buffers in zip(optimiser.stacks, optimiser.buffers, strict=True):
            for p, buffer in zip(group, buffers, strict=True):
                buffer.copy_(momentum[by_identity[id(p)]])
        log("momentum too")

    pool = LatentPool(args.pool, vae, render, feed)
    alphas = alphas_cumprod(device)
    snr = alphas / (1 - alphas)
    weights = snr.clamp(max=MIN_SNR) / snr
    weights = weights / weights.mean()
    empty = torch.tensor(captioner(""), device=device)

    text_twin, unet_twin = Twin(text, device), Twin(unet, device)
    pad_heads(unet_twin.net)
    task = Denoising(unet_twin, args.batch, PRESETS[args.preset]["text"]["width"], device)

    def backward(latents: Tensor, ids: Tensor) -> Tensor:
        """Leave gradients on the float32 weights; returns the two losses."""
        size = len(ids)
        ids = torch.where(torch.rand(size, 1, device=device) < args.drop, empty, ids)
        # stratified timesteps: every batch covers the whole range
        t = torch.arange(size, device=device) + torch.rand(size, device=device)
        t = (t * 1000 / size).long()
        text_twin.refresh()
        unet_twin.refresh()
        text_twin.net.zero_grad(set_to_none=True)
        context = text_twin.net(ids).last_hidden_state
        noise = torch.randn_like(latents)
        a = alphas[t].view(-1, 1, 1, 1)
        figures, slope = task(
            latents * a.sqrt() + noise * (1 - a).sqrt(), t, context.detach(), noise, weights[t]
        )
        context.backward(slope)
        text_twin.hand_over()
        unet_twin.hand_over()
        return figures

    begin = time.monotonic()
    size = min(512, args.batch)
    while pool.filled < min(args.first, args.pool):
        pool.refill()
        if gpu and pool.filled % (16 * size) == 0:
            torch.cuda.synchronize()
    log(f"{pool.filled} latents in {time.monotonic() - begin:.0f} s, std",
        pool.moments[: pool.filled, :4].float().std((0, 2, 3)).tolist())  # fmt: skip
    begin = time.monotonic()
    if gpu and not args.plain:
        task.replay.record()
    log(f"ready after {time.monotonic() - begin:.0f} s")

    start_step, begin = step, time.monotonic()
    stop = START + args.seconds - args.reserve
    total = before + stop - begin if args.last else args.total
    last, sums = begin, []
    while (now := time.monotonic()) < stop and before + now - begin < total:
        progress = (before + now - begin) / total
        if step % args.refresh == 0:
            pool.refill()
        figures = backward(*pool.batch(args.batch))
        nn.utils.clip_grad_norm_(average.live, 1.0)
        optimiser.step(trapezoid(progress, step, warm=300, level=0.5))
        average.update()
        sums.append(figures.clone())
        step += 1
        if now - last > 20 or step == 10 or not gpu:
            values = torch.stack(sums).mean(0).tolist()
            sums, last = [], now
            if not all(map(math.isfinite, values)):
                raise SystemExit(f"diverged at step {step}: {values}")
            facts["losses"].append(
                [step, round(before + now - begin, 1), *(round(v, 5) for v in values)]
            )
            speed = (step - start_step) * args.batch / max(now - begin, 1e-3)
            log(
                f"step {step} weighted {values[0]:.4f} plain {values[1]:.4f} {speed:.0f} pictures/s"
            )
    feed.close()
    trained = time.monotonic() - begin
    facts["columns"] = ["step", "seconds", "weighted", "plain"]
    facts["runs"].append({
        "trained_seconds": round(trained, 1), "steps": step - start_step, "batch": args.batch,
        "pictures_per_second": round((step - start_step) * args.batch / trained), "seed": seed,
        "torch": torch.__version__, "lr": args.lr, "refresh": args.refresh, "total": round(total),
    })  # fmt: skip
    save_parts(dict(named), args.out / "state")
    mean = {by_identity[id(p)]: m for p, m in zip(average.live, average.mean, strict=True)}
    save_parts(mean, args.out / "mean")
    flat = {
        by_identity[id(p)]: b.bfloat16()
        for (_, group), buffers in zip(optimiser.stacks, optimiser.buffers, strict=True)
        for p, b in zip(group, buffers, strict=True)
    }
    save_parts(flat, args.out / "momentum")
    average.swap()
    save_parts(half(unet), args.out / "unet")
    save_parts(text_weights(text, captioner), args.out / "text")
    write_json(facts_path, facts)
    log("saved step", step, facts["runs"][-1])
    unet.load_state_dict({k: v.float() for k, v in half(unet).items()})
    model = Model(text.eval(), unet.eval(), vae, captioner.tokenizer)
    prompts = list(PROMPTS) if gpu else list(PROMPTS[:2])
    with torch.no_grad():
        grid(model.draw(prompts, steps=20 if gpu else 2), 8, prompts).save(
            args.out / "ldm_grid.png"
        )
    log("grid drawn")


if __name__ == "__main__":
    main()
