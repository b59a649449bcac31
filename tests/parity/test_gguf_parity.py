"""GGUF and 8-bit floats against the gguf package and torch: every form, bit for bit."""

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from maple_convert.readers import open_checkpoint
from maple_convert.readers.encodings import EIGHT_BITS, GGML

sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))
import gguf_files

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("kind", GGML)
def test_every_form(kind, parity_record):
    blocks = np.random.default_rng(kind).integers(0, 256, (4096, GGML[kind].nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random scales are infinite or no numbers, too
        ours = GGML[kind].decode(blocks)
        theirs = quants.dequantize(blocks, GGMLQuantizationType(kind))
        blocks[:, gguf_files.SCALES[kind][0]] ^= 1
        control = GGML[kind].decode(blocks)
    assert np.array_equal(ours, theirs, equal_nan=True)
    assert not np.array_equal(control, theirs, equal_nan=True)
    name = GGML[kind].name
    parity_record(f"GGUF, {name}", values=ours.size, differing=0, bar="bit for bit")


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_eight_bit_floats(name):
    every = np.arange(256, dtype=np.uint8)
    dtype = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[name]
    theirs = torch.from_numpy(every).view(dtype).to(torch.float16).numpy()
    assert np.array_equal(EIGHT_BITS[name].decode(every), theirs, equal_nan=True)


def test_a_file_that_the_package_wrote(tmp_path):
    """Its own writer and quantiser, at every form that it can quantise to."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "sd1")
    writer.add_custom_alignment(64)
    writer.add_array("some.words", ["a", "b"])
    values = np.random.default_rng(0).standard_normal((8, 3, 256)).astype(np.float32)
    expected = {}
    for form in ("F32", "F16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        kind = GGMLQuantizationType[form]
        packed = quants.quantize(values, kind)
        writer.add_tensor(form, packed, raw_dtype=kind)
        expected[form] = quants.dequantize(packed, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata["general.architecture"] == "sd1"
        assert checkpoint.tensors.keys() == expected.keys()
        for name, theirs in expected.items():
            ours = checkpoint.read(name).astype("float32").array
            assert ours.shape == values.shape and np.array_equal(ours, theirs), name


@pytest.mark.weights
def test_the_real_file(weights, parity_record):
    path = weights / "taesd" / "taesd-decoder.sdcpp-2023-11.gguf"
    tensors = gguf.GGUFReader(path).tensors
    with open_checkpoint(path) as checkpoint:
        assert [t.name for t in tensors] == list(checkpoint.tensors)
        for theirs in tensors:
            ours = checkpoint.read(theirs.name)
            assert ours.array.dtype == theirs.data.dtype
            assert ours.array.tobytes() == theirs.data.tobytes()
    parity_record("GGUF, a real file", tensors=len(tensors), differing=0, bar="bit for bit")
