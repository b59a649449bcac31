"""What a file is, from evidence: facts read from names and shapes, then a table of families.

Exactly one family must fit. Nothing is decided by the order of the table, nothing by what is left
over, and nothing by a width alone: a narrow model trained on SD 1.x's architecture has a context of
128 where the published one has 768, and is still told from SD 2 and SDXL by its convolutional
projections, its missing label embedding and its Hugging Face text encoder.

Every fact keeps the line that says where it was read; these lines are the evidence that
``maple inspect`` prints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from maple_convert.errors import UnsupportedCheckpoint, one_line
from maple_convert.layouts import LAYOUTS, View, files, image_encoder, ip_adapter, unet
from maple_convert.layouts.parts import LINEAR
from maple_convert.tensors import TensorInfo

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")

# ---------------------------------------------------------------------------------------------
# Facts


@dataclass(frozen=True)
class UNetFacts:
    """What tells one family's UNet from another's.

    Attributes:
        channels: what the first convolution takes.
        context: width of the text states that cross-attention takes.
        projections: "convolution" or "linear", before and after each transformer.
        label: "none", "vector" (size or image conditioning) or "classes".
        levels: number of resolutions.
        first_attends: whether the finest level has transformers.
        middle_attends: whether the middle block has one.
    """

    channels: int
    context: int
    projections: str
    label: str
    levels: int
    first_attends: bool
    middle_attends: bool


@dataclass
class Facts:
    """All that a file or folder shows of its kind.

    Attributes:
        path: the file or folder.
        lines: where each fact was read, for people.
        components: the components found.
        unet: facts of the UNet, where there is one.
        text: the kinds of text encoder found: "CLIP", "OpenCLIP", "BERT", "XLM-RoBERTa".
        has_second: whether one of them stands where SDXL has its second.
        others: parts of a folder that no family known here has.
    """

    path: Path
    lines: list[str] = field(default_factory=list[str])
    components: list[str] = field(default_factory=list[str])
    unet: UNetFacts | None = None
    text: set[str] = field(default_factory=set[str])
    has_second: bool = False
    others: list[str] = field(default_factory=list[str])

    def describe(self) -> str:
        """The facts in one sentence, for the message that no family fits."""
        parts: list[str] = []
        if (u := self.unet) is not None:
            parts.append(
                f"a UNet of {u.levels} levels that takes {u.channels} channels and a context of "
                f"{u.context}, {u.projections} projections, label embedding: {u.label}, "
                f"{'with' if u.middle_attends else 'without'} middle attention"
            )
        if self.has_second:
            parts.append("a text encoder in the place of SDXL's second")
        parts += [f"a text encoder of kind {kind}" for kind in sorted(self.text)]
        known = ("unet", *TEXT_ENCODERS)
        parts += [name for name in self.components if name not in known]
        return "; ".join(parts + self.others)


def read_unet(facts: Facts, view: View, spelling: str) -> None:
    """Add what a UNet shows."""
    levels = unet.walk(view, spelling)
    first = next((name for level in levels for name in level.transformers), unet.middle(spelling))
    conv_in = unet.ROOT.name("conv_in", spelling) + ".weight"
    proj_in = f"{first}.{unet.TRANSFORMER.name('proj_in', spelling)}.weight"
    to_k = f"{first}.transformer_blocks.0.{unet.TRANSFORMER_BLOCK.name('attn2.to_k', spelling)}"
    channels = view.axis(conv_in, 1, 4)
    context = view.axis(f"{to_k}.weight", 1, 2)
    axes = len(view.tensors[proj_in].shape) if proj_in in view.tensors else 0
    if axes not in (2, 4):
        view.axis(proj_in, 0, 4)  # raises: missing, or no layout of any family
    projections = "convolution" if axes == 4 else "linear"
    label, label_line = "none", "no label or size embedding"
    for name, kind in (
        ("label_emb.0", "vector"),
        ("add_embedding", "vector"),
        ("label_emb", "classes"),
        ("class_embedding", "classes"),
    ):
        if view.holds(name):
            label, label_line = kind, f"{view.shown(name)} embeds a {kind}"
            break
    facts.unet = UNetFacts(
        channels=channels,
        context=context,
        projections=projections,
        label=label,
        levels=len(levels),
        first_attends=bool(levels and levels[0].transformers),
        middle_attends=view.holds(f"{unet.middle(spelling)}.transformer_blocks"),
    )
    use = _CHANNELS.get(channels, "of unknown use")
    whose = _CONTEXTS.get(context, "a narrow model's context")
    facts.lines += [
        f"{view.shown(conv_in)} takes {channels} channels: {use}",
        f"{view.shown(proj_in)} has {axes} axes: {projections} projections",
        f"{view.shown(to_k)}.weight is {context} wide: {whose}",
        label_line,
    ]


_CHANNELS = {
    4: "latents only",
    5: "latents and depth",
    7: "latents and a small picture (x4 upscaler)",
    8: "latents and an image's latents (InstructPix2Pix)",
    9: "latents, mask and masked latents (inpainting)",
}
_CONTEXTS = {
    768: "SD 1.x's context",
    1024: "SD 2.x's context",
    1280: "the context of SDXL's refiner or of LDM text2img",
    2048: "SDXL's context",
}

# Text encoders, whole or not, and everything else that people keep in such files. Each is there
# when a tensor lies below one of its places, or its name ends or begins as given.
_TEXT_PLACES = {
    "OpenCLIP": (
        "cond_stage_model.model",
        "conditioner.embedders.0.model",
        "conditioner.embedders.1.model",
    ),
    "CLIP": ("conditioner.embedders.0.transformer",),
    "BERT": ("cond_stage_model.transformer.token_emb", "cond_stage_model.transformer.attn_layers"),
    "XLM-RoBERTa": ("cond_stage_model.roberta",),
}

# In a diffusers folder OpenCLIP has CLIP's names; its published widths are none of CLIP ViT-L's.
_OPEN_CLIP_WIDTHS = {1024: "OpenCLIP", 1280: "OpenCLIP"}


@dataclass(frozen=True)
class Other:
    """Something that is no plain Stable Diffusion model, known by its names."""

    name: str
    places: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    begins: tuple[str, ...] = ()

    def evidence(self, view: View) -> str | None:
        """The name that shows it, or None."""
        for place in self.places:
            if view.holds(place):
                return place
        for start in self.begins:
            if view.begins(start):
                return next(name for name in view.tensors if name.startswith(start))
        if self.ends:
            return next((name for name in view.tensors if name.endswith(self.ends)), None)
        return None


OTHERS = (
    Other(
        "a LoRA, which changes a model and is none itself",
        ends=(
            ".lora_down.weight",
            ".lora_up.weight",
            ".lora_A.weight",
            ".lora_B.weight",
            "_lora.down.weight",
            "_lora.up.weight",
            ".lora.down.weight",
            ".lora.up.weight",
            ".lokr_w1",
            ".lokr_w2",
            ".hada_w1_a",
            ":up",
            ":down",
        ),
        begins=("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_"),
    ),
    Other(
        "a textual inversion, which adds a word to a model and is none itself",
        places=("string_to_param", "embedding_manager"),
        begins=("emb_params", "<"),
        ends=("string_to_param",),
    ),
    Other("a ControlNet kept as its difference from a model", places=("difference",)),
    Other("a ControlNet of LoRAs", places=("lora_controlnet",), begins=("lllite_unet",)),
    Other("a light T2I-Adapter", places=("adapter.body.0.out_conv", "body.0.out_conv")),
    Other(
        "a video model or motion module",
        ends=("time_stack.0.in_layers.0.weight",),
        places=("model.diffusion_model.input_blocks.1.1.time_stack", "motion_modules"),
    ),
    Other("a vision model that is no image encoder of CLIP's", places=("vision_tower",)),
    Other("Stable Diffusion 3", places=("model.diffusion_model.joint_blocks", "joint_blocks")),
    Other(
        "Flux",
        places=("model.diffusion_model.double_blocks", "double_blocks", "single_blocks"),
    ),
    Other(
        "a diffusion transformer (no UNet)",
        places=("transformer_blocks.0", "model.diffusion_model.transformer_blocks"),
    ),
    Other(
        "an autoencoder with a codebook (VQ)",
        places=("quantize.embedding", "first_stage_model.quantize.embedding"),
    ),
)

# ---------------------------------------------------------------------------------------------
# Families


@dataclass(frozen=True)
class Family:
    """One kind of model: what its facts must be, and whether this version can use it.

    Attributes:
        name: short name, as in the maple folder's config.
        title: name for people.
        channels: input channels of the UNet.
        projections: see ``UNetFacts``.
        label: see ``UNetFacts``.
        text: the text encoders that its files may hold; a file without one fits too.
        levels: number of resolutions, where that tells families apart.
        first_attends: whether the finest level has transformers, where that tells.
        middle_attends: whether the middle block attends.
        is_xl: whether its files may hold a text encoder in the place of SDXL's second.
        refusal: why this version cannot use it; empty where it can.
    """

    name: str
    title: str
    channels: int
    projections: str
    label: str = "none"
    text: frozenset[str] = frozenset()
    levels: int | None = None
    first_attends: bool | None = None
    middle_attends: bool = True
    is_xl: bool = False
    refusal: str = ""

    def fits(self, facts: Facts) -> bool:
        """Whether every fact is this family's."""
        u = facts.unet
        return (
            u is not None
            and u.channels == self.channels
            and u.projections == self.projections
            and u.label == self.label
            and u.middle_attends == self.middle_attends
            and self.levels in (None, u.levels)
            and self.first_attends in (None, u.first_attends)
            and facts.text <= self.text
            and (self.is_xl or not facts.has_second)
        )


