"""The same work on torch with diffusers, for `maple bench --against diffusers`.

Run as a script in a process of its own, never imported: it is the one file of the package that
needs torch, diffusers and transformers, and it imports nothing of ours. It prints one line of JSON
for each case, as soon as that is measured. Timing is as in mlx_maple/engine/measure.py.
"""

# Whoever has not got torch checks the rest.
# pyright: reportMissingImports=false

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

TOKENS = 77
TIMES = (937.0, 521.25, 41.0)
SCALING = 0.18215
STEPS = 20
GUIDANCE = 7.5


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def peak_bytes(device: str) -> int:
    """The most memory that torch held: of the device's own, or of the process on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if device == "mps":
        return torch.mps.driver_allocated_memory()  # torch keeps no peak there
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Networks:
    """SD 1.5's networks with random weights, each built when it is first asked for.

    Args:
        device: cuda, mps or cpu.
        dtype: of all weights.
        compiled: UNet and decoder under torch.compile and with channels last.
    """

    def __init__(self, device: str, dtype: torch.dtype, compiled: bool) -> None:
        self.device = device
        self.dtype = dtype
        self.compiled = compiled
        self._built: dict[str, Callable[..., Any]] = {}

    def __call__(self, part: str) -> Callable[..., Any]:
        """A part as a function: text_encoder, unet or vae (its decoder)."""
        if part not in self._built:
            self._built[part] = self._build(part)
        return self._built[part]

    def _build(self, part: str) -> Callable[..., Any]:
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                module = getattr(self, f"_{part}")()
        finally:
            torch.set_default_dtype(before)
        module = module.eval().requires_grad_(False)
        call = module.decode if part == "vae" else module
        if not self.compiled or part == "text_encoder":
            return call
        module.to(memory_format=torch.channels_last)
        mode = "reduce-overhead" if self.device == "cuda" else "default"
        return torch.compile(call, mode=mode, dynamic=False)

    def _unet(self) -> Any:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        return UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)

    def _xl(self) -> Any:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        config: dict[str, Any] = {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
            "up_block_types": (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }
        return UNet2DConditionModel(**config)

    def _vae(self) -> Any:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        config: dict[str, Any] = {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
            "sample_size": 512,
        }
        return AutoencoderKL(**config)

    def _text_encoder(self) -> Any:
        from transformers import CLIPTextConfig, CLIPTextModel

        return CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
            )
        )

    def channels_last(self, x: torch.Tensor) -> torch.Tensor:
        """A picture or its latents (B, C, h, w), laid out as the networks are."""
        return x.contiguous(memory_format=torch.channels_last) if self.compiled else x

    def random(self, *shape: int) -> torch.Tensor:
        """Numbers of unit variance."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)


