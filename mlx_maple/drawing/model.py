"""A model's networks, made ready for the device, and what is known of them."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_maple import enlarge
from mlx_maple.adapters import Adapters
from mlx_maple.conditioning import TextEncoders
from mlx_maple.control import control_name
from mlx_maple.drawing.results import Component, Info
from mlx_maple.engine import quantize
from mlx_maple.engine.compiled import made_ready
from mlx_maple.engine.low_memory import Networks, Reload
from mlx_maple.forms import PARTS, PLAIN, set_form
from mlx_maple.image_prompt import ENCODER, PREFIX, numbered
from mlx_maple.models import (
    TAESD,
    AutoencoderKL,
    CLIPTextEncoder,
    CLIPVisionEncoder,
    ControlNet,
    IPAdapter,
    T2IAdapter,
    UNet,
)
from mlx_maple.models.forms import Form
from mlx_maple.sampling import NoiseSchedule
from mlx_maple.text.prompt import encode_prompt
from mlx_maple.text.tokenizer import Tokenizer

READ_LATE = ("vae", "taesd")  # `load` leaves these to be read when they are first used
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
# What a model of the family does where its own files do not say.
DEFAULTS: dict[str, Any] = {
    "width": 512,
    "height": 512,
    "steps": 20,
    "guidance_scale": 7.5,
    "guidance_rescale": 0.0,
    "sampler": "dpmpp_2m",
    "schedule": "karras",
}


@dataclass(frozen=True, kw_only=True)
class Others:
    """What a model is to draw with from now on, where that is another than before.

    Attributes:
        networks: those that are new, by name, and what loads each anew.
        gone: names of those that it has no longer.
        control_names: of all that steer, in order: what people call each.
        vae_name: of an autoencoder from elsewhere, else "".
        latent_rgb_factors: that suit the autoencoder, or None.
    """

    networks: Mapping[str, tuple[nn.Module, Reload]]
    gone: Sequence[str]
    control_names: Mapping[str, str]
    vae_name: str
    latent_rgb_factors: Sequence[Sequence[float]] | None


class DiffusionModel:
    """The networks of a Stable Diffusion model, 1.x, 2.x or XL.

    Attributes:
        text_encoder: ids (B, 77) to states. SDXL's refiner has none.
        text_encoder_2: SDXL's second one; None in other families.
        text_encoders: all that the model has, with their tokenizers.
        unet: latents (B, h, w, C), timesteps (B,), context (B, T, D) to predictions (B, h, w, C).
        vae: pictures to scaled latents and back.
        taesd: a small autoencoder for previews, or None.
        configs: of each network by name; looking at them loads nothing.
        tokenizer: text to ids.
        noise_schedule: what the UNet was trained on.
        defaults: width, height, steps, guidance_scale, guidance_rescale, sampler and schedule of a
            plain call.
        latent_rgb_factors: of linear previews: C rows of RGB weights and a row of offsets, or None.
        ip_adapters: of each network that makes prompts of pictures, in order: what people call it.
        image_encoders: of each of these, the name of the network that looks at its pictures.
        control_names: of each network that steers, in order: what people call it.
        networks: all of them by name, held or to be loaded when they are asked for.
        adapters: LoRAs and learned words for them, or None.
        upscalers: what finds a network that enlarges pictures, or None.
        unet_name: of a UNet from elsewhere, else "".
        vae_name: of an autoencoder from elsewhere, else "".
        max_memory: bytes of MLX's in all, above which a GPU is waited for, or None.
        info: what is known of the model.
    """

    def __init__(
        self,
        *,
        text_encoder: CLIPTextEncoder | None,
        unet: UNet,
        vae: AutoencoderKL,
        tokenizer: Tokenizer,
        noise_schedule: NoiseSchedule,
        text_encoder_2: CLIPTextEncoder | None = None,
        taesd: TAESD | None = None,
        controlnets: Mapping[str, ControlNet | T2IAdapter] | None = None,
        ip_adapters: Mapping[str, tuple[IPAdapter, CLIPVisionEncoder]] | None = None,
        defaults: Mapping[str, Any] | None = None,
        latent_rgb_factors: Sequence[Sequence[float]] | None = None,
        name: str = "",
        sha256: str = "",
        unet_name: str = "",
        vae_name: str = "",
        family: str = "sd1",
        layout: str = "",
        notes: Sequence[str] = (),
        upscalers: Callable[[str], enlarge.Upscaler] | None = None,
        reload: Mapping[str, Reload] | None = None,
        renew: Mapping[str, Reload] | None = None,
        adapters: Adapters | None = None,
        compile: bool = True,
        max_memory: int | None = None,
        others: Callable[..., "Others"] | None = None,
    ) -> None:
        """Put a model together from its networks.

        Args:
            text_encoder: with its weights; SDXL's refiner has none.
            unet: with its weights.
            vae: with its weights.
            tokenizer: whose ids the text encoders know; each fills up with its own.
            noise_schedule: what the UNet was trained on and what it predicts.
            text_encoder_2: SDXL's second, with its weights.
            taesd: for previews.
            controlnets: what steers, by the name that people know it by.
            ip_adapters: what makes prompts of pictures, likewise, each with what looks at them.
            defaults: any of the settings in ``DEFAULTS``, as this model likes them.
            latent_rgb_factors: C rows of RGB weights and a row of offsets, for linear previews;
                None has them fitted to what is drawn, which costs some decodings.
            name: of the model, for pictures' settings.
            sha256: of its file, in hexadecimal.
            unet_name: of a UNet from elsewhere.
            vae_name: of an autoencoder from elsewhere.
            family: for ``info``.
            layout: for ``info``.
            notes: for ``info``.
            upscalers: what enlarges pictures, by its name or place; an OSError where there is none.
            reload: functions that load a network by name. With them the model is in low-memory
                mode: of those networks only the one in use is held, and what is given here needs
                no weights that were read.
            renew: functions that load a network by name once more, with whatever ``adapters`` has
                put on top of it by then.
            adapters: LoRAs and learned words for this model.
            compile: whether networks may be compiled; they are on a GPU where that works.
            max_memory: bytes of MLX's in all, above which a GPU is waited for; it stays an
                attribute. What one operation needs it takes; nothing is refused.
            others: what finds other networks for ``exchange``, with its arguments.
        """
        self.max_memory = max_memory
        self._others = others
        self.tokenizer = tokenizer
        self.noise_schedule = noise_schedule
        self.defaults = {**DEFAULTS, **(defaults or {})}
        self.latent_rgb_factors = latent_rgb_factors
        self.unet_name, self.vae_name = unet_name, vae_name
        self.upscalers = upscalers
        networks: dict[str, Any] = {
            "text_encoder": text_encoder,
            "text_encoder_2": text_encoder_2,
            "unet": unet,
            "vae": vae,
            "taesd": taesd,
        }
        self.control_names: dict[str, str] = {}
        for number, (known_as, network) in enumerate((controlnets or {}).items()):
            networks[part := control_name(number)] = network
            self.control_names[part] = known_as
        self.ip_adapters: dict[str, str] = {}
        self.image_encoders: dict[str, str] = {}
        for number, (known_as, (adapter, encoder)) in enumerate((ip_adapters or {}).items()):
            networks[part := numbered(PREFIX, number)] = adapter
            self.ip_adapters[part] = known_as
            # One that several adapters share is held once.
            held_as = next((n for n, m in networks.items() if m is encoder), None)
            place = numbered(ENCODER, len(set(self.image_encoders.values())))
            self.image_encoders[part] = held_as or place
            networks[self.image_encoders[part]] = encoder
        present = {part: module for part, module in networks.items() if module is not None}
        components = {part: _component(module) for part, module in present.items()}
        self._compiles = compile
        self._form = PLAIN  # that networks have just now
        self.worn_by: object = None  # the drawing whose LoRAs and words are put on just now
        self._thread = threading.current_thread()  # that what was not read yet is bound to
        self._has_moved = False  # from there to others: nothing is bound any longer
        reload = dict(reload or {})
        held = {n: m if n in reload else self._ready(n, m, False) for n, m in present.items()}
        reloads = {
            n: lambda n=n, load=load: self._ready(n, load(), True, True)
            for n, load in reload.items()
        }
        renewals = {
            n: lambda n=n, load=load: self._ready(n, load(), False, True)
            for n, load in (renew or {}).items()
        }
        self.networks = Networks(held, reloads, renewals)
        self.adapters = adapters
        self.configs = self.networks.configs
        self.text_encoders = TextEncoders(
            {
                part: tokenizer.padded_with(self.configs[part].pad_token_id)
                for part in TEXT_ENCODERS
                if part in present
            },
            self.networks.__getitem__,
            is_normed=self.configs["unet"].vector_channels is None,
        )
        self.info = Info(
            name=name,
            sha256=sha256,
            family=family,
            layout=layout,
            prediction=noise_schedule.prediction,
            parameters=sum(component.parameters for component in components.values()),
            bytes=sum(component.bytes for component in components.values()),
            width=self.defaults["width"],
            height=self.defaults["height"],
            components=components,
            notes=tuple(notes),
        )

    @property
    def text_encoder(self) -> CLIPTextEncoder:
        """Ids (B, 77) to states; in low-memory mode it is loaded when it is asked for."""
        if "text_encoder" not in self.networks:
            raise AttributeError("this model has no text_encoder: see text_encoder_2")
        return self.networks["text_encoder"]

    @text_encoder.setter
    def text_encoder(self, module: CLIPTextEncoder) -> None:
        self.networks["text_encoder"] = self._ready("text_encoder", module)

    @property
    def text_encoder_2(self) -> CLIPTextEncoder | None:
        """SDXL's second text encoder; None in other families."""
        return self.networks["text_encoder_2"] if "text_encoder_2" in self.networks else None

    @text_encoder_2.setter
    def text_encoder_2(self, module: CLIPTextEncoder) -> None:
        self.networks["text_encoder_2"] = self._ready("text_encoder_2", module)

    @property
    def unet(self) -> UNet:
        """Latents (B, h, w, C), timesteps (B,) and context (B, T, D) to predictions."""
        return self.networks["unet"]

    @unet.setter
    def unet(self, module: UNet) -> None:
        self.networks["unet"] = self._ready("unet", module)

    @property
    def vae(self) -> AutoencoderKL:
        """Pictures to scaled latents and back."""
        return self.networks["vae"]

    @vae.setter
    def vae(self, module: AutoencoderKL) -> None:
        self.networks["vae"] = self._ready("vae", module)

    @property
    def taesd(self) -> TAESD | None:
        """A small autoencoder for previews, or None."""
        return self.networks["taesd"] if "taesd" in self.networks else None

    @taesd.setter
    def taesd(self, module: TAESD | None) -> None:
        self.networks["taesd"] = self._ready("taesd", module)

    def _ready(
        self, part: str, network: Any, low_memory: bool | None = None, consumes: bool = False
    ) -> Any:
        """A network as the device that runs draws fastest with, in the form of the others."""
        if network is None:
            return None
        low_memory = self.networks.is_low_memory if low_memory is None else low_memory
        ready = made_ready(
            network, compiles=self._compiles, low_memory=low_memory, consumes=consumes
        )
        if part in PARTS and self._form != PLAIN:
            set_form(ready, self._form)
        if self._has_moved:
            mx.eval(ready.parameters())
        return ready

    @property
    def is_on_cpu(self) -> bool:
        """Whether MLX draws on the CPU just now."""
        return mx.default_device().type == mx.DeviceType.cpu

    @property
    def is_low_memory(self) -> bool:
        """Whether only the network in use is held."""
        return self.networks.is_low_memory

    def tokenize(self, text: str, *, syntax: str = "a1111") -> list[list[int]]:
        """Chunks of 77 ids, as the text encoder reads them; without tags, AND and changes."""
        return encode_prompt(self.tokenizer, text, syntax=syntax).ids

    def exchange(
        self,
        *,
        vae: str | Path | None = None,
        taesd: str | Path | None = None,
        controlnet: str | Path | Sequence[str | Path] | None = None,
    ) -> None:
        """Draw with these from now on, as if the model had been loaded with them; the rest stays.

        Args:
            vae: as ``load`` takes it; None is the one that the model is drawn with as a rule.
            taesd: likewise; None is the model's own, or none.
            controlnet: likewise; None is none.

        Raises:
            ValueError: the model was not made by ``load``.
            ConvertError: as ``load``; the model is as it was.
        """
        if self._others is None:
            raise ValueError("the networks of a model that `load` did not make stay as they are.")
        found = self._others(self.configs, vae=vae, taesd=taesd, controlnet=controlnet)
        components = dict(self.info.components)
        for part in found.gone:
            self.networks.exchange(part, None, None)
            del components[part]
        for part, (module, load) in found.networks.items():
            components[part] = _component(module)
            low = self.is_low_memory
            ready = module if low else self._ready(part, module, False)
            self.networks.exchange(
                part,
                ready,
                lambda part=part, load=load, low=low: self._ready(part, load(), low, True),
            )
        self.vae_name, self.latent_rgb_factors = found.vae_name, found.latent_rgb_factors
        self.control_names = dict(found.control_names)
        self.info = replace(
            self.info,
            components=components,
            parameters=sum(component.parameters for component in components.values()),
            bytes=sum(component.bytes for component in components.values()),
        )

    def come_here(self) -> None:
        """Draw in this thread, whichever loaded the model.

        MLX 0.32 lets an array be read by the one thread that described it. So a model that moves is
        described again here, but for what is in memory, and read whole from then on.
        """
        is_at_home = threading.current_thread() is self._thread
        if not (is_at_home or self._has_moved or self.is_low_memory):
            self._has_moved = True
            self.networks.drop(*READ_LATE)

    def set_form(self, form: Form) -> None:
        """Have the networks in a form from now on."""
        if form == self._form:
            return
        self._form = form
        for network in map(self.networks.held, PARTS):
            if network is not None:
                set_form(network, form)

    def dtype_of(self, part: str) -> mx.Dtype:
        """What the network of this name computes in."""
        return getattr(mx, self.info.components[part].dtype)


def _weights(module: nn.Module) -> list[mx.array]:
    found = tree_flatten(module.parameters())
    assert isinstance(found, list)
    return [weight for _, weight in found]


def _dtype(module: nn.Module) -> mx.Dtype:
    """What a module computes in."""
    return next(w.dtype for w in _weights(module) if mx.issubdtype(w.dtype, mx.floating))


def dtype_name(dtype: mx.Dtype) -> str:
    """Such as float16, without the module's name."""
    return str(dtype).rpartition(".")[2]


def _component(module: nn.Module) -> Component:
    weights = _weights(module)
    return Component(
        parameters=quantize.parameter_count(module),
        bytes=sum(weight.nbytes for weight in weights),
        dtype=dtype_name(_dtype(module)),
        bits=quantize.bits_of(module),
    )
