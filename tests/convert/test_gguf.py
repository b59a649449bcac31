"""GGUF and 8-bit files: every form's values, whole models, and what is refused by name."""

import hashlib
import shutil

import families
import gguf_files
import numpy as np
import pytest
import tiny
from gguf_files import F16, IQ4_NL, Q4_0, Q4_K, Q8_0

from maple_convert import convert, open_model
from maple_convert.errors import InvalidCheckpoint, LayoutMismatch, UnsupportedCheckpoint
from maple_convert.layouts import LAYOUTS
from maple_convert.readers import gguf, open_checkpoint
from maple_convert.readers.encodings import EIGHT_BITS, GGML

# SHA-256 of what the gguf package (0.19) makes of random_blocks, float32; the comparison itself is
# in tests/parity/test_gguf_parity.py.
DIGESTS = {
    "Q4_0": "ed968a3c6e515d9a",
    "Q4_1": "60c2e3df65c6ccb0",
    "Q5_0": "fa48e4c3cfac3837",
    "Q5_1": "1ade22c1fec9ac67",
    "Q8_0": "3c3024c212ba414d",
    "Q2_K": "b81516270d5b9e67",
    "Q3_K": "96a551d8cf5ee282",
    "Q4_K": "d66c32d8c066ced4",
    "Q5_K": "e3fd3d9b886818d4",
    "Q6_K": "818c692700ec3606",
}


def random_blocks(kind: int, count: int = 64) -> np.ndarray:
    blocks = np.random.default_rng(kind).integers(
        0, 256, (count, GGML[kind].nbytes), dtype=np.uint8
    )
    for at in gguf_files.SCALES[kind]:  # finite and unlike one another
        scales = np.random.default_rng(at).normal(size=count).astype("<f2")
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks


@pytest.mark.parametrize("kind", GGML)
def test_values_are_ggmls(kind):
    encoding = GGML[kind]
    values = encoding.decode(random_blocks(kind))
    assert values.dtype == np.float32 and values.shape == (64, encoding.elements)
    assert hashlib.sha256(values.tobytes()).hexdigest()[:16] == DIGESTS[encoding.name]


def test_a_block_by_hand():
    """Q4_0: a scale of 0.5 and nibbles 0 to 15, twice: the low ones are the first half."""
    nibbles = np.arange(16, dtype=np.uint8)
    block = np.concatenate([np.float16([0.5]).view(np.uint8), nibbles | (nibbles[::-1] << 4)])
    values = GGML[Q4_0].decode(block[None])[0]
    assert values.tolist() == [*(np.arange(16) - 8) / 2, *(np.arange(16)[::-1] - 8) / 2]


def test_eight_bit_floats_by_hand():
    e4m3, e5m2 = (EIGHT_BITS[name].decode(np.arange(256, dtype=np.uint8)) for name in EIGHT_BITS)
    assert e4m3[[0x00, 0x01, 0x07, 0x08, 0x38, 0x7E, 0xB8]].tolist() == [
        0, 2**-9, 7 * 2**-9, 2**-6, 1, 448, -1,
    ]  # fmt: skip
    assert np.isnan(e4m3[[0x7F, 0xFF]]).all() and np.isfinite(e4m3).sum() == 254
    assert e5m2[[0x00, 0x01, 0x3C, 0x7B, 0x7C, 0xBC]].tolist() == [
        0, 2**-16, 1, 57344, np.inf, -1,
    ]  # fmt: skip


def native(component: str, state: dict, spelling: str, prefix: str, config: dict) -> dict:
    """A component's arrays as the model must have them, from a file's."""
    return {
        row.native: row.weights.to_native(
            np.split(state[prefix + row.published], row.share[1])[row.share[0]]
        )
        for row in LAYOUTS[component].rows(config, spelling)
    }


def wide_state(dtype=np.float32):
    """SD 1.x with some weights wide enough for every form."""
    changes = {
        "unet": {
            "block_out_channels": [32, 256],
            "transformer_layers": [1, 1],
            "cross_attention_dim": 64,
        },
    }
    return tiny.compvis(dtype, **changes), tiny.configs(**changes)


@pytest.mark.parametrize(("kind", "version"), [(None, 2), (Q8_0, 3), (Q4_K, 3)])
def test_a_whole_model(tmp_path, kind, version):
    state, configs = wide_state(np.float16)
    path = tmp_path / "model.gguf"
    expected = gguf_files.save(path, state, kind, version=version, alignment=64)
    with open_model(path) as model:
        assert (model.family, model.layout) == ("sd1", "compvis")
        assert model.container == f"GGUF version {version}"
        found = tiny.everything(model)
        assert any(GGML[kind].name in note for note in model.notes) if kind else True
    for name, (spelling, prefix) in tiny.COMPVIS.items():
        for key, array in native(name, expected, spelling, prefix, configs[name]).items():
            ours = found[name][key]
            assert ours.dtype == array.dtype and np.array_equal(ours, array), key