_CLIP = frozenset({"CLIP"})
_OPEN = frozenset({"OpenCLIP", "CLIP"})
_NOT_YET = "a family that this version cannot use yet"

FAMILIES = (
    Family("sd1", "Stable Diffusion 1.x", 4, "convolution", text=_CLIP),
    Family(
        "sd1-inpainting",
        "Stable Diffusion 1.x inpainting (9 input channels)",
        9,
        "convolution",
        text=_CLIP,
    ),
    Family(
        "sd1-pix2pix",
        "InstructPix2Pix on SD 1.x (8 input channels)",
        8,
        "convolution",
        text=_CLIP,
    ),
    Family(
        "sd1-distilled",
        "a distilled SD 1.x without middle block (BK-SDM, tiny-sd)",
        4,
        "convolution",
        text=_CLIP,
        middle_attends=False,
    ),
    Family("sd2", "Stable Diffusion 2.x", 4, "linear", text=_OPEN),
    Family(
        "sd2-distilled",
        "a distilled SD 2.x without middle block (BK-SDM)",
        4,
        "linear",
        text=_OPEN,
        middle_attends=False,
    ),
    Family("sd2-inpainting", "Stable Diffusion 2.x inpainting", 9, "linear", text=_OPEN),
    Family("sd2-depth", "Stable Diffusion 2.x depth", 5, "linear", text=_OPEN),
    Family(
        "sd2-unclip",
        "Stable Diffusion 2.x unCLIP",
        4,
        "linear",
        label="vector",
        text=_OPEN,
        levels=4,
        first_attends=True,
        refusal=_NOT_YET,
    ),
    Family(
        "x4-upscaler",
        "Stable Diffusion x4 upscaler",
        7,
        "linear",
        label="classes",
        text=_OPEN,
        refusal=_NOT_YET,
    ),
    Family(
        "sdxl",
        "Stable Diffusion XL",
        4,
        "linear",
        label="vector",
        text=_OPEN,
        levels=3,
        is_xl=True,
    ),
    Family(
        "sdxl-refiner",
        "Stable Diffusion XL refiner",
        4,
        "linear",
        label="vector",
        text=_OPEN,
        levels=4,
        first_attends=False,
        is_xl=True,
    ),
    Family(
        "sdxl-inpainting",
        "Stable Diffusion XL inpainting",
        9,
        "linear",
        label="vector",
        text=_OPEN,
        levels=3,
        is_xl=True,
    ),
    Family(
        "sdxl-pix2pix",
        "InstructPix2Pix on SDXL",
        8,
        "linear",
        label="vector",
        text=_OPEN,
        levels=3,
        is_xl=True,
    ),
    Family(
        "sdxl-distilled",
        "a distilled SDXL without middle attention (SSD-1B, Vega)",
        4,
        "linear",
        label="vector",
        text=_OPEN,
        levels=3,
        middle_attends=False,
        is_xl=True,
    ),
)


