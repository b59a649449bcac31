"""A model opened for reading: components, each a list of native parameters and where they lie.

Nothing here knows how a file was recognised (detect.py, open_file.py, open_folder.py). Values come
one tensor at a time, checked to be finite on the way.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from maple_convert.errors import InvalidCheckpoint, LayoutMismatch
from maple_convert.layouts import LAYOUTS, NATIVE, Row, files
from maple_convert.layouts.diffusers_config import SD1_SCHEDULER
from maple_convert.layouts.parts import TRANSPOSED
from maple_convert.quantized import PACKED
from maple_convert.readers import read_json
from maple_convert.stream import Block, Task, stream_rows
from maple_convert.tensors import FLOATS, STORAGE, Checkpoint, Tensor, TensorInfo


@dataclass(frozen=True)
class Slot:
    """Where one native parameter lies."""

    row: Row
    checkpoint: Checkpoint
    key: str

    @property
    def info(self) -> TensorInfo:
        """Stored dtype and native shape."""
        return TensorInfo(self.checkpoint.tensors[self.key].dtype, self.row.native_shape)

    def tasks(self, dtype: str | None = None) -> Iterator[Task]:
        """Functions, in order, that each make some rows (first axis) of the values in native shape.

        They may be called in any order and from any thread. Called, each raises
        ``InvalidCheckpoint`` if a value is not finite, in the file or in ``dtype``.
        """
        to_native = self.row.weights.to_native
        tasks = stream_rows(self.checkpoint, self.key, dtype, self.row.share)
        if self.row.weights is TRANSPOSED:  # its rows are the file's columns
            yield lambda: to_native(np.concatenate([task() for task in tasks]))
            return
        for task in tasks:
            yield lambda task=task: to_native(task())

    def blocks(self, dtype: str | None = None) -> Iterator[Block]:
        """The values in native shape, some rows (first axis) at a time; raises as ``tasks`` do."""
        return (task() for task in self.tasks(dtype))

    def read(self, dtype: str | None = None) -> Tensor:
        """All the values in native shape, contiguous."""
        kind = self.info.dtype if dtype is None else dtype
        array = np.empty(self.row.native_shape, STORAGE[kind])
        start = 0
        for block in self.blocks(dtype):
            array[start : start + len(block)] = block
            start += len(block)
        return Tensor(kind, array)


@dataclass
class Component:
    """One network of a model.

    Attributes:
        name: text_encoder, text_encoder_2, unet, vae, taesd or controlnet.
        config: keyword arguments of the network's config class.
        slots: every parameter, in the order in which the file holds them.
        dropped: keys of the file below this component's prefix that are left out, and why.
        bits: that its weights are quantised to, 8 or 4, or None.
        has_linear_doors: whether published files of its family keep the layers before and after a
            transformer's blocks as linear ones.
    """

    name: str
    config: dict[str, Any]
    slots: list[Slot]
    dropped: dict[str, str] = field(default_factory=dict[str, str])
    bits: int | None = None
    has_linear_doors: bool = False

    @property
    def keys(self) -> dict[str, TensorInfo]:
        """Native names, with native shapes and stored dtypes."""
        return {slot.row.native: slot.info for slot in self.slots}

    @property
    def parameters(self) -> int:
        """How many numbers it holds, whatever they are stored as."""
        return sum(TensorInfo("float32", row.native_shape).size for row in self._plain_rows())

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters as stored."""
        return sum(slot.info.nbytes for slot in self.slots)

    @property
    def dtypes(self) -> dict[str, int]:
        """Stored dtype to number of parameters; "4-bit" or "8-bit" for quantised ones."""
        infos = self.keys
        counted: dict[str, int] = {}
        for row in self._plain_rows():
            dtype = infos[row.native].dtype
            dtype = f"{self.bits}-bit" if dtype == PACKED else dtype
            size = TensorInfo("float32", row.native_shape).size
            counted[dtype] = counted.get(dtype, 0) + size
        return counted

    def _plain_rows(self) -> list[Row]:
        """Every parameter as it is unquantised."""
        if self.bits is None:
            return [slot.row for slot in self.slots]
        return LAYOUTS[self.name].rows(self.config, NATIVE)

    def tensors(self, dtype: str | None = None) -> Iterator[tuple[str, Tensor]]:
        """Every parameter under its native name, contiguous, one alive at a time.

        Args:
            dtype: cast to this; None keeps what the file stores.

        Raises:
            InvalidCheckpoint: at a tensor with values that are not finite.
        """
        for slot in self.slots:
            yield slot.row.native, slot.read(dtype)


