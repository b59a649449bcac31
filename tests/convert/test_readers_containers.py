"""Good files of every container: names, types, shapes, values, what lies beside them, and cost."""

import json
import os
import struct
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch_files as tf
from torch_files import Call, Global, Storage, TorchTensor

from maple_convert.errors import ConvertError, InvalidCheckpoint, UnreadableFile
from maple_convert.readers import Stub, open_checkpoint, read_json
from maple_convert.tensors import STORAGE, Tensor, TensorInfo

RNG = np.random.default_rng(0)
TYPES = {
    name: RNG.integers(0, 2, (2, 3)).astype(bool)
    if name == "bool"
    else (RNG.standard_normal((2, 3)) * 40).astype(dtype)
    for name, dtype in STORAGE.items()
}
NOT_IN_TORCH = {"uint32"}  # it has the type, but no class of storages for it


def all_types():
    return {
        name: tf.tensor(array, "bfloat16") if name == "bfloat16" else array
        for name, array in TYPES.items()
        if name not in NOT_IN_TORCH
    }


def write_safetensors(path: Path, arrays: dict[str, tuple[str, np.ndarray]], **metadata) -> Path:
    """A plain writer of the format, independent of the reader's tables."""
    header, data = {"__metadata__": metadata}, b""
    for name, (code, array) in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def safetensors_of_all_types(path: Path) -> Path:
    codes = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
             "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
             "bool": "BOOL", "uint32": "U32"}  # fmt: skip
    return write_safetensors(path, {name: (codes[name], TYPES[name]) for name in TYPES}, a="b")