_NEVER_BESIDE = ("image_encoder", "ip_adapter")  # a UNet, in one file


def identify(facts: Facts) -> tuple[str, str]:
    """The one family that fits, as (name, title).

    A file without a UNet is of its component's own name, unless its text encoder stands where
    only SD 1.x has it.

    Raises:
        UnsupportedCheckpoint: no family fits, or one that this version cannot use.
    """
    path = facts.path
    beside = [name for name in facts.components if name in _NEVER_BESIDE]
    if beside and facts.unet is not None:
        titles = " and ".join(LAYOUTS[name].title for name in beside)
        raise UnsupportedCheckpoint(path, f"a UNet and {titles} in one file: no model is kept so")
    fitting = [family for family in FAMILIES if family.fits(facts)]
    if facts.others and not any(family.refusal for family in fitting):
        raise UnsupportedCheckpoint(path, f"a pipeline with {' and '.join(facts.others)}")
    if facts.unet is None:
        if facts.text - _OPEN:
            kinds = " and ".join(sorted(facts.text))
            raise UnsupportedCheckpoint(path, f"a text encoder of kind {kinds}: {_NOT_YET}")
        if len(facts.components) == 1:
            (name,) = facts.components
            return name, f"{LAYOUTS[name].title} alone"
        if set(facts.components) == {"text_encoder", "vae"} and facts.text <= _CLIP:
            return "sd1", "Stable Diffusion 1.x without its UNet"
        raise UnsupportedCheckpoint(path, f"no UNet, but {facts.describe()}")
    if not fitting:
        raise UnsupportedCheckpoint(path, f"no known family fits: {facts.describe()}")
    if len(fitting) > 1:
        names = " and ".join(family.title for family in fitting)
        raise UnsupportedCheckpoint(path, f"fits more than one family: {names}")
    (family,) = fitting
    if family.refusal:
        raise UnsupportedCheckpoint(path, f"this is {family.title}: {family.refusal}")
    return family.name, family.title


