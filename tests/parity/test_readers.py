"""The readers against torch and safetensors: the same names, types, shapes and bits."""

import io
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch

from maple_convert.readers import open_checkpoint
from maple_convert.tensors import STORAGE

sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))
import torch_files as tf

pytestmark = pytest.mark.parity

REAL_FOLDERS = ("checkpoints", "lora", "textual_inversion", "taesd", "emoji-trial")
REFUSED = {"silero_vad.jit", "EasyNegative.utf8-damaged.pt"}
TORCH_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin"}


class Anything:
    """Stands for classes of libraries that are not installed (pytorch_lightning)."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


class StubbingUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError):
            return Anything


STUBBING = SimpleNamespace(Unpickler=StubbingUnpickler, load=pickle.load, __name__="stubbing")


def torch_load(path):
    if Path(path).suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=STUBBING)


def torch_tensors(tree):
    """Names and tensors as torch sees them, by the naming that tensors.Checkpoint documents."""
    if isinstance(tree, torch.Tensor):
        return {"tensor": tree}
    if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
        tree = tree["state_dict"]
    found = {}

    def walk(prefix, node):
        if isinstance(node, torch.nn.Module):
            node = dict(node.state_dict(keep_vars=True))
        if isinstance(node, torch.Tensor):
            found[prefix] = node
        elif isinstance(node, dict | list | tuple):
            pairs = node.items() if isinstance(node, dict) else enumerate(node)
            for key, value in pairs:
                walk(f"{prefix}.{key}" if prefix else str(key), value)

    walk("", tree)
    return found


def differences(path, tree):
    """What differs between our reading of a file and torch's objects; (tensors, bytes) read."""
    expected = torch_tensors(tree)
    problems, count = [], 0
    with open_checkpoint(path) as checkpoint:
        if list(checkpoint.tensors) != list(expected) and Path(path).suffix != ".safetensors":
            problems.append("names or their order")
        if set(checkpoint.tensors) != set(expected):
            problems.append(f"names: {set(checkpoint.tensors) ^ set(expected)}")
            return problems, 0, 0
        for name, info in checkpoint.tensors.items():
            ours, theirs = checkpoint.read(name), expected[name].detach()
            bits = theirs.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            count += len(bits)
            if f"torch.{info.dtype}" != str(theirs.dtype) or ours.dtype != info.dtype:
                problems.append(f"{name}: type {info.dtype}, {theirs.dtype}")
            elif info.shape != tuple(theirs.shape) or ours.shape != info.shape:
                problems.append(f"{name}: shape {info.shape}, {tuple(theirs.shape)}")
            elif ours.array.dtype != STORAGE[info.dtype] or not ours.array.flags.c_contiguous:
                problems.append(f"{name}: not contiguous storage")
            elif ours.array.tobytes() != bits:
                problems.append(f"{name}: values")
    return problems, len(expected), count


@pytest.mark.weights
@pytest.mark.parametrize("folder", REAL_FOLDERS)
def test_real_files_read_as_torch_reads_them(weights, folder, parity_record):
    files = [
        path
        for path in sorted((weights / folder).rglob("*"))
        if path.suffix in TORCH_SUFFIXES | {".safetensors"} and path.name not in REFUSED
    ]
    assert files
    tensors = size = 0
    for path in files:
        problems, count, read = differences(path, torch_load(path))
        assert not problems, (path, problems)
        tensors, size = tensors + count, size + read
    parity_record(
        f"reader, real files in {folder}",
        files=len(files), tensors=tensors, bytes=size, differing=0, bar="bit for bit",
    )  # fmt: skip


