"""From a path or a hub name to modules: the only file that imports maple_convert.

Two roads, one end. A maple folder is read lazily with ``mx.load``. Anything else is a raw
checkpoint: on the first start it becomes a maple folder in the cache, its twin, which takes the
first road from then on; without a cache that can be written it is read through maple_convert, one
tensor at a time. The end is strict: names, shapes and types of the weights must be the modules'
own, both ways. Layout is what the plan or the folder's format declares, never a guess.
"""

import gc
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from maple_convert import Component, SourceModel, convert, open_model
from maple_convert.errors import (
    InvalidCheckpoint,
    LayoutMismatch,
    UnreadableFile,
    UnsupportedCheckpoint,
)
from maple_convert.layouts.diffusers_config import (
    PREDICTIONS,
    SDXL_SCALING_FACTOR,
    UNKNOWN,
)
from maple_convert.layouts.lora import FAMILIES
from maple_convert.recommend import recommended
from maple_convert.tensors import Tensor
from mlx_maple import hub, image_encoders, known_models, model_folders, twins, upscalers
from mlx_maple.adapter_files import AdapterFiles
from mlx_maple.adapters import Adapters
from mlx_maple.control import control_name
from mlx_maple.drawing.model import Others
from mlx_maple.engine import quantize as quantizing
from mlx_maple.engine import reading
from mlx_maple.engine.attention import in_chunks
from mlx_maple.engine.low_memory import Reload, set_environment
from mlx_maple.engine.tiling import in_stripes
from mlx_maple.hub import HubError, Progress
from mlx_maple.image_prompt import ENCODER, PREFIX, numbered
from mlx_maple.known_models import KnownModel
from mlx_maple.metadata import check_number
from mlx_maple.models import (
    TAESD,
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextEncoder,
    CLIPVisionConfig,
    CLIPVisionEncoder,
    ControlNet,
    ControlNetConfig,
    IPAdapter,
    IPAdapterConfig,
    T2IAdapter,
    T2IAdapterConfig,
    TAESDConfig,
    UNet,
    UNetConfig,
    VAEConfig,
)
from mlx_maple.models.unet import attention_channels
from mlx_maple.pipeline import TEXT_ENCODERS, StableDiffusion
from mlx_maple.predictions import seen_prediction
from mlx_maple.sampling import SAMPLERS, SCHEDULES, NoiseSchedule
from mlx_maple.text.tokenizer import Tokenizer, VocabularyError
from mlx_maple.twins import Twin, twins_folder

DEMO = Path(__file__).resolve().parent / "demo"  # the embedded model, where the package has one
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
# What each family's models are made of; all others as "".
REQUIRED = {
    "": ("text_encoder", "unet", "vae"),
    "sdxl": ("text_encoder", "text_encoder_2", "unet", "vae"),
    "sdxl-refiner": ("text_encoder_2", "unet", "vae"),
}
READ_LATER = ("vae", "taesd")  # when they are first used
EXCHANGED = ("vae", "taesd")  # beside what steers: a model can be given others later
V_PREDICTION_SIZE = 768  # of SD 2.x, which predicts v at this size only

_MODULES: dict[str, tuple[type, Callable[[Any], nn.Module]]] = {
    "text_encoder": (CLIPTextConfig, CLIPTextEncoder),
    "text_encoder_2": (CLIPTextConfig, CLIPTextEncoder),
    "unet": (UNetConfig, UNet),
    "vae": (VAEConfig, AutoencoderKL),
    "taesd": (TAESDConfig, TAESD),
    "controlnet": (ControlNetConfig, ControlNet),
    "t2i_adapter": (T2IAdapterConfig, T2IAdapter),
    "image_encoder": (CLIPVisionConfig, CLIPVisionEncoder),
    "ip_adapter": (IPAdapterConfig, IPAdapter),
}
_STEERS = ("controlnet", "t2i_adapter")  # of no use as a part of a model
# What a network of its own file is given as.
_OPTIONS = {
    "unet": "--unet",
    "vae": "--vae",
    "taesd": "--vae",
    "controlnet": "--controlnet",
    "t2i_adapter": "--controlnet",
    "image_encoder": "--ip-encoder",
    "ip_adapter": "--ip-adapter",
}
_STAND_INS = {
    "vae": "taesd",
    "controlnet": "t2i_adapter",
}  # what may take a network's place, where the file holds none


class NoModel(Exception):
    """No model was named, or none is where the name says; one line with what to do."""

    def __init__(self, message: str, exit_code: Literal[1, 2]) -> None:
        self.exit_code = exit_code
        super().__init__(message)


@dataclass
class _Found:
    """A source made out: what to open and what to say of it.

    Attributes:
        path: a file or folder that is there.
        name: what pictures will call the model.
        variant: which files of a folder.
        notes: what happened on the way.
        is_finite: whether a conversion has already looked at every value in the run's dtype.
        known: its entry in the table of short names.
    """

    path: Path
    name: str
    variant: str | None = None
    notes: list[str] = field(default_factory=list)
    is_finite: bool = True
    known: KnownModel | None = None