# ---------------------------------------------------------------------------------------------
# One file


@dataclass(frozen=True)
class Section:
    """One component found in one file: its name, its spelling, its tensors."""

    component: str
    spelling: str
    view: View


def find_sections(whole: View) -> list[Section]:
    """The components of one file, each in one spelling below one prefix.

    Args:
        whole: all that the file holds.

    Raises:
        UnsupportedCheckpoint: if a component is there twice, or in two spellings.
    """
    views = {prefix: whole.below(prefix) for prefix in files.PREFIXES}
    found = files.find(views)
    sections: dict[str, Section] = {}
    for where, prefix in found:
        if where.component in sections:
            first = sections[where.component]
            raise UnsupportedCheckpoint(
                whole.path,
                f"holds two of {where.component}: {_spelt(first.spelling, first.view.prefix)} and "
                f"{_spelt(where.spelling, prefix)}",
            )
        view = whole.below(prefix, where.under) if where.under else views[prefix]
        spelling = where.spelling
        if where.component in ("unet", "controlnet") and unet.has_linear_doors(view, spelling):
            spelling += LINEAR
        sections[where.component] = Section(where.component, spelling, view)
    return list(sections.values())


def _spelt(spelling: str, prefix: str) -> str:
    return f"{spelling} names below {prefix!r}" if prefix else f"{spelling} names without a prefix"


