"""From a path to modules: every container to the same arrays, strictly, with and without a twin."""

import gc
import json
import os
import shutil
import stat
import subprocess
import sys
import weakref
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny_model
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

import mlx_maple
from maple_convert import convert
from maple_convert.errors import ConvertError, InvalidCheckpoint, LayoutMismatch
from mlx_maple import loading, twins
from mlx_maple.drawing import model as drawn
from mlx_maple.engine.compiled import GuidedSteps
from mlx_maple.engine.prepare import prepare_unet
from mlx_maple.engine.quantize import Quantizer
from mlx_maple.loading import NoModel, load

PARTS = ("text_encoder", "unet", "vae")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAPLE_CACHE", str(tmp_path / "cache"))


def arrays(sd):
    found = {}
    for part in PARTS:
        for name, value in tree_flatten(getattr(sd, part).parameters()):
            found[f"{part}.{name}"] = np.array(value.astype(mx.float32))
    return found


def same(one, other):
    one, other = arrays(one), arrays(other)
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def reference():
    return load(tiny_model.folder() / "model.ckpt", cache=False)


@pytest.mark.parametrize("cache", [True, False], ids=["twin", "direct"])
@pytest.mark.parametrize("form", ["ckpt", "safetensors", "legacy", "diffusers", "maple"])
def test_every_container_gives_the_same_arrays(form, cache, reference, tmp_path):
    folder = tiny_model.folder()
    if form == "legacy":
        path = tmp_path / "old.ckpt"
        tiny_model.write_legacy(path, {"state_dict": tiny_model.compvis()})
    elif form in ("diffusers", "maple"):
        path = tmp_path / form
        convert(folder / "model.safetensors", path, to=form)
    else:
        path = folder / f"model.{form}"
    sd = load(path, cache=cache)
    assert same(sd, reference)
    assert sd.info.parameters == reference.info.parameters
    assert (len(twins.all_twins()) == 1) == (cache and form != "maple")
    if cache:
        assert same(load(path), reference)


@pytest.mark.parametrize("way", ["another model", "another network"])
def test_a_network_made_ready_goes_when_another_takes_its_place(way):
    """Its compiled steps and it know of each other: nobody counts them down to zero."""
    sd, plain = load(tiny_model.maple_folder()), load(tiny_model.maple_folder()).unet
    ready = prepare_unet(sd.unet)
    ready.steps = GuidedSteps(ready, compiles=False)
    sd.unet, seen = ready, weakref.ref(ready)
    gc.disable()
    try:
        del ready
        if way == "another model":
            del sd
            assert seen() is not None
            load(tiny_model.maple_folder())
        else:
            sd.unet = plain
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("compiles", [True, False])
def test_compiling_can_be_switched_off(compiles, monkeypatch):
    """Also of what low-memory mode loads later."""
    seen = []

    def spy(network, **how):
        seen.append(how["compiles"])
        return network

    monkeypatch.setattr(drawn, "made_ready", spy)
    load(tiny_model.maple_folder(), compile=compiles)
    _ = load(tiny_model.maple_folder(), compile=compiles, low_memory=True).unet
    assert len(seen) == 4 and set(seen) == {compiles}