def load(
    source: str | Path | None = None,
    *,
    dtype: str | mx.Dtype | None = None,
    quantize: int | None = None,
    low_memory: bool = False,
    max_memory: int | None = None,
    unet: str | Path | None = None,
    vae: str | Path | None = None,
    taesd: str | Path | None = None,
    controlnet: str | Path | Sequence[str | Path] | None = None,
    ip_adapter: str | Path | Sequence[str | Path] | None = None,
    ip_encoder: str | Path | None = None,
    loras: Any = (),
    embeddings: Iterable[str | Path] = (),
    compile: bool = True,
    variant: str | None = None,
    ema: bool = False,
    prediction: str | None = None,
    cache: bool = True,
    local_files_only: bool = False,
    progress: Progress | None = None,
) -> StableDiffusion:
    """Load a model to draw with.

    The autoencoder is read when it is first used. A model may draw in any thread, in one at a time;
    a thread that has drawn ends with ``mx.clear_streams()``.

    Args:
        source: a checkpoint file, a diffusers folder, a maple folder, a checkpoint's name in the
            models' folders (``model_folders``), a hub name: "owner/name", "owner/name@revision",
            "owner/name:file.safetensors", or a short name such as "sd15" (``known_models``). None
            is the embedded model, "demo".
        dtype: of weights and activations; None is float16 on a GPU and float32 on the CPU, where
            16-bit matrix products are slow.
        quantize: 8 or 4: the bits in which the weights of the text encoder and the UNet are kept;
            None keeps them as they are stored, which may be quantised.
        low_memory: hold only the network that is in use, draw guidance halves one after the other
            and decode in stripes: less memory, the same pictures, more time.
        max_memory: bytes of MLX's above which a drawing waits for the GPU; None is as many as do
            not cost time.
        unet: take the UNet from here instead, named likewise: a bare one, as GGUF files mostly hold
            and distilled ones are published, or another whole model's. What shows how a UNet is
            drawn with, shows it here too: its name, its config.
        vae: take the autoencoder from here instead, named as ``source`` is, or as it is called in
            the models' folders (``model_folders``). A TAESD will do: quick, and less exact.
        taesd: take a small autoencoder for previews from here.
        controlnet: networks that steer drawings by a picture, named likewise: one, or a list;
            ControlNets or T2I-Adapters.
        ip_adapter: networks that make prompts of pictures, named likewise: one, or a list.
        ip_encoder: the CLIP image encoder that looks at them; None looks beside the adapter, in
            the models' folders and, where it is a published one, on the hub.
        loras: that every drawing has unless it says otherwise; see ``StableDiffusion.generate``.
        embeddings: files of learned words (textual inversions), or their names in the models'
            folders; words of those folders are also found when a prompt has them.
        compile: whether the UNet's step may be compiled, which it is on a GPU where that works.
        variant: of a diffusers folder's weights, such as "fp16"; None takes what suits ``dtype``.
        ema: use the EMA copy of the UNet's weights; the file that it is from must hold one.
        prediction: what the UNet predicts, "epsilon" or "v_prediction"; None is what the files say,
            and where they do not, what the UNet is seen to do.
        cache: keep the converted twin of a raw checkpoint, and use it.
        local_files_only: use the hub's cache and no network.
        progress: called with bytes done, bytes in all and a label, at downloads and conversions.

    Raises:
        ConvertError: the file cannot be used, or not be read; see maple_convert.errors.
        HubError: the hub could not be reached, or refuses.
        NoModel: nothing is there by that name.
        ValueError: an unknown ``dtype`` or ``prediction``, or ``quantize`` to other bits.
    """
    name = dtype_name(dtype)
    if prediction not in (None, *PREDICTIONS):
        known = " or ".join(PREDICTIONS)
        raise ValueError(f"[load] prediction must be {known}, got {prediction!r}.")
    if quantize is not None and quantize not in quantizing.BITS:
        raise ValueError(f"[load] quantize must be 8 or 4, got {quantize!r}.")
    # A model that was let go of may still be there: its UNet and the steps that were compiled of it
    # know of each other. 10 ms, against two models in memory.
    gc.collect()
    if low_memory:
        set_environment()

    def find(what: str | Path | None, variant: str | None, kind: str = "") -> _Found:
        if kind in model_folders.KINDS and isinstance(what, str) and not _exists(what):
            what = model_folders.find(kind, what) or what
        return _find(what, name, variant, local_files_only, progress)

    found = find(source, variant, "checkpoint")
    if vae is None:
        vae = _known_vae(found, name)
    given = {"unet": unet, "vae": vae, "taesd": taesd}
    replaced = {part: other for part, other in given.items() if other}
    own_ema = ema and "unet" not in replaced
    with _open(found, name, ema=own_ema, cache=cache, progress=progress) as model:
        if lacking := [part for part in _lacking(model) if part not in replaced]:
            raise _not_whole(found.path, model, lacking)
        if found.known is not None:
            model.defaults |= found.known.settings
        notes = [*found.notes, *model.notes]
        own = {
            part: _Source(_reopening(model, found, own_ema), found, part)
            for part in model.components
            if part not in _STEERS
        }
        sources = {part: origin for part, origin in own.items() if part not in replaced}
        wanted = [(part, part, other) for part, other in replaced.items()]
        several = [controlnet] if isinstance(controlnet, str | Path) else controlnet or ()
        wanted += [(control_name(i), "controlnet", other) for i, other in enumerate(several)]
        names: dict[str, str] = {}
        for part, kind, other in wanted:
            elsewhere = find(other, None, kind)
            notes += elsewhere.notes
            own_ema = ema and part == "unet"
            sources[part] = _elsewhere(elsewhere, kind, model.family, ema=own_ema)
            names[part] = elsewhere.name
        if "unet" in replaced:
            notes += _take_unet(model, sources["unet"])
        looked_at = _image_prompts(ip_adapter, ip_encoder, find, sources, names, notes)
        configs = {part: component.config for part, component in model.components.items()}
        fetch = partial(_adapter_of_hub, local_files_only=local_files_only, progress=progress)
        adapters = AdapterFiles(configs, fetch).adapters(embeddings)
        notes += adapters.stand(loras)
        how = _How(name, quantize, low_memory, adapters.fold)
        modules: dict[str, nn.Module] = {}
        for part, origin in sources.items():
            with nullcontext(model) if origin.found is found else origin.open() as opened:
                modules[part] = origin.built(opened, how, is_skeleton=low_memory)
        _check_fit(found.path, modules, {part: o.found.path for part, o in sources.items()})
        again: dict[str, Reload] = {part: partial(o.load, how) for part, o in sources.items()}
        if not low_memory:
            modules = {part: o.ready(modules[part], how) for part, o in sources.items()}
        if prediction is not None:
            model.prediction = prediction
        elif model.prediction == UNKNOWN:
            shown = again["unet"]() if low_memory else modules["unet"]
            _see_prediction(model, cast(UNet, shown), notes)
            del shown
        loads = {"reload" if low_memory else "renew": again}
        given: dict[str, Any] = {"compile": compile, "max_memory": max_memory, **loads}
        given["ip_adapters"] = _ip_adapters(modules, names, looked_at)
        given["others"] = _Exchange(
            find=find,
            how=how,
            own=own,
            now=sources,
            family=model.family,
            usual_vae=_known_vae(found, name),
            latent_rgb_factors=model.latent_rgb_factors,
        )
        return _assemble(model, modules, found, names, notes, adapters, **given)


