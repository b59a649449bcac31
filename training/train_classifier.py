"""Train the small judge: which emoji is on the picture?

    python train_classifier.py --data data --out judge --seconds 100

It sees true artwork only, composed as the captions say (colours, backgrounds, sizes, positions,
turns), a little blurred and noisy so that it reads shapes and not pixels. Writes judge.safetensors:
plain convolutions (normalisation folded in) and one matrix, float16. To read a picture in [-1, 1]:
average 2x2 pixels to 64x64, then for each layer a 3x3 convolution with padding 1 and its stride,
bias, ReLU; the mean over the last 4x4; the matrix and its bias.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from captions import Catalogue, Sampler, scene_row
from common import START, Feed, autocast, log, parameters, setup, write_json
from render import Renderer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

LAYERS = (
    (3, 32, 2),
    (32, 48, 1),
    (48, 64, 2),
    (64, 64, 1),
    (64, 96, 2),
    (96, 112, 2),
)  # in, out, stride


class Judge(nn.Module):
    """(B, 3, 128, 128) in [-1, 1] to (B, names) scores."""

    def __init__(self, names: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, 3, s, 1, bias=False) for i, o, s in LAYERS
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _ in LAYERS)
        self.read = nn.Linear(LAYERS[-1][1], names)

    def forward(self, x: Tensor) -> Tensor:
        """Scores, unnormalised."""
        x = F.avg_pool2d(x, 2)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        return self.read(x.mean((2, 3)))


@torch.no_grad()
def folded(judge: Judge) -> dict[str, Tensor]:
    """Plain weights: layers.i.weight/bias, read.weight/bias, float16."""
    out = {}
    for i, (convolution, norm) in enumerate(zip(judge.convolutions, judge.norms, strict=True)):
        gain = norm.weight / (norm.running_var + norm.eps).sqrt()
        out[f"layers.{i}.weight"] = convolution.weight * gain.view(-1, 1, 1, 1)
        out[f"layers.{i}.bias"] = norm.bias - norm.running_mean * gain
    out |= {"read.weight": judge.read.weight, "read.bias": judge.read.bias}
    return {k: v.detach().half().cpu().contiguous() for k, v in out.items()}


class FoldedJudge:
    """The judge as it ships: names read off pictures from the folded weights."""

    def __init__(self, folder: Path, device: str) -> None:
        from safetensors.torch import load_file

        weights = load_file(folder / "judge.safetensors")
        self.weights = {k: v.float().to(device) for k, v in weights.items()}
        self.names: list[str] = json.loads(
            (folder / "judge_names.json").read_text(encoding="utf-8")
        )

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """(B, 3, 128, 128) in [-1, 1] to (B, names) scores."""
        w, x = self.weights, F.avg_pool2d(pictures.clamp(-1, 1), 2)
        for i, (_, _, stride) in enumerate(LAYERS):
            x = F.relu(F.conv2d(x, w[f"layers.{i}.weight"], w[f"layers.{i}.bias"], stride, 1))
        return x.mean((2, 3)) @ w["read.weight"].T + w["read.bias"]


def weathered(x: Tensor) -> Tensor:
    """Blur some pictures, shift colours and add noise a little."""
    size = len(x)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    blurred = torch.where(
        torch.rand(size, 1, 1, 1, device=x.device) < 0.5,
        blurred, F.avg_pool2d(F.pad(blurred, (2, 2, 2, 2), mode="replicate"), 5, 1),
    )  # fmt: skip
    x = torch.where(torch.rand(size, 1, 1, 1, device=x.device) < 0.4, blurred, x)
    x = x * (1 + 0.1 * torch.randn(size, 3, 1, 1, device=x.device))
    x = x + 0.05 * torch.randn(size, 3, 1, 1, device=x.device)
    noise = 0.1 * torch.rand(size, 1, 1, 1, device=x.device)
    return (x + noise * torch.randn_like(x)).clamp(-1, 1)


def main() -> None:
    """Train until the time is up, then measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--pool", type=int, default=65536)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = setup(args.seed)
    feed = Feed(args.data, "captioned", args.batch, args.workers, args.seed)
    catalogue = Catalogue(args.data)
    render = Renderer(args.data, catalogue, device)
    owner = torch.tensor([icon["emoji"] for icon in catalogue.icons], device=device)
    judge = Judge(len(catalogue.emoji)).to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.02)
    pool = torch.empty(args.pool, 3, 128, 128, dtype=torch.uint8, device=device)
    answers = torch.empty(args.pool, dtype=torch.long, device=device)
    filled = cursor = step = 0
    begin = time.monotonic()
    stop = START + args.seconds - 10
    losses: list[float] = []
    while (now := time.monotonic()) < stop:
        if step % 3 == 0 or filled < len(pool) // 4:
            rows, _ = feed.next()
            rows = rows[rows[:, -1] == 1][: len(pool) - cursor]
            fresh = ((render(rows) + 1) * 127.5).round().byte()
            pool[cursor : cursor + len(fresh)] = fresh
            answers[cursor : cursor + len(fresh)] = owner[rows[:, 0].long().to(device)]
            cursor = (cursor + len(fresh)) % len(pool)
            filled = max(filled, cursor or len(pool))
        pick = torch.randint(filled, (args.batch,), device=device)
        x = weathered(pool[pick].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        progress = (now - begin) / (stop - begin)
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 200, (1 - progress) / 0.6 + 0.003)
        with autocast(device):
            scores = judge(x)
        loss = F.cross_entropy(scores.float(), answers[pick], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        step += 1
        if step % 500 == 0 or device == "cpu":
            losses.append(round(loss.item(), 4))
            log("judge step", step, "loss", losses[-1])
    feed.close()
    judge.eval()
    save_file(folded(judge), args.out / "judge.safetensors", metadata={"format": "pt"})
    names = [e["name"] for e in catalogue.emoji]
    write_json(args.out / "judge_names.json", names)

    shipped = FoldedJudge(args.out, device)
    sampler, rows = Sampler(catalogue, 98), []
    while len(rows) < (4096 if device == "cuda" else 64):
        scene = sampler.scene()
        if len(scene.things) == 1:
            rows.append(scene_row(scene))
    scores = torch.cat([shipped(render(torch.tensor(r))) for r in _chunks(rows, 256)])
    truth = owner[torch.tensor([int(r[0]) for r in rows], device=device)]
    top = scores.topk(5, dim=1).indices == truth[:, None]
    facts = {
        "names": len(names), "parameters": parameters(judge), "steps": step, "batch": args.batch,
        "seconds": round(time.monotonic() - begin, 1), "losses": losses, "seed": args.seed,
        "composed_top1": round(top[:, 0].float().mean().item(), 4),
        "composed_top5": round(top.any(1).float().mean().item(), 4),
    }  # fmt: skip
    write_json(args.out / "judge.json", facts)
    log(facts)


def _chunks(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


if __name__ == "__main__":
    main()
