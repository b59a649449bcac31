"""Low-rank differences (LoRA): learned beside a network, stored under kohya's names, merged.

A file holds, for each matrix or convolution `a.b.c` of a diffusers UNet, `lora_unet_a_b_c` with
.lora_down.weight (rank, in[, kh, kw]), .lora_up.weight (out, rank[, 1, 1]) and .alpha; the weight
becomes weight + alpha / rank * up @ down.
Source   Hu et al. 2021 (arXiv:2106.09685); names and convolutions as in kohya-ss/sd-scripts.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def matrices(net: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that take a difference, by kohya's name: every matrix and convolution."""
    return {
        "lora_unet_" + name.removesuffix(".weight").replace(".", "_"): p
        for name, p in net.named_parameters()
        if p.ndim in (2, 4)
    }


class LowRank(nn.Module):
    """One difference for each matrix of a network; alpha equals the rank."""

    def __init__(self, net: nn.Module, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.targets = matrices(net)
        self.base = [p.detach().clone() for p in self.targets.values()]
        self.down = nn.ParameterList(
            torch.randn(rank, p[0].numel(), device=p.device) * p[0].numel() ** -0.5
            for p in self.base
        )
        self.up = nn.ParameterList(torch.zeros(len(p), rank, device=p.device) for p in self.base)

    def _merged(self) -> list[Tensor]:
        parts = zip(self.base, self.up, self.down, strict=True)
        return [base + (up @ down).view_as(base) for base, up, down in parts]

    @torch.no_grad()
    def merge(self) -> None:
        """Write base plus difference into the network."""
        torch._foreach_copy_(list(self.targets.values()), self._merged())

    def backward(self) -> None:
        """Turn the gradients on the network's weights into the factors'."""
        torch.autograd.backward(self._merged(), [p.grad for p in self.targets.values()])

    def save(self, path: Path, metadata: dict[str, str]) -> None:
        """Write the file in float16."""
        tensors = {}
        for (name, p), up, down in zip(self.targets.items(), self.up, self.down, strict=True):
            point = (1,) * (p.ndim - 2)
            tensors |= {
                f"{name}.lora_down.weight": down.view(self.rank, *p.shape[1:]),
                f"{name}.lora_up.weight": up.view(*up.shape, *point),
                f"{name}.alpha": torch.tensor(float(self.rank)),
            }
        tensors = {k: v.detach().half().cpu().contiguous() for k, v in tensors.items()}
        save_file(tensors, path, metadata)


@torch.no_grad()
def merge_file(net: nn.Module, path: Path) -> None:
    """Add the differences of a file to a network's weights.

    Raises:
        KeyError: the file names a weight that the network has not.
    """
    tensors, targets = load_file(path), matrices(net)
    for name in sorted({key.partition(".")[0] for key in tensors}):
        down, up = (tensors[f"{name}.lora_{side}.weight"].float() for side in ("down", "up"))
        gain = tensors[f"{name}.alpha"].item() / len(down)
        p = targets[name]
        p += (gain * up.flatten(1) @ down.flatten(1)).view_as(p).to(p)