WRITERS = {
    "torch zip": lambda path: tf.write_torch_zip(path, all_types()),
    "torch zip ": lambda path: tf.write_torch_zip(path, all_types(), root="x y", byteorder=None),
    "legacy torch pickle": lambda path: tf.write_legacy(path, all_types()),
    "legacy torch pickle ": lambda path: tf.write_legacy(path, all_types(), oldest=True),
    "safetensors": safetensors_of_all_types,
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors", ".bin", ""])
def test_every_type_in_every_container_whatever_its_name(kind, suffix, tmp_path):
    path = WRITERS[kind](tmp_path / f"model{suffix}")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.container == kind.strip()
        assert checkpoint.path == path
        there = set(TYPES) if kind == "safetensors" else set(TYPES) - NOT_IN_TORCH
        assert list(checkpoint.tensors) == [name for name in TYPES if name in there]
        for name in there:
            array = TYPES[name]
            assert checkpoint.tensors[name] == TensorInfo(name, (2, 3))
            value = checkpoint.read(name)
            assert value.dtype == name and value.array.dtype == STORAGE[name]
            assert isinstance(value.array, np.ndarray)
            assert value.array.flags.c_contiguous and value.array.flags.owndata
            np.testing.assert_array_equal(value.array, array)


def test_a_string_opens_as_a_path_does(tmp_path):
    with open_checkpoint(str(WRITERS["safetensors"](tmp_path / "a"))) as checkpoint:
        assert checkpoint.metadata == {"a": "b"}


# Views of storages

BASE = np.arange(60, dtype=np.float32)
VIEWS = {
    "offset": (7, (3,), (1,)),
    "step": (2, (5,), (4,)),
    "transposed": (0, (5, 4), (1, 5)),
    "permuted": (3, (2, 3, 4), (1, 2, 6)),
    "columns": (1, (6, 2), (10, 3)),
    "expanded": (5, (3, 4), (0, 1)),
    "one element": (59, (1, 1), (60, 7)),
    "zero-dim": (42, (), ()),
    "empty": (0, (0, 3), (3, 1)),
    "whole": (0, (60,), (1,)),
}


@pytest.mark.parametrize("write", [tf.write_torch_zip, tf.write_legacy])
def test_views_share_one_storage(write, tmp_path):
    run = Storage(BASE)
    tree = {name: TorchTensor(run, *view) for name, view in VIEWS.items()}
    with open_checkpoint(write(tmp_path / "a.pt", tree)) as checkpoint:
        for name, (offset, shape, strides) in VIEWS.items():
            steps = [4 * step for step in strides]
            expected = np.lib.stride_tricks.as_strided(BASE[offset:], shape, steps)
            np.testing.assert_array_equal(checkpoint.read(name).array, expected)


def test_a_strided_view_is_gathered_in_blocks(tmp_path, monkeypatch):
    """Views that span more than a block are read piece by piece, to the same values."""
    from maple_convert.readers import source

    run = Storage(np.arange(4000, dtype=np.int16))
    views = {
        "transposed": (0, (40, 100), (1, 40)),
        "sparse": (5, (7, 3), (500, 101)),
        "deep": (0, (4, 5, 6, 7), (7, 700, 28, 1)),
        "line": (1, (300,), (13,)),
        "expanded": (9, (30, 50), (0, 70)),
    }
    path = tf.write_torch_zip(
        tmp_path / "a.pt", {n: TorchTensor(run, *v) for n, v in views.items()}
    )
    for block in (2, 16, 200, 3000, 1 << 20):
        monkeypatch.setattr(source, "BLOCK", block)
        with open_checkpoint(path) as checkpoint:
            for name, (offset, shape, strides) in views.items():
                steps = [2 * step for step in strides]
                expected = np.lib.stride_tricks.as_strided(run.array[offset:], shape, steps)
                np.testing.assert_array_equal(checkpoint.read(name).array, expected, str(block))


def test_views_of_storages_in_files_before_torch_0_4(tmp_path):
    """A storage that is itself a view: its offset adds to the tensor's."""
    run = Storage(BASE, view=("9", 10, 20))
    path = tf.write_legacy(tmp_path / "a.pt", {"x": TorchTensor(run, 3, (4,), (2,))}, oldest=True)
    with open_checkpoint(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("x").array, BASE[13:21:2])


def test_untyped_storages_count_bytes(tmp_path):
    """_rebuild_tensor_v3 gives the type that an untyped storage lacks."""
    bits = np.arange(8, dtype=np.float16)

    class Untyped(Storage):
        pass

    run = Untyped(bits.view(np.uint8))
    rest = (False, OrderedDict(), Global("torch", "float16"))
    call = Call(Global("torch._utils", "_rebuild_tensor_v3"), (run, 1, (2, 3), (3, 1), *rest))
    path = tf.write_torch_zip(tmp_path / "a.pt", {"x": call})
    raw = path.read_bytes().replace(b"ctorch\nByteStorage\n", b"ctorch.storage\nUntypedStorage\n")
    stream = raw[raw.index(b"\x80\2") : raw.index(b".PK\7\x08") + 1]
    tf.write_records(path, [("a/data.pkl", stream), ("a/data/0", bits)])
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors["x"] == TensorInfo("float16", (2, 3))
        np.testing.assert_array_equal(checkpoint.read("x").array, bits[1:7].reshape(2, 3))


# Names and objects


def scalar(value: np.generic) -> Call:
    """A numpy scalar as protocol 2 pickles it."""
    dtype = Call(Global("numpy", "dtype"), (value.dtype.str[1:], False, True))
    dtype.state = (3, "<", None, None, None, -1, -1, 0)
    raw = Call(Global("_codecs", "encode"), (value.tobytes().decode("latin-1"), "latin1"))
    return Call(Global("numpy.core.multiarray", "scalar"), (dtype, raw))


def training_checkpoint():
    ones = np.ones((2, 2), np.float32)
    callback = Global("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    return {
        "epoch": 3,
        "global_step": 875_000,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": OrderedDict(
            {
                "model.diffusion_model.out.weight": ones,
                "model_ema.num_updates": np.array(7, np.int32),
            }
        ),
        "callbacks": {callback: {"best": scalar(np.float64(0.25)), "path": "/x/é.ckpt"}},
        "optimizer_states": [{"state": {0: {"step": 2, "exp_avg": ones}}, "lr": 1e-4}],
        "hyper_parameters": Call(Global("omegaconf", "DictConfig"), (), {"_content": {"a": 1}}),
    }


