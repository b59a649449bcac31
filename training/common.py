"""What the training scripts share: networks, optimiser, average, scene feed, resumable state."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from captions import ROW, UNKNOWN, Catalogue, Sampler, all_phrases, scene_row
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vocabulary import LENGTH, Tokenizer

START = time.monotonic()
SCALING_FACTOR = 0.18215
SCHEDULE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False,
    "steps_offset": 1, "prediction_type": "epsilon",
}  # fmt: skip
# 32 groups over 64 channels keep two channels a group: with one, GroupNorm is instance norm, and a
# network that wants to say "bright" learns to draw a speck. The tiny model says its groups itself.
PRESETS = {
    "demo": {
        "vae": {
            "block_out_channels": (64, 64, 96, 96),
            "layers_per_block": 1,
            "norm_num_groups": 32,
        },
        "unet": {
            "block_out_channels": (96, 128, 64, 32),
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "heads": 8,
        },
        "text": {"width": 128, "layers": 3, "heads": 2},
    },
    "tiny": {
        "vae": {
            "block_out_channels": (16, 16, 16, 16),
            "layers_per_block": 1,
            "norm_num_groups": 8,
        },
        "unet": {
            "block_out_channels": (32, 24),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "heads": 4,
        },
        "text": {"width": 32, "layers": 1, "heads": 2},
    },
}
PART_BYTES = 15 * 2**20  # a run's results travel in files of at most 16 MiB


def log(*words: object) -> None:
    """Print with the seconds since the start."""
    print(f"[{time.monotonic() - START:6.1f}s]", *words, flush=True)


def setup(seed: int) -> str:
    """Seed, choose the device, allow TF32; returns the device."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.manual_seed(seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    log("torch", torch.__version__, name)
    return device


def autocast(device: str) -> torch.autocast:
    """bfloat16 on a GPU, nothing on a CPU."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def make_vae(preset: str) -> nn.Module:
    """AutoencoderKL: 8 times smaller, 4 channels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=128,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=SCALING_FACTOR, **PRESETS[preset]["vae"],
    )  # fmt: skip


def make_unet(preset: str) -> nn.Module:
    """UNet2DConditionModel with SD1's blocks; diffusers calls the number of heads a dimension."""
    from diffusers import UNet2DConditionModel

    sizes = dict(PRESETS[preset]["unet"])
    heads = sizes.pop("heads")
    attending = len(sizes["block_out_channels"]) - 1  # levels; the coarsest has no transformers
    return UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, attention_head_dim=heads,
        down_block_types=("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * attending,
        cross_attention_dim=PRESETS[preset]["text"]["width"], **sizes,
    )  # fmt: skip


def make_text(preset: str, tokenizer: Tokenizer) -> nn.Module:
    """CLIPTextModel with quick_gelu over the given vocabulary."""
    from transformers import CLIPTextConfig, CLIPTextModel

    size = PRESETS[preset]["text"]
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer.ids), hidden_size=size["width"], hidden_act="quick_gelu",
            intermediate_size=4 * size["width"], num_hidden_layers=size["layers"],
            num_attention_heads=size["heads"], max_position_embeddings=LENGTH,
            projection_dim=size["width"], bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos,
            pad_token_id=tokenizer.eos,
        )
    )  # fmt: skip


def compiled(module: nn.Module, device: str, trial: Callable[[nn.Module], None]) -> nn.Module:
    """The module compiled, where the device gains by it and the compiler manages a trial step."""
    if device == "cuda":
        try:
            fast = torch.compile(module)
            trial(fast)
            torch.cuda.synchronize()
            return fast
        except Exception as error:
            log("not compiled:", str(error)[:300])
    trial(module)
    return module


