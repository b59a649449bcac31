"""IP-Adapter: native names and the original's.

Source   tencent-ailab/IP-Adapter ip_adapter/ip_adapter.py (ImageProjModel, MLPProjModel) and
         ip_adapter/resampler.py. Files hold two dictionaries, ``image_proj`` and ``ip_adapter``.
Numbers  A cross-attention's number counts all attentions of the UNet, those to itself too, so that
         it is odd; they go down, up and come to the middle last, as diffusers listed them.
Kinds    "linear": some tokens of the pooled picture. "mlp": each of the picture's tokens by itself
         (full-face). "resampler": learned questions to the picture's tokens (plus).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from maple_convert.errors import UnsupportedCheckpoint
from maple_convert.layouts.parts import (
    AS_IS,
    SAME,
    Bare,
    Leaf,
    Part,
    Parts,
    Place,
    View,
    linear,
    norm,
)

SPELLINGS = ("original",)

LINEAR = Parts(
    "linear projection",
    SPELLINGS,
    (
        Part("proj", (SAME,), linear("picture", "all tokens")),
        Part("norm", (SAME,), norm("context")),
    ),
)
MLP = Parts(
    "projection of each token",
    SPELLINGS,
    (
        Part("proj_in", ("proj.0",), linear("picture", "picture")),
        Part("proj_out", ("proj.2",), linear("picture", "context")),
        Part("norm_out", ("proj.3",), norm("context")),
    ),
)
RESAMPLER = Parts(
    "resampler",
    SPELLINGS,
    (
        Part(
            "latents",
            (Bare("latents"),),
            Leaf("table", (1, "tokens", "inner"), AS_IS, bias=False),
        ),
        Part("proj_in", (SAME,), linear("picture", "inner")),
        Part("proj_out", (SAME,), linear("inner", "context")),
        Part("norm_out", (SAME,), norm("context")),
    ),
)
RESAMPLER_LAYER = Parts(
    "layer of the resampler",
    SPELLINGS,
    (
        Part("norm1", ("0.norm1",), norm("inner")),
        Part("norm2", ("0.norm2",), norm("inner")),
        Part("to_q", ("0.to_q",), linear("inner", "heads", bias=False)),
        Part("to_kv", ("0.to_kv",), linear("inner", "2 heads", bias=False)),
        Part("to_out", ("0.to_out",), linear("heads", "inner", bias=False)),
        Part("norm3", ("1.0",), norm("inner")),
        Part("ff.proj_in", ("1.1",), linear("inner", "hidden", bias=False)),
        Part("ff.proj_out", ("1.3",), linear("hidden", "inner", bias=False)),
    ),
)
ATTENTION = Parts(
    "cross-attention",
    SPELLINGS,
    (
        Part("to_k", ("to_k_ip",), linear("context", "c", bias=False)),
        Part("to_v", ("to_v_ip",), linear("context", "c", bias=False)),
    ),
)

TABLES = (LINEAR, MLP, RESAMPLER, RESAMPLER_LAYER, ATTENTION)
_SD1_WIDTHS = (*[320] * 2, *[640] * 2, *[1280] * 2, *[1280] * 3, *[640] * 3, *[320] * 3, 1280)
PUBLISHED_CONFIG = {  # ip-adapter-plus_sd15
    "projection": "resampler",
    "image_dim": 1280,
    "cross_attention_dim": 768,
    "tokens": 16,
    "inner_dim": 768,
    "num_attention_heads": 12,
    "num_layers": 4,
    "channels": _SD1_WIDTHS,
}
KINDS = {
    "linear": "the plain or light kind, which sees a picture in few words",
    "mlp": "full-face, which sees each patch",
    "resampler": "plus, which asks the patches",
}
HEAD_WIDTH = 64  # of a resampler's heads, always
LINEAR_TOKENS = 4  # of a linear projection, always
HIDDEN = 4  # times its width is a resampler's feed-forward layer
FACE_ID = (
    "this is an IP-Adapter FaceID, which recognises faces with insightface, and that is not used "
    "here: take a plus-face or full-face one"
)


def is_face_id(view: View) -> bool:
    """Whether it reads what a network that recognises faces says, and not CLIP."""
    names = view.tensors
    is_plain = "image_proj.proj.2.weight" in names and "image_proj.proj.3.weight" not in names
    return is_plain or view.holds("image_proj.perceiver_resampler")


def places(config: Mapping[str, Any]) -> list[Place]:
    """The projection, then the cross-attentions in the file's order."""
    kind, context, tokens = (config[key] for key in ("projection", "cross_attention_dim", "tokens"))
    widths = {"picture": config["image_dim"], "context": context}
    root = "image_proj"
    if kind == "linear":
        found = [Place(root, (root,), LINEAR, {**widths, "all tokens": tokens * context})]
    elif kind == "mlp":
        found = [Place(root, (root,), MLP, widths)]
    else:
        inner: int = config["inner_dim"]
        found = [Place(root, (root,), RESAMPLER, {**widths, "inner": inner, "tokens": tokens})]
        heads = config["num_attention_heads"] * HEAD_WIDTH
        dims = {"inner": inner, "heads": heads, "2 heads": 2 * heads, "hidden": HIDDEN * inner}
        for n in range(config["num_layers"]):
            name = f"{root}.layers.{n}"
            found.append(Place(name, (name,), RESAMPLER_LAYER, dims))
    channels: Sequence[int] = config["channels"]
    for n, width in enumerate(channels):
        names = (f"ip_adapter.{2 * n + 1}",)
        found.append(Place(f"layers.{n}", names, ATTENTION, {"context": context, "c": width}))
    return found


def infer(view: View, spelling: str) -> dict[str, Any]:
    """Read the architecture from names and shapes.

    Raises:
        UnsupportedCheckpoint: if it is one for faces that CLIP does not read.
    """
    if is_face_id(view):
        raise UnsupportedCheckpoint(view.path, FACE_ID)
    channels: list[int] = []
    while (name := f"ip_adapter.{2 * len(channels) + 1}.to_k_ip.weight") in view.tensors:
        channels.append(view.axis(name, 0, 2))
    found: dict[str, Any] = {
        "tokens": None,
        "inner_dim": None,
        "num_attention_heads": None,
        "num_layers": None,
        "cross_attention_dim": view.axis("ip_adapter.1.to_k_ip.weight", 1, 2),
        "channels": channels,
    }
    root = "image_proj"
    if f"{root}.latents" in view.tensors:
        rows = view.axis(f"{root}.layers.0.0.to_q.weight", 0, 2)
        found |= {
            "projection": "resampler",
            "image_dim": view.axis(f"{root}.proj_in.weight", 1, 2),
            "tokens": view.axis(f"{root}.latents", 1, 3),
            "inner_dim": view.axis(f"{root}.latents", 2, 3),
            "num_attention_heads": rows // HEAD_WIDTH,
            "num_layers": view.count(f"{root}.layers"),
        }
    elif f"{root}.proj.3.weight" in view.tensors:
        found |= {"projection": "mlp", "image_dim": view.axis(f"{root}.proj.0.weight", 1, 2)}
    else:
        width = max(found["cross_attention_dim"], 1)
        found |= {
            "projection": "linear",
            "image_dim": view.axis(f"{root}.proj.weight", 1, 2),
            "tokens": view.axis(f"{root}.proj.weight", 0, 2) // width,
        }
    return {key: found[key] for key in PUBLISHED_CONFIG}