@pytest.mark.parametrize("write", [tf.write_torch_zip, tf.write_legacy])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_training_checkpoint(write, protocol, tmp_path):
    with open_checkpoint(
        write(tmp_path / "a.ckpt", training_checkpoint(), protocol=protocol)
    ) as checkpoint:
        assert list(checkpoint.tensors) == [
            "model.diffusion_model.out.weight",
            "model_ema.num_updates",
        ]
        assert checkpoint.tensors["model_ema.num_updates"] == TensorInfo("int32", ())
        assert checkpoint.notes == ["The weights lie in 'state_dict', which their names leave out."]
        objects = checkpoint.objects
        assert objects["global_step"] == 875_000
        assert objects["callbacks"] == {
            "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": {
                "best": 0.25,
                "path": "/x/é.ckpt",
            }
        }
        average = {"step": 2, "exp_avg": TensorInfo("float32", (2, 2))}
        assert objects["optimizer_states"] == [{"state": {"0": average}, "lr": 1e-4}]
        config = Stub("omegaconf.DictConfig", (), {"_content": {"a": 1}})
        assert objects["hyper_parameters"] == config


def test_nested_dictionaries_and_lists_are_joined_with_dots(tmp_path):
    one = np.ones(1, np.float32)
    tree = {"a": {"b": [one, {"c": one}], 7: one}, "note": "x", "mixed": {"w": one, "step": 5}}
    with open_checkpoint(tf.write_torch_zip(tmp_path / "a.pt", tree)) as checkpoint:
        assert list(checkpoint.tensors) == ["a.b.0", "a.b.1.c", "a.7", "mixed.w"]
        assert dict(checkpoint.objects) == {"note": "x", "mixed.step": 5}


def test_bare_tensors_lists_parameters_and_modules(tmp_path):
    path = tmp_path / "a.pt"
    weight = tf.parameter(np.arange(6, dtype=np.float32).reshape(2, 3))
    tables = {"training": True, "_parameters": {"weight": weight, "bias": None}, "_buffers": {}}
    inner = Call(Global("torch.nn.modules.linear", "Linear"), (), {**tables, "_modules": {}})
    module = Call(Global("my.net", "Net"), (), {"_parameters": {}, "_modules": {"fc": inner}})
    for tree, names in (
        (tf.tensor(np.ones(3)), ["tensor"]),
        ([weight, weight], ["0", "1"]),
        ({"p": weight}, ["p"]),
        (module, ["fc.weight"]),
    ):
        with open_checkpoint(tf.write_torch_zip(path, tree)) as checkpoint:
            assert list(checkpoint.tensors) == names


def test_strangers_objects_are_inert_stubs(tmp_path):
    """What is not known stays a name with its arguments; nothing of that name need exist."""
    odd = {
        "w": np.ones(1, np.float32),
        "class": Global("no.such.module", "Thing"),
        "made": Call(Global("no.such", "make"), (1, ("a", None)), {"x": b"raw"}),
        "path": Call(Global("pathlib", "PosixPath"), ("/", "tmp")),
        "size": Call(Global("torch", "Size"), ((1, 2),)),
        "dtype": Global("torch", "float16"),
        "many": list(range(50_000)),
        "deep": [[[[[[[[[[[[[[[[[[[["bottom"]]]]]]]]]]]]]]]]]]]],
        "long": "x" * 5000,
    }
    with open_checkpoint(tf.write_torch_zip(tmp_path / "a.pt", odd)) as checkpoint:
        objects = checkpoint.objects
    assert objects["class"] == Stub("no.such.module.Thing")
    assert objects["made"] == Stub("no.such.make", (1, ("a", None)), {"x": b"raw"})
    assert objects["path"] == Stub("pathlib.PosixPath", ("/", "tmp"))
    assert objects["size"] == (1, 2)
    assert objects["dtype"] == Stub("torch.float16")
    assert objects["many"] == [*range(1000), Stub("…")]
    assert "bottom" not in repr(objects["deep"])
    assert len(objects["long"]) < 2000