def test_folded_weights(tmp_path):
    """Rows that no block fits are folded up: tasks begin and end within blocks."""
    state = {"w": np.zeros((700, 4, 3, 3), np.float32), "x": np.zeros((64, 1, 4, 2), np.float16)}
    path = tmp_path / "model.gguf"
    expected = gguf_files.save(path, state, Q8_0, folded=True, settings={"n": ["a", "b"]})
    with open_checkpoint(path) as checkpoint:
        for name, array in expected.items():
            assert checkpoint.tensors[name].shape == array.shape
            assert np.array_equal(checkpoint.read(name).array, array)
        part = np.empty((3, 4, 3, 3), np.float32)
        checkpoint.read_elements(checkpoint.places["w"], 5 * 36, part)
        assert np.array_equal(part, expected["w"][5:8])


@pytest.mark.parametrize("window", [8, 9, 41, 1 << 10, 1 << 20])
def test_strings_are_passed_over_wherever_a_window_ends(tmp_path, window, monkeypatch):
    monkeypatch.setattr(gguf, "WINDOW", window)
    lengths = np.random.default_rng(0).integers(0, 60, 400)
    words = ["x" * length for length in [*lengths, 2000, 0, 0, 7]]
    path, state = tmp_path / "model.gguf", {"w": np.arange(32, dtype=np.float32)}
    gguf_files.save(path, state, settings={"words": words, "after": "it", "none": [""]})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.metadata["after"] == "it"
        assert np.array_equal(checkpoint.read("w").array, state["w"])
    cut = path.read_bytes()
    path.write_bytes(cut[: cut.index(b"after") - 20])
    with pytest.raises(InvalidCheckpoint, match="truncated"):
        open_checkpoint(path)


def test_converted_and_drawn_from(tmp_path):
    state, _ = wide_state()
    gguf_files.save(tmp_path / "m.gguf", state, Q8_0)
    convert(tmp_path / "m.gguf", tmp_path / "maple")
    with open_model(tmp_path / "m.gguf") as one, open_model(tmp_path / "maple") as other:
        assert tiny.same_bits(tiny.everything(one), tiny.everything(other))


def sdcpp_names(family: str) -> dict:
    """A family's tensors as stable-diffusion.cpp of 2024 names and shapes them."""
    arrays, state = families.native(family, np.float16), {}
    for name, config in families.FAMILIES[family].items():
        how, prefix = families.spelling(family, name)
        if name == "text_encoder":
            how, prefix = "transformers", "cond_stage_model.transformer."
        if name == "text_encoder_2":
            how, prefix = "sdcpp", "cond_stage_model.1.transformer."
        state |= tiny.published(name, config, arrays[name], how, prefix)
    for key, array in state.items():
        if key.startswith("model.") and key.endswith(("proj_in.weight", "proj_out.weight")):
            state[key] = array.reshape(*array.shape[:2], 1, 1)
    return state


def test_stable_diffusion_cpps_sdxl(tmp_path):
    state = sdcpp_names("sdxl")
    assert "cond_stage_model.1.transformer.text_model.text_projection" in state
    gguf_files.save(tmp_path / "xl.gguf", state)
    tiny.save_safetensors(tmp_path / "xl.safetensors", families.compvis("sdxl", np.float16))
    with open_model(tmp_path / "xl.gguf") as ours, open_model(tmp_path / "xl.safetensors") as plain:
        assert ours.family == plain.family == "sdxl"
        assert tiny.same_bits(tiny.everything(ours), tiny.everything(plain))
        for name, part in plain.components.items():
            assert ours.components[name].config == part.config


