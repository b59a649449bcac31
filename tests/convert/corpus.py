"""Hostile files, each made by a function whose docstring tells the attack.

``HOSTILE`` lists them as ``Case``s: a name, a function that makes the file in an empty folder and
returns the path to open, the exit code that the error must have, and words that its one line must
contain. A new attack is a new function here:

    @hostile("is empty")
    def empty_file(folder):
        \"\"\"A download that never began.\"\"\"
        return write(folder / "model.ckpt", b"")

Cases of stage "reader" must be refused by ``readers.open_checkpoint`` (or by reading what it
lists); those of stage "layout" open there, and must be refused by ``open_model`` or ``convert``.
``test_hostile_readers.py`` runs the first kind; nothing may be executed, written or left open.
"""

import gzip
import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf_files as gf
import numpy as np
import torch_files as tf
from torch_files import Call, Global

MARKER = "EXECUTED"  # every payload would make a file of this name in the case's folder


@dataclass(frozen=True)
class Case:
    """One hostile file and how it must be refused."""

    name: str
    make: Callable[[Path], Path]
    exit_code: int
    words: tuple[str, ...]
    stage: str = "reader"
    unprivileged: bool = False  # open it as another user, where the tests run as root


HOSTILE: list[Case] = []


def hostile(
    *words: str, exit_code: int = 3, stage: str = "reader", unprivileged: bool = False
) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    """Register the function below as a case."""

    def register(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
        assert make.__doc__, f"{make.__name__} must tell the attack in its docstring"
        HOSTILE.append(Case(make.__name__, make, exit_code, words, stage, unprivileged))
        return make

    return register


def hostile_each(
    values: Iterable[Any], *words: str, exit_code: int = 3, stage: str = "reader"
) -> Callable[[Callable[[Path, Any], Path]], Callable[[Path, Any], Path]]:
    """Register the function below as one case for each value."""

    def register(make: Callable[[Path, Any], Path]) -> Callable[[Path, Any], Path]:
        assert make.__doc__, f"{make.__name__} must tell the attack in its docstring"
        for value in values:
            name = f"{make.__name__}[{value}]"
            HOSTILE.append(Case(name, lambda f, v=value: make(f, v), exit_code, words, stage))
        return make

    return register


# Good files, to be spoiled


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def good_tree() -> dict[str, Any]:
    return {
        "state_dict": OrderedDict(
            weight=np.arange(24, dtype=np.float32).reshape(4, 6),
            bias=np.arange(4, dtype=np.float16),
        ),
        "global_step": 7,
    }


def good_zip(folder: Path) -> bytes:
    return tf.write_torch_zip(folder / "model.ckpt", good_tree()).read_bytes()


def good_legacy(folder: Path) -> bytes:
    return tf.write_legacy(folder / "model.ckpt", good_tree()).read_bytes()


def good_safetensors() -> bytes:
    return safetensors_file(
        {
            "weight": {"dtype": "F32", "shape": [4, 6], "data_offsets": [0, 96]},
            "bias": {"dtype": "F16", "shape": [4], "data_offsets": [96, 104]},
        },
        104,
    )


def safetensors_file(header: Any, data: int) -> bytes:
    """A safetensors file with that header (JSON-able, or bytes) and ``data`` bytes of tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def one_entry(**changes: Any) -> bytes:
    """A safetensors file of one tensor, 4 float32, with some fields changed."""
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}
    return safetensors_file({"x": entry}, 16)


def checkpoint(folder: Path, stream: bytes, data: bytes = bytes(16)) -> Path:
    """A torch zip with that pickle and one storage, data/0."""
    records = [("archive/data.pkl", stream), ("archive/data/0", data), ("archive/version", b"3\n")]
    return tf.write_records(folder / "model.ckpt", records)


def with_value(folder: Path, value: object) -> Path:
    """A torch zip of a good tensor and some other value."""
    return tf.write_torch_zip(folder / "model.ckpt", {"weight": np.ones(4, np.float32), "x": value})


def patched(folder: Path, content: bytes, at: int, new: bytes) -> Path:
    """The content with the bytes at one place replaced."""
    at = at if at >= 0 else len(content) + at
    return write(folder / "model.ckpt", content[:at] + new + content[at + len(new) :])


def payload(folder: Path) -> str:
    return f"touch {folder / MARKER}"


STORAGE = b"X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\4"


def raw_tensor(
    offset: bytes = b"K\0",
    shape: bytes = b"K\4\x85",
    stride: bytes = b"K\1\x85",
    storage: bytes = b"(" + STORAGE + b"tQ",
    hooks: bytes = b"N",
    call: bytes = b"ctorch._utils\n_rebuild_tensor_v2\n",
) -> bytes:
    """The opcodes of one tensor over a storage of 4 float32, any part of which may be replaced."""
    return call + b"(" + storage + offset + shape + stride + b"\x89" + hooks + b"tR"


def raw_state(value: bytes) -> bytes:
    """A pickle of {"weight": value}."""
    return b"\x80\2}X\6\0\0\0weight" + value + b"s."


def short(text: str) -> bytes:
    """The opcode of a short string."""
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


# Not a checkpoint at all


@hostile("is empty")
def empty_file(folder):
    """A download that never began."""
    return write(folder / "model.ckpt", b"")


@hostile_each([1, 2, 4, 7, 8, 9])
def a_few_bytes(folder, count):
    """Files shorter than any header, so that every fixed-size read could run off the end."""
    return write(folder / "model.ckpt", b"\x80\2PK\3\4{}\x89PNG"[:count])


@hostile("zeros", "did not finish")
def preallocated_download(folder):
    """A download manager reserved the space and stopped: zeros only."""
    return write(folder / "model.ckpt", bytes(100_000))


@hostile("zeros")
def sparse_terabyte(folder):
    """A sparse file that claims a terabyte; reading it whole would never end."""
    path = folder / "model.ckpt"
    with path.open("wb") as file:
        for size in (1 << 40, 1 << 34):  # some file systems allow less
            try:
                file.truncate(size)
                break
            except OSError:
                continue
        else:
            file.truncate(1 << 24)
    return path


@hostile("no kind of checkpoint")
def noise(folder):
    """Random bytes."""
    return write(folder / "model.safetensors", b"\xf1\x07" + random.Random(1).randbytes(5000))


@hostile("web page")
def html_named_ckpt(folder):
    """The login page that a download link answered, saved under the model's name."""
    page = "\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>é</body></html>"
    return write(folder / "model.ckpt", page.encode() * 50)


@hostile("web page")
def html_with_byte_order_mark(folder):
    """The same from a server that begins its pages with a byte-order mark."""
    return write(
        folder / "model.safetensors", "\ufeff<html lang='de'><body>Anmelden</body>".encode()
    )


@hostile("a text", "Entry not found")
def error_message_as_file(folder):
    """What a hub answers instead of a missing file."""
    return write(folder / "model.safetensors", b"Entry not found")


@hostile("weight_map")
def json_error_as_file(folder):
    """An API's error object saved under the model's name."""
    return write(folder / "model.ckpt", b'{"error": "Access to model x/y is restricted"}')


@hostile("Git LFS", "4265380512", "git lfs pull")
def git_lfs_pointer(folder):
    """A repository cloned without Git LFS has such a file instead of the weights."""
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'fe' * 32}\nsize 4265380512\n"
    return write(folder / "model.ckpt", text.encode())


@hostile("GGML", "not read")
def ggml_named_safetensors(folder):
    """Another kind of weights file."""
    return write(folder / "model.safetensors", b"lmgg" + bytes(100))


@hostile("gzip")
def gzip_of_a_checkpoint(folder):
    """A checkpoint compressed as a whole."""
    return write(folder / "model.ckpt", gzip.compress(good_zip(folder)))


@hostile_each(["png", "jpeg", "pdf", "elf", "exe", "hdf5", "npy", "7z", "xz", "zstd", "sqlite"])
def other_file_kinds(folder, kind):
    """Files of other kinds under the model's name; each is named in the message."""
    heads = {
        "png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff\xe0", "pdf": b"%PDF-1.7\n",
        "elf": b"\x7fELF\2\1", "exe": b"MZ\x90\0", "hdf5": b"\x89HDF\r\n\x1a\n",
        "npy": b"\x93NUMPY\1\0", "7z": b"7z\xbc\xaf\x27\x1c", "xz": b"\xfd7zXZ\0",
        "zstd": b"\x28\xb5\x2f\xfd", "sqlite": b"SQLite format 3\0",
    }  # fmt: skip
    return write(folder / "model.ckpt", heads[kind] + random.Random(2).randbytes(300))


@hostile("ONNX")
def onnx_model(folder):
    """A protobuf that begins as an ONNX ModelProto."""
    return write(folder / "model.ckpt", b"\x08\x07\x12\x07pytorch\x1a\x032.1" + bytes(range(200)))


@hostile("msgpack")
def flax_weights(folder):
    """Weights that Flax saved."""
    return write(folder / "flax_model.msgpack", b"\x82\xa6params\x81\xa4conv\xc7\xff\xff\xff\xff")


