"""The networks, as the papers draw them: plain modules, published parameter names, channels last.

Nothing here opens a file, prints, draws random numbers in a forward pass or evaluates: a call
builds a lazy MLX graph and returns. What makes the networks fast lies elsewhere.

Read in this order: layers, attention, resnet, then unet, vae, clip, taesd and controlnet;
clip_vision and ip_adapter for pictures as prompts.
"""

from mlx_maple.models.clip import CLIPTextConfig, CLIPTextEncoder, TextStates
from mlx_maple.models.clip_vision import CLIPVisionConfig, CLIPVisionEncoder, ImageStates
from mlx_maple.models.controlnet import ControlNet, ControlNetConfig
from mlx_maple.models.ip_adapter import IPAdapter, IPAdapterConfig
from mlx_maple.models.t2i_adapter import T2IAdapter, T2IAdapterConfig
from mlx_maple.models.taesd import TAESD, TAESDConfig
from mlx_maple.models.unet import UNet, UNetConfig
from mlx_maple.models.vae import AutoencoderKL, Moments, VAEConfig

__all__ = [
    "TAESD",
    "AutoencoderKL",
    "CLIPTextConfig",
    "CLIPTextEncoder",
    "CLIPVisionConfig",
    "CLIPVisionEncoder",
    "ControlNet",
    "ControlNetConfig",
    "IPAdapter",
    "IPAdapterConfig",
    "ImageStates",
    "Moments",
    "T2IAdapter",
    "T2IAdapterConfig",
    "TAESDConfig",
    "TextStates",
    "UNet",
    "UNetConfig",
    "VAEConfig",
]
