"""GGUF and 8-bit floats against the gguf package and torch: every form, bit for bit."""

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

import mlx_maple as maple
from maple_convert.readers import open_checkpoint
from maple_convert.readers.encodings import EIGHT_BITS, GGML
from maple_convert.tensors import FLOATS

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


@pytest.mark.weights
def test_a_trained_model_quantised_draws_its_picture(weights, tmp_path, parity_record):
    """The trial model as the package packs it: F32 is the same picture, Q8_0 nearly, Q4_0 less."""
    source = weights / "emoji-trial" / "emoji-trial.ckpt"
    steps = {"seed": 7, "steps": 4, "width": 64, "height": 64}
    latents = {}
    for form in ("", "F32", "Q8_0", "Q4_0"):
        path = write_quantised(source, tmp_path / f"{form}.gguf", form) if form else source
        latents[form] = np.array(maple.load(path, cache=False)("a red maple leaf", **steps).latents)
    cosines = {form: cosine(latents[form], latents[""]) for form in ("F32", "Q8_0", "Q4_0")}
    assert np.array_equal(latents["F32"], latents[""])
    assert cosines["Q8_0"] > 0.999 > cosines["Q4_0"] > 0.9
    parity_record("GGUF, a trained model's latents", **cosines, bar="F32 bit for bit, Q8_0 0.999")


def write_quantised(source, path, form):
    """A checkpoint as GGUF, whole rows in a form, all else in F32."""
    kind = GGMLQuantizationType[form]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(path, "sd1")
    with open_checkpoint(source) as checkpoint:
        for name, info in checkpoint.tensors.items():
            if info.dtype not in FLOATS:
                continue
            values = checkpoint.read(name).astype("float32").array
            if block > 1 and values.ndim > 1 and not values.shape[-1] % block:
                writer.add_tensor(name, quants.quantize(values, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def cosine(one, other):
    return float((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))
