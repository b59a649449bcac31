"""Make tests/golden/*.npz: what torch's reference implementations answer on the tiny networks.

    python tests/golden/make_golden.py

Needs torch, diffusers and transformers (`make parity` installs them); the tests that read the files
do not. Each file holds a network's outputs and a few inner states ("taps"), channels last, and the
versions that made them.
"""

import argparse
import json
import platform
from pathlib import Path

import diffusers
import numpy as np
import recipe
import reference
import torch
import transformers
from reference import nchw, nhwc, tap

VERSIONS = {
    "torch": torch.__version__,
    "diffusers": diffusers.__version__,
    "transformers": transformers.__version__,
    "numpy": np.__version__,
    "python": platform.python_version(),
}
Arrays = dict[str, np.ndarray]


def clip(x: Arrays) -> Arrays:
    out = reference.clip(recipe.CLIP)(torch.from_numpy(x["ids"]), output_hidden_states=True)
    return {
        "embedded": nhwc(out.hidden_states[0]),
        "after_layer_1": nhwc(out.hidden_states[1]),
        "penultimate": nhwc(out.hidden_states[-2]),
        "last": nhwc(out.last_hidden_state),
        "pooled": nhwc(out.pooler_output),
    }


def unet(x: Arrays) -> Arrays:
    model = reference.unet(recipe.UNET)
    answer: Arrays = {}

    def run() -> None:
        args = nchw(x["latents"]), torch.from_numpy(x["timesteps"]), torch.from_numpy(x["context"])
        answer["output"] = nhwc(model(*args).sample)

    names = {
        "time": "time_embedding",
        "conv_in": "conv_in",
        "mid": "mid_block",
        "before_norm": f"up_blocks.{len(recipe.UNET['block_out_channels']) - 1}",
    }
    return tap(model, names, run) | answer


def vae(x: Arrays) -> Arrays:
    model = reference.vae(recipe.VAE)
    scale = recipe.VAE["scaling_factor"]
    answer: Arrays = {}

    def encode() -> None:
        posterior = model.encode(nchw(x["images"])).latent_dist
        answer["mean"] = nhwc(posterior.mean * scale)
        answer["logvar"] = nhwc(posterior.logvar + 2 * np.log(scale))

    def decode() -> None:
        answer["decoded"] = nhwc(model.decode(nchw(x["vae_latents"]) / scale).sample)

    taps = tap(model, {"encoder_mid": "encoder.mid_block"}, encode)
    taps |= tap(model, {"decoder_mid": "decoder.mid_block"}, decode)
    return taps | answer


def taesd(x: Arrays) -> Arrays:
    model = reference.taesd(recipe.TAESD)
    return {
        "latents": nhwc(model.encode(nchw(x["images"])).latents),
        "decoded": nhwc(model.decode(nchw(x["tiny_latents"])).sample),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().output
    torch.set_num_threads(1)
    with torch.no_grad():
        for make in (clip, unet, vae, taesd):
            arrays = make(recipe.inputs())
            path = folder / f"{make.__name__}.npz"
            np.savez_compressed(path, versions=np.array(json.dumps(VERSIONS)), **arrays)
            print(f"{path}: {path.stat().st_size} bytes")
            for name, array in arrays.items():
                print(f"  {name} {array.shape} std {array.std():.3f}")


if __name__ == "__main__":
    main()