@pytest.mark.parametrize(
    "name",
    ["code.model.Net", "trace.data.Set", "__main__.Config", "copyreg.__newobj__",
     "argparse.Namespace", "functools.partial", "builtins.getattr", "builtins.set",
     "torch.jit.ScriptModule",
     "pathlib.PosixPath", "torch.optim.lr_scheduler.LambdaLR", "numpy.random._pickle.__x"],
)  # fmt: skip
def test_names_that_real_checkpoints_carry_are_no_reason_to_refuse(name, tmp_path):
    module, _, last = name.rpartition(".")
    tree = {"w": np.ones(1, np.float32), "x": Call(Global(module, last), (1,))}
    with open_checkpoint(tf.write_torch_zip(tmp_path / "a.pt", tree)) as checkpoint:
        assert checkpoint.objects["x"] == Stub(name, (1,))


def test_numpy_arrays_among_the_objects(tmp_path):
    array = np.arange(6, dtype=">i4").reshape(2, 3)
    args = (Global("numpy", "ndarray"), (0,), b"b")
    dtype = Call(Global("numpy", "dtype"), ("i4", False, True), (3, ">", None, None, None, -1, -1))
    state = (1, (2, 3), dtype, False, array.tobytes())
    call = Call(Global("numpy._core.multiarray", "_reconstruct"), args, state)
    tree = {"w": np.ones(1, np.float32), "a": call}
    with open_checkpoint(tf.write_torch_zip(tmp_path / "a.pt", tree)) as checkpoint:
        np.testing.assert_array_equal(checkpoint.objects["a"], array)


# Sharded checkpoints