def _image_prompts(
    given: str | Path | Sequence[str | Path] | None,
    encoder: str | Path | None,
    find: Callable[..., _Found],
    sources: dict[str, "_Source"],
    names: dict[str, str],
    notes: list[str],
) -> dict[str, str]:
    """Add the IP-Adapters and their image encoders to what is loaded.

    Returns:
        Of each adapter, in order, the name of the network that looks at its pictures.
    """
    several = [given] if isinstance(given, str | Path) else given or ()
    if encoder is not None and not several:
        raise ValueError("[load] ip_encoder goes with an ip_adapter, and none is given.")
    found: dict[str, str] = {}
    encoders: dict[Path, str] = {}  # by place; one may serve several
    for number, what in enumerate(several):
        adapter = find(what, None, "ip_adapter")
        origin = _Source(_opening(adapter), adapter, "ip_adapter")
        with origin.open() as opened:
            config = origin.component(opened).config
        named = encoder if encoder is not None else image_encoders.find(adapter.path, config)
        looks = find(named, None, "clip_vision")
        with open_model(looks.path, variant=looks.variant) as opened:
            image_encoders.check(looks.path, opened, adapter.path, config)
        part = numbered(PREFIX, number)
        if looks.path not in encoders:
            encoders[looks.path] = numbered(ENCODER, len(encoders))
            sources[encoders[looks.path]] = _Source(_opening(looks), looks, "image_encoder")
            notes += [*looks.notes, f"{adapter.name} looks at pictures with {looks.path}"]
        sources[part], names[part] = origin, adapter.name
        notes += adapter.notes
        found[part] = encoders[looks.path]
    return found


@dataclass
class _Exchange:
    """Finds other networks for a model that was loaded, as ``StableDiffusion.exchange`` asks.

    Attributes:
        find: makes out a source.
        how: the model was loaded.
        own: where the networks are that its own files hold.
        now: where those are from that it has.
        family: of the model.
        usual_vae: the autoencoder that it is best drawn with, or None for its own.
        latent_rgb_factors: that suit its own.
    """

    find: Callable[[Any, None, str], _Found]
    how: "_How"
    own: Mapping[str, "_Source"]
    now: dict[str, "_Source"]
    family: str
    usual_vae: str | None
    latent_rgb_factors: Sequence[Sequence[float]] | None

    def __call__(
        self, configs: Mapping[str, Any], *, vae: Any, taesd: Any, controlnet: Any
    ) -> Others:
        """What to draw with from now on, built and read; ``configs`` are of what there is now."""
        several = [controlnet] if isinstance(controlnet, str | Path) else controlnet or ()
        asked = {"vae": vae or self.usual_vae, "taesd": taesd}
        asked |= {control_name(number): other for number, other in enumerate(several)}
        wanted, names = dict(self.now), {}
        for part in [p for p in wanted if p in EXCHANGED or p.startswith(control_name(0))]:
            del wanted[part]
        for part, other in asked.items():
            if other:
                kind = part if part in EXCHANGED else "controlnet"
                elsewhere = self.find(other, None, kind)
                names[part] = elsewhere.name
                wanted[part] = _elsewhere(elsewhere, kind, self.family)
            elif part in self.own:
                wanted[part] = self.own[part]
        if "vae" not in wanted:
            raise UnsupportedCheckpoint(self.now["unet"].found.path, "holds no vae: name one")
        new = {p: o for p, o in wanted.items() if not _is_same(o, self.now.get(p))}
        modules: dict[str, nn.Module] = {}
        for part, origin in new.items():
            with origin.open() as opened:
                modules[part] = origin.built(opened, self.how, is_skeleton=self.how.low_memory)
        shown: dict[str, Any] = {
            part: SimpleNamespace(config=configs[part])
            for part in ("unet", *EXCHANGED)
            if part in wanted and part not in modules
        }
        _check_fit(
            wanted["vae"].found.path,
            {**shown, **modules},
            {part: origin.found.path for part, origin in wanted.items()},
        )
        if not self.how.low_memory:
            modules = {part: new[part].ready(modules[part], self.how) for part in modules}
        gone = [part for part in self.now if part not in wanted]
        self.now = wanted
        controls = [part for part in wanted if part.startswith(control_name(0))]
        return Others(
            networks={p: (modules[p], partial(new[p].load, self.how)) for p in modules},
            gone=gone,
            control_names=_numbered({part: names[part] for part in controls}),
            vae_name=names.get("vae", ""),
            latent_rgb_factors=None if "vae" in names else self.latent_rgb_factors,
        )


def _is_same(one: "_Source", other: "_Source | None") -> bool:
    return other is not None and (one.found.path, one.part) == (other.found.path, other.part)


def _numbered(names: Mapping[str, str]) -> dict[str, str]:
    """What people call each network; a second of a name is numbered."""
    found: dict[str, str] = {}
    for part, name in names.items():
        taken = name in found.values()
        found[part] = f"{name} ({len(found) + 1})" if taken else name
    return found