@dataclass
class SourceModel:
    """A model file or folder opened for reading. A context manager: closing it closes the files.

    Attributes:
        path: what was opened.
        container: what it is ("torch zip", "safetensors", "diffusers folder", "maple folder", …).
        family: "sd1", "sd2", "sdxl", …, or the component's name where it alone cannot say.
        title: the family in words.
        layout: "compvis", "diffusers" or "maple".
        prediction: "epsilon", "v_prediction", or "unknown" where the tensors fit both.
        evidence: what was seen that makes it this family, one sentence each.
        notes: what had to be decided, one sentence each.
        has_ema: whether the file carries EMA copies of the UNet's weights.
        uses_ema: whether those are the ones that are read.
        components: its networks by name.
        scheduler: the betas it was trained with, and hints of a folder's scheduler.
        scheduler_class: of a folder's scheduler, or "".
        alphas_cumprod: the noise schedule as stored, where a file stores it.
        defaults: width, height, steps, guidance_scale, sampler, schedule.
        latent_rgb_factors: linear preview, four rows and the bias to RGB in 0..1, or None.
        tokenizer_files: "vocab" and "merges" of the folder's own vocabulary, or nothing.
        dropped: every key that is left out, and why.
        files: the files that hold the tensors.
        source: for a maple folder, which file it was made from.
        stack: closes the files.
    """

    path: Path
    container: str
    family: str
    title: str
    layout: str
    evidence: list[str]
    components: dict[str, Component]
    prediction: str = "epsilon"
    notes: list[str] = field(default_factory=list[str])
    has_ema: bool = False
    uses_ema: bool = False
    scheduler: dict[str, Any] = field(default_factory=lambda: dict(SD1_SCHEDULER))
    scheduler_class: str = ""
    alphas_cumprod: npt.NDArray[np.floating[Any]] | None = None
    defaults: dict[str, Any] = field(default_factory=dict[str, Any])
    latent_rgb_factors: list[list[float]] | None = None
    tokenizer_files: dict[str, Path] = field(default_factory=dict[str, Path])
    dropped: dict[str, str] = field(default_factory=dict[str, str])
    files: list[Path] = field(default_factory=list[Path])
    source: dict[str, Any] | None = None
    stack: ExitStack = field(default_factory=ExitStack, repr=False)

    def __enter__(self) -> "SourceModel":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; the components cannot be read any more."""
        self.stack.close()


# ---------------------------------------------------------------------------------------------
# Planning: every key once


def match(
    path: Path,
    tensors: Mapping[str, TensorInfo],
    slots: Sequence[Slot],
    dropped: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Check that every slot's key is there with its shape and every other key is known as dropped.

    Args:
        path: the file, for messages.
        tensors: everything that it holds.
        slots: everything that the architecture needs of it.
        dropped: keys to leave out for a reason that only this file gives.

    Returns:
        The keys that are left out, with the reason.

    Raises:
        LayoutMismatch: listing missing, unexpected and misshapen keys.
        InvalidCheckpoint: if a weight is of another type than it must be.
    """
    used = {slot.key: slot for slot in slots}
    missing = [key for key in used if key not in tensors]
    misshapen = [
        (key, tensors[key].shape, slot.row.published_shape)
        for key, slot in used.items()
        if key in tensors and tensors[key].shape != slot.row.published_shape
    ]
    left_out: dict[str, str] = {}
    unexpected: list[str] = []
    for key in tensors:
        if key in used:
            continue
        reason = (dropped or {}).get(key) or files.dropped_reason(key)
        if reason is None:
            unexpected.append(key)
        else:
            left_out[key] = reason
    if missing or unexpected or misshapen:
        raise LayoutMismatch(path, missing, unexpected, misshapen)
    for key, slot in used.items():
        found = tensors[key].dtype
        if found != PACKED if slot.row.packed else found not in FLOATS:
            raise InvalidCheckpoint(path, f"{key} is {tensors[key].dtype}, not a weight")
    return left_out


def in_file_order(slots: Sequence[Slot], tensors: Mapping[str, TensorInfo]) -> list[Slot]:
    """The slots as the file holds their tensors, so that reading it runs forward."""
    order = {key: n for n, key in enumerate(tensors)}
    return sorted(slots, key=lambda slot: order[slot.key])


def files_of(path: Path) -> list[Path]:
    """A weight file, or the index of a sharded one and its shards."""
    if path.suffix != ".json":
        return [path]
    shards: dict[str, str] = read_json(path)["weight_map"]
    return [path, *(path.parent / shard for shard in sorted(set(shards.values())))]
