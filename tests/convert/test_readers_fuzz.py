"""Properties of the readers over generated input, and a bounded run of the fuzzer."""

import json
import pickle
import pickletools
import struct
from collections import OrderedDict

import numpy as np
import pytest
import safetensors
import torch_files as tf
from fuzz_readers import Mutator, fuzz, seeds
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from maple_convert.errors import ConvertError
from maple_convert.readers import open_checkpoint
from maple_convert.readers.pickle_tree import _OPCODES, PickleFault, parse_pickle
from maple_convert.readers.plain import PlainValues
from maple_convert.tensors import STORAGE

QUICK = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def test_mutated_files_end_in_typed_errors(tmp_path):
    """``python tests/convert/fuzz_readers.py`` runs this for as long as one likes."""
    outcomes = fuzz(tmp_path, seed=0, count=4000)
    assert set(outcomes) >= {"read", "InvalidCheckpoint", "UnsupportedCheckpoint"}


def test_the_fuzzer_keeps_what_it_finds(tmp_path, monkeypatch):
    """The control: a reader that fails in another way is caught, with its file."""
    import fuzz_readers

    def broken(path):
        if path.stat().st_size % 7 == 0:
            raise ValueError("not typed")
        return "read"

    monkeypatch.setattr(fuzz_readers, "try_file", broken)
    with pytest.raises(fuzz_readers.Finding, match="ValueError: not typed"):
        fuzz(tmp_path, seed=0, count=1000)
    assert len(list(tmp_path.glob("finding-*"))) == 1


@QUICK
@given(st.binary(max_size=300))
@example(b"")
@example(b"PK\3\4")
@example(b"\x80\2.")
@example(b"\x05\0\0\0\0\0\0\0{}")
def test_any_bytes_are_no_checkpoint(tmp_path, data):
    path = tmp_path / "a"
    path.write_bytes(data)
    with pytest.raises(ConvertError):
        open_checkpoint(path)


@QUICK
@given(st.binary(max_size=200))
def test_any_bytes_as_a_pickle(data):
    try:
        parse_pickle(data)
    except PickleFault:
        pass


TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.text(max_size=8)
    | st.floats(allow_nan=False) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner,
                                                                max_size=4),
    max_leaves=12)  # fmt: skip


def plain(data: bytes) -> object:
    return PlainValues(lambda node: None).value(parse_pickle(data).root)


@settings(QUICK, max_examples=60)
@given(TREES, st.integers(0, 5))
def test_pickles_read_without_unpickling_equal_unpickled_ones(tree, protocol):
    assert plain(pickle.dumps(tree, protocol)) == tree


@pytest.mark.parametrize(
    "text",
    [rb"'abc'", rb'"it\'s"', rb"'\x41\xe9\n\t\\'", rb"'\'quoted\''", rb"''", rb"'\r\0\a\b\f\v'"],
)
def test_python_2_strings(text):
    """STRING holds Python 2's repr; what is not UTF-8 is taken byte by byte."""
    data = b"S" + text + b"\n."
    assert plain(data) == pickle.loads(data, encoding="latin1")


def test_the_set_of_opcodes_is_python_s_but_for_two():
    """Out-of-band buffers are refused; everything else that Python knows, this does."""
    known = {ord(op.code): op.name for op in pickletools.opcodes}
    missing = {name for code, name in known.items() if code not in _OPCODES}
    assert missing == {"STOP", "NEXT_BUFFER", "READONLY_BUFFER"}  # STOP is the loop's end
    assert not set(_OPCODES) - set(known)


@settings(QUICK, max_examples=60)
@given(st.dictionaries(st.text(max_size=5), TREES, max_size=6), st.sampled_from([2, 3, 4, 5]))
def test_plain_objects_come_back(tmp_path, tree, protocol):
    """What Python pickles besides tensors, read without unpickling, equals itself."""
    assume("w" not in tree and "state_dict" not in tree)
    tree = {"w": np.ones(1, np.float32), **tree}
    path = tf.write_torch_zip(tmp_path / "a.pt", tree, protocol=protocol)
    with open_checkpoint(path) as checkpoint:
        assert dict(checkpoint.objects) == {key: tree[key] for key in tree if key != "w"}


