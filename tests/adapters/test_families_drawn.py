"""LoRAs and words on tiny models of SDXL and SD 2: two encoders, OpenCLIP, linear doors."""

import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import mlx_maple as maple
from maple_convert.errors import UnsupportedCheckpoint
from maple_convert.layouts import LAYOUTS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "convert"))
import families
import tiny

SMALL = {"width": 64, "height": 64, "steps": 1, "seed": 5, "guidance_scale": 1}
TOKENS = {"vocab_size": 49408, "eos_token_id": 49407}
LEAF = "a leaf"
# How each family's LoRAs name its networks, by kohya's scripts.
NAMES = {
    "sdxl": {
        "unet": ("compvis", "lora_unet_"),
        "text_encoder": ("transformers", "lora_te1_"),
        "text_encoder_2": ("transformers", "lora_te2_"),
    },
    "sd2": {"unet": ("diffusers", "lora_unet_"), "text_encoder": ("transformers", "lora_te_")},
}


def family_of(name):
    """A family's networks with CLIP's vocabulary, and a coarser autoencoder."""
    parts = {
        part: {**config, **(TOKENS if part.startswith("text_encoder") else {})}
        for part, config in families.FAMILIES[name].items()
    }
    parts["vae"] = {**parts["vae"], "block_out_channels": [32] * 4}
    return parts


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, loaded = tmp_path_factory.mktemp("families"), {}

    def model(name, copy="", **more):
        """A family's model; ``copy`` is another one of the same weights."""
        if (name, copy) not in loaded:
            plain = families.FAMILIES[name]
            families.FAMILIES[name] = family_of(name)
            try:
                path = folder / f"{name}.safetensors"
                tiny.save_safetensors(path, families.compvis(name, np.float16))
                loaded[name, copy] = maple.load(path, cache=False, **more)
            finally:
                families.FAMILIES[name] = plain
        return loaded[name, copy]

    return model


def lora(path, name, parts):
    """A kohya file for all matrices of some networks."""
    generator, tensors = np.random.default_rng(1), {}
    for part in parts:
        spelling, prefix = NAMES[name][part]
        for row in LAYOUTS[part].rows(family_of(name)[part], spelling):
            shape = row.published_shape
            if len(shape) < 2 or row.native.startswith("embeddings."):
                continue
            key = prefix + row.published.removesuffix(".weight").replace(".", "_")
            down = generator.standard_normal((2, *shape[1:])) / np.prod(shape[1:]) ** 0.5
            up = 0.3 * generator.standard_normal((shape[0], 2, *(1 for _ in shape[2:])))
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = np.array(1.0)
    save_file({k: v.astype(np.float16) for k, v in tensors.items()}, path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_every_network_takes_its_lora_and_gives_it_back(models, tmp_path, name):
    sd, drawn = models(name), set()
    plain = sd(LEAF, **SMALL)
    for part in NAMES[name]:
        path = lora(tmp_path / f"{part}.safetensors", name, [part])
        styled = sd(LEAF, loras=[path], **SMALL)
        assert not [note for note in styled.notes if "left out" in note]
        drawn.add(styled.latents.tobytes())
    assert len(drawn | {plain.latents.tobytes()}) == len(NAMES[name]) + 1
    assert np.array_equal(sd(LEAF, **SMALL).latents, plain.latents)


def test_a_pair_is_a_word_of_sdxl(models, tmp_path):
    sd = models("sdxl")
    widths = [sd.configs[part].hidden_size for part in ("text_encoder", "text_encoder_2")]
    generator = np.random.default_rng(2)
    pair = {
        key: generator.standard_normal((3, width)).astype(np.float32)
        for key, width in zip(("clip_l", "clip_g"), widths, strict=True)
    }
    (tmp_path / "embeddings").mkdir()
    save_file(pair, tmp_path / "embeddings" / "noctia.safetensors")
    plain = sd(f"{LEAF}, noctia", **SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAPLE_MODELS", str(tmp_path))
        spoken = sd(f"{LEAF}, noctia", **SMALL)
        assert not np.array_equal(spoken.latents, plain.latents)
        half = {"clip_l": pair["clip_l"]}
        save_file(half, tmp_path / "embeddings" / "noctia.safetensors")
        refused = sd(f"{LEAF}, noctia", **SMALL)
        assert np.array_equal(refused.latents, plain.latents)
        assert any("read as plain text" in note for note in refused.notes)
    assert np.array_equal(sd(f"{LEAF}, noctia", **SMALL).latents, plain.latents)


def test_one_familys_lora_is_not_the_others(models, tmp_path):
    path = lora(tmp_path / "style.safetensors", "sd2", ["unet", "text_encoder"])
    with pytest.raises(UnsupportedCheckpoint, match=r"is for a model of a text \d+ wide"):
        models("sdxl")(LEAF, loras=[path], **SMALL)


# A refiner ---------------------------------------------------------------------------------------


def refined(sd, refiner, text=LEAF, **more):
    """A drawing that the refiner makes from the first step on."""
    return sd(text, **SMALL, refiner=refiner, refiner_start=0, **more)


def test_a_refiner_carries_what_changes_the_encoder_that_it_shares(models, tmp_path):
    sd, refiner = models("sdxl"), models("sdxl-refiner")
    plain = refiner(LEAF, **SMALL).latents
    shared = lora(tmp_path / "shared.safetensors", "sdxl", ["text_encoder_2"])
    whole = lora(tmp_path / "whole.safetensors", "sdxl", ["text_encoder_2", "text_encoder", "unet"])
    expected = refiner(LEAF, loras=[shared], **SMALL).latents
    assert not np.array_equal(expected, plain)
    drawn = refined(sd, refiner, loras=[whole])
    assert np.array_equal(drawn.latents, expected)
    assert drawn.notes == ["the LoRA whole leaves the refiner's unet as it is, another one"]
    assert np.array_equal(refined(sd, refiner).latents, plain)  # it is taken off again


def test_a_refiner_of_the_same_shape_carries_all_of_it(models, tmp_path):
    sd, other = models("sdxl"), models("sdxl", "another")
    whole = lora(tmp_path / "whole.safetensors", "sdxl", ["unet", "text_encoder"])
    drawn = refined(sd, other, loras=[whole])
    assert np.array_equal(drawn.latents, sd(LEAF, loras=[whole], **SMALL).latents)
    assert not drawn.notes and not np.array_equal(drawn.latents, refined(sd, other).latents)


def test_a_refiner_knows_the_words_for_its_encoder(models, tmp_path):
    refiner, text = models("sdxl-refiner"), f"{LEAF}, noctia"
    generator = np.random.default_rng(2)
    pair = {key: generator.standard_normal((3, 64)).astype("f") for key in ("clip_l", "clip_g")}
    save_file(pair, word := tmp_path / "noctia.safetensors")
    plain = refiner(text, **SMALL).latents
    sd = models("sdxl", "with a word", embeddings=[word])
    knows = refined(sd, refiner, text)
    assert not np.array_equal(knows.latents, plain) and not knows.notes
    assert np.array_equal(refined(models("sdxl"), refiner, text).latents, plain)
