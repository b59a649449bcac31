"""Distil the trained UNet so that four steps without guidance are enough.

    python distill.py --data data --vae vae --ldm ldm --seconds 120

Latent consistency distillation (Luo et al. 2023, arXiv:2310.04378) with one fixed guidance scale
baked in: the student's clean picture at t must equal its slow copy's at t - 20, where the teacher
takes the step between with DDIM and guidance. Writes lcm-*.safetensors beside the teacher's files;
sample with the LCM scheduler at guidance 1.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from captions import Catalogue
from common import (
    START,
    Average,
    Feed,
    Muon,
    autocast,
    half,
    log,
    save_parts,
    setup,
    trapezoid,
    write_json,
)
from export import load_model
from render import Renderer
from torch import Tensor, nn
from train_ldm import LatentPool, alphas_cumprod, pad_heads

STRIDE = 20  # 50 teacher steps


def main() -> None:
    """Distil until the time is up, then write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--ldm", type=Path, required=True)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--reserve", type=float, default=5)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--first", type=int, default=32768)
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    device = setup(args.seed)
    size = min(512, args.batch)
    feed = Feed(args.data, "captioned", size, args.workers, args.seed)
    text, teacher, vae, captioner = load_model(args.data, args.vae, args.ldm, args.preset)
    for net in (text, teacher, vae):
        net.eval().requires_grad_(False).to(device)
    for net in (teacher, vae):
        net.to(memory_format=torch.channels_last)
    pad_heads(teacher)
    student = copy.deepcopy(teacher).requires_grad_(True)
    slow = copy.deepcopy(teacher)
    render = Renderer(args.data, Catalogue(args.data), device)
    pool = LatentPool(max(args.first, size), vae, render, feed)
    while pool.filled < args.first:
        pool.refill()
    log(pool.filled, "latents")
    alphas = alphas_cumprod(device)
    empty = torch.tensor(captioner(""), device=device)
    optimiser = Muon([student], args.lr)
    average, target = Average([student], 0.995), Average([student], 0.95)
    with torch.no_grad():
        with autocast(device):
            blank = text(empty[None]).last_hidden_state

    def split(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The clean latents that x and a guess of its noise imply."""
        a = alphas[t].view(-1, 1, 1, 1)
        return (x - (1 - a).sqrt() * noise) / a.sqrt()

    def boundary(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The consistency function: x itself at t = 0."""
        scaled = t.view(-1, 1, 1, 1) * 10.0
        skip = 0.25 / (scaled**2 + 0.25)
        return skip * x + scaled / (scaled**2 + 0.25) ** 0.5 * split(x, t, noise)

    def losses(net: nn.Module) -> Tensor:
        latents, ids = pool.batch(args.batch)
        t = (torch.randint(50, (args.batch,), device=device) + 1) * STRIDE - 1
        earlier = (t - STRIDE).clamp_min(0)
        noise = torch.randn_like(latents)
        a = alphas[t].view(-1, 1, 1, 1)
        x = (a.sqrt() * latents + (1 - a).sqrt() * noise).contiguous(
            memory_format=torch.channels_last
        )
        with torch.no_grad(), autocast(device):
            context = text(ids).last_hidden_state
            both = torch.cat([blank.expand_as(context), context])
            guess = teacher(torch.cat([x, x]), torch.cat([t, t]), both).sample.float()
            plain, steered = guess.chunk(2)
            guided = plain + args.guidance * (steered - plain)
            b = alphas[earlier].view(-1, 1, 1, 1)
            nearer = b.sqrt() * split(x, t, guided) + (1 - b).sqrt() * guided
            nearer = nearer.contiguous(memory_format=torch.channels_last)
            wanted = boundary(nearer, earlier, slow(nearer, earlier, context).sample.float())
        with autocast(device):
            guess = net(x, t, context).sample.float()
        error = boundary(x, t, guess) - wanted
        return ((error.square() + 1e-4).sqrt() - 1e-2).mean()

    begin = last = time.monotonic()
    stop = START + args.seconds - args.reserve
    step, history = 0, []
    while (now := time.monotonic()) < stop:
        if step % 4 == 0:
            pool.refill()
        loss = losses(student)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step(trapezoid((now - begin) / (stop - begin), step, warm=100))
        average.update()
        target.update()
        with torch.no_grad():
            torch._foreach_copy_(list(slow.parameters()), target.mean)
        step += 1
        if now - last > 10 or device == "cpu":
            last = now
            history.append([step, round(now - begin, 1), round(loss.item(), 5)])
            log("step", *history[-1])
    feed.close()
    average.swap()
    save_parts(half(student), args.ldm / "lcm")
    facts = {"steps": step, "batch": args.batch, "guidance": args.guidance, "seed": args.seed}
    write_json(args.ldm / "lcm.json", {**facts, "losses": history})
    log("saved", facts)


if __name__ == "__main__":
    main()