@hostile("torch 0.1.9", "save it again")
def tar_of_the_oldest_torch(folder):
    """The tar form of torch 0.1.9 and older."""
    with tarfile.open(folder / "model.pth", "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = 4
            tar.addfile(info, io.BytesIO(b"\x80\2N."))
    return folder / "model.pth"


@hostile("tar archive", "../../evil")
def tar_with_path_traversal(folder):
    """A tar whose member would be unpacked outside the folder."""
    with tarfile.open(folder / "model.ckpt", "w") as tar:
        tar.addfile(tarfile.TarInfo("../../evil"), io.BytesIO(b""))
    return folder / "model.ckpt"


# The file system


@hostile("is a folder", exit_code=1)
def directory_named_ckpt(folder):
    """A folder with a file's name."""
    (folder / "model.ckpt").mkdir()
    return folder / "model.ckpt"


@hostile("No such file", exit_code=1)
def missing_file(folder):
    """A path to nothing."""
    return folder / "model.ckpt"


@hostile("Permission denied", exit_code=1, unprivileged=True)
def no_permission(folder):
    """A file that this user may not read."""
    path = write(folder / "model.ckpt", good_zip(folder))
    path.chmod(0)
    return path


@hostile("pipe", exit_code=1)
def named_pipe(folder):
    """Opening a pipe without a writer waits for ever, unless it is opened without blocking."""
    os.mkfifo(folder / "model.ckpt")
    return folder / "model.ckpt"


@hostile("device", exit_code=1)
def endless_device(folder):
    """A link to a device that never ends."""
    (folder / "model.ckpt").symlink_to("/dev/zero")
    return folder / "model.ckpt"


@hostile("No such file", exit_code=1)
def dangling_link(folder):
    """A link whose target was deleted, as in a cleaned cache."""
    (folder / "model.ckpt").symlink_to(folder / "blob")
    return folder / "model.ckpt"


@hostile("cannot be read", exit_code=1)
def link_to_itself(folder):
    """A link that never arrives."""
    (folder / "model.ckpt").symlink_to("model.ckpt")
    return folder / "model.ckpt"


@hostile("cannot be read", exit_code=1)
def nul_in_the_path(folder):
    """A path that the system's calls would cut short."""
    return folder / "model.ckpt\0.safetensors"


@hostile("cannot be read", exit_code=1)
def endless_path(folder):
    """A path longer than the system allows."""
    return folder / ("m" * 5000)


@hostile("is empty")
def control_characters_in_the_name(folder):
    """A file name that would clear the screen, colour it and add lines to the message."""
    return write(folder / "model\x1b[2J\n\rerror: all is well\u202e.ckpt", b"")


# safetensors


@hostile_each([9, 20, 60, 120, 150, 190, -1, -2, -50, -104, -105], "")
def truncated_safetensors(folder, at):
    """A download that stopped, at several places of header and data."""
    return write(folder / "model.safetensors", good_safetensors()[:at])


@hostile("truncated")
def header_longer_than_the_file(folder):
    """The length field points far beyond the end."""
    return patched(folder, good_safetensors(), 0, struct.pack("<Q", 1 << 24))


@hostile("more than safetensors allows")
def header_of_a_terabyte(folder):
    """A length that would be allocated before it is found out."""
    return patched(folder, good_safetensors(), 0, struct.pack("<Q", (1 << 40) - 1))


@hostile("no kind of checkpoint")
def header_length_of_all_ones(folder):
    """A length that is -1 when read as signed, and overflows when 8 is added."""
    return patched(folder, good_safetensors(), 0, b"\xff" * 8)


@hostile("not valid JSON")
def hundred_megabytes_of_header(folder):
    """A header of the greatest length that is allowed, almost all of it a hole in a sparse file."""
    path = write(folder / "model.safetensors", struct.pack("<Q", 99_000_000) + b'{"x":')
    with path.open("r+b") as file:
        file.truncate(99_000_100)
    return path


@hostile("too many")
def header_of_two_million_brackets(folder):
    """JSON whose parsed form is a hundred times its text."""
    return write(folder / "model.safetensors", safetensors_file(b'{"x":[' + b"[]," * 2_100_000, 0))


@hostile("no tensors")
def header_without_tensors(folder):
    """A well-formed file of nothing."""
    return write(folder / "model.safetensors", safetensors_file({}, 0))


@hostile("not valid JSON")
def header_cut_inside(folder):
    """Valid lengths around JSON that ends in its middle."""
    return write(folder / "model.safetensors", safetensors_file(b'{"x":{"dtype":"F32","sha', 16))


@hostile("UTF-8")
def header_not_utf8(folder):
    """Text in another encoding."""
    return write(folder / "model.safetensors", safetensors_file(b'{"gr\xf6\xdfe":{}}', 0))


@hostile("twice")
def header_names_a_tensor_twice(folder):
    """Two readers could disagree about which of the two entries holds."""
    entry = b'{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'
    text = b'{"x":' + entry + b',"x":' + entry + b"}"
    return write(folder / "model.safetensors", safetensors_file(text, 16))


@hostile("twice")
def header_names_a_field_twice(folder):
    """Two shapes for one tensor."""
    text = b'{"x":{"dtype":"F32","shape":[4],"shape":[2],"data_offsets":[0,16]}}'
    return write(folder / "model.safetensors", safetensors_file(text, 16))


@hostile("too deep")
def header_nested_deep(folder):
    """Brackets that overflow a recursive parser's stack."""
    text = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    return write(folder / "model.safetensors", safetensors_file(text, 0))


@hostile("NaN")
def header_with_nan(folder):
    """NaN, which Python's parser takes and JSON does not have."""
    text = b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,16]}}'
    return write(folder / "model.safetensors", safetensors_file(text, 16))


@hostile("digits")
def shape_of_a_million_digits(folder):
    """A number whose conversion takes quadratic time."""
    text = b'{"x":{"dtype":"F32","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,16]}}'
    return write(folder / "model.safetensors", safetensors_file(text, 16))


@hostile_each([[-4], [4.0], [True, 4], ["4"], [1] * 40, None, 4, {"0": 4}, [1 << 64]], "shape")
def shape_that_is_no_shape(folder, shape):
    """Sizes that are negative, not integers, too many, or no list."""
    return write(folder / "model.safetensors", one_entry(shape=shape))


@hostile("its range has 16 bytes")
def shape_that_overflows(folder):
    """2**32 times 2**32 times 4 bytes is 0 in 64 bits."""
    return write(folder / "model.safetensors", one_entry(shape=[1 << 32, 1 << 32, 4]))


@hostile("its range has 16 bytes", "4000000000000")
def shape_of_terabytes(folder):
    """A tensor that would be allocated before its bytes are missed."""
    return write(folder / "model.safetensors", one_entry(shape=[10**12]))


@hostile_each([[0, 12], [4, 16], [16, 0], [0, 1 << 62], [1 << 62, (1 << 62) + 16]], "")
def lying_offsets(folder, offsets):
    """Ranges that are too short, shifted, reversed or beyond the end."""
    return write(folder / "model.safetensors", one_entry(data_offsets=offsets))


@hostile_each([[0], [0, 8, 16], [-16, 0], [0.0, 16.0], [False, 16], "016", None], "data_offsets")
def offsets_that_are_none(folder, offsets):
    """data_offsets of the wrong kind."""
    return write(folder / "model.safetensors", one_entry(data_offsets=offsets))


@hostile("overlaps")
def overlapping_tensors(folder):
    """Two tensors over the same bytes."""
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    return write(folder / "model.safetensors", safetensors_file({"a": entry, "b": entry}, 16))


@hostile("hole")
def hole_between_tensors(folder):
    """Bytes that belong to no tensor: room for a second file inside."""
    header = {
        "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [4], "data_offsets": [32, 48]},
    }
    return write(folder / "model.safetensors", safetensors_file(header, 48))


@hostile("bytes follow")
def bytes_after_the_tensors(folder):
    """A zip archive appended: another reader would see another file."""
    return write(folder / "model.safetensors", good_safetensors() + good_zip(folder))


@hostile_each(["F31", "f32", "", "__proto__", 32, None, ["F32"]], "unknown type")
def unknown_dtype(folder, dtype):
    """A type that the format does not have."""
    return write(folder / "model.safetensors", one_entry(dtype=dtype))


@hostile_each(["F8_E8M0", "U16", "C64"], "not supported")
def dtype_that_is_not_computed_with(folder, dtype):
    """Types of the format for which nothing here has arithmetic, refused by name."""
    size = {"F8_E8M0": 16, "U16": 8, "C64": 2}[dtype]
    return write(folder / "model.safetensors", one_entry(dtype=dtype, shape=[size]))


@hostile("exactly dtype")
def entry_with_another_field(folder):
    """A field that a later format might give a meaning."""
    return write(folder / "model.safetensors", one_entry(strides=[1]))


@hostile("exactly dtype")
def entry_that_is_a_list(folder):
    """An entry of the wrong kind."""
    return write(folder / "model.safetensors", safetensors_file({"x": ["F32", [4], [0, 16]]}, 16))


@hostile("__metadata__")
def metadata_that_is_nested(folder):
    """Metadata must be strings, so that no second parser is needed for it."""
    header = {"__metadata__": {"format": {"a": 1}}}
    return write(folder / "model.safetensors", safetensors_file(header, 0))


@hostile("Unicode")
def name_with_half_a_character(folder):
    """A lone surrogate in a name, which no file can be written with."""
    text = b'{"x\\ud800":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    return write(folder / "model.safetensors", safetensors_file(text, 16))