def shards(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    arrays = {f"w{i}": RNG.standard_normal(i + 1).astype(np.float32) for i in range(4)}
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for number, name in enumerate(names):
        part = {k: ("F32", v) for i, (k, v) in enumerate(arrays.items()) if i // 2 == number}
        write_safetensors(folder / name, part, format="pt")
    weight_map = {key: names[i // 2] for i, key in enumerate(arrays)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 40}, "weight_map": weight_map}))
    return index, arrays


def test_a_sharded_checkpoint_reads_as_one(tmp_path):
    index, arrays = shards(tmp_path)
    with open_checkpoint(index) as checkpoint:
        assert checkpoint.container == "safetensors in 2 shards"
        assert set(checkpoint.tensors) == set(arrays)
        assert checkpoint.metadata == {"format": "pt"}
        for name, array in arrays.items():
            np.testing.assert_array_equal(checkpoint.read(name).array, array)


def test_shards_may_be_links_into_a_cache(tmp_path):
    """The hub's cache keeps files as blobs and links to them."""
    index, arrays = shards(tmp_path)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in list(tmp_path.glob("model*")):
        path.rename(tmp_path / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../blob-{path.name}")
    with open_checkpoint(snapshot / index.name) as checkpoint:
        assert set(checkpoint.tensors) == set(arrays)


def test_torch_shards(tmp_path):
    for i in range(2):
        tf.write_torch_zip(tmp_path / f"part-{i}.bin", {f"w{i}": np.full(3, i, np.float16)})
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"w0": "part-0.bin", "w1": "part-1.bin"}}))
    with open_checkpoint(index) as checkpoint:
        assert checkpoint.container == "torch zip in 2 shards"
        assert checkpoint.read("w1").array.tolist() == [1, 1, 1]


# What reading costs, and what can happen meanwhile


def test_opening_costs_the_metadata_only(tmp_path):
    """A checkpoint of 8 GB, sparse on disk, opens at once and in little memory."""
    path = tmp_path / "large.safetensors"
    sizes = {"a": 1 << 32, "b": 1 << 32}
    header = {
        "a": {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 1 << 32]},
        "b": {"dtype": "U8", "shape": [1 << 32], "data_offsets": [1 << 32, 1 << 33]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + sum(sizes.values()))
    script = (
        "import sys, resource, time\n"
        "from maple_convert.readers import open_checkpoint\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "start = time.process_time()\n"
        "with open_checkpoint(sys.argv[1]) as c:\n"
        "    assert c.tensors['a'].nbytes == 1 << 32\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(grown // (1024 if sys.platform == 'darwin' else 1), time.process_time() - start)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kilobytes, seconds = done.stdout.split()
    assert int(kilobytes) < 20_000 and float(seconds) < 0.5


def test_a_zip_beyond_4_gigabytes(tmp_path):
    """Sizes and offsets of more than 32 bits, in a sparse file."""
    size = (1 << 32) + 64
    tree = {"large": np.zeros(size, np.uint8), "small": np.arange(5, dtype=np.int16)}
    stream, storages = tf.pickled(tree)
    records = [("a/data.pkl", stream), ("a/data/0", tf.Hole(size)), ("a/data/1", tree["small"])]
    path = tf.write_records(tmp_path / "a.ckpt", records)
    assert [key for key, _ in storages] == ["0", "1"] and path.stat().st_size > size
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors["large"].nbytes == size
        assert checkpoint.read("small").array.tolist() == [0, 1, 2, 3, 4]


def test_one_tensor_at_a_time_is_all_that_memory_holds(tmp_path):
    """Streaming 400 MB in 40 tensors adds little more than one tensor to the peak."""
    path = tmp_path / "many.ckpt"
    array = np.ones(2_500_000, np.float32)
    tf.write_torch_zip(path, {f"w{i}": tf.tensor(array) for i in range(40)})
    script = (
        "import sys, resource\n"
        "from maple_convert.readers import open_checkpoint\n"
        "with open_checkpoint(sys.argv[1]) as c:\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    for name in c.tensors: assert c.read(name).array[-1] == 1\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(grown // (1024 if sys.platform == 'darwin' else 1))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 30_000  # kilobytes; the tensor has 9,800


def test_threads_may_read_at_once(tmp_path):
    arrays = {f"w{i}": np.full(20_000, i, np.int32) for i in range(30)}
    with open_checkpoint(tf.write_torch_zip(tmp_path / "a.pt", arrays)) as checkpoint:
        wrong = []

        def work():
            for name, array in arrays.items():
                if not np.array_equal(checkpoint.read(name).array, array):
                    wrong.append(name)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tf.write_torch_zip(tmp_path / "a.pt", {"w": np.ones(100_000, np.float32)})
    with open_checkpoint(path) as checkpoint:
        os.truncate(path, 5000)
        with pytest.raises(UnreadableFile, match="became shorter"):
            checkpoint.read("w")


def test_a_file_that_is_deleted_while_it_is_read(tmp_path):
    """The open file stays whole, as the system promises."""
    path = tf.write_torch_zip(tmp_path / "a.pt", {"w": np.ones(3, np.float32)})
    with open_checkpoint(path) as checkpoint:
        path.unlink()
        assert checkpoint.read("w").array.tolist() == [1, 1, 1]


def test_reading_after_closing(tmp_path):
    checkpoint = open_checkpoint(tf.write_torch_zip(tmp_path / "a.pt", {"w": np.ones(3)}))
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(UnreadableFile):
        checkpoint.read("w")


def test_an_unknown_name_is_a_key_error(tmp_path):
    with open_checkpoint(safetensors_of_all_types(tmp_path / "a")) as checkpoint:
        with pytest.raises(KeyError):
            checkpoint.read("weight")


def test_bools_are_true_or_false_whatever_their_bytes(tmp_path):
    run = Storage(np.array([0, 1, 2, 255], np.uint8), "bool")
    path = tf.write_torch_zip(tmp_path / "a.pt", {"x": TorchTensor(run, 0, (4,), (1,))})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.read("x").array.tolist() == [False, True, True, True]
        assert checkpoint.read("x").array.view(np.uint8).tolist() == [0, 1, 1, 1]


def test_zero_dim_tensors_are_arrays(tmp_path):
    names = set(TYPES) - NOT_IN_TORCH
    tree = {name: tf.tensor(TYPES[name][0, 0].reshape(()), name) for name in names}
    with open_checkpoint(tf.write_torch_zip(tmp_path / "a.pt", tree)) as checkpoint:
        for name in names:
            value = checkpoint.read(name).array
            assert isinstance(value, np.ndarray) and value.shape == ()
            assert value.dtype == STORAGE[name] and value == TYPES[name][0, 0]


def test_bytes_after_a_legacy_file_are_noted(tmp_path):
    path = tf.write_legacy(tmp_path / "a.pt", {"w": np.ones(3)})
    path.write_bytes(path.read_bytes() + b"tail")
    with open_checkpoint(path) as checkpoint:
        assert "4 bytes after the last storage" in checkpoint.notes[0]


def test_a_legacy_file_whose_pickles_pass_the_first_window(tmp_path):
    tree = {f"layer.{i}.weight.{'x' * 200}": np.full(2, i, np.float32) for i in range(6000)}
    path = tf.write_legacy(tmp_path / "a.pt", tree)
    assert path.stat().st_size > 2 << 20
    with open_checkpoint(path) as checkpoint:
        assert len(checkpoint.tensors) == 6000
        last = list(tree)[-1]
        assert checkpoint.read(last).array.tolist() == [5999, 5999]


# Damage at every place


def small_files(folder: Path) -> dict[str, bytes]:
    run = Storage(BASE[:8])
    tree = {"state_dict": {"w": TorchTensor(run, 1, (2, 3), (1, 2)), "h": np.ones(2, np.float16)}}
    pairs = {"w": ("F32", BASE[:6]), "h": ("F16", np.ones(2, np.float16))}
    return {
        "torch zip": tf.write_torch_zip(folder / "a", tree, byteorder=None).read_bytes(),
        "legacy torch pickle": tf.write_legacy(folder / "a", tree).read_bytes(),
        "safetensors": write_safetensors(folder / "a", pairs, format="pt").read_bytes(),
    }


@pytest.mark.parametrize("kind", ["torch zip", "legacy torch pickle", "safetensors"])
def test_truncation_at_every_byte_is_noticed(kind, tmp_path):
    """No shorter file opens, so no tail of the weights can be missing."""
    content = small_files(tmp_path)[kind]
    path = tmp_path / "cut"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ConvertError) as caught:
            with open_checkpoint(path):
                pytest.fail(f"opened after {length} of {len(content)} bytes")
        assert caught.value.exit_code == 3


@pytest.mark.parametrize("kind", ["torch zip", "legacy torch pickle", "safetensors"])
@pytest.mark.parametrize("flipped", [0x01, 0xFF])
def test_any_byte_may_be_wrong(kind, flipped, tmp_path):
    """Bits of every byte flipped in turn: the file reads, or ends in a typed error."""
    content = small_files(tmp_path)[kind]
    path = tmp_path / "spoiled"
    read = 0
    for at, byte in enumerate(content):
        path.write_bytes(content[:at] + bytes([byte ^ flipped]) + content[at + 1 :])
        try:
            with open_checkpoint(path) as checkpoint:
                for name in checkpoint.tensors:
                    checkpoint.read(name)
            read += 1
        except ConvertError:
            pass
    assert 0 < read < len(content)  # bytes of values may change, bytes of structure may not


# JSON


def test_read_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": [1, 2.5, null, true], "b": {"c": "é"}}')
    assert read_json(path) == {"a": [1, 2.5, None, True], "b": {"c": "é"}}


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "3", '{"a": NaN}', '{"a": Infinity}', '{"a": 1, "a": 2}', '{"a": 1', "{'a': 1}",
     '{"a": 1e}', '{"a":' + "[" * 5000, '{"a": ' + "9" * 50 + "}", '{"a": 1} x', "\ufeff{}"],
)  # fmt: skip
def test_read_json_refuses(text, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidCheckpoint) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_read_json_is_bounded(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"a": "' + "x" * 100 + '"}')
    assert len(read_json(path)["a"]) == 100
    with pytest.raises(InvalidCheckpoint, match="too much"):
        read_json(path, limit=50)
    with pytest.raises(UnreadableFile):
        read_json(tmp_path)
    with pytest.raises(UnreadableFile):
        read_json(tmp_path / "absent.json")


