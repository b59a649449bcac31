"""Distil the trained UNet so that four steps without guidance are enough.

    python distill.py --data data --model final/diffusers --out lcm --rank 8 --seconds 240

Latent consistency distillation (Luo et al. 2023, arXiv:2310.04378) with one fixed guidance scale
baked in: the student's clean picture at t must equal its slow copy's at t - 50, where the teacher
takes the step between with DDIM and guidance, as it does when it draws in 20 steps. With --rank the
student is the teacher plus low-rank differences (LCM-LoRA, arXiv:2311.05556), written as
lcm_lora.safetensors; without it every weight learns, and the UNet is written as a diffusers folder.
Sample with the LCM scheduler at guidance 1.
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
    Captioner,
    Feed,
    Muon,
    Replay,
    Twin,
    log,
    parameters,
    setup,
    trapezoid,
    write_json,
)
from lora import LowRank
from render import Renderer
from sample import Model
from torch import Tensor, nn
from train_ldm import LatentPool, alphas_cumprod, pad_heads

STRIDE = 50  # 20 teacher steps
# Float16: at t = 999 the clean picture amplifies the guess 15 times, and bfloat16's rounding of the
# weights, which the student would learn to undo, with it.
DTYPE = torch.float16
LOSS_SCALE = 1024.0  # keeps float16 gradients off the subnormals


class Consistency:
    """The student's loss over fixed buffers, and its gradients."""

    def __init__(
        self, student: Twin, slow: Twin, teacher: nn.Module, batch: int, blank: Tensor, scale: float
    ) -> None:
        self.student, self.slow, self.teacher, self.scale = student.net, slow.net, teacher, scale
        device, self.dtype = blank.device, student.copies[0].dtype
        self.alphas = alphas_cumprod(str(device))
        self.latents = torch.randn(batch, 4, 16, 16, device=device)
        self.noise = torch.randn_like(self.latents)
        self.t = torch.full((batch,), 500, device=device)
        self.context = blank.expand(batch, -1, -1).clone()
        self.blank = blank.expand(batch, -1, -1)
        self.replay = Replay(self._run, lambda: self.student.zero_grad(set_to_none=True))

    def _clean(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The clean latents that x and a guess of its noise imply."""
        a = self.alphas[t].view(-1, 1, 1, 1)
        return (x - (1 - a).sqrt() * noise) / a.sqrt()

    def _noised(self, clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        a = self.alphas[t].view(-1, 1, 1, 1)
        return a.sqrt() * clean + (1 - a).sqrt() * noise

    def _guess(self, net: nn.Module, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return net(x, t, context.to(self.dtype)).sample.float()

    def _consistent(self, net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        """The consistency function as LCMScheduler has it: x itself at t = 0."""
        scaled = t.view(-1, 1, 1, 1) * 10.0
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        return skip * x + out * self._clean(x, t, self._guess(net, x, t, self.context))

    def _run(self) -> Tensor:
        t, earlier = self.t, (self.t - STRIDE).clamp_min(0)
        x = self._noised(self.latents, t, self.noise)
        with torch.no_grad():
            both = torch.cat([self.blank, self.context])
            guess = self._guess(self.teacher, torch.cat([x, x]), torch.cat([t, t]), both)
            plain, steered = guess.chunk(2)
            guided = plain + self.scale * (steered - plain)
            nearer = self._noised(self._clean(x, t, guided), earlier, guided)
            wanted = self._consistent(self.slow, nearer, earlier)
        error = self._consistent(self.student, x, t) - wanted
        loss = ((error.square() + 1e-4).sqrt() - 1e-2).mean()  # pseudo-Huber
        (loss * LOSS_SCALE).backward()
        return loss.detach()


def main() -> None:
    """Distil until the time is up, then write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="the teacher, a diffusers folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--rank", type=int, default=0, help="low-rank differences, else all weights"
    )
    parser.add_argument("--seconds", type=float, default=240, help="from process start")
    parser.add_argument("--reserve", type=float, default=5, help="kept for writing")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, help="default: 1e-3 low-rank, 4e-4 all weights")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--first", type=int, default=49152, help="pictures encoded before training")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = setup(args.seed)
    size = min(512, args.batch)
    feed = Feed(args.data, "captioned", size, args.workers, args.seed)
    teacher = Model.from_folder(args.model, device)
    captioner = Captioner(args.data, Catalogue(args.data))
    if captioner.tokenizer.ids != teacher.tokenizer.ids:
        raise SystemExit("the model was trained with another vocabulary than the data's")
    teacher.unet.to(memory_format=torch.channels_last)
    teacher.vae.to(memory_format=torch.channels_last)
    pad_heads(teacher.unet)
    student = copy.deepcopy(teacher.unet).requires_grad_(True)
    render = Renderer(args.data, Catalogue(args.data), device)
    pool = LatentPool(max(args.first, size), teacher.vae, render, feed)
    while pool.filled < args.first:
        pool.refill()
    log(pool.filled, "latents")

    small = LowRank(student, args.rank) if args.rank else None
    learning = small or student
    lr = args.lr or (1e-3 if small else 4e-4)
    optimiser = (
        torch.optim.AdamW(small.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
        if small
        else Muon([student], lr)
    )
    average, target = Average([learning], 0.995), Average([student], 0.95)
    student_twin, slow_twin = Twin(student, device, DTYPE), Twin(student, device, DTYPE)
    slow_twin.live = target.mean
    slow_twin.net.requires_grad_(False)
    with torch.no_grad():
        blank = teacher.text(torch.tensor([captioner("")], device=device)).last_hidden_state
    teaching = Twin(teacher.unet, device, DTYPE).net.requires_grad_(False)
    task = Consistency(student_twin, slow_twin, teaching, args.batch, blank, args.guidance)
    if device == "cuda":
        task.replay.record()
    log("ready;", parameters(learning), "parameters learn")

    begin = last = time.monotonic()
    stop = START + args.seconds - args.reserve
    step, history, sums = 0, [], []
    while (now := time.monotonic()) < stop:
        if step % 4 == 0:
            pool.refill()
        latents, ids = pool.batch(args.batch)
        with torch.no_grad():
            task.latents.copy_(latents)
            task.noise.normal_()
            # stratified: every batch covers the whole range
            t = torch.arange(args.batch, device=device) + torch.rand(args.batch, device=device)
            task.t.copy_(t * 1000 / args.batch)
            task.context.copy_(teacher.text(ids).last_hidden_state)
        if small:
            small.merge()
        student_twin.refresh()
        slow_twin.refresh()
        sums.append(task.replay().clone())
        student_twin.hand_over()
        torch._foreach_div_([p.grad for p in student.parameters()], LOSS_SCALE)
        factor = trapezoid((now - begin) / (stop - begin), step, warm=50)
        if small:
            optimiser.zero_grad()
            small.backward()
            for group in optimiser.param_groups:
                group["lr"] = lr * factor
            nn.utils.clip_grad_norm_(small.parameters(), 1.0)
            optimiser.step()
        else:
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimiser.step(factor)
        average.update()
        target.update()
        step += 1
        if now - last > 10 or device == "cpu":
            last = now
            history.append([step, round(now - begin, 1), round(torch.stack(sums).mean().item(), 5)])
            sums = []
            log("step", *history[-1])
    feed.close()
    average.swap()
    facts = {
        "steps": step, "seconds": round(time.monotonic() - begin, 1), "batch": args.batch,
        "rank": args.rank, "lr": lr, "guidance": args.guidance, "seed": args.seed,
        "stride": STRIDE, "parameters": parameters(learning), "torch": torch.__version__,
    }  # fmt: skip
    if small:
        about = {"steps": "4", "sampler": "lcm", "guidance_scale": "1", "rank": str(args.rank)}
        small.save(args.out / "lcm_lora.safetensors", about)
    else:
        student.half().save_pretrained(args.out / "unet")
    write_json(args.out / "lcm.json", {**facts, "losses": history})
    log("saved", facts)


if __name__ == "__main__":
    main()