def corner_cases():
    """Trees that torch.save writes in every way a tensor can lie in a storage."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    parent = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    shared = torch.arange(100, dtype=torch.float64)
    scalar = torch.tensor(2.5)
    every_type = {
        str(dtype): (torch.randn(3, 5, generator=generator) * 50).to(dtype)
        for dtype in (
            torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64,
            torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
        )
    }  # fmt: skip
    return {
        "every type": every_type,
        "transposed": {"t": base.T, "p": base.view(2, 3, 2, 4).permute(3, 1, 0, 2)},
        "sliced": {"rows": base[2:4], "columns": base[:, 1:7:3], "last": base[5, 7]},
        "expanded": {"e": torch.ones(1, 4).expand(3, 4), "n": torch.ones(2, 1).expand(2, 5)},
        "shared": {"a": shared[:50], "b": shared[25:75], "c": shared, "d": shared[10::20]},
        "tied": OrderedDict(a=base, b=base),
        "zero-dim": {"s": scalar, "i": torch.tensor(7), "b": torch.tensor(True)},
        "empty": {"e": torch.zeros(0), "f": torch.zeros(3, 0, 2, dtype=torch.float16)},
        "single axes": {"x": torch.arange(12.0).view(3, 1, 4).transpose(0, 1)},
        "channels last": {"w": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)},
        "parameters": {"p": torch.nn.Parameter(torch.ones(3)), "m": [torch.nn.Parameter(base)]},
        "state dict": parent.state_dict(),
        "nested": {"state_dict": parent.state_dict(), "epoch": 3, "name": "x"},
        "wrapped": {"model": {"inner": {"w": base}}, "steps": [1, 2, base]},
        "parameter dict": {"string_to_param": torch.nn.ParameterDict({"*": base})},
        "bare": base[1:3],
        "list": [base, [scalar], (base,)],
        "integer keys": {0: base, 1: {2: base}},
        "nan and inf": {"x": torch.tensor([float("nan"), float("inf"), -0.0])},
        "nan in bfloat16": {"x": torch.tensor([float("nan"), 1e38], dtype=torch.bfloat16)},
        "many": {f"layer.{i}.weight": torch.full((i % 7,), i) for i in range(3000)},
        "unicode": {"größe.é": base, "重み": base.clone()},
    }


CORNERS = corner_cases()
# Not protocol 0: torch writes its storages as text there, and cannot read them back itself.
FORMATS = {
    "zip": {},
    "zip, protocol 4": {"pickle_protocol": 4},
    "zip, protocol 5": {"pickle_protocol": 5},
    "legacy": {"_use_new_zipfile_serialization": False},
    "legacy, protocol 1": {"_use_new_zipfile_serialization": False, "pickle_protocol": 1},
    "legacy, protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_way_that_a_tensor_can_lie(form, tmp_path, parity_record):
    tensors = 0
    for case, tree in CORNERS.items():
        path = tmp_path / f"{form} {case}.pt"
        torch.save(tree, path, **FORMATS[form])
        problems, count, _ = differences(path, torch_load(path))
        assert not problems, (case, problems)
        tensors += count
    parity_record(
        f"reader, torch.save as {form}",
        cases=len(CORNERS), tensors=tensors, differing=0, bar="bit for bit",
    )  # fmt: skip


def test_safetensors_written_by_the_library(tmp_path):
    for case in ("every type", "empty", "zero-dim", "many", "unicode", "nan and inf"):
        path = tmp_path / f"{case}.safetensors"
        safetensors.torch.save_file(CORNERS[case], path, {"format": "pt"})
        problems, _, _ = differences(path, safetensors.torch.load_file(path))
        assert not problems, (case, problems)
        with open_checkpoint(path) as checkpoint:
            assert checkpoint.metadata == {"format": "pt"}


def test_a_pickled_module_gives_its_weights(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.Linear(4, 2)))
    for options in FORMATS.values():
        torch.save(module, tmp_path / "module.pt", **options)
        problems, count, _ = differences(tmp_path / "module.pt", module)
        assert count == 4 and not problems


@pytest.mark.slow
def test_torch_files_beyond_4_gigabytes(tmp_path, parity_record):
    """torch's own zip64 fields: a record longer than 32 bits say, and records after it."""
    large = torch.zeros((1 << 32) + 64, dtype=torch.uint8)
    large[-1] = 7
    tree = {"large": large, "after": torch.arange(1000.0), "last": torch.arange(3)}
    torch.save(tree, tmp_path / "large.pt")
    problems, count, size = differences(tmp_path / "large.pt", tree)
    assert not problems
    parity_record("reader, 4.3 GB from torch.save", tensors=count, bytes=size, differing=0)