@hostile("range")
def name_that_colours_the_terminal(folder):
    """Escape sequences and line ends in a tensor's name, which an error message repeats."""
    name = "\x1b[31m\r\nERROR\u2028fake line\x00" + "A" * 10_000
    entry = {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}
    return write(folder / "model.safetensors", safetensors_file({name: entry}, 16))


# GGUF


def gguf(folder: Path, head: bytes, data: int = 128) -> Path:
    """A GGUF file of that header and so many bytes of tensors."""
    return write(folder / "model.gguf", gf.padded(head) + bytes(data))


def one_gguf_entry(
    name: str | bytes = "x", shape: Iterable[int] = (4, 8), kind: int = 0, offset: int = 0
) -> bytes:
    return gf.header([], [gf.entry(name, shape, kind, offset)])


@hostile("truncated")
def gguf_of_its_magic_only(folder):
    """Four bytes, and counts that are not there."""
    return write(folder / "model.gguf", b"GGUF")


@hostile("truncated")
def gguf_cut_in_its_header(folder):
    """The download stopped within the list of tensors."""
    return write(folder / "model.gguf", one_gguf_entry()[:-5])


@hostile("truncated")
def gguf_cut_in_its_tensors(folder):
    """The download stopped within the last tensor."""
    return gguf(folder, one_gguf_entry(), 127)


@hostile_each([0, 1, 4, 0x7FFFFFFF], "version")
def gguf_of_another_version(folder, version):
    """Versions whose counts have other widths, or that do not exist."""
    return gguf(folder, gf.header([], [gf.entry("x", (4, 8), 0, 0)], version=version))


@hostile("big-endian")
def gguf_of_another_byte_order(folder):
    """A file for a machine that counts bytes the other way round."""
    return write(folder / "model.gguf", b"GGUF" + struct.pack(">IQQ", 3, 1, 0) + bytes(100))


@hostile_each(["tensors", "settings"], "says that it has", "more than")
def gguf_of_endless_counts(folder, which):
    """A count for which a list of that length would take all memory."""
    counts = {"tensors": 1 << 60} if which == "tensors" else {"keys": 1 << 60}
    return gguf(folder, gf.header(**counts))


@hostile("setting's name of 1152921504606846976 bytes")
def gguf_of_an_endless_key(folder):
    """A string's length that the file does not have."""
    return gguf(folder, gf.header([struct.pack("<Q", 1 << 60)], keys=1))


@hostile("a setting of 1152921504606846976 bytes")
def gguf_of_an_endless_string(folder):
    """The same in a value."""
    value = gf.text("k") + struct.pack("<IQ", 8, 1 << 60)
    return gguf(folder, gf.header([value], keys=1))


@hostile_each([13, 255, 0xFFFFFFFF], "unknown type")
def gguf_of_an_unknown_setting(folder, kind):
    """A type whose values have no known length: nothing behind it can be found."""
    return gguf(folder, gf.header([gf.text("k") + struct.pack("<IQ", kind, 0)], keys=1))


@hostile_each([0, 4, 12], "truncated")
def gguf_of_an_endless_array(folder, kind):
    """An array of numbers longer than the file; its bytes overflow 64 bits for wide ones."""
    value = gf.text("k") + struct.pack("<IIQ", 9, kind, (1 << 64) - 1)
    return gguf(folder, gf.header([value], keys=1))


@hostile_each([8, 9], "more elements")
def gguf_of_an_endless_array_of_strings(folder, kind):
    """An array whose elements must be looked at one by one, for hours."""
    value = gf.text("k") + struct.pack("<IIQ", 9, kind, 1 << 60)
    return gguf(folder, gf.header([value], keys=1))


@hostile("more elements")
def gguf_of_many_long_arrays(folder):
    """Empty strings by the million, in arrays that each are within bounds."""
    one = struct.pack("<IIQ", 9, 8, 700_000) + bytes(8 * 700_000)
    return gguf(folder, gf.header([gf.text(f"k{n}") + one for n in range(4)]))


@hostile("more text")
def gguf_of_much_text(folder):
    """Strings that together would fill memory; the file has holes in their place."""
    path, size = folder / "model.gguf", 8 << 20
    with path.open("wb") as file:
        file.write(gf.header(keys=9_000))
        for n in range(5):
            file.write(gf.text(f"k{n}") + struct.pack("<IQ", 8, size))
            file.seek(size, os.SEEK_CUR)
        file.truncate(10 << 30)
    return path


@hostile("nested deeper")
def gguf_of_arrays_in_arrays(folder):
    """Arrays nested deeper than any stack."""
    nested = struct.pack("<IQ", 9, 1) * 100_000
    return gguf(folder, gf.header([gf.text("k") + struct.pack("<I", 9) + nested], keys=1))


@hostile("twice")
def gguf_with_a_setting_twice(folder):
    """Two readers would believe two values."""
    return gguf(folder, gf.header([gf.setting("a", "b"), gf.setting("a", "c")]))


@hostile("twice")
def gguf_with_a_tensor_twice(folder):
    """Two tensors of one name."""
    entries = [gf.entry("x", (4, 8), 0, 0), gf.entry("x", (4, 8), 0, 128)]
    return gguf(folder, gf.header([], entries), 256)


@hostile("not UTF-8")
def gguf_with_a_name_of_bytes(folder):
    """A name that is no text."""
    return gguf(folder, one_gguf_entry(b"\xff\xfe"))


@hostile_each([5, 0xFFFFFFFF], "axes")
def gguf_with_many_axes(folder, axes):
    """More axes than ggml has, or than there are bytes."""
    entry = gf.text("x") + struct.pack("<I", axes) + bytes(64)
    return gguf(folder, gf.header([], [entry]))


@hostile_each([(0, 8), (1 << 62, 1 << 62), (1 << 63, 2)], "elements")
def gguf_with_no_or_endless_elements(folder, shape):
    """Sizes whose product is zero, or passes for a small one where it overflows."""
    return gguf(folder, one_gguf_entry(shape=shape))


@hostile_each([4, 5, 31, 99, 0xFFFFFFFF], "unknown type")
def gguf_of_an_unknown_type(folder, kind):
    """Types that ggml took back, or never had."""
    return gguf(folder, one_gguf_entry(kind=kind))


@hostile("cannot hold")
def gguf_with_rows_of_half_a_block(folder):
    """Quantised rows that end within a block."""
    return gguf(folder, one_gguf_entry(shape=(4, 16), kind=gf.Q4_0))


@hostile_each([1, 31, 1 << 40, (1 << 64) - 32], "out of place")
def gguf_with_a_tensor_elsewhere(folder, offset):
    """Offsets off their alignment, outside the file, or that wrap round to its start."""
    return gguf(folder, one_gguf_entry(offset=offset))


@hostile("overlaps")
def gguf_with_overlapping_tensors(folder):
    """A thousand tensors of the same bytes would fill memory from a small file."""
    entries = [gf.entry(f"x{n}", (4, 8), 0, 0) for n in range(1000)]
    return gguf(folder, gf.header([], entries))


@hostile("behind its last tensor")
def gguf_with_something_behind(folder):
    """Another file hidden behind the tensors."""
    return gguf(folder, one_gguf_entry(), 4096)


@hostile_each([0, 3, 1 << 31], "aligns")
def gguf_of_a_strange_alignment(folder, alignment):
    """An alignment to divide by zero with, or to leave any hole."""
    settings = [gf.setting("general.alignment", alignment)]
    return gguf(folder, gf.header(settings, [gf.entry("x", (4, 8), 0, 0)]))


@hostile_each([[4, 9], [-4, -8], [0, 32], []], "has the shape")
def gguf_unfolded_to_another_size(folder, shape):
    """A shape said beside a folded tensor that is not its own."""
    settings = [gf.setting("comfy.gguf.orig_shape.x", shape)]
    return gguf(folder, gf.header(settings, [gf.entry("x", (4, 8), 0, 0)]))


@hostile_each(["4, 8", 32], "no list of whole numbers")
def gguf_unfolded_to_no_shape(folder, shape):
    """A text or one number where the shape of a folded tensor should be."""
    settings = [gf.setting("comfy.gguf.orig_shape.x", shape)]
    return gguf(folder, gf.header(settings, [gf.entry("x", (4, 8), 0, 0)]))


@hostile("no tensors")
def gguf_of_nothing(folder):
    """A vocabulary alone."""
    return gguf(folder, gf.header([gf.setting("a", ["b", "c"])]))


# Sharded


def sharded(folder: Path, weight_map: Any, **more: Any) -> Path:
    write(folder / "model-00001-of-00001.safetensors", good_safetensors())
    index = folder / "model.safetensors.index.json"
    return write(index, json.dumps({"metadata": {}, "weight_map": weight_map, **more}).encode())


@hostile_each(
    ["../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\b.safetensors",
     "C:b.safetensors", ".hidden.safetensors", "", "b.safetensors\0.txt", "http://x/b.bin"],
    "no file beside it",
)  # fmt: skip
def shard_outside_the_folder(folder, shard):
    """A name that leads elsewhere when it is joined to the folder."""
    return sharded(folder, {"weight": shard})


@hostile("No such file", exit_code=1)
def shard_that_is_missing(folder):
    """One of the shards was not downloaded."""
    return sharded(folder, {"weight": "model-00002-of-00002.safetensors"})