def parameters(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


class Captioner:
    """Captions to ids, with one id for unknown words."""

    def __init__(self, folder: str | Path, catalogue: Catalogue) -> None:
        self.tokenizer = Tokenizer.from_folder(folder)
        used = {i for text in all_phrases(catalogue) for i in self.tokenizer.encode(text)}
        used |= {self.tokenizer.bos, self.tokenizer.eos}
        self.unused = [i for i in range(len(self.tokenizer.ids)) if i not in used]
        self.unknown = self.unused[0]

    def __call__(self, caption: str) -> list[int]:
        """77 ids."""
        tok = self.tokenizer
        ids = [tok.bos]
        for i, text in enumerate(caption.split(UNKNOWN)):
            ids += [self.unknown] * (i > 0) + tok.encode(text)
        ids = ids[: LENGTH - 1]
        return ids + [tok.eos] * (LENGTH - len(ids))


def _produce(folder: str, seed: int, kind: str, size: int, queue) -> None:
    """A worker's loop: batches of scene rows and caption ids, for ever."""
    catalogue = Catalogue(folder)
    sampler, captioner = Sampler(catalogue, seed), Captioner(folder, catalogue)
    while True:
        rows = np.empty((size, ROW), np.float32)
        ids = np.zeros((size, LENGTH), np.int16)
        for i in range(size):
            if kind == "captioned" or (kind == "mixed" and i % 2):
                scene = sampler.scene()
                ids[i] = captioner(scene.caption)
            else:
                scene = sampler.wide_scene()
            rows[i] = scene_row(scene)
        queue.put((rows, ids))


class Feed:
    """Scenes from worker processes, in an order that does not depend on their speed."""

    def __init__(self, folder: str | Path, kind: str, size: int, workers: int, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._queues = [context.Queue(4) for _ in range(workers)]
        self._turn = 0
        self._workers = [
            context.Process(
                target=_produce,
                args=(str(folder), 1000 * seed + i, kind, size, q),
                daemon=True,
            )
            for i, q in enumerate(self._queues)
        ]
        for worker in self._workers:
            worker.start()

    def next(self) -> tuple[Tensor, Tensor]:
        """Rows (size, ROW) and ids (size, 77); pinned beside a GPU, so that it need not wait."""
        queue = self._queues[self._turn % len(self._queues)]
        self._turn += 1
        rows, ids = (torch.from_numpy(a) for a in queue.get(timeout=120))
        return (rows.pin_memory(), ids.pin_memory()) if torch.cuda.is_available() else (rows, ids)

    def close(self) -> None:
        """Stop the workers."""
        for worker in self._workers:
            worker.terminate()


def orthogonalise(updates: Tensor) -> Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrices, (n, rows, columns)."""
    x = updates.bfloat16() if updates.is_cuda else updates
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(updates.dtype)


class Muon:
    """Momentum made orthogonal for every matrix and convolution, AdamW for the rest.

    Matrices are laid into a few padded stacks (zeros change no singular value), because hundreds of
    small products one by one would keep the processor busier than the GPU.
    Source   Jordan et al. 2024, "Muon"; the scale 0.2 sqrt(max(rows, columns)) that lets both
             share one learning rate is from Liu et al. 2025 (arXiv:2502.16982).
    """

    def __init__(self, modules: list[nn.Module], lr: float, decay: float = 0.02) -> None:
        self.lr, self.decay, self.momentum = lr, decay, 0.95
        stacks: dict[tuple[int, int], list[nn.Parameter]] = {}
        rest = []
        ends = ("conv_in.weight", "conv_out.weight", "embedding.weight")
        for module in modules:
            for name, p in module.named_parameters():
                if p.ndim < 2 or name.endswith(ends):
                    rest.append(p)
                    continue
                short, long = sorted((p.shape[0], p[0].numel()))
                size = (-(-short // 128) * 128, next(s for s in COLUMNS if s >= long))
                stacks.setdefault(size, []).append(p)
        self.stacks = list(stacks.items())
        self.buffers = [[torch.zeros_like(p) for p in group] for _, group in self.stacks]
        fused = rest[0].is_cuda
        self.rest = torch.optim.AdamW(
            rest, lr=lr / 2, betas=(0.9, 0.99), weight_decay=0.0, fused=fused
        )

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step at factor times the learning rate."""
        lr = self.lr * factor
        for (size, group), buffers in zip(self.stacks, self.buffers, strict=True):
            gradients = [p.grad for p in group]
            torch._foreach_lerp_(buffers, gradients, 1 - self.momentum)
            updates = torch._foreach_lerp(gradients, buffers, self.momentum)
            stack = torch.zeros(len(group), *size, device=group[0].device)
            for slot, update in zip(stack, updates, strict=True):
                flat = _matrix(update)
                slot[: flat.shape[0], : flat.shape[1]] = flat
            done = orthogonalise(stack)
            torch._foreach_mul_(group, 1 - lr * self.decay)
            for slot, p in zip(done, group, strict=True):
                flat = _matrix(p)
                flat.add_(
                    slot[: flat.shape[0], : flat.shape[1]], alpha=-0.2 * lr * max(flat.shape) ** 0.5
                )
        for settings in self.rest.param_groups:
            settings["lr"] = lr / 2
        self.rest.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for _, group in self.stacks:
            for p in group:
                p.grad = None
        self.rest.zero_grad(set_to_none=True)


COLUMNS = (128, 384, 1152, 2304, 4608, 9216)


def _matrix(x: Tensor) -> Tensor:
    """A weight as a wide matrix, a view of it: convolutions have their taps side by side."""
    if x.ndim == 4:
        nhwc = x.permute(0, 2, 3, 1)
        x = nhwc.flatten(1) if nhwc.is_contiguous() else x.view(len(x), -1)
    return x.mT if x.shape[0] > x.shape[1] else x


class Twin:
    """A half-precision copy that computes, beside the float32 weights that learn."""

    def __init__(self, module: nn.Module, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
        self.live = list(module.parameters())
        self.net = copy.deepcopy(module)
        if device == "cuda":
            self.net = self.net.to(dtype)
        self.copies = list(self.net.parameters())

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights in."""
        torch._foreach_copy_(self.copies, self.live)

    @torch.no_grad()
    def hand_over(self) -> None:
        """Give the float32 weights their gradients."""
        for live, copied in zip(self.live, self.copies, strict=True):
            live.grad = torch.zeros_like(live) if copied.grad is None else copied.grad.float()


class Replay:
    """A computation over fixed buffers, on a GPU recorded once as a CUDA graph and replayed.

    `work` returns a tensor and leaves gradients; `forget` drops them before a plain run.
    """

    def __init__(self, work: Callable[[], Tensor], forget: Callable[[], None]) -> None:
        self.work, self.forget = work, forget
        self.graph = None
        self.result = torch.zeros(())

    def record(self) -> None:
        """Warm up and capture."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.forget()
                self.work()
        torch.cuda.current_stream().wait_stream(side)
        self.forget()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = self.work()

    def __call__(self) -> Tensor:
        """Compute once; the result's buffer is the same every time on a GPU."""
        if self.graph is None:
            self.forget()
            return self.work()
        self.graph.replay()
        return self.result


class Average:
    """An exponential moving average of the weights, quick at first."""

    def __init__(self, modules: list[nn.Module], decay: float) -> None:
        self.live = [p for m in modules for p in m.parameters()]
        self.mean = [p.detach().clone() for p in self.live]
        self.decay, self.count = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.mean, self.live, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the live weights."""
        for live, mean in zip(self.live, self.mean, strict=True):
            kept = live.clone()
            live.copy_(mean)
            mean.copy_(kept)


def trapezoid(progress: float, step: int, warm: int = 200, level: float = 0.5) -> float:
    """Learning rate factor: up over `warm` steps, flat until `level` of the time, then to zero."""
    return min(1.0, (step + 1) / warm, max(0.01, (1 - progress) / (1 - level)))


def half(module: nn.Module) -> dict[str, Tensor]:
    """The weights as contiguous float16 on the CPU."""
    weights = module.state_dict()
    return {k: v.detach().to("cpu", torch.float16).contiguous() for k, v in weights.items()}


def save_parts(tensors: dict[str, Tensor], stem: Path) -> None:
    """Write stem-0.safetensors, stem-1..., each below PART_BYTES."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if parts[-1] and size + nbytes > PART_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        size += nbytes
    for i, part in enumerate(parts):
        save_file(part, f"{stem}-{i}.safetensors", metadata={"format": "pt"})


def load_parts(stem: Path) -> dict[str, Tensor]:
    """Read what save_parts wrote; empty when there is nothing."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(stem.parent.glob(stem.name + "-[0-9]*.safetensors")):
        tensors |= load_file(path)
    return tensors


def write_json(path: Path, value: object) -> None:
    """Indented JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