# Tensors


@pytest.mark.parametrize("name", STORAGE)
def test_finding_nan_and_infinity(name):
    array = np.zeros(700_000, STORAGE[name])
    assert not Tensor(name, array).has_nonfinite()
    assert not Tensor(name, array[:0]).has_nonfinite()
    for bad in (np.nan, np.inf, -np.inf):
        for at in (0, 349_999, 699_999):
            spoiled = array.copy()
            if name == "bfloat16":
                spoiled[at] = np.float32(bad).view(np.uint32) >> 16
            elif name.startswith("float"):
                spoiled[at] = bad
            else:
                continue
            assert Tensor(name, spoiled).has_nonfinite()
            assert Tensor(name, spoiled[at : at + 1].reshape(())).has_nonfinite()


def test_bfloat16_rounds_to_nearest_even():
    """Ties go to the even neighbour; NaN stays NaN; beyond the range is infinity."""
    bits = [0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800001, 0xFF800000]
    values = np.array(bits, np.uint32).view(np.float32)
    rounded = Tensor("float32", values).astype("bfloat16").array
    assert rounded.tolist() == [0x3F80, 0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x7FC0, 0xFF80]
    back = Tensor("bfloat16", rounded).astype("float32").array
    assert back[:4].tolist() == [1.0, 1.0, 1.015625, 1.0078125]
    assert Tensor("float64", np.array(1e300)).astype("bfloat16").array == 0x7F80