@hostile("which it does not")
def shard_without_the_tensor(folder):
    """The index names a tensor that its shard lacks."""
    names = ("weight", "bias", "ghost")
    return sharded(folder, dict.fromkeys(names, "model-00001-of-00001.safetensors"))


@hostile("does not list")
def shard_with_another_tensor(folder):
    """A tensor that the index keeps quiet about."""
    return sharded(folder, {"weight": "model-00001-of-00001.safetensors"})


@hostile("JSON")
def shard_that_is_an_index(folder):
    """An index that names an index that names ... itself."""
    path = sharded(folder, {"weight": "model.safetensors"})
    os.link(path, folder / "model.safetensors")
    return path


@hostile("shards")
def ten_thousand_shards(folder):
    """More files than a process may hold open."""
    return sharded(folder, {f"w{i}": f"{i}.safetensors" for i in range(10_000)})


@hostile_each([[], "x", None, 3], "weight_map")
def weight_map_of_the_wrong_kind(folder, weight_map):
    """An index whose map is none."""
    return sharded(folder, weight_map)


@hostile("no file name")
def weight_map_to_a_list(folder):
    """A shard's name of the wrong kind."""
    return sharded(folder, {"weight": ["a.safetensors"]})


@hostile("too deep")
def index_nested_deep(folder):
    """Brackets against a recursive parser."""
    return write(folder / "model.safetensors.index.json", b'{"weight_map":' + b"[" * 200_000)


@hostile("nested deeper")
def index_nested_somewhat_deep(folder):
    """Nesting that a parser survives but a later recursive walk might not."""
    text = b'{"a":' + b"[" * 500 + b"]" * 500 + b"}"
    return write(folder / "model.safetensors.index.json", text)


@hostile("too many")
def index_of_ten_million_lists(folder):
    """JSON whose parsed form is twenty times its text."""
    text = b'{"weight_map": {"x": [' + b"[]," * 10_000_000 + b"[]]}}"
    return write(folder / "model.safetensors.index.json", text)


@hostile("too much for a JSON file")
def index_of_a_gigabyte(folder):
    """A JSON text too large to parse, sparse on the disk."""
    path = write(folder / "model.safetensors.index.json", b'{"weight_map": {' + b" " * 5000)
    with path.open("r+b") as file:
        file.truncate(1 << 30)
    return path


# Zip archives


@hostile_each([5, 30, 64, 300, 500, 700, 900, 1100, 1400, -1, -22, -60, -98, -99, -500], "")
def truncated_zip(folder, at):
    """A download that stopped, at several places of records, directory and end."""
    return write(folder / "model.ckpt", good_zip(folder)[:at])


@hostile("damaged zip", "no end record")
def zip_without_its_beginning_of_the_end(folder):
    """The end record overwritten."""
    return patched(folder, good_zip(folder), -22, b"PK\0\0")


@hostile("download it again")
def zip_saved_as_text(folder):
    """Bytes replaced by U+FFFD, as found in the wild: somebody's tool took it for text."""
    text = good_zip(folder).decode("utf-8", "replace")
    return write(folder / "model.ckpt", text.encode())


def eocd(content: bytes, field: int, value: int, size: str = "I") -> bytes:
    """The archive with one field of its end record changed, and no zip64 end to contradict it."""
    end = content[-22:]
    changed = bytearray(content[: -22 - 76] + end)
    struct.pack_into(f"<{size}", changed, len(changed) - 22 + field, value)
    return bytes(changed)


@hostile_each([0, 1, 3, 50, 0xFFFF], "damaged zip")
def lying_count(folder, count):
    """The end record says another number of records."""
    content = eocd(good_zip(folder), 8, count, "H")
    return write(
        folder / "model.ckpt", eocd(content[:-22] + bytes(76) + content[-22:], 10, count, "H")
    )


@hostile_each([0, 1, 46, 0xFFFFFFFF], "damaged zip")
def lying_directory_size(folder, size):
    """The end record says another size of the directory."""
    return write(folder / "model.ckpt", eocd(good_zip(folder), 12, size))


@hostile_each([0, 64, 0x7FFFFFFF, 0xFFFFFFFF], "damaged zip")
def lying_directory_offset(folder, offset):
    """The end record points elsewhere."""
    return write(folder / "model.ckpt", eocd(good_zip(folder), 16, offset))


@hostile("several")
def zip_on_two_disks(folder):
    """A part of an archive that spans disks."""
    return write(folder / "model.ckpt", eocd(good_zip(folder), 4, 1, "H"))


@hostile_each([0, 1 << 20, (1 << 64) - 1], "zip64 locator")
def lying_zip64_locator(folder, offset):
    """The locator points elsewhere."""
    return patched(folder, good_zip(folder), -42 + 8, struct.pack("<Q", offset))


@hostile_each([24, 32, 40, 48], "damaged zip")
def lying_zip64_end(folder, field):
    """Count, size or offset of the 64-bit end record disagree with the 32-bit one."""
    return patched(folder, good_zip(folder), -98 + field, struct.pack("<Q", 1 << 40))


@hostile("damaged zip")
def zip64_with_a_trillion_records(folder):
    """Both ends agree, through all ones, on a count that would fill memory."""
    content = bytearray(good_zip(folder))
    struct.pack_into("<2H", content, len(content) - 22 + 8, 0xFFFF, 0xFFFF)
    struct.pack_into("<2Q", content, len(content) - 98 + 24, 1 << 40, 1 << 40)
    return write(folder / "model.ckpt", bytes(content))


def directory_field(content: bytes, name: bytes, field: int, value: int, size: str) -> bytes:
    """The archive with one field of one directory entry changed."""
    changed = bytearray(content)
    entry = content.rindex(name) - 46
    assert content[entry : entry + 4] == b"PK\1\2"
    struct.pack_into(f"<{size}", changed, entry + field, value)
    return bytes(changed)


@hostile_each([0, 95, 97, 10_000, 0xFFFFFFFE, 0xFFFFFFFF], "")
def lying_record_size(folder, size):
    """The directory says another size of a storage."""
    content = directory_field(good_zip(folder), b"model/data/0", 20, size, "I")
    return write(folder / "model.ckpt", directory_field(content, b"model/data/0", 24, size, "I"))


@hostile("disagree")
def record_with_two_sizes(folder):
    """A stored record whose packed size is not its size."""
    content = directory_field(good_zip(folder), b"model/data/0", 20, 95, "I")
    return write(folder / "model.ckpt", content)


@hostile_each([0, 1, 63, 0x7FFFFFFF, 0xFFFFFFFF], "damaged zip")
def lying_record_offset(folder, offset):
    """The directory points to another record, or outside the file."""
    content = directory_field(good_zip(folder), b"model/data/0", 42, offset, "I")
    return write(folder / "model.ckpt", content)


@hostile("overlap")
def thousand_records_over_the_same_bytes(folder):
    """The overlapping zip bomb: a quine of local headers, each inside the one before."""
    names = [f"m/data/{i}" for i in range(200)]
    body, offsets = b"", []
    locals_ = [struct.pack("<4s5H3I2H", b"PK\3\4", *[0] * 8, len(n), 0) + n.encode() for n in names]
    for local in locals_:
        offsets.append(len(body))
        body += local
    body += bytes(1000)
    directory = b"".join(
        struct.pack("<4s6H3I5H2I", b"PK\1\2", *[0] * 7, len(body) - o - len(x),
                    len(body) - o - len(x), len(n), 0, 0, 0, 0, 0, o) + n.encode()
        for n, o, x in zip(names, offsets, locals_, strict=True)
    )  # fmt: skip
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 200, 200, len(directory), len(body), 0)
    return write(folder / "model.ckpt", body + directory + end)


@hostile("local header")
def local_name_differs(folder):
    """The local header names another file: readers that trust it see another archive."""
    content = good_zip(folder)
    return patched(folder, content, content.index(b"model/data/0"), b"model/data/1")


@hostile("two records")
def two_records_of_one_name(folder):
    """Two pickles of one name: readers may take the first or the last."""
    stream, _ = tf.pickled({"x": 1})
    return tf.write_records(folder / "model.ckpt", [("a/data.pkl", stream), ("a/data.pkl", stream)])


@hostile_each(
    ["../../etc/cron.d/x", "/etc/passwd", "a/../../b", "a\\..\\b", "a//b", "./a", "a\0b", "a/."],
    "no plain path",
)
def path_traversal_in_a_record_name(folder, name):
    """A name that writes outside the folder when somebody unpacks it."""
    stream, _ = tf.pickled({"x": 1})
    return tf.write_records(folder / "model.ckpt", [("a/data.pkl", stream), (name, b"evil")])


@hostile("encrypted")
def encrypted_record(folder):
    """A record that needs a password."""
    content = good_zip(folder)
    return write(folder / "model.ckpt", directory_field(content, b"model/data/0", 8, 0x809, "H"))


@hostile("compressed", "zip -0")
def zip_bomb(folder):
    """A gigabyte of zeros in a megabyte of archive."""
    path = folder / "model.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", good_zip(folder))
        with archive.open("archive/data/0", "w", force_zip64=True) as record:
            for _ in range(16):
                record.write(bytes(1 << 22))
    return path