def test_names_are_imported_when_they_are_asked_for():
    code = (
        "import sys, mlx_maple; assert 'mlx.core' not in sys.modules; "
        "assert set(mlx_maple.__all__) <= set(dir(mlx_maple)); "
        "[getattr(mlx_maple, name) for name in mlx_maple.__all__]; "
        "assert 'mlx.core' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mlx_maple.nothing


# Types --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_everything_is_in_the_dtype_that_was_asked_for(dtype):
    sd = load(tiny_model.maple_folder(), dtype=dtype)
    found = {
        value.dtype for part in PARTS for _, value in tree_flatten(getattr(sd, part).parameters())
    }
    assert found == {loading.DTYPES[dtype]}
    assert sd.info.components["unet"].dtype == dtype


def test_the_default_is_float32_on_the_cpu():
    assert loading.default_dtype() == "float32"
    assert loading.dtype_name(mx.bfloat16) == "bfloat16"
    with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, float32"):
        load(tiny_model.maple_folder(), dtype="int8")


@pytest.mark.parametrize(
    ("source", "run", "stored"),
    [
        ("float32", "float16", "float16"),
        ("float32", "float32", "float32"),
        ("float16", "float32", "float16"),
        ("float16", "bfloat16", "float16"),
        ("float64", "float32", "float32"),
    ],
)
def test_a_twin_is_as_narrow_as_it_can_be(source, run, stored, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tiny_model.compvis(source), path)
    sd = load(path, dtype=run)
    (twin,) = twins.all_twins()
    assert (twin.source_dtype, twin.dtype) == (source, stored)
    weights = load_file(twin.path / "unet.safetensors").values()
    assert {str(value.dtype) for value in weights} == {stored}
    assert sd.info.components["unet"].dtype == run
    assert same(sd, load(path, dtype=run, cache=False))


# Twins --------------------------------------------------------------------------------------------


def test_the_second_start_does_not_open_the_source(monkeypatch):
    path = tiny_model.folder() / "model.ckpt"
    first = load(path)
    assert any("converted once into" in note for note in first.info.notes)
    opened = []
    real = loading.open_model
    monkeypatch.setattr(
        loading, "open_model", lambda p, **k: (opened.append(Path(p)), real(p, **k))[1]
    )
    second = load(path)
    assert opened == [twins.all_twins()[0].path] and second.info.notes == ()
    assert second.info.sha256 == first.info.sha256 and len(first.info.sha256) == 64


def test_a_damaged_twin_is_made_again(reference):
    path = tiny_model.folder() / "model.ckpt"
    load(path)
    (twin,) = twins.all_twins()
    os.truncate(twin.path / "unet.safetensors", 1000)
    assert same(load(path), reference)


def test_without_a_cache_that_can_be_written_it_loads_all_the_same(
    monkeypatch, tmp_path, reference
):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("MAPLE_CACHE", str(blocked / "cache"))
    sd = load(tiny_model.folder() / "model.ckpt")
    assert same(sd, reference)
    assert any("not kept in the cache" in note for note in sd.info.notes)


def test_without_room_on_the_disk_it_loads_all_the_same(monkeypatch, reference):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda path: usage)
    sd = load(tiny_model.folder() / "model.ckpt")
    assert same(sd, reference)
    assert any("are needed and 0.00 GB are free" in note for note in sd.info.notes)
    assert not twins.all_twins() and not twins.unfinished()


def test_a_disk_that_fills_up_on_the_way_leaves_nothing(monkeypatch, reference):
    real = loading.convert

    def full(source, out, **options):
        real(source, out, **options)
        raise loading.UnreadableFile(out, "the disk is full; nothing was written")

    monkeypatch.setattr(loading, "convert", full)
    sd = load(tiny_model.folder() / "model.ckpt")
    assert same(sd, reference)
    assert any("the disk is full" in note for note in sd.info.notes)
    assert not twins.all_twins() and not twins.unfinished()


def test_a_source_that_cannot_be_converted_is_an_error_and_leaves_nothing(tmp_path):
    state = tiny_model.compvis()
    name = next(name for name in state if "input_blocks" in name)
    state[name] = np.full_like(state[name], np.nan)
    path = tmp_path / "nan.safetensors"
    save_file(state, path)
    for cache in (True, False):
        with pytest.raises(InvalidCheckpoint, match="NaN"):
            load(path, cache=cache)
    assert not twins.all_twins() and not twins.unfinished()


def test_progress_is_told_while_converting():
    seen = []
    load(tiny_model.folder() / "model.ckpt", progress=lambda *state: seen.append(state))
    done, total, label = seen[-1]
    assert done == total > 1e6 and label


# Which source -------------------------------------------------------------------------------------


