"""Make tests/golden/*.npz: what torch's reference implementations answer on the tiny networks.

    python tests/golden/make_golden.py

Needs torch, diffusers and transformers (`make parity` installs them); the tests that read the files
do not. Each file holds a network's outputs and a few inner states ("taps"), channels last, and the
versions that made them.
"""

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import recipe
import torch
import transformers
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

HERE = Path(__file__).parent
VERSIONS = {
    "torch": torch.__version__,
    "diffusers": diffusers.__version__,
    "transformers": transformers.__version__,
    "numpy": np.__version__,
    "python": platform.python_version(),
}
RENAMED = (  # torch's containers -> native names
    (".to_out.0.", ".to_out."),
    (".ff.net.0.proj.", ".ff.proj_in."),
    (".ff.net.2.", ".ff.proj_out."),
    ("text_model.", ""),
)


def fill(model: torch.nn.Module) -> None:
    """Give every parameter the recipe's value of its native name."""
    for name, parameter in model.named_parameters():
        native = name
        for theirs, ours in RENAMED:
            native = native.replace(theirs, ours)
        shape = tuple(parameter.shape)
        if len(shape) == 4:
            shape = (shape[0], *shape[2:], shape[1])
            if shape[1:3] == (1, 1):  # a 1x1 convolution is a Linear layer
                value = recipe.value(native, (shape[0], shape[3]))[:, :, None, None]
            else:
                value = recipe.value(native, shape).transpose(0, 3, 1, 2)
        else:
            value = recipe.value(native, shape)
        parameter.data = torch.from_numpy(np.ascontiguousarray(value))
    model.eval()


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    x = x.detach()
    return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).contiguous().numpy()


def tap(model: torch.nn.Module, names: dict[str, str], run: Callable[[], None]) -> dict:
    """Run, and return the outputs of the named submodules."""
    seen: dict[str, np.ndarray] = {}

    def hook(label: str) -> Callable[..., None]:
        def keep(module: object, args: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output
            seen[label] = nhwc(first)

        return keep

    handles = [
        model.get_submodule(name).register_forward_hook(hook(label))
        for label, name in names.items()
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


def clip(x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    facts = {k: v for k, v in recipe.CLIP.items() if v is not None}
    model = CLIPTextModel(CLIPTextConfig(**facts, bos_token_id=0, pad_token_id=95))
    fill(model)
    out = model(torch.from_numpy(x["ids"]), output_hidden_states=True)
    states = out.hidden_states
    return {
        "embedded": nhwc(states[0]),
        "after_layer_1": nhwc(states[1]),
        "penultimate": nhwc(states[-2]),
        "last": nhwc(out.last_hidden_state),
        "pooled": nhwc(out.pooler_output),
    }


def unet(x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    facts = dict(recipe.UNET)
    depths = facts.pop("transformer_layers")
    facts.pop("mid_transformer_layers")  # diffusers: that of the last level
    model = UNet2DConditionModel(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in facts.items() if "heads" not in k},
        attention_head_dim=tuple(facts["num_attention_heads"]),
        transformer_layers_per_block=tuple(depth or 1 for depth in depths),
        down_block_types=tuple("CrossAttnDownBlock2D" if d else "DownBlock2D" for d in depths),
        up_block_types=tuple("CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(depths)),
    )
    fill(model)
    answer: list[torch.Tensor] = []

    def run() -> None:
        args = nchw(x["latents"]), torch.from_numpy(x["timesteps"]), torch.from_numpy(x["context"])
        answer.append(model(*args).sample)

    names = {
        "time": "time_embedding",
        "conv_in": "conv_in",
        "mid": "mid_block",
        "before_norm": f"up_blocks.{len(depths) - 1}",
    }
    return tap(model, names, run) | {"output": nhwc(answer[0])}


def vae(x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    facts = dict(recipe.VAE)
    levels = len(facts["block_out_channels"])
    model = AutoencoderKL(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()},
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )
    fill(model)
    scale = facts["scaling_factor"]
    answer: dict[str, np.ndarray] = {}

    def encode() -> None:
        posterior = model.encode(nchw(x["images"])).latent_dist
        answer["mean"] = nhwc(posterior.mean) * np.float32(scale)
        answer["logvar"] = nhwc(posterior.logvar) + np.float32(2 * np.log(scale))

    def decode() -> None:
        answer["decoded"] = nhwc(model.decode(nchw(x["vae_latents"]) / scale).sample)

    taps = tap(model, {"encoder_mid": "encoder.mid_block"}, encode)
    taps |= tap(model, {"decoder_mid": "decoder.mid_block"}, decode)
    return taps | answer


def taesd(x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    widths = (recipe.TAESD["width"],) * 4
    model = AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths)
    fill(model)
    return {
        "latents": nhwc(model.encode(nchw(x["images"])).latents),
        "decoded": nhwc(model.decode(nchw(x["tiny_latents"])).sample),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE)
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
