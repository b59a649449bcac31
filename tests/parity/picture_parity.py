"""What two drawings of one picture are compared by, and what diffusers draws with.

Bars: latents' cosine 0.9999, pictures 40 dB PSNR; and, because a timestep that is off by one still
passes those, latents within 0.002.
"""

import numpy as np
import torch
from PIL import Image, ImageDraw

COSINE, PSNR, ERROR = 0.9999, 40.0, 0.002
BAR = f"cosine >= {COSINE}, PSNR > {PSNR:g} dB, max <= {ERROR}"


def cosine(ours, theirs) -> float:
    a, b = (np.asarray(array, np.float64).ravel() for array in (ours, theirs))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def psnr(ours, theirs) -> float:
    a, b = (np.asarray(image, np.float64) for image in (ours, theirs))
    return float(10 * np.log10(255**2 / max(np.square(a - b).mean(), 1e-6)))


def figures(result, latents, pictures) -> dict[str, float]:
    """The worst of a result's pictures against the reference's."""
    return {
        "max_error": float(np.abs(result.latents - latents).max()),
        "cosine": min(cosine(a, b) for a, b in zip(result.latents, latents, strict=True)),
        "psnr": min(psnr(a, b) for a, b in zip(result.images, pictures, strict=True)),
    }


def passes(found: dict[str, float]) -> bool:
    is_close = found["cosine"] >= COSINE and found["max_error"] <= ERROR
    return is_close and found["psnr"] > PSNR


def compare(record, name: str, result, latents, pictures) -> None:
    found = figures(result, latents, pictures)
    record(name, **found, bar=BAR)
    assert passes(found), f"{name}: {found}"


def nchw(array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(array), -1, 1)))


def decoded(pipeline, latents: torch.Tensor) -> list[Image.Image]:
    pixels = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return pipeline.image_processor.postprocess(pixels.detach(), output_type="pil")


def unit_noise(seed: int, count: int = 1, height: int = 16, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, height, width, 4), np.float32)


def photo() -> Image.Image:
    """A picture that the model can encode well enough: shapes in plain colours."""
    image = Image.new("RGB", (128, 128), (250, 220, 40))
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 30, 90, 100), fill=(200, 40, 30))
    draw.rectangle((70, 60, 118, 118), fill=(30, 90, 200))
    return image


def hole() -> Image.Image:
    mask = Image.new("L", (128, 128), 0)
    ImageDraw.Draw(mask).ellipse((40, 40, 110, 120), fill=255)
    return mask


def network(pipe, prompt: str, negative: str, scale: float):
    """diffusers' UNet under guidance: (latents at its scale, timestep) to a prediction."""
    wanted, avoided = pipe.encode_prompt(prompt, "cpu", 1, True, negative)
    context = torch.cat([avoided, wanted])

    def call(x, t):
        both = torch.cat([x, x]).float()
        times = torch.full((len(both),), t, dtype=torch.float32)
        contexts = context.repeat_interleave(len(x), 0)
        low, high = pipe.unet(both, times, contexts).sample.chunk(2)
        return (low + scale * (high - low)).to(x.dtype)

    return call