def _lacking(model: SourceModel) -> list[str]:
    """The networks that a whole model of the family has and this one has not."""
    family = model.family
    parts = REQUIRED.get(family, REQUIRED.get(family.partition("-")[0], REQUIRED[""]))
    return [part for part in parts if part not in model.components]


def _not_whole(path: Path, model: SourceModel, lacking: Sequence[str]) -> UnsupportedCheckpoint:
    """What is missing, and by which option the rest is added."""
    there = list(model.components)
    advice = ""
    if len(there) == 1 and (option := _OPTIONS.get(there[0])):
        advice = f"; draw with a whole one and give this as its {option}"
    elif len(lacking) == 1 and (option := _OPTIONS.get(lacking[0])):
        advice = f"; {option} takes one from elsewhere"
    missing = " and no ".join(lacking)
    return UnsupportedCheckpoint(
        path, f"holds {', '.join(there)} but no {missing}: not a whole model{advice}"
    )


def _take_unet(model: SourceModel, origin: "_Source") -> list[str]:
    """Make ``model`` what it is with another UNet: of its family, drawn with as it likes.

    What a whole model says of its UNet holds. A bare UNet says little: the rest stays as it was,
    and where it seems to predict something else, what it predicts is looked at.

    Returns:
        One sentence for each thing that was settled.

    Raises:
        UnsupportedCheckpoint: there is no UNet, or one that takes other text.
    """
    with origin.open() as other:
        component = origin.component(other)
        path, family, notes = origin.found.path, other.family, list[str]()
        origin.found.is_finite = other.layout != "maple"
        if not _lacking(other):
            for what in ("prediction", "scheduler", "scheduler_class", "alphas_cumprod"):
                setattr(model, what, getattr(other, what))
            model.defaults |= other.defaults
        else:
            key = "rescale_zero_terminal_snr"
            model.scheduler[key] = model.scheduler[key] or other.scheduler[key]
            if other.alphas_cumprod is not None:
                model.alphas_cumprod = other.alphas_cumprod
            if other.prediction != model.prediction:
                model.prediction = UNKNOWN
            settings, notes = recommended(
                path,
                component.config,
                scheduler=other.scheduler,
                scheduler_class=other.scheduler_class,
            )
            model.defaults |= settings
        if origin.found.known is not None:
            model.defaults |= origin.found.known.settings
        model.components["unet"], model.family = component, family
    texts = [model.components[part].config for part in TEXT_ENCODERS if part in model.components]
    context, width = component.config["cross_attention_dim"], sum(t["hidden_size"] for t in texts)
    lacking = [part for part in _lacking(model) if part in TEXT_ENCODERS]
    if lacking or width != context:
        reason = f"its context is {context} wide and that model's text {width}"
        raise UnsupportedCheckpoint(
            path, f"is the UNet of another family than {model.path}: {reason}"
        )
    return notes


def _see_prediction(model: SourceModel, unet: UNet, notes: list[str]) -> None:
    """Settle what the UNet predicts where the files do not say: look at what it does."""
    model.prediction, share = seen_prediction(unet, unet.config)
    does = "repeats" if model.prediction == "epsilon" else "does not repeat"
    notes.append(
        f"the file does not say what the UNet predicts: it {does} noise that it is shown "
        f"(correlation {share:.2f}), so {model.prediction}"
    )
    sizes = [model.defaults.get(side) for side in ("width", "height")]
    if model.prediction == "v_prediction" and sizes == [512, 512]:
        model.defaults |= {"width": V_PREDICTION_SIZE, "height": V_PREDICTION_SIZE}


def default_dtype() -> str:
    """float16 on a GPU; float32 on the CPU, where 16-bit matrix products are slow."""
    on_cpu = mx.default_device() == mx.Device(mx.DeviceType.cpu)
    return "float32" if on_cpu else "float16"


def dtype_name(dtype: str | mx.Dtype | None) -> str:
    """The name of a dtype that weights can have.

    Raises:
        ValueError: for any other.
    """
    if dtype is None:
        return default_dtype()
    for name, known in DTYPES.items():
        if dtype in (name, known):
            return name
    raise ValueError(f"[load] dtype must be one of {', '.join(DTYPES)}, got {dtype}.")


# Which source is meant ------------------------------------------------------------------------


def _find(
    source: str | Path | None,
    dtype: str,
    variant: str | None,
    local_files_only: bool,
    progress: Progress | None,
) -> _Found:
    """A path that exists wins over a name; what is neither is an error."""
    if source is None:
        return _Found(_demo(), "demo", notes=[_full_size_hint()])
    path = _expanded(Path(source))
    try:
        exists = path.exists()
    except OSError as error:  # a name too long, a folder on the way that may not be entered
        raise UnreadableFile(path, error.strerror or "cannot be read") from error
    if exists and str(source):
        return _Found(path, path.stem if path.is_file() else path.resolve().name, variant)
    known = known_models.find(source) if isinstance(source, str) else None
    if known is not None and known.hub is None:
        return _Found(_demo(), known.name)
    name = known.hub if known is not None else source
    name = hub.parse_name(name) if isinstance(name, str) else None
    if name is None:
        raise NoModel(f"{source}: no such file or folder{_if_a_name(source)}", 1)
    path, choice, notes = hub.fetch(
        name,
        dtype=dtype,
        variant=variant,
        local_files_only=local_files_only,
        progress=progress,
    )
    chosen = None if choice.single else variant or choice.variant
    known = known if known is not None or name.file else known_models.of_repo(name.repo)
    return _Found(path, name.repo.partition("/")[2], chosen, notes, known=known)


def _adapter_of_hub(name: str, **options: Any) -> Path | None:
    """One file of the hub: "owner/name:file.safetensors", a repository's only one, a known one."""
    known = known_models.find(name)
    parsed = hub.parse_name(known.hub if known is not None and known.hub is not None else name)
    if parsed is None:
        return None
    path, _, _ = hub.fetch(parsed, **options)
    if not path.is_file():
        raise UnsupportedCheckpoint(path, "holds a whole model: name one file, owner/name:file")
    return path