@hostile("compressed")
def compressed_pickle(folder):
    """Only the pickle is compressed, and it would unpack to a hundred times its size."""
    path = folder / "model.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\2" + b"N0" * 10**6, zipfile.ZIP_DEFLATED)
    return path


@hostile("local header")
def record_compressed_only_locally(folder):
    """Directory and local header disagree about compression."""
    content = good_zip(folder)
    return patched(folder, content, content.index(b"model/data/0") - 30 + 8, b"\x08\0")


@hostile("data.pkl")
def zip_of_something_else(folder):
    """An office document, say."""
    records = [("word/document.xml", b"<w/>"), ("[Content_Types].xml", b"<t/>")]
    return tf.write_records(folder / "model.ckpt", records)


@hostile("unpack", "v1-5.ckpt")
def zip_around_a_checkpoint(folder):
    """A checkpoint packed into an archive by whoever uploaded it."""
    return tf.write_records(folder / "model.zip", [("v1-5.ckpt", good_zip(folder))])


@hostile(".npz")
def npz_archive(folder):
    """NumPy's archive, here with an object array, whose loading would unpickle."""
    np.savez(folder / "model.npz", x=np.array([1, "a", None], dtype=object))
    return folder / "model.npz"


@hostile("empty zip")
def zip_of_nothing(folder):
    """An archive without records."""
    with zipfile.ZipFile(folder / "model.ckpt", "w"):
        pass
    return folder / "model.ckpt"


@hostile("2 files data.pkl")
def two_roots(folder):
    """Two checkpoints in one archive: which one is meant?"""
    stream, _ = tf.pickled({"x": 1})
    return tf.write_records(folder / "model.ckpt", [("a/data.pkl", stream), ("b/data.pkl", stream)])


@hostile("TorchScript")
def torchscript_archive(folder):
    """A program with its weights, which torch.jit.load would run."""
    stream, _ = tf.pickled({"x": np.ones(3)})
    records = [("m/data.pkl", stream), ("m/constants.pkl", b"\x80\2)."), ("m/code/a.py", b"boom()")]
    return tf.write_records(folder / "model.pt", records)


@hostile("picture (PNG)")
def picture_with_a_zip_behind(folder):
    """A file that is a picture to one program and an archive to another."""
    return write(folder / "model.ckpt", b"\x89PNG\r\n\x1a\n" + bytes(100) + good_zip(folder))


@hostile("damaged zip")
def zip_with_a_prefix(folder):
    """Bytes before the first record shift every offset; lenient readers add the shift."""
    return write(folder / "model.ckpt", b"PK\3\4" + bytes(60) + good_zip(folder))


@hostile("not at its beginning")
def zip_behind_something_that_begins_like_one(folder):
    """A prefix that the directory's offsets allow for: room for another file in front."""
    prefix = b"PK\3\4" + bytes(60)
    content = bytearray(prefix + good_zip(folder))
    for name in (b"model/data.pkl", b"model/byteorder", b"model/data/0", b"model/data/1",
                 b"model/version", b"model/.format_version", b"model/.storage_alignment",
                 b"model/.data/serialization_id"):  # fmt: skip
        entry = content.rindex(name) - 46
        (offset,) = struct.unpack_from("<I", content, entry + 42)
        struct.pack_into("<I", content, entry + 42, offset + len(prefix))
    for at, size in ((-98 + 48, "Q"), (-42 + 8, "Q"), (-22 + 16, "I")):
        (offset,) = struct.unpack_from(f"<{size}", content, len(content) + at)
        struct.pack_into(f"<{size}", content, len(content) + at, offset + len(prefix))
    return write(folder / "model.ckpt", bytes(content))


@hostile("no end record")
def zip_with_a_suffix(folder):
    """Bytes after the end record."""
    return write(folder / "model.ckpt", good_zip(folder) + b"#!/bin/sh\n")


@hostile("did not write")
def second_end_record_in_the_comment(folder):
    """The comment holds another end record: two readers may see two archives."""
    content = good_zip(folder)
    fake = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0, 0, 0, len(content), 0)
    return write(folder / "model.ckpt", content[:-2] + struct.pack("<H", len(fake)) + fake)


@hostile("too large")
def pickle_of_a_gigabyte(folder):
    """A stored pickle larger than any real one, sparse on the disk."""
    path, size = folder / "model.ckpt", 1 << 30
    name = b"a/data.pkl"
    local = struct.pack("<4s5H3I2H", b"PK\3\4", *[0] * 8, len(name), 0) + name
    entry = struct.pack(
        "<4s6H3I5H2I", b"PK\1\2", *[0] * 7, size, size, len(name), 0, 0, 0, 0, 0, 0
    )  # fmt: skip
    start = len(local) + size
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(entry + name), start, 0)
    with path.open("wb") as file:
        file.write(local)
        file.seek(start)
        file.write(entry + name + end)
    return path


@hostile("lacks the record")
def storage_that_is_missing(folder):
    """The pickle names a storage that the archive lacks."""
    return tf.write_records(folder / "model.ckpt", [("a/data.pkl", raw_state(raw_tensor()))])


@hostile_each([0, 12, 15, 20], "its pickle says 16")
def storage_of_another_length(folder, size):
    """The record is shorter or longer than the pickle says."""
    return checkpoint(folder, raw_state(raw_tensor()), bytes(size))


@hostile("big-endian")
def big_endian_zip(folder):
    """Bytes in the other order, which would read as plausible nonsense."""
    return tf.write_torch_zip(folder / "model.ckpt", good_tree(), byteorder="big")


@hostile("byte order")
def unknown_byte_order(folder):
    """A byte order that nobody has heard of."""
    return tf.write_torch_zip(folder / "model.ckpt", good_tree(), byteorder="middle")


# Pickles that carry code. Each payload would make a file; none may.


@hostile_each(["os", "posix", "nt"], "run code")
def reduce_of_system(folder, module):
    """The classic: GLOBAL and REDUCE of os.system, hidden beside good weights."""
    return with_value(folder, Call(Global(module, "system"), (payload(folder),)))


@hostile("run code")
def code_instead_of_weights(folder):
    """A pickle that is nothing but the call."""
    return checkpoint(folder, b"cos\nsystem\n(" + short(payload(folder)) + b"tR.")


@hostile("run code")
def stack_global_of_system(folder):
    """The name taken from the stack (protocol 4), so that no GLOBAL shows in a scan for text."""
    call = short("os") + short("system") + b"\x93" + short(payload(folder)) + b"\x85R"
    return checkpoint(folder, b"\x80\4" + call + b".")


@hostile("run code")
def stack_global_from_the_memo(folder):
    """Module and name are stored long before, with other text between, and fetched by number."""
    stream = b"\x80\4" + short("system") + b"\x940" + short("os") + b"\x940" + b"h\1h\0\x93"
    return checkpoint(folder, stream + short(payload(folder)) + b"\x85R.")


@hostile("run code")
def inst_of_system(folder):
    """INST: protocol 0's call in one opcode."""
    return checkpoint(folder, b"(S'" + payload(folder).encode() + b"'\nios\nsystem\n.")


@hostile("run code")
def obj_of_system(folder):
    """OBJ: protocol 1's call, class and arguments above a mark."""
    return checkpoint(folder, b"(cos\nsystem\n" + short(payload(folder)) + b"o.")


@hostile("run code")
def newobj_of_popen(folder):
    """NEWOBJ calls cls.__new__, then BUILD sets its state."""
    stream = b"\x80\2csubprocess\nPopen\n" + short(payload(folder)) + b"\x85\x81}b."
    return checkpoint(folder, stream)


@hostile("run code")
def newobj_ex_of_popen(folder):
    """NEWOBJ_EX: the same with keyword arguments, shell=True among them."""
    stream = b"\x80\4csubprocess\nPopen\n" + short(payload(folder)) + b"\x85}"
    return checkpoint(folder, stream + short("shell") + b"\x88s\x92.")


@hostile("run code")
def build_with_setstate(folder):
    """BUILD calls __setstate__, which the state itself may define through __dict__."""
    state = {"__setstate__": Global("os", "system")}
    return with_value(folder, Call(Global("some.module", "Thing"), (), state))


@hostile("run code")
def builtin_exec(folder):
    """exec under its Python 3 name."""
    code = f"open({str(folder / MARKER)!r}, 'w')"
    return with_value(folder, Call(Global("builtins", "exec"), (code,)))


@hostile("run code")
def builtin_eval_of_python_2(folder):
    """eval under its Python 2 name, which Python 3's unpickler translates."""
    code = f"open({str(folder / MARKER)!r}, 'w')"
    return with_value(folder, Call(Global("__builtin__", "eval"), (code,)))


@hostile("run code")
def import_and_getattr(folder):
    """getattr(__import__("os"), "system")(...), so that os.system never appears as a name."""
    module = Call(Global("builtins", "__import__"), ("os",))
    system = Call(Global("builtins", "getattr"), (module, "system"))
    return with_value(folder, Call(system, (payload(folder),)))


@hostile("run code")
def dotted_name(folder):
    """A dotted attribute path: protocol 4 resolves every part of it."""
    name = "OrderedDict.__init__.__globals__"
    stream = b"\x80\4" + short("collections") + short(name) + b"\x93."
    return checkpoint(folder, stream)


@hostile("run code")
def dotted_through_a_harmless_module(folder):
    """os.system reached through a module that imports os."""
    stream = b"\x80\4" + short("pickle") + short("sys.modules") + b"\x93."
    return checkpoint(folder, stream)


