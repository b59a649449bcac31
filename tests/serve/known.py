"""What the server's tests share: the tiny model, a quick drawing, and patience."""

import shutil
import time
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "data"
TINY = DATA / "tiny-model"
BASE = "http://127.0.0.1:7860"
# Two steps of a small picture: enough to be drawn, watched and told of.
QUICK = {"prompt": "a red maple leaf", "seed": 7, "steps": 2, "width": 64, "height": 64}


def put_networks(folder: Path) -> Path:
    """Lay a model and networks into ``folder``, as A1111 keeps them."""
    import tiny_model

    adapters, made = DATA / "adapters", tiny_model.folder()
    for source, place in (
        (adapters / "blueprint.safetensors", "Lora/blueprint.safetensors"),
        (adapters / "noctia.safetensors", "embeddings/noctia.safetensors"),
        (made / "model.safetensors", "Stable-diffusion/below/noisy.safetensors"),
        (made / "control.safetensors", "ControlNet/steer.safetensors"),
        (made / "vae.safetensors", "VAE/other.safetensors"),
    ):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / place)
    return folder


def wait_until(condition, seconds=60):
    """What ``condition`` gives, as soon as that is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found