def _known_vae(found: _Found, dtype: str) -> str | None:
    """The autoencoder that a known model is best drawn with, where it is on this disk."""
    wanted = None if found.known is None else found.known.vae
    known = None if wanted is None else known_models.find(wanted)
    name = None if known is None or known.hub is None else hub.parse_name(known.hub)
    if wanted is None or name is None:
        return None
    try:
        hub.fetch(name, dtype=dtype, local_files_only=True)
    except HubError:
        found.notes.append(
            f"{found.name} is best drawn with --vae {wanted}: `maple models pull {wanted}`"
        )
        return None
    found.notes.append(f"{found.name} is drawn with {wanted}, as its makers recommend")
    return wanted


def _demo() -> Path:
    """The embedded model's folder."""
    if not (DEMO / "config.json").is_file():
        raise NoModel(
            "no model is named and none comes with this version: name a checkpoint file, a "
            "folder or a hub repository (owner/name)",
            2,
        )
    return DEMO


def _full_size_hint() -> str:
    full = known_models.find("sd15")
    assert full is not None
    return (
        "no model is named: the small one that comes with maple draws; for a full-size one, "
        f"`maple models pull {full.name}` ({full.bytes / 1e9:.1f} GB), then -m {full.name}"
    )


def _if_a_name(source: str | Path) -> str:
    """What else to say of a source that is not there, where it may be a misspelt short name."""
    text = str(source)
    if not text or not all(c.isalnum() or c in "-_" for c in text):
        return ""
    names = ", ".join(model.name for model in known_models.known_models() if model.kind == "model")
    return f", and no model is known by that name: {names}"


def _exists(name: str) -> bool:
    try:
        return _expanded(Path(name)).exists()
    except OSError:
        return False


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # "~name" of nobody: a plain name, then
        return path


# Raw checkpoints and their twins --------------------------------------------------------------


def _open(
    found: _Found, dtype: str, *, ema: bool, cache: bool, progress: Progress | None
) -> SourceModel:
    """Open the source, or its twin, which is made first where there is none yet."""
    options = {"ema": ema, "variant": found.variant}
    if cache and not _is_maple_folder(found.path):
        try:
            key = twins.source_key(found.path, options)
        except OSError as error:
            raise UnreadableFile(found.path, error.strerror or "cannot be read") from error
        twin = twins.find(key, lambda twin: twin.dtype == _stored(twin.source_dtype, dtype))
        if twin is not None:
            found.is_finite = _is_checked(twin, dtype)
            return open_model(twin.path)
    model = open_model(found.path, variant=found.variant, ema=ema)
    found.is_finite = model.layout != "maple"
    is_whole = not _lacking(model)
    if not cache or model.layout == "maple" or not is_whole:
        return model
    try:
        twin = _make_twin(model, found, options, dtype, progress)
    except OSError as error:
        reason = error.strerror or str(error)
        found.notes.append(
            f"not kept in the cache at {twins_folder()} ({reason}): it is converted at every start"
        )
        return model
    except BaseException:
        model.close()
        raise
    model.close()
    found.notes += model.notes
    found.notes.append(f"converted once into {twin.path}, which the next start reads")
    found.is_finite = _is_checked(twin, dtype)
    return open_model(twin.path)


def _is_checked(twin: Twin, dtype: str) -> bool:
    """Whether the values that a conversion found finite are so in ``dtype`` too."""
    return twin.dtype == dtype or BYTES[twin.dtype] < BYTES[dtype]


