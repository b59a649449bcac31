"""Reading by several threads: the same arrays, in the hands of the thread that asked."""

import threading

import mlx.core as mx
import numpy as np
import pytest

import mlx_maple as maple
from mlx_maple.engine import reading


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("reading") / "some.safetensors"
    arrays = {
        f"w{i}": mx.random.normal((i, 40), key=mx.random.key(i)).astype(mx.float16)
        for i in range(1, 12)
    }
    mx.save_safetensors(str(path), arrays)
    return path, arrays


@pytest.mark.parametrize("backend", ["cuda", "metal", "cpu"])
def test_the_same_arrays(stored, backend):
    path, arrays = stored
    names = [*list(arrays)[2:], "nothing"]
    found = reading.read(path, names, backend)
    assert sorted(found) == sorted(names[:-1])
    assert all(mx.array_equal(found[name], arrays[name]) for name in found)


def test_on_cuda_nothing_is_left_to_read(stored, tmp_path):
    path, arrays = stored
    copy = tmp_path / "copy.safetensors"
    for backend, is_read in (("cuda", True), ("metal", False)):
        copy.write_bytes(path.read_bytes())
        found = reading.read(copy, list(arrays), backend)
        seen = []

        def elsewhere(found=found, seen=seen):
            try:  # what was not read yet is bound to the thread that described it
                seen.append(np.array_equal(np.array(found["w3"]), np.array(arrays["w3"])))
            except RuntimeError:
                seen.append(False)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert seen == [is_read]


@pytest.mark.parametrize("backend", ["cuda", "cpu"])
def test_a_file_that_ends_early_is_a_fault_of_this_thread(stored, tmp_path, backend):
    path, arrays = stored
    short = tmp_path / "short.safetensors"
    short.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(RuntimeError):
        mx.eval(reading.read(short, list(arrays), backend))


def test_a_model_that_is_read_so_draws_the_same(monkeypatch):
    drawing = {"seed": 3, "steps": 1, "width": 64, "height": 64}
    plain = maple.load(dtype="float16")("a pear", **drawing)
    calls = []
    read = reading.read

    def by_threads(file, names):
        calls.append(file.name)
        return read(file, names, "cuda")

    monkeypatch.setattr(reading, "read", by_threads)
    found = maple.load(dtype="float16")("a pear", **drawing)
    assert calls == ["text_encoder.safetensors", "unet.safetensors"]
    assert np.array_equal(np.asarray(found.images[0]), np.asarray(plain.images[0]))


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"quantize": 8}, {"low_memory": True}])
def test_no_weight_is_held_twice(monkeypatch, options):
    read = []
    monkeypatch.setattr(reading, "read", lambda file, names: read.append(file.name))
    maple.load(**{"dtype": "float16", **options})
    assert not read