def gather(path: Path, sections: Sequence[Section], whole: View | None = None) -> Facts:
    """The facts of a file's or folder's components.

    Args:
        path: the file or folder.
        sections: the components found in it.
        whole: all that a single file holds; None for a folder.
    """
    facts = Facts(path)
    if whole is not None:
        for kind, places in _TEXT_PLACES.items():
            for place in filter(whole.holds, places):
                facts.text.add(kind)
                facts.lines.append(f"{place} holds a text encoder of kind {kind}")
    for section in sections:
        view = section.view
        where = (view.folder + view.prefix).rstrip("./") or "the file"
        facts.components.append(section.component)
        if section.component == "unet":
            names = section.spelling.removesuffix(LINEAR)
            facts.lines.append(f"{where} holds the UNet in {names} names")
            read_unet(facts, view, section.spelling)
        elif section.component in TEXT_ENCODERS:
            width = LAYOUTS["text_encoder"].infer(view, section.spelling)["hidden_size"]
            is_open = section.spelling == "openclip"
            kind = "OpenCLIP" if is_open else _OPEN_CLIP_WIDTHS.get(width, "CLIP")
            facts.text.add(kind)
            facts.has_second |= section.component == "text_encoder_2"
            names = "OpenCLIP's" if is_open else "Hugging Face's CLIP"
            facts.lines.append(
                f"{where} holds a text encoder in {names} names, {width} wide: {kind}"
            )
        else:
            title = LAYOUTS[section.component.split()[0]].title
            facts.lines.append(f"{where} holds the {title} in {section.spelling} names")
            if section.component in _READERS:
                facts.lines += _READERS[section.component](view, section.spelling)
    return facts


def _read_image_encoder(view: View, spelling: str) -> list[str]:
    """What an image encoder shows of its kind."""
    found = LAYOUTS["image_encoder"].infer(view, spelling)
    width, layers = found["hidden_size"], found["num_hidden_layers"]
    which = image_encoder.NAMES.get(width, "of no published width")
    return [f"it is {width} wide, of {layers} layers: {which}"]


def _read_ip_adapter(view: View, spelling: str) -> list[str]:
    """What an IP-Adapter shows of its kind, and of the family and encoder that it is for."""
    found = LAYOUTS["ip_adapter"].infer(view, spelling)
    context, count = found["cross_attention_dim"], len(found["channels"])
    whose = _CONTEXTS.get(context, "a narrow model's context")
    return [
        f"{view.shown('ip_adapter.1.to_k_ip.weight')} is {context} wide: {whose}",
        f"it has keys and values for {count} cross-attentions",
        f"a {found['projection']} projection of what is {found['image_dim']} wide: "
        f"{ip_adapter.KINDS[found['projection']]}",
    ]


_READERS = {"image_encoder": _read_image_encoder, "ip_adapter": _read_ip_adapter}


def refuse_others(whole: View) -> None:
    """Name what is no plain model, before anything of a model is asked of it.

    Raises:
        UnsupportedCheckpoint: if any of ``OTHERS`` is there.
    """
    if ip_adapter.is_face_id(whole):
        raise UnsupportedCheckpoint(whole.path, ip_adapter.FACE_ID)
    found = ((other, other.evidence(whole)) for other in OTHERS)
    names = [f"{other.name} ({one_line(name, 80)})" for other, name in found if name is not None]
    if names:
        raise UnsupportedCheckpoint(whole.path, f"this is {' and '.join(names)}")


def refuse_unknown(whole: View) -> None:
    """Say what a file holds in which no component was found."""
    path, tensors = whole.path, whole.tensors
    facts = gather(path, [], whole)
    if facts.text:
        identify(facts)
    names = [one_line(name, 60) for name in list(tensors)[:3]]
    shown = ", ".join(names + ["…"] * (len(tensors) > len(names)))
    if _is_list_of_factors(tensors):
        reason = f"this is a LoRA without names, which changes a model and is none itself ({shown})"
        raise UnsupportedCheckpoint(path, reason)
    raise UnsupportedCheckpoint(
        path, f"no Stable Diffusion component in its {len(tensors)} tensors ({shown})"
    )


def _is_list_of_factors(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a bare list alternates between (outputs, rank) and (rank, inputs)."""
    shapes = [info.shape for info in tensors.values()]
    return (
        len(shapes) > 1
        and len(shapes) % 2 == 0
        and list(tensors) == [str(n) for n in range(len(shapes))]
        and all(len(shape) in (2, 4) for shape in shapes)
        and all(up[1] == down[0] for up, down in zip(shapes[::2], shapes[1::2], strict=True))
    )
