"""Train the autoencoder: 128x128 pictures to 16x16x4 latents and back.

    python train_vae.py --data data --out vae --seconds 440

Writes vae.safetensors (float16, latents normalised so that SD1's scaling factor fits), vae.json
(losses and figures) and vae_recon.png. The time limit holds from the start of the process.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from captions import Catalogue, Sampler, scene_row
from common import (
    SCALING_FACTOR,
    START,
    Average,
    Feed,
    Muon,
    autocast,
    compiled,
    half,
    log,
    make_vae,
    parameters,
    setup,
    trapezoid,
    write_json,
)
from measure import overshoots, psnr
from render import Renderer, grid
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

# YCbCr's chroma rows: colour is what a small decoder forgets first
CHROMA = ((-0.169, -0.331, 0.5), (0.5, -0.419, -0.081))


class Reconstruction(nn.Module):
    """Encode, add the posterior's noise, decode, and weigh the errors; compiled as one."""

    def __init__(self, vae: nn.Module, kl: float) -> None:
        super().__init__()
        self.vae, self.kl = vae, kl
        self.register_buffer("chroma", torch.tensor(CHROMA))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 128, 128) and (B, 4, 16, 16) noise to the loss and the five figures in it."""
        moments = self.vae.quant_conv(self.vae.encoder(x)).float()
        mean, logvar = moments.chunk(2, 1)
        logvar = logvar.clamp(-20, 5)
        z = mean + (0.5 * logvar).exp() * noise
        y = self.vae.decoder(self.vae.post_quant_conv(z)).float()
        error = y - x
        square, absolute = error.square().mean(), error.abs().mean()
        edges = _slopes(error) + 0.5 * _slopes(F.avg_pool2d(error, 2))
        chroma = torch.einsum("kc,bchw->bkhw", self.chroma, error).abs().mean()
        # the worst 0.4% of every picture's pixels: specks cannot hide in the mean
        worst = error.abs().amax(1).flatten(1).topk(64, dim=1).values.mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = 6 * square + absolute + 0.4 * edges + chroma + 0.04 * worst + self.kl * kl
        return loss, torch.stack([square, absolute, edges, worst, kl]).detach()


def _slopes(e: Tensor) -> Tensor:
    return (e[..., 1:] - e[..., :-1]).abs().mean() + (e[..., 1:, :] - e[..., :-1, :]).abs().mean()


@torch.no_grad()
def normalise(vae: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Fold the latents' mean and std into the 1x1 convolutions, so that 0.18215 is exact."""
    gain = 1 / (std * SCALING_FACTOR)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] *= gain.view(4, 1, 1, 1)
    quant.bias[:4] = (quant.bias[:4] - mean) * gain
    quant.bias[4:] += 2 * gain.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight /= gain.view(1, 4, 1, 1)