def test_no_model_at_all_says_how_to_name_one(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "DEMO", tmp_path)
    with pytest.raises(NoModel, match="name a checkpoint file") as caught:
        load()
    assert caught.value.exit_code == 2


def test_the_embedded_model_is_the_default(monkeypatch):
    monkeypatch.setattr(loading, "DEMO", tiny_model.maple_folder())
    assert load().info.name == "demo"


@pytest.mark.parametrize("name", ["nothing.ckpt", "./no/folder", "a b", "", "x" * 5000, "a\0b"])
def test_a_path_that_is_not_there(name):
    with pytest.raises((NoModel, ConvertError)) as caught:
        load(name)
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)


def test_another_autoencoder_and_a_taesd(reference):
    folder = tiny_model.folder()
    sd = load(
        tiny_model.maple_folder(),
        vae=folder / "vae.safetensors",
        taesd=folder / "taesd.safetensors",
    )
    assert same(sd, reference)  # the same weights, out of a file of their own
    assert sd.taesd is not None and "taesd" in sd.info.components
    with pytest.raises(ConvertError, match="holds no taesd but vae"):
        load(tiny_model.maple_folder(), taesd=folder / "vae.safetensors")
    with pytest.raises(ConvertError, match="no text_encoder and no unet: not a whole model"):
        load(folder / "vae.safetensors")


def test_a_model_without_autoencoder_takes_another(tmp_path, reference):
    path = tmp_path / "no-vae.safetensors"
    save_file({k: v for k, v in tiny_model.compvis().items() if "first_stage" not in k}, path)
    with pytest.raises(ConvertError, match="no vae: not a whole model"):
        load(path)
    assert same(load(path, vae=tiny_model.folder() / "vae.safetensors"), reference)


# Strictness of the fast road ----------------------------------------------------------------------


@pytest.fixture
def maple(tmp_path):
    path = tmp_path / "maple"
    shutil.copytree(tiny_model.maple_folder(), path)
    return path


def rewrite(path, change):
    """Change the UNet's arrays of a maple folder, keeping the file well formed."""
    state = load_file(path / "unet.safetensors")
    change(state)
    save_file(state, path / "unet.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("conv_in.bias"), "1 missing: conv_in.bias"),
        (lambda s: s.update(extra=np.zeros(1, "f2")), "1 unexpected: extra"),
        (lambda s: s.update({"conv_in.bias": np.zeros(31, "f2")}), "1 misshapen: conv_in.bias"),
        (lambda s: s.update({"conv_in.bias": np.zeros(32, "i4")}), "conv_in.bias"),
    ],
    ids=["missing", "unexpected", "misshapen", "integers"],
)
def test_a_maple_folder_is_read_strictly(maple, change, words):
    rewrite(maple, change)
    with pytest.raises(ConvertError, match=words) as caught:
        load(maple)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_of_a_maple_folder_are_looked_at(maple, value):
    rewrite(maple, lambda state: state["conv_in.weight"].__setitem__((0, 0, 0, 0), value))
    with pytest.raises(InvalidCheckpoint, match=r"unet\.conv_in\.weight holds NaN or infinite"):
        load(maple)


def test_values_too_large_for_the_run_are_found(tmp_path):
    state = tiny_model.compvis("float32")
    name = next(name for name in state if name.endswith("input_blocks.0.0.weight"))
    state[name][0, 0, 0, 0] = 1e6
    path = tmp_path / "large.safetensors"
    save_file(state, path)
    load(path, dtype="float32")
    with pytest.raises(InvalidCheckpoint, match="too large for float16"):
        load(path, dtype="float16")
    convert(path, tmp_path / "bf16", dtype="bfloat16")
    load(tmp_path / "bf16", dtype="bfloat16")
    with pytest.raises(InvalidCheckpoint, match="NaN or infinite"):
        load(tmp_path / "bf16", dtype="float16")