def _make_twin(
    model: SourceModel,
    found: _Found,
    options: Mapping[str, Any],
    dtype: str,
    progress: Progress | None,
) -> Twin:
    source_dtype = _widest(model)
    stored = _stored(source_dtype, dtype)
    needed = sum(
        info.size * min(BYTES[info.dtype], BYTES[stored])
        for component in model.components.values()
        for info in component.keys.values()
    )
    folder = twins_folder()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed * 1.02 + (64 << 20):
        raise OSError(0, f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free")

    def converting(done: int, total: int, label: str) -> None:
        if progress is not None:
            progress(done, total, f"converting {label}")

    def write(path: Path) -> None:
        try:
            convert(
                found.path,
                path,
                dtype=None if stored == source_dtype else stored,
                ema=bool(options["ema"]),
                variant=found.variant,
                progress=converting,
            )
        except UnreadableFile as error:
            if error.path.resolve().is_relative_to(folder.resolve()):
                raise OSError(0, error.reason) from error  # a fault of the cache, not of the source
            raise

    def waiting() -> None:
        if progress is not None:
            progress(0, 1, f"waiting for another maple that converts {found.name}")

    return twins.make(
        found.path,
        options,
        name=_plain(found.name),
        dtype=stored,
        source_dtype=source_dtype,
        write=write,
        waiting=waiting,
    )


def _widest(model: SourceModel) -> str:
    """The widest float among the stored weights."""
    dtypes = {
        info.dtype for component in model.components.values() for info in component.keys.values()
    }
    return max(sorted(dtypes), key=lambda dtype: BYTES[dtype])


def _stored(source_dtype: str, dtype: str) -> str:
    """What a twin's weights are stored as: the narrower of the source's dtype and the run's."""
    return dtype if BYTES[dtype] < BYTES[source_dtype] else source_dtype


def _plain(name: str) -> str:
    return (
        "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[:60].lstrip(".") or "model"
    )


def _is_maple_folder(path: Path) -> bool:
    return (path / "config.json").is_file() and (path / "unet.safetensors").is_file()


# Strictly into modules ------------------------------------------------------------------------


@dataclass(frozen=True)
class _How:
    """How networks are loaded.

    Attributes:
        dtype: of what is not quantised, and of scales.
        bits: that the weights are to be quantised to, or None.
        low_memory: whether networks are loaded one at a time, when they are used.
        fold: puts into a network that was just read what is on top of it.
    """

    dtype: str
    bits: int | None
    low_memory: bool
    fold: Callable[[nn.Module, str], None]


@dataclass(frozen=True)
class _Source:
    """Where one network comes from.

    Attributes:
        open: opens the file or folder, now and again.
        found: what was made out of it.
        part: the network's name.
    """

    open: Callable[[], SourceModel]
    found: _Found
    part: str

    def component(self, model: SourceModel) -> Component:
        """The network's part of what was opened, which must have it."""
        if self.part not in model.components:
            there = ", ".join(model.components)
            raise UnsupportedCheckpoint(self.found.path, f"holds no {self.part} but {there}")
        return model.components[self.part]

    def load(self, how: _How) -> nn.Module:
        """The network with its weights read, ready to draw."""
        with self.open() as model:
            module = self.built(model, how)
        return self.ready(module, how)

    def built(self, model: SourceModel, how: _How, *, is_skeleton: bool = False) -> nn.Module:
        """The network, its weights still to be read; a skeleton has none."""
        self.component(model)
        return _build(model, self.part, how, is_skeleton=is_skeleton)

    def ready(self, module: nn.Module, how: _How) -> nn.Module:
        """The network with its weights read, and what is done to it before it draws."""
        _read_now(self.found, self.part, module, one_by_one=how.low_memory)
        if how.low_memory and self.part == "vae":
            return in_stripes(cast(AutoencoderKL, module))
        if how.low_memory and self.part in ("unet", "controlnet"):
            in_chunks(module)
        return module


def _elsewhere(found: _Found, part: str, family: str, *, ema: bool = False) -> _Source:
    """One network of another file or folder, or what stands in for it.

    Args:
        found: the file or folder.
        part: the network.
        family: of the model that it is for; settles what a bare file leaves open.
        ema: take the EMA copy of its weights.
    """
    opening, other = _opening(found, ema), _STAND_INS.get(part)
    if other is not None:
        with opening() as model:
            is_bare = model.family == part and found.path.is_file()
            if part not in model.components and other in model.components:
                part = other
        if is_bare and part == "vae" and family.startswith("sdxl"):
            opening = _opening(found, config={"vae": _SDXL_VAE})
    return _Source(opening, found, part)


# What an autoencoder's tensors do not say: SDXL's has the names and shapes of SD 1's.
_SDXL_VAE = {"scaling_factor": SDXL_SCALING_FACTOR, "force_upcast": True}


def _opening(
    found: _Found, ema: bool = False, config: Mapping[str, Any] | None = None
) -> Callable[[], SourceModel]:
    return lambda: open_model(found.path, variant=found.variant, ema=ema, config=config)


def _reopening(model: SourceModel, found: _Found, ema: bool) -> Callable[[], SourceModel]:
    """Opens a model again: its twin, where it has one."""
    if model.layout == "maple":
        return lambda: open_model(model.path)
    return _opening(found, ema)


def _build(model: SourceModel, part: str, how: _How, *, is_skeleton: bool = False) -> nn.Module:
    """One network with its weights; as a skeleton, without them."""
    component = model.components[part]
    if component.config.get("force_upcast") and how.dtype == "float16":
        how = replace(how, dtype="float32")  # float16 overflows in it
    config_class, module_class = _MODULES[part]
    try:
        module = module_class(config_class(**component.config))
    except (TypeError, ValueError) as error:
        raise InvalidCheckpoint(model.path, f"{part}: {error}") from error
    module.eval()
    stored, bits = component.bits, how.bits if part in quantizing.QUANTIZED else None
    if stored is not None:
        if bits not in (None, stored):
            reason = f"its weights are quantised to {stored} bits already: they cannot be {bits}"
            raise UnsupportedCheckpoint(model.path, reason)
        quantizing.as_quantized(module, stored)
    _check_names(model.path, component, module)
    to_quantize = bits if stored is None else None
    if is_skeleton:
        if to_quantize is not None:
            quantizing.as_quantized(module, to_quantize)
    else:
        if model.layout == "maple":
            # At once where every weight is kept as it is stored: two of each would be held else.
            kept = {how.dtype, "uint32"}
            at_once = (
                to_quantize is None
                and not how.low_memory
                and part not in READ_LATER
                and all(info.dtype in kept for info in component.keys.values())
            )
            weights = dict(_stored_arrays(model, part, at_once=at_once))
        else:
            read_as = how.dtype if to_quantize is None else None
            weights = {name: _array(tensor) for name, tensor in component.tensors(read_as)}
        if to_quantize is not None:
            # In the narrower of what is stored and what is run in, and cast afterwards: as
            # `maple convert --quantize` does, so that its folder gives the same numbers.
            target = DTYPES[how.dtype]
            for name, value in weights.items():
                if target.size < value.dtype.size:
                    weights[name] = value.astype(target)
        _fill(model.path, part, module, weights)
        weights.clear()
        if to_quantize is None:
            module.set_dtype(DTYPES[how.dtype])  # before: a difference is not to be rounded twice
        try:
            how.fold(module, part)
        except RuntimeError as error:
            raise _unreadable(model.path, error) from error
        if to_quantize is not None:
            quantizing.quantize(module, to_quantize)
    module.set_dtype(DTYPES[how.dtype])
    return module


def _check_names(path: Path, component: Component, module: nn.Module) -> None:
    """The plan's names and shapes must be the module's, before any value is read."""
    expected = {name: tuple(value.shape) for name, value in _parameters(module)}
    planned = {name: tuple(info.shape) for name, info in component.keys.items()}
    missing = sorted(expected.keys() - planned.keys())
    unexpected = sorted(planned.keys() - expected.keys())
    misshapen = [
        (name, planned[name], shape)
        for name, shape in expected.items()
        if name in planned and planned[name] != shape
    ]
    if missing or unexpected or misshapen:
        raise LayoutMismatch(path, missing, unexpected, misshapen)


def _stored_arrays(
    model: SourceModel, part: str, *, at_once: bool
) -> Iterator[tuple[str, mx.array]]:
    """The arrays of a maple folder's component; each is read when it is evaluated, or all now."""
    file, keys = model.path / f"{part}.safetensors", model.components[part].keys
    try:
        arrays = reading.read(file, list(keys)) if at_once else mx.load(str(file))
    except RuntimeError as error:
        fault = _unreadable(file, error)
        raise (InvalidCheckpoint(file, str(error)) if fault is error else fault) from error
    assert isinstance(arrays, dict)
    for name, info in keys.items():
        if name not in arrays:
            raise LayoutMismatch(file, missing=[name])
        if str(arrays[name].dtype).removeprefix("mlx.core.") != info.dtype:
            raise InvalidCheckpoint(file, f"{name} changed its type while it was read")
        yield name, arrays[name]


def _array(tensor: Tensor) -> mx.array:
    values = mx.array(tensor.array)
    return values.view(mx.bfloat16) if tensor.dtype == "bfloat16" else values


def _fill(path: Path, part: str, module: nn.Module, weights: Mapping[str, mx.array]) -> None:
    """Put ``weights`` into ``module``; whatever does not fit is an error, in both directions."""
    expected = dict(_parameters(module))
    misshapen = [
        (f"{part}.{name}", tuple(value.shape), tuple(expected[name].shape))
        for name, value in weights.items()
        if name in expected and value.shape != expected[name].shape
    ]
    missing = [f"{part}.{name}" for name in expected.keys() - weights.keys()]
    unexpected = [f"{part}.{name}" for name in weights.keys() - expected.keys()]
    if missing or unexpected or misshapen:
        raise LayoutMismatch(path, missing, unexpected, misshapen)
    for name, value in weights.items():
        is_packed = expected[name].dtype == mx.uint32  # a quantised leaf's weights
        if not (value.dtype == mx.uint32 if is_packed else mx.issubdtype(value.dtype, mx.floating)):
            raise InvalidCheckpoint(path, f"{part}.{name} is {value.dtype}, not a weight")
    module.load_weights(list(weights.items()), strict=True)


def _parameters(module: nn.Module) -> list[tuple[str, mx.array]]:
    found = tree_flatten(module.parameters())
    assert isinstance(found, list)
    return found


def _check_fit(path: Path, modules: Mapping[str, nn.Module], paths: Mapping[str, Path]) -> None:
    """Networks from different files must speak of the same latents, and steer the same UNet."""
    unet = cast(UNet, modules["unet"]).config
    for part, module in modules.items():
        if isinstance(module, ControlNet):
            for name, what in _SHARED.items():
                theirs, ours = getattr(module.config, name), getattr(unet, name)
                if theirs != ours:
                    raise UnsupportedCheckpoint(
                        paths[part],
                        f"is for models of another family: {what} {theirs}, and this model's "
                        f"{ours}",
                    )
            cells = cast("AutoencoderKL | TAESD", modules["vae"]).config.downscale
            if (factor := module.config.downscale) != cells:
                raise UnsupportedCheckpoint(
                    paths[part], f"makes {factor} pixels a latent cell, and this model {cells}"
                )
        if isinstance(module, IPAdapter):
            _check_image_prompts(paths[part], module.config, unet)
        if isinstance(module, T2IAdapter):
            theirs, ours = module.config.channels, unet.block_out_channels
            # SDXL's finest level has no transformers: its adapters begin at the next size.
            cells = 16 if unet.transformer_layers[0] == 0 else 8
            if theirs[: len(ours)] != ours or module.config.downscale != cells:
                raise UnsupportedCheckpoint(
                    paths[part],
                    f"is for models of another family: its widths are {theirs} on cells of "
                    f"{module.config.downscale} pixels, and this model's {ours} on {cells}",
                )
    channels = unet.out_channels
    for part in ("vae", "taesd"):
        if part in modules:
            found = cast("AutoencoderKL | TAESD", modules[part]).config.latent_channels
            if found != channels:
                raise UnsupportedCheckpoint(
                    path, f"its latents have {channels} channels and the {part}'s have {found}"
                )


def _check_image_prompts(path: Path, config: IPAdapterConfig, unet: UNetConfig) -> None:
    """Raise unless an IP-Adapter has keys and values for a UNet's cross-attentions."""
    theirs, ours = config.cross_attention_dim, unet.cross_attention_dim
    if theirs != ours:
        one, other = (FAMILIES.get(width, "a model") for width in (theirs, ours))
        raise UnsupportedCheckpoint(
            path, f"is for {one} (its text {theirs} wide); this model is {other} ({ours})"
        )
    if config.channels != attention_channels(unet):
        theirs, ours = len(config.channels), len(attention_channels(unet))
        raise UnsupportedCheckpoint(
            path,
            f"is for another UNet: it has keys and values for {theirs} cross-attentions, and this "
            f"model's {ours} are others",
        )


# What a ControlNet has in common with the UNets that it can steer, and what to call it.
_SHARED = {
    "cross_attention_dim": "its context is",
    "block_out_channels": "its widths are",
    "layers_per_block": "its layers a level are",
}


def _read_now(found: _Found, part: str, module: nn.Module, *, one_by_one: bool) -> None:
    """Read what every picture needs now, so that a fault of the file shows here and not in a step.

    The autoencoder's two halves stay lazy: a picture from text never reads the encoder. Values are
    looked at where no conversion did: NaN anywhere ends in a black picture minutes later.

    Args:
        found: where it comes from.
        part: the network's name.
        module: the network.
        one_by_one: each weight before the next, so that no two are read and cast at once.
    """
    if part in READ_LATER:
        return
    weights = [(f"{part}.{name}", value) for name, value in _parameters(module)]
    try:
        for some in [[pair] for pair in weights] if one_by_one else [weights]:
            mx.eval([value for _, value in some])
    except RuntimeError as error:
        raise _unreadable(found.path, error) from error
    if not found.is_finite:
        # The extremes show NaN and infinities, and cost a fifth of looking at each value.
        floats = [(n, value) for n, value in weights if mx.issubdtype(value.dtype, mx.floating)]
        extremes = [each for _, value in floats for each in (value.max(), value.min())]
        are_finite = np.isfinite(np.array(mx.stack(extremes).astype(mx.float32))).reshape(-1, 2)
        for (name, _), is_finite in zip(floats, are_finite, strict=True):
            if not is_finite.all():
                raise InvalidCheckpoint(found.path, f"{name} holds NaN or infinite values")


def _unreadable(path: Path, error: RuntimeError) -> Exception:
    """What MLX's error means, if it comes from a file that ended early; else the error itself."""
    if "[read]" in str(error):
        return UnreadableFile(path, "could not be read to its end")
    return error


def _assemble(
    model: SourceModel,
    modules: Mapping[str, nn.Module],
    found: _Found,
    names: Mapping[str, str],
    notes: list[str],
    adapters: Adapters,
    **given: Any,
) -> StableDiffusion:
    try:
        return StableDiffusion(
            text_encoder=cast("CLIPTextEncoder | None", modules.get("text_encoder")),
            text_encoder_2=cast("CLIPTextEncoder | None", modules.get("text_encoder_2")),
            unet=cast(UNet, modules["unet"]),
            vae=cast(AutoencoderKL, modules["vae"]),
            taesd=cast("TAESD | None", modules.get("taesd")),
            tokenizer=_tokenizer(model),
            noise_schedule=_noise_schedule(model),
            defaults=_defaults(model.defaults),
            controlnets=_controlnets(modules, names),
            upscalers=upscalers.open_named,
            latent_rgb_factors=None if "vae" in names else model.latent_rgb_factors,
            name=found.name,
            sha256=(model.source or {}).get("sha256") or "",
            unet_name=names.get("unet", ""),
            vae_name=names.get("vae", ""),
            family=model.family,
            layout=model.layout,
            notes=notes,
            adapters=adapters,
            **given,
        )
    except VocabularyError as error:
        raise InvalidCheckpoint(error.path, error.reason) from error
    except ValueError as error:
        raise InvalidCheckpoint(found.path, str(error)) from error


def _controlnets(
    modules: Mapping[str, nn.Module], names: Mapping[str, str]
) -> dict[str, ControlNet | T2IAdapter]:
    """The networks that steer, in order, by their files' names; a second of a name is numbered."""
    found: dict[str, ControlNet | T2IAdapter] = {}
    steering = {p: m for p, m in modules.items() if isinstance(m, ControlNet | T2IAdapter)}
    for part, name in _numbered({part: names[part] for part in steering}).items():
        found[name] = steering[part]
    return found


def _ip_adapters(
    modules: Mapping[str, nn.Module], names: Mapping[str, str], looked_at: Mapping[str, str]
) -> dict[str, tuple[IPAdapter, CLIPVisionEncoder]]:
    """The IP-Adapters by their files' names, each with its encoder; a second one is numbered."""
    found: dict[str, tuple[IPAdapter, CLIPVisionEncoder]] = {}
    for part, encoder in looked_at.items():
        pair = cast(IPAdapter, modules[part]), cast(CLIPVisionEncoder, modules[encoder])
        name = names[part]
        found[name if name not in found else f"{name} ({len(found) + 1})"] = pair
    return found


def _tokenizer(model: SourceModel) -> Tokenizer:
    """The model's own vocabulary where it brings one, else CLIP's."""
    files = model.tokenizer_files
    if files:
        return Tokenizer.from_files(files["vocab"], files["merges"])
    tokenizer = Tokenizer.bundled()
    encoders = [part for name, part in model.components.items() if name in TEXT_ENCODERS]
    rows = min(part.config["vocab_size"] for part in encoders)
    if tokenizer.vocab_size > rows:  # MLX would read beyond the table
        raise ValueError(
            f"its text encoder knows {rows} tokens where CLIP's vocabulary has "
            f"{tokenizer.vocab_size}: it needs a vocabulary of its own, as a folder can hold"
        )
    return tokenizer


def _noise_schedule(model: SourceModel) -> NoiseSchedule:
    """The schedule that the file stores, else the one that its betas make."""
    betas = model.scheduler
    if model.alphas_cumprod is None:
        return NoiseSchedule.from_betas(
            betas["beta_schedule"],
            betas["beta_start"],
            betas["beta_end"],
            betas["num_train_timesteps"],
            zero_terminal_snr=betas["rescale_zero_terminal_snr"],
            prediction=model.prediction,
        )
    schedule = NoiseSchedule.from_alphas_cumprod(model.alphas_cumprod, prediction=model.prediction)
    ends_in_noise = schedule.alphas_cumprod[-1] < 1e-6
    rescale = betas["rescale_zero_terminal_snr"] and not ends_in_noise
    return schedule.with_zero_terminal_snr() if rescale else schedule


def _defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What the model's files say of a plain drawing, held to what there is."""
    for name, known in (("sampler", SAMPLERS), ("schedule", SCHEDULES)):
        if (word := defaults.get(name)) is not None and word not in known:
            raise ValueError(f"its default {name} is {word!r}, which this version does not have")
    for name in ("width", "height", "steps", "guidance_scale", "guidance_rescale"):
        if name in defaults:
            check_number(name, defaults[name])
    for name in ("width", "height"):
        if defaults.get(name, 0) % 8:
            raise ValueError(f"its default {name} is {defaults[name]}, no multiple of 8")
    return dict(defaults)