def unet_call(networks: Networks, batch: int, size: int) -> Callable[[], Any]:
    """The UNet's part of a step: (B, 4, size / 8, size / 8)."""
    unet = networks("unet")
    latents = networks.channels_last(networks.random(batch, 4, size // 8, size // 8))
    context = networks.random(batch, TOKENS, 768)
    times = [torch.full((batch,), t, device=networks.device) for t in TIMES]
    count = 0

    def call() -> Any:
        nonlocal count
        count += 1
        return unet(latents, times[count % len(times)], context, return_dict=False)[0]

    return call


def xl_call(networks: Networks, batch: int, size: int) -> Callable[[], Any]:
    """The same of SDXL's UNet, with a pooled prompt and a picture's sizes."""
    unet = networks("xl")
    latents = networks.channels_last(networks.random(batch, 4, size // 8, size // 8))
    context, pooled = networks.random(batch, TOKENS, 2048), networks.random(batch, 1280)
    sizes = torch.tensor([[size, size, 0, 0, size, size]] * batch, device=networks.device)
    added = {"text_embeds": pooled, "time_ids": sizes.to(networks.dtype)}
    times = [torch.full((batch,), t, device=networks.device) for t in TIMES]
    count = 0

    def call() -> Any:
        nonlocal count
        count += 1
        time = times[count % len(times)]
        return unet(latents, time, context, added_cond_kwargs=added, return_dict=False)[0]

    return call


def vae_call(networks: Networks, batch: int, size: int) -> Callable[[], Any]:
    """Decoding (B, 4, size / 8, size / 8) to (B, 3, size, size)."""
    decode = networks("vae")
    latents = networks.channels_last(networks.random(batch, 4, size // 8, size // 8))
    return lambda: decode(latents, return_dict=False)[0]


def text_call(networks: Networks, batch: int, size: int) -> Callable[[], Any]:
    """A prompt and a negative prompt, one after the other."""
    encode = networks("text_encoder")
    ids = [torch.randint(0, 49000, (1, TOKENS), device=networks.device) for _ in range(2)]
    return lambda: [encode(one).last_hidden_state for one in ids]


def image_call(networks: Networks, batch: int, size: int) -> Callable[[], Any]:
    """A whole guided picture: text, steps of DPM-Solver++ 2M on Karras' levels, decoding, uint8."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    unet, decode = networks("unet"), networks("vae")
    text = text_call(networks, 1, size)

    def call() -> Any:
        scheduler = DPMSolverMultistepScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            use_karras_sigmas=True,
        )
        scheduler.set_timesteps(STEPS, device=networks.device)
        context = torch.cat(text())
        latents = networks.random(1, 4, size // 8, size // 8) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            both = networks.channels_last(scheduler.scale_model_input(torch.cat([latents] * 2), t))
            times = t.to(torch.float32).repeat(2)  # laid out as elsewhere: no second compilation
            avoided, wanted = unet(both, times, context, return_dict=False)[0].chunk(2)
            guided = avoided + GUIDANCE * (wanted - avoided)
            latents = scheduler.step(guided, t, latents, return_dict=False)[0]
        pixels = decode(networks.channels_last(latents / SCALING), return_dict=False)[0]
        pixels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).cpu().numpy()

    return call


CALLS = {"unet": unet_call, "xl": xl_call, "vae": vae_call, "text": text_call, "image": image_call}


def measure(
    call: Callable[[], Any], device: str, warm_up: int, runs: int, rows: int
) -> dict[str, float | int | None]:
    """Wait for each call, then for rows of calls; medians in seconds."""
    first: list[float] = []
    seconds: list[float] = []
    synchronise(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for taken, count in ((first, warm_up), (seconds, runs)):
        for _ in range(count):
            start = time.perf_counter()
            call()
            synchronise(device)
            taken.append(time.perf_counter() - start)
    in_a_row = []
    for _ in range(rows):
        start = time.perf_counter()
        for _ in range(runs):
            call()
        synchronise(device)
        in_a_row.append((time.perf_counter() - start) / runs)
    return {
        "median_s": statistics.median(seconds),
        "fastest_s": min(seconds),
        "slowest_s": max(seconds),
        "in_a_row_s": statistics.median(in_a_row) if in_a_row else None,
        "first_s": first[0] if first else None,
        "runs": len(seconds),
        "peak_bytes": peak_bytes(device),
    }


def parse_case(case: str) -> tuple[str, int, int]:
    """``unet-512-b2`` is (unet, 512, 2); a part that is left out is 512 and 1."""
    words = case.split("-")
    sizes = [int(word) for word in words[1:] if word.isdigit()]
    batches = [int(word[1:]) for word in words[1:] if word.startswith("b")]
    return words[0], (sizes or [512])[0], (batches or [1])[0]


def main() -> None:
    """Measure the named cases in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"))
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rows", type=int, default=3)
    args = parser.parse_args()
    device = args.device
    if device is None:
        is_mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if is_mps else "cpu"
    dtype = args.dtype or ("float32" if device == "cpu" else "float16")
    networks = Networks(device, getattr(torch, dtype), args.compiled)
    for case in args.cases:
        kind, size, batch = parse_case(case)
        row: dict[str, Any] = {"case": case, "device": device, "dtype": dtype}
        try:
            with torch.inference_mode():
                call = CALLS[kind](networks, batch, size)
                row |= measure(call, device, args.warm_up, args.runs, args.rows)
        except Exception as error:  # one case's end is not that of the others
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
