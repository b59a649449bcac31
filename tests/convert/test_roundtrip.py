"""Every container, layout and dtype: the same numbers in, the same bits out."""

import hashlib
import json
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch_files
from safetensors import safe_open
from safetensors.numpy import load_file

from maple_convert import (
    ConvertError,
    InvalidCheckpoint,
    LayoutMismatch,
    convert,
    open_model,
)
from maple_convert.half import round_to_half
from maple_convert.maple_folder import LATER, SETTINGS
from maple_convert.model import SD1_LATENT_RGB, WrongUse, inspect
from maple_convert.tensors import TensorInfo
from maple_convert.write import BLOCKS_AHEAD, Entry, write_safetensors

f16, f32 = np.float16, np.float32


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)


def read(path, **keywords):
    with open_model(path, **keywords) as model:
        return tiny.everything(model)


def snapshot(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# The same weights in every container


def forms(folder, dtype):
    """The same model as people find it."""
    state = tiny.compvis(dtype)
    folder.mkdir()
    return {
        "CompVis .safetensors": tiny.save_safetensors(folder / "a.safetensors", state),
        "zip .ckpt": tiny.save_ckpt(folder / "b.ckpt", state),
        "legacy .ckpt": tiny.save_ckpt(folder / "c.ckpt", state, legacy=True),
        "diffusers folder": tiny.save_diffusers(folder / "d", dtype),
        "diffusers folder, .bin": tiny.save_diffusers(folder / "e", dtype, binary=True),
        "diffusers folder of 2022": tiny.save_diffusers(
            folder / "f", dtype, spellings={"vae": "diffusers_2022"}
        ),
        "variant": tiny.save_diffusers(folder / "g", dtype, variant=".fp16"),
    }


@pytest.mark.parametrize("dtype", [f32, f16])
def test_every_container_gives_identical_arrays(tmp_path, dtype):
    expected = tiny.model(dtype)
    for name, path in forms(tmp_path / "forms", dtype).items():
        assert tiny.same_bits(read(path), expected), name


def test_a_half_file_is_the_float_file_rounded(tmp_path):
    whole = tiny.save_safetensors(tmp_path / "a.safetensors", tiny.compvis(f32))
    half = tiny.save_safetensors(tmp_path / "b.safetensors", tiny.compvis(f16))
    with open_model(whole) as model:
        assert tiny.same_bits(tiny.everything(model, "float16"), read(half))


def test_bfloat16_is_carried_as_bits(tmp_path):
    state = {k: (v.view(np.uint32) >> 16).astype(np.uint16) for k, v in tiny.compvis().items()}
    path = tiny.save_safetensors(tmp_path / "a.safetensors", state, "bfloat16")
    with open_model(path) as model:
        assert model.components["unet"].dtypes.keys() == {"bfloat16"}
        bits = tiny.everything(model)
    for to, out in (("maple", "m"), ("compvis", "c.safetensors"), ("diffusers", "d")):
        assert convert(path, tmp_path / out, to=to).dtype == "bfloat16"
        assert tiny.same_bits(read(tmp_path / out), bits)
    with open_model(path) as model:
        wide = tiny.everything(model, "float32")
    for name, array in wide["vae"].items():
        assert np.array_equal(array.view(np.uint32) >> 16, bits["vae"][name])


# Every pair of layouts

LAYOUTS = ("maple", "compvis", "diffusers")


def place(folder, to, name):
    return folder / (f"{name}.safetensors" if to == "compvis" else name)


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_round_trips_are_bit_exact(tmp_path, first, second):
    source = tiny.save_ckpt(tmp_path / "source.ckpt", tiny.compvis())
    one, other = place(tmp_path, first, "one"), place(tmp_path, second, "other")
    assert convert(source, one, to=first).layout == first
    convert(one, other, to=second)
    assert tiny.same_bits(read(other), tiny.model())
    with open_model(source) as original, open_model(other) as final:
        for name, part in original.components.items():
            assert final.components[name].config == part.config
        assert final.prediction == original.prediction


def test_compvis_comes_back_byte_for_byte(tmp_path):
    state = tiny.compvis()
    source = tiny.save_safetensors(tmp_path / "a.safetensors", state)
    for middle in ("maple", "diffusers"):
        convert(source, tmp_path / middle, to=middle)
        convert(tmp_path / middle, tmp_path / f"{middle}.safetensors", to="compvis")
        back = load_file(tmp_path / f"{middle}.safetensors")
        assert tiny.same_bits({"all": back}, {"all": state})


def test_diffusers_comes_back_byte_for_byte(tmp_path):
    source = tiny.save_diffusers(tmp_path / "source", f16)
    tiny.save_tokenizer(source / "tokenizer", 120)
    convert(source, tmp_path / "middle")
    convert(tmp_path / "middle", tmp_path / "back", to="diffusers")
    for name, (_, stem) in tiny.CLASSES.items():
        if name in tiny.CONFIGS:
            file = f"{name}/{stem}.safetensors"
            one, other = load_file(source / file), load_file(tmp_path / "back" / file)
            assert tiny.same_bits({"all": one}, {"all": other})
    for file in ("tokenizer/vocab.json", "tokenizer/merges.txt"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    index = json.loads((tmp_path / "back" / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]


@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("component", tiny.CONFIGS)
def test_components_alone_round_trip(tmp_path, to, component):
    native = tiny.arrays(component, tiny.CONFIGS[component])
    spelling = "diffusers" if component != "text_encoder" else "transformers_flat"
    state = tiny.published(component, tiny.CONFIGS[component], native, spelling)
    source = tiny.save_safetensors(tmp_path / "a.safetensors", state)
    out = place(tmp_path, to, "out")
    convert(source, out, to=to)
    assert tiny.same_bits(read(out), {component: native})


@pytest.mark.parametrize("to", LAYOUTS)
def test_taesd_round_trips(tmp_path, to):
    native = tiny.arrays("taesd", tiny.TAESD)
    state = tiny.published("taesd", tiny.TAESD, native, "upstream")
    source = tiny.save_safetensors(tmp_path / "a.safetensors", state)
    out = place(tmp_path, to, "out")
    convert(source, out, to=to)
    assert tiny.same_bits(read(out), {"taesd": native})


@pytest.mark.weights
@pytest.mark.parametrize("to", LAYOUTS)
@pytest.mark.parametrize("source", ["emoji-trial.ckpt", "diffusers"])
def test_the_trained_model_round_trips(weights, tmp_path, to, source):
    path = weights / "emoji-trial" / source
    out = place(tmp_path, to, "out")
    convert(path, out, to=to)
    assert tiny.same_bits(read(out), read(path))


# What goes along with the weights


def test_prediction_survives_every_layout(tmp_path):
    state = {**tiny.compvis(), "v_pred": np.zeros(0, f32), "ztsnr": np.zeros(0, f32)}
    source = tiny.save_safetensors(tmp_path / "a.safetensors", state)
    for first in LAYOUTS:
        for second in LAYOUTS:
            one, other = (place(tmp_path, to, f"{first}{second}{to}") for to in (first, second))
            convert(source, one, to=first)
            if first != second:
                convert(one, other, to=second)
            with open_model(other if first != second else one) as model:
                assert model.prediction == "v_prediction", (first, second)
                assert model.scheduler["rescale_zero_terminal_snr"], (first, second)


def test_stored_schedule_survives(tmp_path):
    stored = tiny.alphas_cumprod() ** f32(1.1)
    state = {**tiny.compvis(), "alphas_cumprod": stored}
    source = tiny.save_safetensors(tmp_path / "a.safetensors", state)
    for to in ("maple", "compvis"):
        convert(source, place(tmp_path, to, "x"), to=to)
        with open_model(place(tmp_path, to, "x")) as model:
            assert model.alphas_cumprod.astype(f32).tobytes() == stored.tobytes()
    convert(source, tmp_path / "d", to="diffusers")  # as betas, whose products round
    with open_model(tmp_path / "d") as model:
        assert np.abs(model.alphas_cumprod / stored - 1).max() < 1e-12


def test_the_usual_schedule_needs_no_betas_in_a_folder(tmp_path):
    state = {**tiny.compvis(), "alphas_cumprod": tiny.alphas_cumprod()}
    convert(
        tiny.save_safetensors(tmp_path / "a.safetensors", state), tmp_path / "d", to="diffusers"
    )
    config = json.loads((tmp_path / "d" / "scheduler" / "scheduler_config.json").read_text())
    assert config["trained_betas"] is None and config["beta_schedule"] == "scaled_linear"


def test_tokenizer_from_the_caller(tmp_path):
    source = tiny.save_safetensors(tmp_path / "a.safetensors", tiny.compvis())
    tiny.save_tokenizer(tmp_path / "words", 120)
    files = {"vocab": tmp_path / "words/vocab.json", "merges": tmp_path / "words/merges.txt"}
    report = convert(source, tmp_path / "d", to="diffusers", tokenizer=files)
    assert "tokenizer" in snapshot(tmp_path / "d") and not any(
        "okenizer" in n for n in report.notes
    )
    report = convert(source, tmp_path / "e", to="diffusers")
    assert "tokenizer" not in snapshot(tmp_path / "e")
    assert any("No tokenizer was written" in note for note in report.notes)


def test_what_a_compvis_file_cannot_hold_is_said(tmp_path):
    source = tiny.save_diffusers(tmp_path / "source")
    tiny.save_tokenizer(source / "tokenizer", 120)
    tiny.edit_json(source / "scheduler" / "scheduler_config.json", beta_schedule="linear")
    report = convert(source, tmp_path / "a.safetensors", to="compvis")
    assert any("no place for a vocabulary" in note for note in report.notes)
    assert any("no place for beta_schedule linear" in note for note in report.notes)


# The maple folder


def test_maple_folder_as_its_law_says(tmp_path):
    source = tiny.save_ckpt(tmp_path / "my model.ckpt", tiny.compvis())
    seen = []
    report = convert(
        source,
        tmp_path / "out",
        dtype="float16",
        config={"defaults": {"steps": 8}},
        progress=lambda done, total, label: seen.append((done, total, label)),
    )
    out = tmp_path / "out"
    names = ["config.json", *(f"{n}.safetensors" for n in ("text_encoder", "unet", "vae"))]
    assert snapshot(out) == names
    config = json.loads((out / "config.json").read_text())
    assert config["format"] == "mlx-maple" and config["format_version"] == 1
    assert config["family"] == "sd1" and config["dtype"] == "float16"
    assert config["components"] == tiny.CONFIGS
    assert config["defaults"]["steps"] == 8
    assert config["quantization"] is None and config["tokenizer"] is None
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert config["source"] == {"file": "my model.ckpt", "sha256": digest}
    assert report.bytes == sum((out / name).stat().st_size for name in names[1:])
    done, total, _ = seen[-1]
    assert (
        done == total == sum(array.nbytes for m in tiny.model(f16).values() for array in m.values())
    )
    assert [d for d, _, _ in seen] == sorted(d for d, _, _ in seen)
    with safe_open(out / "unet.safetensors", "np") as file:
        assert file.metadata() == {"format": "mlx", "component": "unet"}
        assert file.get_slice("conv_in.weight").get_shape() == [32, 3, 3, 4]


def test_the_digest_of_a_folder(tmp_path):
    source = tiny.save_diffusers(tmp_path / "folder")
    convert(source, tmp_path / "out")
    lines = "".join(
        f"{hashlib.sha256((source / name).read_bytes()).hexdigest()}  {name}\n"
        for name in (
            "text_encoder/model.safetensors",
            "unet/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
        )
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    digest = hashlib.sha256(lines.encode()).hexdigest()
    assert config["source"] == {"file": "folder", "sha256": digest}
    convert(source, tmp_path / "quick", digest=False)
    config = json.loads((tmp_path / "quick" / "config.json").read_text())
    assert config["source"]["sha256"] is None


def test_a_maple_folder_converted_again_keeps_its_source(tmp_path):
    source = tiny.save_ckpt(tmp_path / "a.ckpt", tiny.compvis())
    convert(source, tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "two", dtype="bfloat16")
    one, two = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("one", "two"))
    assert one["source"] == two["source"]
    assert two["dtype"] == "bfloat16" and one["components"] == two["components"]


def test_mixed_and_double_precision(tmp_path):
    state = tiny.compvis(f16)
    key = f"{tiny.VAE}encoder.conv_in.weight"
    state[key] = state[key].astype(np.float64)
    source = tiny.save_safetensors(tmp_path / "a.safetensors", state)
    assert inspect(source)["components"]["vae"]["dtypes"]["float64"] == state[key].size
    report = convert(source, tmp_path / "out")
    assert report.dtype == "mixed"
    assert load_file(tmp_path / "out" / "vae.safetensors")["encoder.conv_in.weight"].dtype == f32
    assert convert(source, tmp_path / "even", dtype="float32").dtype == "float32"


CONFIG_LIES = [
    ({"format": "mlx"}, "is of None"),
    ({"format_version": 2}, "format_version 2; this version reads 1"),
    ({"format_version": True}, "format_version True"),
    ({"family": ...}, "lacks family"),
    ({"family": 5}, "family is"),
    ({"dtype": "int8"}, "dtype is 'int8'"),
    ({"source": {"file": "x"}}, "source is"),
    ({"source": {"file": "x", "sha256": 5}}, "source.sha256 is 5"),
    ({"converter": None}, "converter is None"),
    ({"colour": "red"}, "unknown key 'colour'"),
    ({"quantization": {"bits": 4}}, "quantization is"),
    ({"quantization": {"bits": 3, "components": ["unet"]}}, "quantization.bits is 3"),
    ({"quantization": {"bits": True, "components": ["unet"]}}, "quantization.bits is True"),
    ({"quantization": {"bits": 4.0, "components": ["unet"]}}, "quantization.bits is 4.0"),
    ({"quantization": {"bits": 4, "components": []}}, "quantization.components is []"),
    ({"quantization": {"bits": 4, "components": ["vae"]}}, "quantization.components is"),
    ({"quantization": {"bits": 4, "components": ["unet"]}}, "keys do not fit"),
    ({"prediction": "x0"}, "prediction is 'x0'"),
    ({"components": {}}, "components is empty"),
    ({"components": []}, "components is []"),
    ({"components": {"../unet": {}}}, "unknown component '../unet'"),
    ({"tokenizer": "../x"}, "tokenizer is '../x'"),
    ({"tokenizer": "tokenizer/"}, "lacks vocab.json"),
    ({"latent_rgb_factors": [[1, 2], [3]]}, "latent_rgb_factors"),
    ({"alphas_cumprod": [0.5, 0.9]}, "alphas_cumprod is no noise schedule"),
    ({"alphas_cumprod": "x"}, "alphas_cumprod is not a list"),
    ({"scheduler": {}}, "scheduler lacks"),
    ({"defaults": {"width": 1}}, "defaults"),
]
SETTING_LIES = [
    ("unet", "block_out_channels", [-32, 64, 32]),
    ("unet", "block_out_channels", [10**30]),
    ("unet", "block_out_channels", [32] * 9),
    ("unet", "block_out_channels", [32, 64]),
    ("unet", "block_out_channels", [48, 64, 32]),
    ("unet", "block_out_channels", "wide"),
    ("unet", "layers_per_block", 10**12),
    ("unet", "layers_per_block", 1.0),
    ("unet", "layers_per_block", 2),
    ("unet", "transformer_layers", [1, 1, 0]),
    ("unet", "num_attention_heads", [5, 8, 8]),
    ("unet", "in_channels", 9),
    ("unet", "norm_num_groups", 24),
    ("vae", "scaling_factor", "0.18215"),
    ("vae", "scaling_factor", -1),
    ("vae", "scaling_factor", True),
    ("vae", "shift", 1),
    ("text_encoder", "num_hidden_layers", 10**9),
    ("text_encoder", "hidden_act", "swish"),
    ("text_encoder", "eos_token_id", 120),
    ("text_encoder", "projection_dim", 0),
    ("text_encoder", "num_attention_heads", None),
]


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    source = tiny.save_ckpt(folder / "a.ckpt", tiny.compvis())
    convert(source, folder / "maple")
    return folder / "maple"


def lying(good_folder, tmp_path, change):
    for file in good_folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").unlink()
    config = json.loads(text)
    change(config)
    tiny.write_json(tmp_path / "config.json", config)
    with pytest.raises(ConvertError) as caught:
        open_model(tmp_path)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("changes, words", CONFIG_LIES)
def test_lying_maple_configs(good_folder, tmp_path, changes, words):
    def change(config):
        for key, value in changes.items():
            config.update({key: value}) if value is not ... else config.pop(key)

    assert words in lying(good_folder, tmp_path, change)


@pytest.mark.parametrize("component, key, value", SETTING_LIES)
def test_lying_component_settings(good_folder, tmp_path, component, key, value):
    lying(good_folder, tmp_path, lambda c: c["components"][component].update({key: value}))


def test_every_setting_of_a_component_is_needed(good_folder, tmp_path):
    for component, settings in SETTINGS.items():
        if component in tiny.CONFIGS:
            for n, key in enumerate(key for key in settings if key not in LATER.get(component, ())):
                place = tmp_path / f"{component}{n}"
                place.mkdir()
                message = lying(
                    good_folder, place, lambda c, k=key, p=component: c["components"][p].pop(k)
                )
                assert f"lacks {key}" in message


def test_a_maple_folder_is_read_strictly(good_folder, tmp_path):
    for file in good_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "vae.safetensors")
    # A convolution left as torch has it: the same number of bytes, the wrong order.
    state["decoder.conv_in.weight"] = state["decoder.conv_in.weight"].transpose(0, 3, 1, 2).copy()
    state["stranger"] = np.zeros(1, f32)
    del state["quant_conv.bias"]
    tiny.save_safetensors(tmp_path / "vae.safetensors", state)
    with pytest.raises(LayoutMismatch) as caught:
        open_model(tmp_path)
    assert caught.value.missing == ("quant_conv.bias",)
    assert caught.value.unexpected == ("stranger",)
    assert [name for name, _, _ in caught.value.misshapen] == ["decoder.conv_in.weight"]
    (tmp_path / "vae.safetensors").unlink()
    with pytest.raises(InvalidCheckpoint, match=r"lacks vae\.safetensors"):
        open_model(tmp_path)


# Values


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16", "float32"])
def test_values_that_are_not_finite_are_refused(tmp_path, bad, dtype):
    state = tiny.compvis()
    key = f"{tiny.UNET}middle_block.0.out_layers.3.weight"
    state[key].reshape(-1)[-1] = bad
    source = tiny.save_safetensors(tmp_path / "a.safetensors", state)
    with pytest.raises(InvalidCheckpoint, match="NaN or infinite") as caught:
        convert(source, tmp_path / "out", dtype=dtype)
    assert key in str(caught.value)
    assert snapshot(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_values_that_are_not_finite_in_other_types(tmp_path, dtype):
    state = tiny.compvis()
    key = f"{tiny.VAE}post_quant_conv.bias"
    if dtype == "bfloat16":
        state = {k: (v.view(np.uint32) >> 16).astype(np.uint16) for k, v in state.items()}
        state[key][1] = 0x7F80
    else:
        state = {k: v.astype(dtype) for k, v in state.items()}
        state[key][1] = np.nan
    source = tiny.save_safetensors(
        tmp_path / "a.safetensors", state, "bfloat16" if dtype == "bfloat16" else None
    )
    with pytest.raises(InvalidCheckpoint, match="NaN or infinite"):
        convert(source, tmp_path / "out")
    with open_model(source) as model, pytest.raises(InvalidCheckpoint, match=key):
        list(model.components["vae"].tensors())


def test_values_too_large_for_half_precision(tmp_path):
    state = tiny.compvis()
    state[f"{tiny.UNET}out.2.bias"][0] = 70000
    source = tiny.save_safetensors(tmp_path / "a.safetensors", state)
    with pytest.raises(InvalidCheckpoint, match="too large for float16; use bfloat16 or float32"):
        convert(source, tmp_path / "out", dtype="float16")
    convert(source, tmp_path / "out", dtype="bfloat16")


def test_rounding_to_half_is_numpys_bit_for_bit():
    """Every exponent and sign with random fractions, and all that is special."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 1_000_003, np.uint32)
    halves = np.arange(1 << 16, dtype=np.uint16).view(f16).astype(f32)
    ties = (halves.view(np.uint32)[:, None] + np.array([0x0FFF, 0x1000, 0x1001], np.uint32)).ravel()
    special = np.array(
        [0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.99, 65520, 6e-8, 2.98e-8], f32
    )
    with np.errstate(all="ignore"):
        for values in (bits.view(f32), halves, ties.view(f32), special, np.zeros(0, f32)):
            result = np.empty(values.size, f16)
            finite = round_to_half(values, result)
            assert finite == np.isfinite(values.astype(f16)).all()
            assert np.array_equal(result.view(np.uint16), values.astype(f16).view(np.uint16))


# write_safetensors


def test_write_safetensors_as_the_library_reads_it(tmp_path):
    arrays = {
        "half": np.arange(5, dtype=f16),
        "scalar": np.array(3.5, f32),
        "empty": np.zeros((0, 4), f32),
        "ids": np.arange(6, dtype=np.int64).reshape(2, 3),
        "flags": np.array([True, False]),
        "turned": np.arange(12, dtype=f32).reshape(3, 4).T,
    }
    entries = [
        Entry(k, TensorInfo(a.dtype.name, a.shape), lambda a=a: [lambda: a])
        for k, a in arrays.items()
    ]
    written = []
    path = tmp_path / "x.safetensors"
    size = write_safetensors(path, entries, {"a": "é"}, written.append)
    assert size == path.stat().st_size
    assert sum(written) == sum(array.nbytes for array in arrays.values())
    back = load_file(path)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype and np.array_equal(back[name], array)
    with safe_open(path, "np") as file:
        assert file.metadata() == {"a": "é"}
    header = json.loads(path.read_bytes()[8:][: int.from_bytes(path.read_bytes()[:8], "little")])
    for name, array in arrays.items():
        assert header[name]["data_offsets"][0] % array.itemsize == 0


def test_rows_are_written_in_order_though_made_at_the_same_time(tmp_path, monkeypatch):
    """The first rows wait for the second: one worker alone would never end, and rows stay few."""
    monkeypatch.setattr("maple_convert.write.WORKERS", 2)
    second, made, written = threading.Event(), [], []

    def rows(number):
        made.append(number)
        assert len(made) - len(written) <= BLOCKS_AHEAD + 1
        if number == 0:
            assert second.wait(10)
        elif number == 1:
            second.set()
        return np.full(3, number, f32)

    entry = Entry("x", TensorInfo("float32", (60,)), lambda: [partial(rows, n) for n in range(20)])
    write_safetensors(tmp_path / "x", [entry], wrote=written.append)
    assert np.array_equal(load_file(tmp_path / "x")["x"], np.repeat(np.arange(20, dtype=f32), 3))


# Arguments


@pytest.mark.parametrize(
    "out, keywords, words",
    [
        ("x", {"to": "onnx"}, "to must be one of"),
        ("x", {"dtype": "int8"}, "dtype must be one of"),
        ("x.ckpt", {"to": "compvis"}, r"name it x\.safetensors"),
        ("x", {"to": "compvis"}, r"name it x\.safetensors"),
        ("x.safetensors", {}, "writes a folder"),
        ("x.ckpt", {"to": "diffusers"}, "writes a folder"),
    ],
)
def test_arguments_that_do_not_go_together(tmp_path, out, keywords, words):
    with pytest.raises(WrongUse, match=words):
        convert(tmp_path / "nothing.ckpt", tmp_path / out, **keywords)


# Published size, names and shapes only


def test_defaults_of_the_published_size(monkeypatch):
    from pathlib import Path

    from test_detect import InMemory

    from maple_convert import open_file
    from maple_convert.layouts import LAYOUTS as COMPONENTS

    tensors = {}
    for name, (spelling, prefix) in tiny.COMPVIS.items():
        layout = COMPONENTS[name]
        for row in layout.rows(layout.published_config, spelling):
            tensors[prefix + row.published] = TensorInfo("float32", row.published_shape)
    monkeypatch.setattr(open_file, "open_checkpoint", lambda path: InMemory(tensors))
    with open_model(Path("sd-v1-4.ckpt")) as model:
        assert model.defaults == {
            "width": 512,
            "height": 512,
            "steps": 20,
            "guidance_scale": 7.5,
            "sampler": "dpmpp_2m",
            "schedule": "karras",
        }
        assert model.latent_rgb_factors == SD1_LATENT_RGB
        assert model.components["text_encoder"].config["num_attention_heads"] == 12
        assert model.components["text_encoder"].config["eos_token_id"] == 49407
        assert model.components["unet"].parameters == 859_520_964
        assert model.components["unet"].nbytes == 4 * 859_520_964


def test_a_folder_with_something_of_the_users_is_not_replaced(tmp_path):
    """Replacing deletes what is there: only what the format writes may go."""
    from maple_convert import UnreadableFile, convert

    source = Path(__file__).parents[2] / "mlx_maple" / "demo"
    out = tmp_path / "model"
    convert(source, out, digest=False)
    convert(source, out, digest=False)
    (out / "mine.txt").write_text("keep")
    with pytest.raises(UnreadableFile, match="exists"):
        convert(source, out, digest=False)
    assert (out / "mine.txt").read_text() == "keep"


def test_a_vocabulary_that_does_not_fit_is_left_out_of_a_diffusers_folder(tmp_path):
    from maple_convert import convert, open_model

    source = Path(__file__).parents[2] / "mlx_maple" / "demo"
    convert(source, tmp_path / "d.safetensors", to="compvis", digest=False)
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text('{"a": 0, "far</w>": 49407}')
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")
    report = convert(
        tmp_path / "d.safetensors",
        tmp_path / "d",
        to="diffusers",
        digest=False,
        tokenizer={"vocab": tokenizer / "vocab.json", "merges": tokenizer / "merges.txt"},
    )
    assert any("left out" in note for note in report.notes)
    with open_model(tmp_path / "d") as model:
        assert model.family == "sd1"


# Streaming


def strided(state):
    """The same state dict with every matrix saved as a transposed view, as torch may do."""
    turned = {}
    for key, array in state.items():
        if array.ndim == 2:
            storage = torch_files.Storage(np.ascontiguousarray(array.T))
            turned[key] = torch_files.TorchTensor(storage, 0, array.shape, (1, array.shape[0]))
        else:
            turned[key] = array
    return turned


@pytest.mark.parametrize(
    "block, dtype", [(1, "float16"), (5000, None), (5000, "float16"), (5000, "bfloat16")]
)
def test_blocks_of_any_size_give_the_same_files(tmp_path, monkeypatch, block, dtype):
    """One row at a time, or some: contiguous, strided and sharded tensors, in every layout."""
    config = tiny.CONFIGS["vae"]
    state = tiny.published("vae", config, tiny.arrays("vae", config), "compvis")
    plain = tiny.save_safetensors(tmp_path / "plain.safetensors", state)
    views = torch_files.write_torch_zip(tmp_path / "views.ckpt", strided(state))
    names = sorted(state)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, keys in shards.items():
        tiny.save_safetensors(tmp_path / shard, {key: state[key] for key in keys})
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    index = tmp_path / "x.safetensors.index.json"
    tiny.write_json(index, {"weight_map": weight_map})
    with open_model(plain) as model:
        whole = tiny.everything(model, dtype)
    monkeypatch.setattr("maple_convert.stream.BLOCK_BYTES", block)
    pairs = [(plain, to) for to in LAYOUTS] + [(views, "maple"), (index, "maple")]
    for source, to in pairs:
        out = place(tmp_path, to, f"{source.stem}-{to}")
        convert(source, out, to=to, dtype=dtype, digest=False)
        assert tiny.same_bits(read(out), whole), (source.name, to)


def test_a_fault_in_the_last_block_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("maple_convert.stream.BLOCK_BYTES", 2000)
    state = tiny.compvis()
    state[f"{tiny.TEXT}text_model.embeddings.token_embedding.weight"][-1, -1] = np.nan
    source = tiny.save_safetensors(tmp_path / "a.safetensors", state)
    for dtype in (None, "float16", "bfloat16"):
        with pytest.raises(InvalidCheckpoint, match="token_embedding"):
            convert(source, tmp_path / "out", dtype=dtype)
