"""The recipe's networks in torch: the reference implementations, filled with the same values.

Imports torch, diffusers and transformers; only `make_golden.py` and the parity tests use it. The
renaming below is written by hand and short, so that the networks are compared without trusting the
converter's tables.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import recipe
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

RENAMED = (  # torch's containers -> native names
    (".to_out.0.", ".to_out."),
    (".ff.net.0.proj.", ".ff.proj_in."),
    (".ff.net.2.", ".ff.proj_out."),
    ("text_model.", ""),
)
Config = Mapping[str, Any]


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter the recipe's value of its native name."""
    parameters = {}
    for name, parameter in model.named_parameters():
        native = name
        for theirs, ours in RENAMED:
            native = native.replace(theirs, ours)
        shape = tuple(parameter.shape)
        if len(shape) == 4 and shape[2:] == (1, 1):  # a 1x1 convolution is a Linear layer
            value = recipe.value(native, shape[:2])[:, :, None, None]
        elif len(shape) == 4:
            value = recipe.value(native, (shape[0], *shape[2:], shape[1])).transpose(0, 3, 1, 2)
        else:
            value = recipe.value(native, shape)
        parameters[name] = torch.from_numpy(np.ascontiguousarray(value))
    model.load_state_dict(parameters, strict=False, assign=True)
    assert not any(p.is_meta for p in model.parameters())
    return model.eval().requires_grad_(False)


def clip(config: Config) -> torch.nn.Module:
    """CLIPTextModel, or the one with a projection, of a native text encoder config."""
    facts = {name: value for name, value in config.items() if value is not None}
    kind = CLIPTextModelWithProjection if "projection_dim" in facts else CLIPTextModel
    eos = facts["eos_token_id"]
    return fill(kind(CLIPTextConfig(**facts, bos_token_id=0, pad_token_id=eos)))


def unet(config: Config) -> torch.nn.Module:
    """UNet2DConditionModel of a native UNet config."""
    facts = _tuples(config)
    depths, heads = facts.pop("transformer_layers"), facts.pop("num_attention_heads")
    middle = facts.pop("mid_transformer_layers")
    # diffusers takes the middle's depth from the last level, whether or not that has transformers.
    assert middle == (depths[-1] or middle)
    crossed = [depth > 0 for depth in depths]
    return fill(
        UNet2DConditionModel(
            **facts,
            attention_head_dim=heads,
            transformer_layers_per_block=(*(depth or 1 for depth in depths[:-1]), middle),
            down_block_types=tuple(
                "CrossAttnDownBlock2D" if has else "DownBlock2D" for has in crossed
            ),
            up_block_types=tuple(
                "CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(crossed)
            ),
        )
    )


def vae(config: Config) -> torch.nn.Module:
    """AutoencoderKL of a native VAE config."""
    facts = _tuples(config)
    levels = len(facts["block_out_channels"])
    return fill(
        AutoencoderKL(
            **facts,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
        )
    )


def taesd(config: Config) -> torch.nn.Module:
    """AutoencoderTiny of a native TAESD config."""
    widths = (config["width"],) * 4
    return fill(
        AutoencoderTiny(
            latent_channels=config["latent_channels"],
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
        )
    )


def nchw(x: np.ndarray) -> torch.Tensor:
    """Channels last to torch's order."""
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    """A torch picture with its channels last; other tensors as they are."""
    x = x.detach()
    return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).contiguous().numpy()


def tap(
    model: torch.nn.Module, names: Mapping[str, str], run: Callable[[], object]
) -> dict[str, np.ndarray]:
    """Run, and return the outputs of the named submodules."""
    seen: dict[str, np.ndarray] = {}

    def hook(label: str) -> Callable[..., None]:
        def keep(module: object, args: object, output: Any) -> None:
            seen[label] = nhwc(output[0] if isinstance(output, tuple) else output)

        return keep

    handles = [
        model.get_submodule(name).register_forward_hook(hook(label))
        for label, name in names.items()
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


def _tuples(config: Config) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in config.items()}