@pytest.mark.parametrize("broken", ["one byte", "strides", "offset", "order", "type"])
def test_the_comparison_notices(broken, tmp_path, monkeypatch):
    """Negative controls: each kind of misreading shows as a difference."""
    path = tmp_path / "a.pt"
    tree = {"x": torch.arange(12.0).view(3, 4).T, "y": torch.arange(9.0)[3:6]}
    torch.save(tree, path)
    assert not differences(path, tree)[0]
    if broken == "one byte":
        raw = bytearray(path.read_bytes())
        raw[raw.index(np.arange(12, dtype="<f4").tobytes()) + 20] ^= 1
        path.write_bytes(raw)
    elif broken == "order":
        tree = dict(reversed(tree.items()))
    elif broken == "type":
        tree["y"] = tree["y"].view(torch.int32)
    else:
        from maple_convert.readers import torch_zip

        real = torch_zip.Placement

        def wrong(info, offset, strides=None):
            return real(info, offset) if broken == "strides" else real(info, offset & ~63, strides)

        monkeypatch.setattr(torch_zip, "Placement", wrong)
    assert differences(path, tree)[0]


# torch_files.py, which the tests without torch rely on, writes what torch writes.


def ours_and_theirs():
    weights = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    run = tf.Storage(np.arange(20, dtype=np.float32))
    base = torch.arange(20.0)
    half = np.linspace(-1, 1, 5).astype(np.float16)
    bits = torch.linspace(-2, 2, 7).to(torch.bfloat16)
    return {
        "plain": ({"w": weights, "n": 3}, {"w": torch.from_numpy(weights), "n": 3}),
        "ordered": (
            OrderedDict(a=weights, h=half, i=np.array(5), z=np.zeros((0, 2), np.int32)),
            OrderedDict(
                a=torch.from_numpy(weights), h=torch.from_numpy(half), i=torch.tensor(5),
                z=torch.zeros(0, 2, dtype=torch.int32),
            ),
        ),
        "views": (
            {"state_dict": {"v": tf.TorchTensor(run, 2, (3,), (2,)),
                            "t": tf.TorchTensor(run, 4, (4, 4), (1, 4))}, "x": [1.5, None, (1,)]},
            {"state_dict": {"v": base[2:8:2], "t": base[4:].view(4, 4).T}, "x": [1.5, None, (1,)]},
        ),
        "parameter": ({"p": tf.parameter(weights)},
                      {"p": torch.nn.Parameter(torch.from_numpy(weights))}),
        "bfloat16": ({"b": tf.tensor(bits.view(torch.uint16).numpy(), "bfloat16")}, {"b": bits}),
        "many": ({f"k{i}": np.full(i % 5, i, np.int64) for i in range(400)},
                 {f"k{i}": torch.full((i % 5,), i) for i in range(400)}),
    }  # fmt: skip


@pytest.mark.parametrize("case", ours_and_theirs())
def test_our_zip_is_byte_for_byte_torchs(case, tmp_path):
    ours, theirs = ours_and_theirs()[case]
    torch.save(theirs, tmp_path / "model.pt")
    expected = (tmp_path / "model.pt").read_bytes()
    # The identifier sums up the records; no reader needs it, so it is taken over.
    at = expected.index(b"PK\7\x08", expected.index(b".data/serialization_id"))
    identifier = expected[at - 40 : at].decode()
    written = tf.write_torch_zip(
        tmp_path / "ours.pt", ours, root="model", serialization_id=identifier
    )
    assert written.read_bytes() == expected


@pytest.mark.parametrize("case", ours_and_theirs())
def test_our_legacy_file_is_torchs_but_for_the_keys(case, tmp_path):
    """torch keys storages by address, so the keys and the order of the data may differ."""
    ours, theirs = ours_and_theirs()[case]
    buffer = io.BytesIO()
    torch.save(theirs, buffer, _use_new_zipfile_serialization=False)
    written = tf.write_legacy(tmp_path / "ours.pt", ours)
    assert written.stat().st_size == len(buffer.getvalue())
    problems, count, _ = differences(written, torch_load(written))
    assert count and not problems
    assert not differences(written, theirs)[0]
