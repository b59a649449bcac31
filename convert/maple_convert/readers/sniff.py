"""What a file is, by its first bytes. Its name does not matter: downloads are often misnamed."""

import re
from typing import Literal

from maple_convert.errors import InvalidCheckpoint, UnsupportedCheckpoint, quoted
from maple_convert.readers.source import SourceFile

Kind = Literal["safetensors", "zip", "pickle", "gguf", "json"]
HEAD = 4096

# (offset, bytes, what the file is and what to do)
SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"lmgg", "is a GGML file, which is not read: use the .safetensors or .ckpt of the model"),
    (0, b"PK\5\6", "is an empty zip archive"),
    (0, b"PK\7\x08", "is one part of a split zip archive: join the parts first"),
    (0, b"\x1f\x8b", "is compressed with gzip: unpack it first"),
    (0, b"BZh", "is compressed with bzip2: unpack it first"),
    (0, b"\xfd7zXZ\0", "is compressed with xz: unpack it first"),
    (0, b"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it first"),
    (0, b"\x04\x22\x4d\x18", "is compressed with lz4: unpack it first"),
    (0, b"7z\xbc\xaf\x27\x1c", "is a 7-Zip archive: unpack it first"),
    (0, b"Rar!\x1a\x07", "is a RAR archive: unpack it first"),
    (0, b"\x93NUMPY", "is a NumPy .npy array, not a checkpoint"),
    (0, b"\x89HDF\r\n\x1a\n", "is an HDF5 file (Keras, TensorFlow), which is not read"),
    (0, b"\x89PNG\r\n\x1a\n", "is a picture (PNG), not a checkpoint"),
    (0, b"\xff\xd8\xff", "is a picture (JPEG), not a checkpoint"),
    (0, b"GIF8", "is a picture (GIF), not a checkpoint"),
    (8, b"WEBP", "is a picture (WebP), not a checkpoint"),
    (0, b"%PDF-", "is a PDF document, not a checkpoint"),
    (0, b"\x7fELF", "is a program (ELF), not a checkpoint"),
    (0, b"\xcf\xfa\xed\xfe", "is a program (Mach-O), not a checkpoint"),
    (0, b"MZ", "is a Windows program, not a checkpoint"),
    (0, b"SQLite format 3\0", "is an SQLite database, not a checkpoint"),
    (4, b"TFL3", "is a TensorFlow Lite model, which is not read"),
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
ONNX = re.compile(rb"\x08[\x01-\x10](\x12.|\x3a)", re.DOTALL)  # ModelProto: ir_version, producer
MSGPACK = re.compile(rb"(?:[\x81-\x8f]|\xde..)(?:[\xa1-\xbf]|\xd9.)[\w./]", re.DOTALL)  # Flax
# The number that torch's legacy files begin with, in the text of pickle protocols 0 and 1.
LEGACY_TEXT = b"L119547037146038801333356L\n."


def sniff(file: SourceFile) -> Kind:
    """Which reader a file needs.

    Raises:
        InvalidCheckpoint: if it is empty, damaged or of no known kind.
        UnsupportedCheckpoint: if it is of a kind that is known and not read; the message names it.
    """
    path = file.path
    if file.size == 0:
        raise InvalidCheckpoint(path, "is empty: the download did not finish")
    head = file.read(0, min(HEAD, file.size))
    if head.startswith(b"PK\3\4"):
        return "zip"
    if head.startswith(b"GGUF"):
        return "gguf"
    if len(head) > 8 and head[8:9] == b"{" and head[5:8] == b"\0\0\0":
        return "safetensors"
    if (head[0] == 0x80 and len(head) > 1 and head[1] <= 5) or head.startswith(LEGACY_TEXT):
        return "pickle"
    for offset, signature, reason in SIGNATURES:
        if head[offset : offset + len(signature)] == signature:
            raise UnsupportedCheckpoint(path, reason)
    if head.startswith(LFS_POINTER):
        size = re.search(rb"^size (\d{1,20})$", head, re.MULTILINE)
        real = f" of {size.group(1).decode()} bytes" if size else ""
        reason = f"is a Git LFS pointer, not the file{real} itself: run 'git lfs pull'"
        raise UnsupportedCheckpoint(path, reason)
    if head[257:262] == b"ustar" or _is_old_tar(head):
        raise UnsupportedCheckpoint(path, _tar_reason(file, head))
    if not head.strip(b"\0"):
        raise InvalidCheckpoint(path, "begins with zeros only: the download did not finish")
    if (text := _as_text(head)) is not None:
        return _sniff_text(file, text)
    if ONNX.match(head):
        raise UnsupportedCheckpoint(path, "seems to be an ONNX model, which is not read")
    if MSGPACK.match(head):
        raise UnsupportedCheckpoint(path, "seems to be Flax weights (msgpack), which are not read")
    reason = f"is no kind of checkpoint that is known (it begins with {head[:8].hex(' ')})"
    raise InvalidCheckpoint(path, reason)


def _sniff_text(file: SourceFile, text: str) -> Kind:
    stripped = text.lstrip("\ufeff \t\r\n")
    if stripped.startswith("{"):
        return "json"
    if re.match(r"<(!doctype|html|head|body|\?xml|!--|\w)", stripped, re.IGNORECASE):
        reason = "is a web page, not a checkpoint: the download needed a login or another address"
        raise UnsupportedCheckpoint(file.path, reason)
    reason = f"is a text, not a checkpoint: it begins {quoted(stripped[:60])}"
    raise UnsupportedCheckpoint(file.path, reason)


def _as_text(head: bytes) -> str | None:
    """The head as text; None if it holds bytes that no text has."""
    if any(byte < 32 and byte not in b"\t\n\r\f" for byte in head):
        return None
    try:
        return head.decode("utf-8")
    except UnicodeDecodeError as error:
        # Only the last character may be cut off where the head ends.
        cut = len(head) == HEAD and error.start > HEAD - 4
        return head[: error.start].decode("utf-8") if cut else None


def _is_old_tar(head: bytes) -> bool:
    """Whether a tar header without the "ustar" mark checks out (V7, as Python 2 could write)."""
    if len(head) < 512 or not head[148:156].strip(b" \0").isdigit():
        return False
    try:
        said = int(head[148:156].strip(b" \0"), 8)
    except ValueError:
        return False
    return said == sum(head[:148]) + 8 * 32 + sum(head[156:512])


def _tar_reason(file: SourceFile, head: bytes) -> str:
    name = head[:100].split(b"\0")[0]
    if name in (b"sys_info", b"pickle", b"storages", b"tensors"):
        return "is in the tar form of torch 0.1.9 and older, which is not read: load it with an old torch and save it again"  # noqa: E501
    return f"is a tar archive (first file {quoted(name.decode('latin-1'))}): unpack it first"