# Real files


@pytest.mark.weights
def test_real_files_open_and_read(weights):
    """Every third-party file is read, or refused by name; nothing else can happen."""
    refused = {
        "silero_vad.jit": "TorchScript",
        "EasyNegative.utf8-damaged.pt": "download it again",
    }
    suffixes = {".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".jit", ".gguf"}
    files = [path for path in sorted(weights.rglob("*")) if path.suffix in suffixes]
    assert len(files) > 30
    for path in files:
        if path.name in refused:
            with pytest.raises(ConvertError, match=refused[path.name]):
                open_checkpoint(path)
            continue
        with open_checkpoint(path) as checkpoint:
            for name, info in checkpoint.tensors.items():
                value = checkpoint.read(name)
                assert value.shape == info.shape


@pytest.mark.weights
def test_the_trained_checkpoint_says_what_it_carries(weights):
    with open_checkpoint(weights / "emoji-trial" / "emoji-trial.ckpt") as checkpoint:
        assert checkpoint.container == "torch zip"
        assert checkpoint.objects["global_step"] == 3107
        (callback,) = checkpoint.objects["callbacks"].values()
        assert isinstance(callback, dict | Stub)
        assert checkpoint.tensors["model.diffusion_model.input_blocks.0.0.weight"].shape[1] == 4
