"""Load a diffusers folder made here (or any like it) and draw prompts in batches."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from common import SCALING_FACTOR, SCHEDULE
from lora import merge_file
from render import SIZE
from torch import Tensor, nn
from vocabulary import Tokenizer

# drawn in every sheet, so that runs can be compared by eye
PROMPTS = (
    "a red maple leaf", "a grinning face", "a cat face", "a pizza", "a rocket", "a red rose",
    "an octopus", "a house with garden",
    "a blue maple leaf on a yellow background", "a green cat face", "a purple octopus",
    "a pink elephant", "a blue banana", "a red frog", "a green heart on a black background",
    "an orange whale on a light blue background",
    "a small red apple in the top left corner", "a tiny rocket on a dark blue background",
    "a large sunflower", "an upside down crown", "a mirrored snail",
    "a blue crown on a red background", "a yellow mushroom, flat style", "a purple bicycle",
    "a dog face, noto style", "a dog face, fluent style", "a dog face, flat style",
    "a cat and a dog", "a black sheep on a green background",
    "a white rabbit on a purple background", "a happy face, yellow",
    "a picture of a teal dragon on a white background",
)  # fmt: skip


@dataclass
class Model:
    """The networks and the tokenizer of one text-to-image model."""

    text: nn.Module
    unet: nn.Module
    vae: nn.Module
    tokenizer: Tokenizer

    @classmethod
    def from_folder(cls, folder: Path, device: str, lora: Path | None = None) -> Model:
        """A diffusers folder; `lora` is a file of differences for its UNet."""
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextModel

        text = CLIPTextModel.from_pretrained(folder / "text_encoder")
        unet = UNet2DConditionModel.from_pretrained(folder / "unet")
        vae = AutoencoderKL.from_pretrained(folder / "vae")
        if lora:
            merge_file(unet.float(), lora)
        nets = [net.float().eval().requires_grad_(False).to(device) for net in (text, unet, vae)]
        return cls(*nets, Tokenizer.from_folder(folder / "tokenizer"))

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.unet.device

    def encode(self, prompts: list[str]) -> Tensor:
        """(B, 77, D) text states."""
        ids = torch.tensor([self.tokenizer.padded(p) for p in prompts], device=self.device)
        return self.text(ids).last_hidden_state

    @torch.no_grad()
    def draw(
        self, prompts: list[str], guidance: float = 5.0, steps: int = 20, seed: int = 0,
        scheduler: str = "ddim", batch: int = 256,
    ) -> Tensor:  # fmt: skip
        """(B, 3, 128, 128) in [-1, 1]; picture i takes all its noise from seed + i."""
        pictures = []
        for first in range(0, len(prompts), batch):
            some = prompts[first : first + batch]
            plan = _scheduler(scheduler)
            plan.set_timesteps(steps)
            sources = [
                torch.Generator().manual_seed(seed + i) for i in range(first, first + len(some))
            ]
            noise = [torch.randn(4, SIZE // 8, SIZE // 8, generator=g) for g in sources]
            extra = {"generator": sources} if scheduler == "lcm" else {}
            x = torch.stack(noise).to(self.device) * plan.init_noise_sigma
            context = self.encode(some)
            if guidance != 1:
                context = torch.cat([self.encode([""]).expand_as(context), context])
            for t in plan.timesteps:
                seen = plan.scale_model_input(x, t)
                seen = torch.cat([seen, seen]) if guidance != 1 else seen
                noise_now = self.unet(
                    seen.to(context.dtype), t.to(x.device), context
                ).sample.float()
                if guidance != 1:
                    plain, steered = noise_now.chunk(2)
                    noise_now = plain + guidance * (steered - plain)
                x = plan.step(noise_now, t, x, **extra).prev_sample
            pictures.append(self.vae.decode((x / SCALING_FACTOR).to(context.dtype)).sample.float())
        return torch.cat(pictures)


def _scheduler(name: str):
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler

    if name == "ddim":
        return DDIMScheduler(**SCHEDULE)
    shared = {k: v for k, v in SCHEDULE.items() if k not in ("clip_sample", "set_alpha_to_one")}
    if name == "dpmpp_2m":
        return DPMSolverMultistepScheduler(**shared, use_karras_sigmas=True)
    if name == "lcm":
        return LCMScheduler(**SCHEDULE)
    raise ValueError(f"expected ddim, dpmpp_2m or lcm, got {name!r}")