@hostile("no tensors")
def getattr_chain(folder):
    """getattr on harmless names, a step at a time; nothing on the list of known names."""
    stage: object = Global("torch", "nn")
    for part in ("functional", "warnings", "sys", "modules"):
        stage = Call(Global("builtins", "getattr"), (stage, part))
    return tf.write_torch_zip(folder / "model.ckpt", {"x": stage})


@hostile("no tensors")
def call_of_an_unknown_module(folder):
    """A package that may be installed on the victim's machine; the name says nothing."""
    call = Call(Global("innocent.helpers", "restore"), (payload(folder),))
    return tf.write_torch_zip(folder / "model.ckpt", {"state_dict": call})


@hostile("run code")
def nested_pickle(folder):
    """pickle.loads of a second pickle carried in bytes."""
    inner = b"cos\nsystem\n(" + short(payload(folder)) + b"tR."
    return with_value(folder, Call(Global("pickle", "loads"), (inner,)))


@hostile("run code")
def nested_pickle_in_joblib(folder):
    """Another library's loader as the carrier."""
    return with_value(folder, Call(Global("joblib.numpy_pickle", "load"), ("x",)))


@hostile("run code")
def code_object(folder):
    """A function built from marshalled bytecode, as cloudpickle does."""
    code = Call(Global("types", "CodeType"), (0,) * 14)
    return with_value(folder, Call(Call(Global("types", "FunctionType"), (code, {})), ()))


@hostile("run code")
def marshalled_code(folder):
    """marshal.loads of bytecode."""
    return with_value(folder, Call(Global("marshal", "loads"), (b"\xe3",)))


@hostile("run code")
def runpy_of_a_path(folder):
    """runpy runs a file or module by name."""
    return with_value(folder, Call(Global("runpy", "run_path"), ("evil.py",)))


@hostile("run code")
def torch_hub_load(folder):
    """torch's own function that downloads a repository and runs it."""
    return with_value(folder, Call(Global("torch.hub", "load"), ("evil/repo", "model")))


@hostile("run code")
def torch_load_inside(folder):
    """torch.load of a second file, without the safe mode of the first."""
    return with_value(folder, Call(Global("torch", "load"), ("other.pt",)))


@hostile("run code")
def numpy_helpers_that_run(folder):
    """numpy's test helper that runs a string, used against allow-lists of numpy.*."""
    name = Global("numpy.testing._private.utils", "runstring")
    return with_value(folder, Call(name, ("import os", {})))


@hostile("run code")
def partial_of_system(folder):
    """functools.partial around the call, set up through its state."""
    part = Call(Global("functools", "partial"), (Global("os", "system"),), (payload(folder),))
    return with_value(folder, Call(part, ()))


@hostile("run code")
def numpy_object_array(folder):
    """An array of objects: its elements are pickles of their own."""
    dtype = Call(Global("numpy", "dtype"), ("O8", False, True))
    command = Call(Global("os", "system"), (payload(folder),))
    args = (Global("numpy", "ndarray"), (0,), b"b")
    state = (1, (1,), dtype, False, [command])
    return with_value(folder, Call(Global("numpy.core.multiarray", "_reconstruct"), args, state))


@hostile("run code")
def code_as_a_dictionary_key(folder):
    """Where a key is hashed, a call is hidden."""
    stream = b"\x80\2}cos\nsystem\n" + short(payload(folder)) + b"\x85RK\1s."
    return checkpoint(folder, stream)


@hostile("run code")
def code_in_the_hooks_of_a_tensor(folder):
    """backward_hooks of a tensor may hold any callable."""
    hook = b"cos\nsystem\n" + short(payload(folder)) + b"\x85R"
    return checkpoint(folder, raw_state(raw_tensor(hooks=hook)))


@hostile("run code")
def code_as_a_storage_type(folder):
    """The persistent id's type is called by some loaders."""
    storage = STORAGE.replace(b"torch\nFloatStorage", b"os\nsystem")
    return checkpoint(folder, raw_state(raw_tensor(storage=b"(" + storage + b"tQ")))


@hostile("run code")
def code_in_a_persistent_id(folder):
    """A persistent id that is not a storage but a call."""
    call = b"cos\nsystem\n" + short(payload(folder)) + b"\x85R"
    return checkpoint(folder, raw_state(call + b"Q"))


@hostile("run code")
def code_through_a_tensor_subclass(folder):
    """_rebuild_from_type_v2 calls its first argument."""
    call = b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nctorch\nTensor\n"
    return checkpoint(folder, raw_state(call + short(payload(folder)) + b"\x85}tR"))


@hostile("run code")
def code_as_the_bytes_of_an_argument(folder):
    """A name that only a later opcode completes: module and name from a decoded string."""
    text = Call(Global("_codecs", "decode"), (b"6f73", "hex"))
    return with_value(folder, Call(Global("importlib", "import_module"), (text,)))


@hostile("no tensors")
def extension_codes(folder):
    """EXT1: a number that stands for whatever global another program registered."""
    return checkpoint(folder, b"\x80\2\x82\1)R.")


@hostile_each([b"\x83\1\0", b"\x84\1\0\0\0", b"\x84\xff\xff\xff\xff"], "no tensors")
def longer_extension_codes(folder, opcode):
    """EXT2 and EXT4, up to the greatest code."""
    return checkpoint(folder, b"\x80\2" + opcode + b".")


@hostile("run code")
def bare_pickle_with_code(folder):
    """No torch file at all: a pickle that runs a command when it is opened."""
    return write(folder / "model.ckpt", b"\x80\2cos\nsystem\n" + short(payload(folder)) + b"\x85R.")


@hostile("run code")
def legacy_with_code_in_the_object(folder):
    """The classic in the old container."""
    tree = {"w": np.ones(3), "x": Call(Global("os", "system"), (payload(folder),))}
    return tf.write_legacy(folder / "model.ckpt", tree)


@hostile_each([0, 1, 2, 4])
def legacy_with_code_elsewhere(folder, place):
    """The old container has five pickles; the others are loaded without thought by some."""
    parts = [pickle.dumps(x, 2) for x in (tf.LEGACY_MAGIC, 1001, {"little_endian": True})]
    parts += [b"\x80\2}.", b"\x80\2]."]
    parts[place] = b"cos\nsystem\n(" + short(payload(folder)) + b"tR."
    return write(folder / "model.ckpt", b"".join(parts))


# Malformed pickles, and pickles that grow


@hostile("unknown opcode")
def unknown_opcode(folder):
    """A byte that is no opcode."""
    return checkpoint(folder, b"\x80\2}\xff.")


@hostile_each([b"\x97", b"\x98"], "unknown opcode")
def out_of_band_buffers(folder, opcode):
    """NEXT_BUFFER and READONLY_BUFFER refer to buffers that no file has."""
    return checkpoint(folder, b"\x80\5" + opcode + b".")


@hostile("protocol 99")
def pickle_of_the_future(folder):
    """A protocol that is not known."""
    return checkpoint(folder, b"\x80\x63}.")


@hostile("before STOP")
def pickle_without_stop(folder):
    """The machine runs off the end."""
    return checkpoint(folder, b"\x80\2}")


@hostile("before STOP")
def pickle_of_no_bytes(folder):
    """An empty pickle."""
    return checkpoint(folder, b"")


@hostile_each(
    [b".", b"0", b"1.", b"2.", b"a.", b"e.", b"s.", b"u.", b"b.", b"R.", b"t.", b"\x85.", b"\x87.",
     b"o.", b"(o.", b"Q.", b"\x93.", b"q\0.", b"\x94.", b"\x81.", b"\x92.", b"\x90.", b"l.", b"d."],
    "empty stack",
)  # fmt: skip
def stack_underflow(folder, stream):
    """Every opcode that takes something, with nothing there."""
    return checkpoint(folder, stream)


@hostile_each([b"h\0", b"j\0\0\0\1", b"g7\n", b"g-1\n"], "never set")
def memo_slot_that_was_never_set(folder, opcode):
    """A fetch from an empty slot."""
    return checkpoint(folder, b"\x80\2" + opcode + b".")


@hostile_each([b"p-1\n", b"p99999999999\n", b"p" + b"9" * 400 + b"\n"], "memo slot")
def memo_slot_out_of_range(folder, opcode):
    """A slot that would make an array of that many pointers."""
    return checkpoint(folder, b"N" + opcode + b".")


@hostile_each(
    [b"X\xff\xff\xff\x7f", b"B\xff\xff\xff\xff", b"T\xff\xff\xff\xff", b"\x8d" + b"\xff" * 8,
     b"\x8e\0\0\0\0\0\0\0\x80", b"\x96" + b"\xff" * 7 + b"\x7f", b"\x8c\x50", b"C\x50", b"U\x50",
     b"G\0\0", b"J", b"\x8a\x50"],
    "ends inside",
)  # fmt: skip
def length_beyond_the_end(folder, opcode):
    """Strings and numbers that claim up to 2**64 bytes."""
    return checkpoint(folder, b"\x80\4" + opcode + b"ab.")


@hostile("frame")
def frame_beyond_the_end(folder):
    """A protocol 4 frame longer than the pickle."""
    return checkpoint(folder, b"\x80\4\x95" + struct.pack("<Q", 1 << 60) + b"}.")


