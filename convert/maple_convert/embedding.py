"""Textual inversions: vectors that stand for a word, in every form that they are kept in.

    A1111 .pt           string_to_param.* (n, D); a ParameterDict in the oldest ones
    diffusers .bin      a word's own name: (D) or (n, D), for one or several words
    safetensors         emb_params, or a word's own name
    SDXL                clip_l (n, 768) and clip_g (n, 1280); text_encoders_0 and _1
    bare                one tensor and nothing else

Source   Gal et al. 2022 (arXiv:2208.01618); rinongal/textual_inversion @main ldm/modules/
         embedding_manager.py; AUTOMATIC1111/stable-diffusion-webui modules/textual_inversion/
         textual_inversion.py; huggingface/diffusers 0.42 loaders/textual_inversion.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maple_convert.errors import InvalidCheckpoint, UnsupportedCheckpoint, one_line, quoted
from maple_convert.layouts.lora import FAMILIES
from maple_convert.readers import open_checkpoint
from maple_convert.tensors import FLOATS, Checkpoint, Tensor

ANY = ""  # of vectors that do not say which text encoder they are for
# A tensor's name to the text encoder that it is for.
VECTOR_ROLES: Mapping[str, str] = {
    "string_to_param.*": ANY,
    "emb_params": ANY,
    "tensor": ANY,
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
MOST_VECTORS = 75  # a prompt's chunk has no room for more
MOST_WORDS = 64
BYTES_OF_NAME = 128

Vectors = dict[str, Tensor]  # by text encoder: (D) or (n, D)


@dataclass(frozen=True)
class EmbeddingFile:
    """One file of textual inversions.

    Attributes:
        path: the file.
        words: vectors by name: the file's own, and its words' where it names them.
    """

    path: Path
    words: Mapping[str, Vectors]


def open_embedding(path: Path | str) -> EmbeddingFile:
    """Read a textual inversion.

    Raises:
        UnsupportedCheckpoint: if the file is something else.
        InvalidCheckpoint: if a value is not finite, or the file is malformed.
        UnreadableFile: if it cannot be read.
    """
    path = Path(path)
    with open_checkpoint(path) as checkpoint:
        words = vectors_of(checkpoint)
        if not words:
            tensors = list(checkpoint.tensors)
            shown = ", ".join(one_line(key, 60) for key in tensors[:2])
            reason = f"is no textual inversion: it holds {len(tensors)} tensors ({shown}"
            raise UnsupportedCheckpoint(path, reason + ("…)" if tensors[2:] else ")"))
        return EmbeddingFile(path, words)


def vectors_of(checkpoint: Checkpoint) -> dict[str, Vectors]:
    """The vectors by name, the file's own name first; nothing where it is no textual inversion."""
    tensors = checkpoint.tensors
    if not 0 < len(tensors) <= MOST_WORDS:
        return {}
    for info in tensors.values():
        if info.dtype not in FLOATS or len(info.shape) not in (1, 2) or 0 in info.shape:
            return {}
        if len(info.shape) == 2 and info.shape[0] > MOST_VECTORS:
            return {}
    own: Vectors = {}
    words: dict[str, Vectors] = {}
    for key in tensors:
        role = VECTOR_ROLES.get("string_to_param.*" if key.startswith("string_to_param.") else key)
        if role is None:
            if len(key.encode(errors="replace")) > BYTES_OF_NAME or not key.isprintable():
                return {}
            words[key] = {ANY: _read(checkpoint, key)}
        elif role in own:
            raise UnsupportedCheckpoint(
                checkpoint.path, "holds several words under one name: save them one a file"
            )
        else:
            own[role] = _read(checkpoint, key)
    if own and words:
        return {}
    stem = checkpoint.path.name.removesuffix(checkpoint.path.suffix)
    if own:
        return {stem: own}
    return {**({stem: next(iter(words.values()))} if len(words) == 1 else {}), **words}


def fitted(path: Path, name: str, vectors: Vectors, widths: Mapping[str, int]) -> Vectors:
    """The vectors (n, D) of each of a model's text encoders, in float32.

    Args:
        path: the file, for messages.
        name: of the word, for messages.
        vectors: as the file has them.
        widths: D of each text encoder by name.

    Raises:
        UnsupportedCheckpoint: if they are of other widths; it says which family they are for.
        InvalidCheckpoint: if the encoders have different numbers of vectors.
    """
    found: Vectors = {}
    for role, tensor in vectors.items():
        array = np.atleast_2d(tensor.astype("float32").array)
        found[role] = Tensor("float32", array)
    theirs = sorted(tensor.shape[1] for tensor in found.values())
    if ANY in found:  # of one encoder: the model's own, if it is as wide and there is no other
        found = {next(iter(widths), ANY): found[ANY]}
    if {role: tensor.shape[1] for role, tensor in found.items()} != dict(widths):
        mine = sorted(widths.values())
        raise UnsupportedCheckpoint(
            path, f"{quoted(name)} is a word of {_family(theirs)}; this model is {_family(mine)}"
        )
    if len({len(tensor.array) for tensor in found.values()}) != 1:
        raise InvalidCheckpoint(
            path, f"{quoted(name)} has more vectors for one encoder than another"
        )
    return found


def _read(checkpoint: Checkpoint, key: str) -> Tensor:
    tensor = checkpoint.read(key)
    if tensor.has_nonfinite():
        raise InvalidCheckpoint(checkpoint.path, f"{quoted(key)} holds NaN or infinite values")
    return tensor


def _family(widths: list[int]) -> str:
    shown = " and ".join(map(str, widths))
    if widths == [768, 1280]:
        return f"SDXL ({shown} wide)"
    family = FAMILIES.get(widths[0]) if len(widths) == 1 else None
    return f"{family} ({shown} wide)" if family else f"a model whose text is {shown} wide"