def test_names_and_shapes_are_compared_both_ways():
    module = load(tiny_model.maple_folder()).unet
    weights = dict(tree_flatten(module.parameters()))
    bias = weights.pop("conv_in.bias")
    path = Path("x")
    with pytest.raises(LayoutMismatch, match=r"1 missing: unet\.conv_in\.bias"):
        loading._fill(path, "unet", module, weights)
    with pytest.raises(LayoutMismatch, match=r"1 unexpected: unet\.more"):
        loading._fill(path, "unet", module, {**weights, "conv_in.bias": bias, "more": bias})
    with pytest.raises(LayoutMismatch, match=r"1 misshapen: unet\.conv_in\.bias"):
        loading._fill(path, "unet", module, {**weights, "conv_in.bias": bias[:9]})
    with pytest.raises(InvalidCheckpoint, match="not a weight"):
        loading._fill(path, "unet", module, {**weights, "conv_in.bias": bias.astype(mx.int32)})


def test_a_file_cut_short_after_its_header_was_read(maple, monkeypatch):
    real = loading._check_fit

    def cut(path, modules, paths):
        os.truncate(maple / "unet.safetensors", 5000)
        real(path, modules, paths)

    monkeypatch.setattr(loading, "_check_fit", cut)
    with pytest.raises(ConvertError, match="could not be read to its end") as caught:
        load(maple)
    assert caught.value.exit_code == 1


def test_defaults_that_this_version_does_not_have(maple):
    config = json.loads((maple / "config.json").read_text())
    config["defaults"]["sampler"] = "dpm_9"
    (maple / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidCheckpoint, match="its default sampler is 'dpm_9'"):
        load(maple)