@hostile("integer of")
def integer_of_a_megabyte(folder):
    """LONG4 with a million bytes: printing it takes quadratic time."""
    return checkpoint(folder, b"\x80\2\x8b" + struct.pack("<I", 10**6) + b"\x7f" * 10**6 + b".")


@hostile_each([b"I", b"L"], "line of more than")
def integer_of_a_million_digits(folder, opcode):
    """The same in decimal, where even reading takes quadratic time."""
    return checkpoint(folder, opcode + b"9" * 10**6 + b"\n.")


@hostile_each(
    [b"Iabc\n", b"L0x10L\n", b"I\n", b"F1.2.3\n", b"F\n", b"gx\n", b"I1_000a\n"], "number"
)
def number_that_is_none(folder, opcode):
    """Text where a number belongs."""
    return checkpoint(folder, opcode + b".")


@hostile_each([b"S'abc\n", b"Sabc\n", b"S\n", b"S'\n", b"Vab\\u12\n", b"X\1\0\0\0\xff"], "")
def malformed_text(folder, opcode):
    """Strings without quotes, cut escapes, text that is not UTF-8."""
    return checkpoint(folder, opcode + b".")


@hostile("line of more than")
def name_of_a_megabyte(folder):
    """A global's name without an end."""
    return checkpoint(folder, b"c" + b"a" * 10**6 + b"\nb\n.")


@hostile("globals")
def fifty_thousand_names(folder):
    """More globals than any library has."""
    stream = b"\x80\2(" + b"".join(b"cm%d\nn\n" % i for i in range(50_000)) + b"l."
    return checkpoint(folder, stream)


@hostile_each([b"NK\1a.", b"NK\1K\1s.", b"N}b.", b")K\1a.", b"](Na(K\1u.", b"}(K\1u."], "")
def change_of_the_wrong_thing(folder, stream):
    """Appending to a number, setting items of None, an odd number of keys and values."""
    return checkpoint(folder, stream)


@hostile("nested deeper")
def hundred_thousand_lists(folder):
    """Lists in lists: a recursive walk overflows the stack, and so does freeing them in C."""
    return checkpoint(folder, b"\x80\2" + b"]" * 100_000 + b"a" * 99_999 + b".")


@hostile("nested deeper")
def hundred_thousand_tuples(folder):
    """Tuples in tuples, which cost one byte each."""
    return checkpoint(folder, b"\x80\2)" + b"\x85" * 100_000 + b".")


@hostile("nested deeper")
def hundred_thousand_dictionaries(folder):
    """Dictionaries in dictionaries."""
    return checkpoint(folder, b"\x80\2" + b"}K\1" * 100_000 + b"N" + b"s" * 100_000 + b".")


@hostile("no tensors")
def hundred_thousand_calls(folder):
    """Calls of calls."""
    return checkpoint(folder, b"\x80\2cm\nn\n" + b")R" * 100_000 + b".")


@hostile("marks")
def hundred_thousand_marks(folder):
    """A mark for every byte."""
    return checkpoint(folder, b"(" * 100_000 + b".")


@hostile("nested deeper")
def billion_laughs(folder):
    """Each list holds the one before twice: 60 steps stand for 2**60 elements."""
    stream = b"\x80\4]\x94" + b"".join(b"](h%ch%ce\x94" % (i, i) for i in range(100))
    return checkpoint(folder, stream + b".")


@hostile("unfolds to more than")
def thousand_laughs_with_a_tensor(folder):
    """Shallow, but wide: 10**9 names for one tensor."""
    stream = b"\x80\4" + raw_tensor() + b"q\xc8"
    for i in range(200, 209):
        stream += b"](" + b"h%c" % i * 10 + b"eq%c" % (i + 1)
    return checkpoint(folder, stream + b".")


@hostile("nested deeper")
def list_that_holds_itself(folder):
    """A cycle: walking it never ends."""
    return checkpoint(folder, b"\x80\2]q\0h\0a.")


@hostile("nested deeper")
def dictionary_that_holds_itself(folder):
    """A cycle through state_dict."""
    return checkpoint(folder, b"\x80\2}q\0" + short("state_dict") + b"h\0s.")


@hostile("opcodes")
def two_million_duplicates(folder):
    """DUP: each byte one more element."""
    return checkpoint(folder, b"\x80\2(N" + b"2" * 2_000_000 + b"l.")


@hostile("")
def half_a_million_empty_lists(folder):
    """Small objects that are large in memory, kept alive by the memo."""
    return checkpoint(folder, b"\x80\4(" + b"]\x94" * 400_000 + b"l.")


@hostile("no tensors")
def keys_that_collide(folder):
    """Integer keys with one hash: a dictionary of them takes quadratic time."""
    step = (1 << 61) - 1
    keys = b"".join(
        b"\x8a\x0b" + (i * step).to_bytes(11, "little") + b"N" for i in range(1, 40_000)
    )
    return checkpoint(folder, b"\x80\2}(" + keys + b"u.")


@hostile("no tensors")
def a_bare_number(folder):
    """A valid pickle of no use."""
    return checkpoint(folder, b"\x80\2K\7.")


@hostile("no tensors")
def a_state_dict_of_nothing(folder):
    """A checkpoint's shape without its content."""
    return tf.write_torch_zip(folder / "model.ckpt", {"state_dict": {}, "global_step": 3})


# Tensors that lie


@hostile_each([b"K\1", b"K\4", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 7 + b"\x7f"], "")
def offset_beyond_the_storage(folder, offset):
    """The tensor begins too late."""
    return checkpoint(folder, raw_state(raw_tensor(offset=offset)))


@hostile_each([b"J\xff\xff\xff\xff", b"G" + bytes(8), b"N", b"\x88", short("0"), b")"], "sizes")
def offset_that_is_none(folder, offset):
    """Negative, fractional, absent, a bool or text."""
    return checkpoint(folder, raw_state(raw_tensor(offset=offset)))


@hostile_each([b"K\5\x85", b"J\xff\xff\xff\x7f\x85", b"K\2K\3\x86"], "")
def shape_beyond_the_storage(folder, shape):
    """More elements than the storage has."""
    stride = b"K\1\x85" if shape.endswith(b"\x85") else b"K\3K\1\x86"
    return checkpoint(folder, raw_state(raw_tensor(shape=shape, stride=stride)))


@hostile_each(
    [b"J\xff\xff\xff\xff\x85", b"G" + bytes(8) + b"\x85", b"\x88\x85", b"K\4", b"N", b"]",
     b"K\1K\4\x86", b"(" + b"K\1" * 40 + b"t", b"\x8a\x09" + b"\xff" * 8 + b"\0\x85"],
    "sizes",
)  # fmt: skip
def shape_of_a_torch_tensor_that_is_none(folder, shape):
    """Shapes that are negative, fractional, no tuple, of another length than the strides."""
    return checkpoint(folder, raw_state(raw_tensor(shape=shape)))


@hostile("storage of 4")
def stride_beyond_the_storage(folder):
    """Two elements, a terabyte apart."""
    tensor = raw_tensor(shape=b"K\2\x85", stride=b"\x8a\x06" + b"\xff" * 5 + b"\0\x85")
    return checkpoint(folder, raw_state(tensor))


@hostile("sizes")
def negative_stride(folder):
    """A step backwards, out of the storage at its front."""
    return checkpoint(folder, raw_state(raw_tensor(stride=b"J\xff\xff\xff\xff\x85")))


@hostile("claims")
def expanded_to_a_terabyte(folder):
    """Stride 0 repeats one element without end: 4 bytes become 4 TB when they are read."""
    tensor = raw_tensor(
        shape=b"\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85", stride=b"K\0\x85"
    )
    return checkpoint(folder, raw_state(tensor))


@hostile("claims")
def thousand_expanded_tensors(folder):
    """Each is modest, together they are not."""
    run = tf.Storage(np.zeros(1, np.float32))
    tree = {str(i): tf.TorchTensor(run, 0, (10**6,), (0,)) for i in range(1000)}
    return tf.write_torch_zip(folder / "model.ckpt", tree)


@hostile("of shape")
def shape_that_overflows_64_bits(folder):
    """Sizes whose product wraps around to something small."""
    big = b"\x8a\x06" + (1 << 40).to_bytes(6, "little")
    tensor = raw_tensor(shape=b"(" + big * 3 + b"t", stride=b"(K\0K\0K\0t")
    return checkpoint(folder, raw_state(tensor))