def test_stable_diffusion_cpps_sd2(tmp_path):
    """Doors as 1x1 convolutions and CLIP's names: 1,024 numbers of context tell the family."""
    family = families.FAMILIES["sd2"]
    family = {
        **family,
        "text_encoder": {**family["text_encoder"], "hidden_size": 1024, "num_attention_heads": 16},
        "unet": {**family["unet"], "cross_attention_dim": 1024},
    }
    state = {}
    for name, config in family.items():
        how, prefix = families.spelling("sd2", name)
        if name == "text_encoder":
            how, prefix = tiny.COMPVIS[name]
        arrays = tiny.arrays(name, config, np.float16)
        state |= tiny.published(name, config, arrays, how, prefix)
    for key, array in state.items():
        if key.startswith("model.") and key.endswith(("proj_in.weight", "proj_out.weight")):
            state[key] = array.reshape(*array.shape[:2], 1, 1)
    gguf_files.save(tmp_path / "sd2.gguf", state)
    with open_model(tmp_path / "sd2.gguf") as model:
        assert model.family == "sd2"
        config = model.components["text_encoder"].config
        assert config["hidden_act"] == "gelu" and config["pad_token_id"] == 0
    # In any other container such doors are those of no family.
    tiny.save_safetensors(tmp_path / "sd2.safetensors", state)
    with pytest.raises((UnsupportedCheckpoint, LayoutMismatch)):
        open_model(tmp_path / "sd2.safetensors")


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_an_eight_bit_model(tmp_path, kind):
    """As written by ComfyUI: every tensor in 8 bits; read as float16, which holds each exactly."""
    path, expected = eight_bit_file(tmp_path / "model.safetensors", kind)
    with open_model(path) as model:
        assert model.family == "sd1"
        assert any(kind in note for note in model.notes)
        found = tiny.everything(model)
        assert model.components["unet"].dtypes.keys() == {"float16"}
    for name, (spelling, prefix) in tiny.COMPVIS.items():
        arrays = native(name, expected, spelling, prefix, tiny.CONFIGS[name])
        assert all(np.array_equal(found[name][key], array) for key, array in arrays.items())


def eight_bit_file(path, kind, **more):
    from corpus import safetensors_file

    state, generator = tiny.compvis(), np.random.default_rng(0)
    entries, data, expected = {}, bytearray(), {}
    for name, array in state.items():
        raw = generator.integers(0x20, 0x50, array.shape, dtype=np.uint8)
        offsets = [len(data), len(data) + raw.size]
        entries[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}
        data += raw.tobytes()
        expected[name] = EIGHT_BITS[kind].decode(raw)
    for name, bits in more.items():
        entries[name] = {"dtype": kind, "shape": [1], "data_offsets": [len(data), len(data) + 1]}
        data += bits
    path.write_bytes(safetensors_file(entries, 0) + data)
    return path, expected


def test_eight_bit_weights_with_scales_are_refused(tmp_path):
    path, _ = eight_bit_file(tmp_path / "model.safetensors", "F8_E4M3", scaled_fp8=b"\0")
    with pytest.raises(UnsupportedCheckpoint, match="scales that are not read"):
        open_model(path)


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"general.architecture": "flux"}, F16, "'flux', which is no Stable Diffusion"),
        ({"general.architecture": "llama"}, F16, "'llama'"),
        ({}, IQ4_NL, "IQ4_NL, which is not read"),
    ],
)
def test_refused_by_name(tmp_path, settings, kind, words):
    head = gguf_files.header(
        [gguf_files.setting(*pair) for pair in settings.items()],
        [gguf_files.entry("w", (2, 32), kind, 0)],
    )
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_files.padded(head) + bytes(128))
    with pytest.raises(UnsupportedCheckpoint, match=words):
        open_checkpoint(path)


def test_flux_without_a_stated_architecture(tmp_path):
    """As stable-diffusion.cpp writes it."""
    state = {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": np.zeros((4, 4), "f4")}
    gguf_files.save(tmp_path / "model.gguf", state)
    with pytest.raises(UnsupportedCheckpoint, match="Flux"):
        open_model(tmp_path / "model.gguf")


def test_a_scale_that_is_no_number(tmp_path):
    """Nothing warns and nothing ends in a black picture: the conversion says which tensor."""
    state, _ = wide_state()
    path = tmp_path / "model.gguf"
    gguf_files.save(path, state, Q8_0)
    with open_checkpoint(path) as checkpoint:
        place = next(p for p in checkpoint.places.values() if p.encoding is not None)
    spoiled = bytearray(path.read_bytes())
    spoiled[place.offset : place.offset + 2] = b"\0\x7c"
    path.write_bytes(spoiled)
    with pytest.raises(InvalidCheckpoint, match="NaN or infinite"):
        convert(path, tmp_path / "maple")
    assert not (tmp_path / "maple").exists()


@pytest.mark.weights
def test_the_real_decoder(tmp_path, weights):
    """A decoder of 2023 with today's encoder beside it."""
    name = "taesd-decoder.sdcpp-2023-11.gguf"
    shutil.copy(weights / "taesd" / name, tmp_path)
    with pytest.raises(UnsupportedCheckpoint, match=r"its encoder \(taesd-encoder"):
        open_model(tmp_path / name)
    encoder = name.replace("decoder", "encoder")
    shutil.copy(weights / "taesd" / "taesd_encoder.safetensors", tmp_path / encoder)
    with open_model(tmp_path / name) as model:
        assert (model.family, model.container) == ("taesd", "GGUF version 3")
        decoder = [key for key in model.components["taesd"].keys if key.startswith("decoder")]
        assert len(decoder) == 67
        for _, tensor in model.components["taesd"].tensors():
            assert np.abs(tensor.astype("float32").array).max() < 10