def test_parts_of_different_latents_do_not_go_together(tmp_path, monkeypatch):
    monkeypatch.setitem(tiny_model.CONFIGS["vae"], "latent_channels", 8)
    path = tmp_path / "vae.safetensors"
    save_file(tiny_model.weights("vae", "diffusers"), path)
    with pytest.raises(ConvertError, match="4 channels and the vae's have 8"):
        load(tiny_model.maple_folder(), vae=path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "model.ckpt"
    shutil.copy(tiny_model.folder() / "model.ckpt", path)
    path.chmod(stat.S_IWUSR)
    with pytest.raises(ConvertError) as caught:
        load(path)
    assert caught.value.exit_code == 1


# Schedules ----------------------------------------------------------------------------------------


def test_a_stored_schedule_is_honoured(tmp_path):
    alphas = np.linspace(0.99, 0.01, 500)
    path = tmp_path / "model.safetensors"
    save_file({**tiny_model.compvis(), "alphas_cumprod": alphas}, path)
    for _ in range(2):  # from the source, then from its twin
        assert np.allclose(load(path).noise_schedule.alphas_cumprod, alphas, atol=1e-7)


def test_marks_of_v_prediction_and_zero_terminal_snr(tmp_path):
    path = tmp_path / "model.safetensors"
    marks = {"v_pred": np.zeros(0, "f4"), "ztsnr": np.zeros(0, "f4")}
    save_file({**tiny_model.compvis(), **marks}, path)
    for _ in range(2):
        schedule = load(path).noise_schedule
        assert schedule.prediction == "v_prediction" and schedule.alphas_cumprod[-1] < 1e-6


def test_a_text_encoder_smaller_than_the_vocabulary_is_refused_and_reads_nothing_beyond_its_table(
    tmp_path,
):
    """A single file cannot carry the embedded model's own vocabulary; CLIP's ids would not fit."""
    from maple_convert import InvalidCheckpoint, convert
    from mlx_maple.loading import DEMO, load

    convert(DEMO, tmp_path / "small.safetensors", to="compvis", digest=False)
    with pytest.raises(InvalidCheckpoint, match="vocabulary of its own"):
        load(tmp_path / "small.safetensors", cache=False)


def test_a_changed_shard_is_another_source(tmp_path):
    from mlx_maple.twins import source_key

    index, shard = tmp_path / "m.safetensors.index.json", tmp_path / "m-1.safetensors"
    index.write_text("{}")
    shard.write_bytes(b"one")
    before = source_key(index, {})
    shard.write_bytes(b"two and more")
    assert source_key(index, {}) != before


# Quantised, and in low-memory mode ---------------------------------------------------------------


@pytest.fixture
def ckpt() -> Path:
    return tiny_model.folder() / "model.ckpt"


def parameters(module) -> dict:
    return dict(tree_flatten(module.parameters()))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_quantised_folder_gives_what_quantising_on_load_gives(maple, dtype, tmp_path):
    convert(maple, tmp_path / "q4", quantizer=Quantizer(4))
    stored = loading.load(tmp_path / "q4", dtype=dtype)
    made = loading.load(maple, dtype=dtype, quantize=4)
    for part in ("text_encoder", "unet", "vae"):
        one, other = parameters(getattr(stored, part)), parameters(getattr(made, part))
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value.dtype == other[name].dtype and mx.array_equal(value, other[name]), name
    bits = {name: component.bits for name, component in stored.info.components.items()}
    assert bits == {"text_encoder": 4, "unet": 4, "vae": None}
    assert stored.info.parameters == loading.load(maple).info.parameters
    assert "unet.conv_in" not in "".join(name for name in parameters(made.unet) if "scales" in name)


def test_a_quantised_folder_keeps_its_bits(maple, tmp_path):
    convert(maple, tmp_path / "q8", quantizer=Quantizer(8))
    assert loading.load(tmp_path / "q8", quantize=8).info.components["unet"].bits == 8
    with pytest.raises(ConvertError, match="quantised to 8 bits already"):
        loading.load(tmp_path / "q8", quantize=4)
    with pytest.raises(ConvertError, match="convert the model that it was made from"):
        convert(tmp_path / "q8", tmp_path / "again")


@pytest.mark.parametrize("fault", ["missing", "type", "shape"])
def test_a_quantised_folder_is_read_strictly(maple, tmp_path, fault):
    convert(maple, tmp_path / "q4", quantizer=Quantizer(4))
    file = tmp_path / "q4" / "unet.safetensors"
    tensors = load_file(file)
    name = "mid_block.resnets.0.conv1.scales"
    if fault == "missing":
        del tensors[name]
    elif fault == "type":
        words = name.replace("scales", "weight")
        tensors[words] = tensors[words].view(np.int32)
    else:
        tensors[name] = tensors[name][:, :-1].copy()
    save_file(tensors, file)
    with pytest.raises(ConvertError, match=r"unet\.safetensors"):
        loading.load(tmp_path / "q4")


@pytest.mark.parametrize("bits", [3, "4", 16])
def test_other_bits_are_refused(maple, bits):
    with pytest.raises(ValueError, match="quantize must be 8 or 4"):
        loading.load(maple, quantize=bits)


@pytest.mark.parametrize("quantize", [None, 8])
def test_low_memory_draws_the_same_from_every_kind_of_source(maple, ckpt, tmp_path, quantize):
    drawn = []
    for source, low_memory in ((maple, False), (maple, True), (ckpt, True)):
        sd = loading.load(source, low_memory=low_memory, quantize=quantize, cache=False)
        assert bool(sd.networks._held) is not low_memory
        drawn.append(sd("a leaf", seed=1, steps=1, width=64, height=64).latents)
    assert np.array_equal(drawn[0], drawn[1])
    assert np.array_equal(drawn[0], drawn[2])


def test_low_memory_reads_no_weights_when_it_loads(maple, monkeypatch):
    def read(*args):
        raise AssertionError("weights were read")

    monkeypatch.setattr(mx, "load", read)
    sd = loading.load(maple, low_memory=True)
    assert sd.info.parameters > 0
    with pytest.raises(AssertionError, match="were read"):
        sd("a leaf", seed=1, steps=1)