@QUICK
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=4),
    st.integers(0, 30),
    st.sampled_from(sorted(set(STORAGE) - {"uint32"})),  # which torch has no storages of
    st.booleans(),
)
def test_any_view_reads_as_numpy_sees_it(tmp_path, axes, offset, dtype, legacy):
    """Random shapes, strides and offsets over one storage, where they fit and where not."""
    shape, strides = tuple(n for n, _ in axes), tuple(step for _, step in axes)
    bits = np.random.default_rng(0).integers(0, 256, 200 * STORAGE[dtype].itemsize, np.uint8)
    base = bits.view(STORAGE[dtype]) if dtype != "bool" else bits > 127
    tree = {"x": tf.TorchTensor(tf.Storage(base, dtype), offset, shape, strides)}
    path = (tf.write_legacy if legacy else tf.write_torch_zip)(tmp_path / "a.pt", tree)
    empty = 0 in shape
    span = offset + 1 + sum((n - 1) * step for n, step in axes)
    if not empty and span > base.size:
        with pytest.raises(ConvertError):
            open_checkpoint(path)
        return
    steps = [step * base.itemsize for step in strides]
    expected = np.lib.stride_tricks.as_strided(base[offset:], shape, steps)
    with open_checkpoint(path) as checkpoint:
        value = checkpoint.read("x").array
    assert value.tobytes() == np.ascontiguousarray(expected).tobytes() and value.shape == shape


# Against the safetensors library


def library(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What the library reads from a file's bytes; None if it refuses."""
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return None
    return {
        name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for name, entry in entries
    }


def ours(path) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    codes = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
             "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
             "bool": "BOOL", "uint32": "U32"}  # fmt: skip
    try:
        with open_checkpoint(path) as checkpoint:
            return {
                name: (codes[info.dtype], info.shape, checkpoint.read(name).array.tobytes())
                for name, info in checkpoint.tensors.items()
            }
    except ConvertError:
        return None


def test_what_is_accepted_the_library_accepts_too(tmp_path):
    """Mutated headers: nothing is read that the format's own reader refuses, or read otherwise."""
    others = ("gguf", "eight bits")  # 8-bit floats are read as wider ones, which the library leaves
    good = {name: data for name, data in seeds(tmp_path).items() if not name.startswith(others)}
    mutator = Mutator(good, seed=3)
    path = tmp_path / "a.safetensors"
    header = mutator.good["safetensors"][8:-104]
    accepted = refused_only_here = 0
    for _ in range(3000):
        text = mutator.bytes_of(header)
        data = struct.pack("<Q", len(text)) + text + bytes(104)
        path.write_bytes(data)
        mine, theirs = ours(path), library(data)
        if mine is not None:
            accepted += 1
            assert mine == theirs, text
        elif theirs is not None:
            refused_only_here += 1
    assert accepted > 50
    assert refused_only_here < accepted, "this reader refuses much that is well-formed"


@QUICK
@given(st.dictionaries(
    st.text(max_size=12).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(set(STORAGE) - {"bfloat16"})),
              st.lists(st.integers(0, 4), max_size=4)), min_size=1, max_size=8))  # fmt: skip
def test_what_the_library_writes_is_read(tmp_path, tree):
    from safetensors.numpy import save_file

    generator = np.random.default_rng(1)
    arrays = {
        name: np.array(generator.standard_normal(shape) * 9).astype(STORAGE[dtype])
        for name, (dtype, shape) in tree.items()
    }
    save_file(arrays, tmp_path / "a", {"format": "np"})
    with open_checkpoint(tmp_path / "a") as checkpoint:
        assert set(checkpoint.tensors) == set(arrays)
        for name, array in arrays.items():
            value = checkpoint.read(name)
            assert value.array.dtype == array.dtype and value.shape == array.shape
            assert value.array.tobytes() == array.tobytes()


def test_refusals_beyond_the_librarys(tmp_path):
    """Where this reader is stricter, on purpose: each of these is well-formed to the library."""
    entry = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    stricter = {
        "a name twice": f'{{"x":{entry},"x":{entry}}}',
        "an unknown field": f'{{"x":{entry[:-1]},"stride":[1]}}}}',
        "a type without arithmetic": '{"x":{"dtype":"U16","shape":[2],"data_offsets":[0,4]}}',
    }
    for why, text in stricter.items():
        data = struct.pack("<Q", len(text)) + text.encode() + bytes(4)
        (tmp_path / "a").write_bytes(data)
        assert library(data) is not None, f"the library refuses {why} now: drop it here"
        assert ours(tmp_path / "a") is None, why
    empty = json.dumps({}).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(empty)) + empty)
    assert ours(tmp_path / "a") is None


def test_state_dicts_of_any_names(tmp_path):
    """Names are taken as they are: dots, spaces, slashes, any alphabet."""
    names = ["a.b.c", " ", "a/b", "größe", "重み", "x" * 1000, "__metadata__", "0", "..", "\n"]
    tree = OrderedDict((name, np.full(1, i, np.float32)) for i, name in enumerate(names))
    for write in (tf.write_torch_zip, tf.write_legacy):
        with open_checkpoint(write(tmp_path / "a.pt", tree)) as checkpoint:
            assert list(checkpoint.tensors) == names
            assert [int(checkpoint.read(n).array[0]) for n in names] == list(range(len(names)))