def main() -> None:
    """Train until the time is up, then measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--seconds", type=float, default=440)
    parser.add_argument("--reserve", type=float, default=25, help="kept for measuring and writing")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--kl", type=float, default=1e-3)
    parser.add_argument("--pool", type=int, default=24576)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--plain", action="store_true", help="no compiler")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = setup(args.seed)
    gpu = device == "cuda"
    feed = Feed(args.data, "mixed", args.batch, args.workers, args.seed)
    catalogue = Catalogue(args.data)
    render = Renderer(args.data, catalogue, device)
    log(len(catalogue.icons), "icons on the device")

    vae = make_vae(args.preset).to(device, memory_format=torch.channels_last)
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -4.0  # start with little posterior noise
    task = Reconstruction(vae, args.kl).to(device)
    optimiser, average = Muon([vae], args.lr), Average([vae], 0.998)
    log("parameters", parameters(vae), "decoder", parameters(vae.decoder))

    pool = torch.empty(args.pool, 3, 128, 128, dtype=torch.uint8, device=device)
    filled = cursor = 0

    def refill() -> None:
        nonlocal filled, cursor
        rows, _ = feed.next()
        fresh = ((render(rows) + 1) * 127.5).round().byte()[: len(pool) - cursor]
        pool[cursor : cursor + len(fresh)] = fresh
        cursor = (cursor + len(fresh)) % len(pool)
        filled = max(filled, cursor or len(pool))

    def batch() -> tuple[Tensor, Tensor]:
        x = pool[torch.randint(filled, (args.batch,), device=device)].float() / 127.5 - 1
        noise = torch.randn(args.batch, 4, 16, 16, device=device)
        return x.contiguous(memory_format=torch.channels_last), noise

    while filled < min(len(pool), 8 * args.batch):
        refill()
    begin = time.monotonic()

    def trial(module: nn.Module) -> None:
        with autocast(device):
            loss = module(*batch())[0]
        loss.backward()
        optimiser.zero_grad()

    run = task if args.plain else compiled(task, device, trial)
    log(f"first step after {time.monotonic() - begin:.0f} s")

    history: list[list[float]] = []
    sums: list[Tensor] = []
    begin = last = time.monotonic()
    stop = START + args.seconds - args.reserve
    step = 0
    while (now := time.monotonic()) < stop:
        progress = (now - begin) / (stop - begin)
        if step % (4 if filled == len(pool) else 1) == 0:
            refill()
        with autocast(device):
            loss, figures = run(*batch())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step(trapezoid(progress, step, level=0.4))
        average.update()
        sums.append(figures)
        step += 1
        if now - last > 15 or step == 10 or not gpu:
            values = torch.stack(sums).mean(0).tolist()
            sums, last = [], now
            if not all(map(math.isfinite, values)):
                raise SystemExit(f"diverged at step {step}: {values}")
            history.append([step, round(now - begin, 1), *(round(v, 5) for v in values)])
            names = ("square", "absolute", "edges", "worst", "kl")
            speed = step * args.batch / max(now - begin, 1e-3)
            log(f"step {step}", *(f"{n} {v:.4f}" for n, v in zip(names, values, strict=True)),
                f"{speed:.0f} pictures/s")  # fmt: skip
    feed.close()
    trained = time.monotonic() - begin
    average.swap()
    vae.eval()
    with torch.no_grad(), autocast(device):
        chunks = [vae.encode(batch()[0]).latent_dist.mean.float() for _ in range(48 if gpu else 2)]
    latents = torch.cat(chunks)
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    normalise(vae, mean, std)
    save_file(half(vae), args.out / "vae.safetensors", metadata={"format": "pt"})
    log("saved after", step, "steps")

    vae.load_state_dict({k: v.float() for k, v in half(vae).items()})
    sampler = Sampler(catalogue, 99)
    count = 1024 if gpu else 16
    truth, copies, noisy, scales = [], [], [], []
    with torch.no_grad():
        for _ in range(count // 16 if not gpu else count // 128):
            size = 128 if gpu else 16
            x = render(torch.tensor([scene_row(sampler.scene()) for _ in range(size)]))
            posterior = vae.encode(x).latent_dist
            extra = 0.1 / SCALING_FACTOR * torch.randn_like(posterior.mean)
            truth.append(x)
            copies.append(vae.decode(posterior.mean).sample)
            noisy.append(vae.decode(posterior.mean + extra).sample)
            scales.append(
                torch.stack([posterior.mean.std(), posterior.std.mean()]) * SCALING_FACTOR
            )
    x, y, z = torch.cat(truth), torch.cat(copies), torch.cat(noisy)
    latent_std, posterior_std = torch.stack(scales).mean(0).tolist()
    facts = {
        "preset": args.preset, "parameters": parameters(vae), "steps": step, "batch": args.batch,
        "seconds": round(trained, 1), "pictures_per_second": round(step * args.batch / trained),
        "psnr": psnr(x, y), "psnr_with_latent_noise_0.1": psnr(x, z), "specks": overshoots(y, x),
        "latent_mean": mean.tolist(), "latent_std_before": std.tolist(), "latent_std": latent_std,
        "posterior_std": posterior_std, "torch": torch.__version__, "seed": args.seed,
        "columns": ["step", "seconds", "square", "absolute", "edges", "worst", "kl"],
        "losses": history,
    }  # fmt: skip
    write_json(args.out / "vae.json", facts)
    sheet = torch.stack([x[:16].view(2, 8, 3, 128, 128), y[:16].view(2, 8, 3, 128, 128)], 1)
    grid(sheet.flatten(0, 2), 8).save(args.out / "vae_recon.png")
    log({k: v for k, v in facts.items() if k not in ("losses", "columns")})


if __name__ == "__main__":
    main()