@hostile_each([b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\xff" * 8 + b"\0", b"N", short("4")], "size")
def storage_of_no_size(folder, size):
    """A storage of negative, immense or absent size."""
    storage = b"(" + STORAGE[:-2] + size + b"tQ"
    return checkpoint(folder, raw_state(raw_tensor(storage=storage)))


@hostile("needs elements")
def storage_of_exabytes(folder):
    """A storage of 2**46 elements, of which the tensor wants the last."""
    size = b"\x8a\x06" + (1 << 46).to_bytes(6, "little")
    storage = b"(" + STORAGE[:-2] + size + b"tQ"
    stream = raw_state(raw_tensor(storage=storage, offset=size))
    return checkpoint(folder, stream)


@hostile_each(["../../../etc/passwd", "/etc/passwd", "..", "", "0\0", "\x1b[2J\n"], "")
def storage_key_with_path_traversal(folder, key):
    """The key becomes a part of a path inside the archive; it must never be one outside."""
    storage = b"(" + STORAGE.replace(short("0"), short(key)) + b"tQ"
    return checkpoint(folder, raw_state(raw_tensor(storage=storage)))


@hostile_each([b"K\0", b"N", b")", b"C\x010"], "key")
def storage_key_that_is_no_text(folder, key):
    """A key of another kind."""
    storage = b"(" + STORAGE.replace(short("0"), key) + b"tQ"
    return checkpoint(folder, raw_state(raw_tensor(storage=storage)))


@hostile("two types")
def storage_with_two_types(folder):
    """The same bytes as float32 here and int64 there: the lengths cannot both be right."""
    second = b"(" + STORAGE.replace(b"Float", b"Long") + b"tQ"
    stream = (
        b"\x80\2}X\1\0\0\0a" + raw_tensor() + b"sX\1\0\0\0b" + raw_tensor(storage=second) + b"s."
    )
    return checkpoint(folder, stream)


@hostile_each(["ComplexFloatStorage", "QInt8Storage", "Float8_e4m3fnStorage"], "not supported")
def storage_type_that_is_not_read(folder, name):
    """Types of torch that no Stable Diffusion checkpoint has, refused by name."""
    storage = b"(" + STORAGE.replace(b"FloatStorage", name.encode()) + b"tQ"
    return checkpoint(folder, raw_state(raw_tensor(storage=storage)))


@hostile_each(
    [b"K\1", short("FloatStorage"), b"cmy.module\nFloatStorage\n", b"ctorch\nTensor\n"], ""
)
def storage_type_that_is_none(folder, kind):
    """Something else where the storage's class belongs."""
    storage = STORAGE.replace(b"ctorch\nFloatStorage\n", kind)
    return checkpoint(folder, raw_state(raw_tensor(storage=b"(" + storage + b"tQ")))


@hostile_each(
    [b")Q", b"NQ", b"K\1Q", short("storage") + b"\x85Q", b"Pabc\n", b"}Q"], "no torch storage"
)
def persistent_id_that_is_no_storage(folder, storage):
    """References of other kinds."""
    return checkpoint(folder, raw_state(raw_tensor(storage=storage)))


@hostile_each([b"N", b"K\1", b"]", b"}", b"cm\nn\n)R"], "refers to no storage")
def tensor_without_a_storage(folder, storage):
    """Something else where the reference belongs."""
    return checkpoint(folder, raw_state(raw_tensor(storage=storage)))


@hostile("arguments")
def tensor_with_too_few_arguments(folder):
    """A call that Python would refuse."""
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + b"(" + STORAGE + b"tQK\0tR"
    return checkpoint(folder, raw_state(call))


@hostile_each(["_rebuild_qtensor", "_rebuild_sparse_tensor", "_rebuild_meta_tensor_no_storage"])
def tensor_of_another_kind(folder, name):
    """Quantised, sparse and empty tensors are named and refused."""
    call = b"ctorch._utils\n" + name.encode() + b"\n"
    return checkpoint(folder, raw_state(raw_tensor(call=call)))


@hostile("wraps a tensor too often")
def parameter_of_a_parameter(folder):
    """Wrappers around wrappers, ten thousand deep."""
    call = b"ctorch._utils\n_rebuild_parameter\n"
    stream = call * 10_000 + raw_tensor() + b"\x88N\x87R" * 10_000
    return checkpoint(folder, raw_state(stream))


@hostile("two tensors are named")
def two_tensors_of_one_name(folder):
    """A dotted key and a nested one that read the same."""
    tree = {"a.b": np.ones(2, np.float32), "a": {"b": np.zeros(2, np.float32)}}
    return tf.write_torch_zip(folder / "model.ckpt", tree)


@hostile("two tensors are named")
def one_key_twice(folder):
    """A dictionary's key set twice: readers may take the first or the last."""
    stream = b"\x80\2}X\1\0\0\0a" + raw_tensor() + b"sX\1\0\0\0a" + raw_tensor() + b"s."
    return checkpoint(folder, stream)


@hostile("two entries")
def two_state_dicts(folder):
    """Two sets of weights under one key."""
    inner = b"}X\1\0\0\0a" + raw_tensor() + b"s"
    key = short("state_dict")
    return checkpoint(folder, b"\x80\2}" + key + inner + b"s" + key + inner + b"s.")


@hostile("Unicode")
def torch_name_with_half_a_character(folder):
    """A lone surrogate in a tensor's name."""
    name = b"X\5\0\0\0ab\xed\xa0\x80"
    return checkpoint(folder, b"\x80\2}" + name + raw_tensor() + b"s.")


@hostile("name of more than")
def tensor_name_of_a_megabyte(folder):
    """A name that would be repeated in every index and message."""
    return checkpoint(folder, b"\x80\2}" + short("w" * 10**6) + raw_tensor() + b"s.")


# The old container


@hostile_each([3, 14, 15, 21, 60, 119, 122, 300, -1, -8, -9, -40, -104, -106, -130], "")
def truncated_legacy(folder, at):
    """A download that stopped, at several places of pickles and storages."""
    return write(folder / "model.ckpt", good_legacy(folder)[:at])


@hostile("that torch.save did not write")
def plain_pickle(folder):
    """A pickle of some other program."""
    return write(folder / "model.pkl", pickle.dumps({"weights": [1.0, 2.0]}, 2))


@hostile("that torch.save did not write")
def another_magic_number(folder):
    """A number in front, but not torch's."""
    return write(folder / "model.pkl", pickle.dumps(12345, 2) + pickle.dumps({}, 2))


# An old file of one tensor of 4 float32, part by part.
LEGACY_PARTS = {
    "magic": pickle.dumps(tf.LEGACY_MAGIC, 2),
    "protocol": pickle.dumps(1001, 2),
    "system": pickle.dumps({"little_endian": True}, 2),
    "body": raw_state(raw_tensor(storage=b"(" + STORAGE + b"NtQ")),
    "keys": pickle.dumps(["0"], 2),
    "count": struct.pack("<q", 4),
    "data": bytes(16),
}


def legacy_parts(**changes: bytes) -> bytes:
    """An old file with some of its parts replaced."""
    return b"".join({**LEGACY_PARTS, **changes}.values())


@hostile("protocol 1001")
def legacy_of_another_protocol(folder):
    """A version of the container that never was."""
    return write(folder / "model.ckpt", legacy_parts(protocol=pickle.dumps(1002, 2)))


@hostile("big-endian")
def big_endian_legacy(folder):
    """The other byte order."""
    system = pickle.dumps({"little_endian": False}, 2)
    return write(folder / "model.ckpt", legacy_parts(system=system))


@hostile_each([["0", "0"], ["1"], ["0", "1"], [0], [None], ["0\0"]], "lists a storage")
def keys_that_do_not_fit(folder, keys):
    """The list names a storage twice, or one that the object does not use."""
    return write(folder / "model.ckpt", legacy_parts(keys=pickle.dumps(keys, 2)))


@hostile("lacks the storage")
def keys_that_are_missing(folder):
    """The object uses a storage that the file does not list."""
    content = legacy_parts(keys=pickle.dumps([], 2), count=b"", data=b"")
    return write(folder / "model.ckpt", content)


@hostile_each([{"0": 1}, 7, None, "0"], "where its storages are listed")
def keys_of_the_wrong_kind(folder, keys):
    """The list of keys is no list."""
    return write(folder / "model.ckpt", legacy_parts(keys=pickle.dumps(keys, 2)))


@hostile_each([3, 5, 0, -1, -(1 << 63), (1 << 63) - 1], "its pickle says 4")
def lying_element_count(folder, count):
    """The count before the storage is not the object's; negative ones would seek backwards."""
    return write(folder / "model.ckpt", legacy_parts(count=struct.pack("<q", count)))


@hostile("truncated")
def legacy_storage_beyond_the_end(folder):
    """Count and object agree on a storage of terabytes."""
    size = b"\x8a\x06" + (1 << 40).to_bytes(6, "little")
    storage = b"(" + STORAGE[:-2] + size + b"NtQ"
    body = raw_state(raw_tensor(storage=storage))
    return write(folder / "model.ckpt", legacy_parts(body=body, count=struct.pack("<q", 1 << 40)))


@hostile_each([b"K\1K\4\x87", b"K\5K\0\x87", b"J\xff\xff\xff\xffK\4\x87", b"K\0\x86"], "view")
def view_beyond_its_storage(folder, view):
    """A storage that is a view of another, outside of it."""
    storage = b"(" + STORAGE + short("9") + view + b"tQ"
    return write(folder / "model.ckpt", legacy_parts(body=raw_state(raw_tensor(storage=storage))))


@hostile("opcodes")
def legacy_pickles_without_end(folder):
    """Pickles that go on and on, to make a reader enlarge its window."""
    return write(folder / "model.ckpt", legacy_parts(system=b"(" + b"N0" * 2_000_000))


@hostile("longer than")
def legacy_pickle_of_a_gigabyte(folder):
    """One string that claims most of a sparse file."""
    path = write(folder / "model.ckpt", legacy_parts(system=b"B" + struct.pack("<I", 1 << 30)))
    with path.open("r+b") as file:
        file.truncate((1 << 30) + 1000)
    return path
