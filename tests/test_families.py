"""Drawing with SD 2.x, SDXL, its refiner and distilled models: what they are told, and by whom."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlx_maple
from maple_convert import UnsupportedCheckpoint, convert
from maple_convert.layouts import LAYOUTS, diffusers_config
from mlx_maple import hub, metadata
from mlx_maple.conditioning import Conditioning
from mlx_maple.models import UNetConfig
from mlx_maple.predictions import seen_prediction
from mlx_maple.sizes import Sizes, read_pair, with_vector, zeroed

sys.path.insert(0, str(Path(__file__).parent / "convert"))
import families
import tiny

TOKENS = {"vocab_size": 49408, "eos_token_id": 49407}
SMALL = {"width": 64, "height": 64, "steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of each family, made when it is asked for: CLIP's vocabulary, an eighth's latents."""
    folder = tmp_path_factory.mktemp("models")
    plain = {name: dict(parts) for name, parts in families.FAMILIES.items()}
    for parts in families.FAMILIES.values():
        for name in parts:
            if name.startswith("text_encoder"):
                parts[name] = {**parts[name], **TOKENS}
        parts["vae"] = {**parts["vae"], "block_out_channels": [32] * 4}

    def file(family: str) -> Path:
        path = folder / f"{family}.safetensors"
        if not path.exists():
            tiny.save_safetensors(path, families.compvis(family, np.float16))
        return path

    yield file
    families.FAMILIES.update(plain)


@pytest.fixture(scope="module")
def models(files):
    loaded = {}

    def model(family: str, **how):
        key = family, *how.items()
        if key not in loaded:
            loaded[key] = mlx_maple.load(files(family), cache=False, **how)
        return loaded[key]

    return model


# What SDXL is told -----------------------------------------------------------------------------


def test_heights_come_first_in_what_the_network_is_told():
    sizes = Sizes(original=(640, 480), crop=(16, 8), score=5, negative_score=2)
    assert sizes.numbers((64, 32), "sdxl") == [480, 640, 8, 16, 32, 64]
    assert sizes.numbers((64, 32), "sdxl-refiner") == [480, 640, 8, 16, 5]
    assert sizes.numbers((64, 32), "sdxl-refiner", is_negative=True) == [480, 640, 8, 16, 2]
    assert Sizes().numbers((64, 32), "sdxl") == [32, 64, 0, 0, 32, 64]


def test_the_vector_is_the_pooled_text_then_each_number():
    pooled = mx.arange(4, dtype=mx.float32)[None]
    told = with_vector(Conditioning(context=mx.zeros((1, 2, 3)), pooled=pooled), [0, 1000], 4 + 16)
    assert told.vector is not None and told.vector.shape == (1, 20)
    vector = np.array(told.vector)[0]
    assert np.array_equal(vector[:4], [0, 1, 2, 3])
    assert np.array_equal(vector[4:12], [1, 1, 1, 1, 0, 0, 0, 0])  # cosines of 0, then sines
    assert not np.allclose(vector[12:], vector[4:12])


@pytest.mark.parametrize(
    "value", ["64", "64x", "0x64", (64, 64, 64), (64.5, 64), (True, 64), "axb"]
)
def test_what_is_no_pair(value):
    with pytest.raises(ValueError, match="original_size must be two whole numbers"):
        read_pair("original_size", value, 1)


@pytest.mark.parametrize("value", ["64x48", "64,48", " 64 X 48", (64, 48), [64, 48]])
def test_pairs(value):
    assert read_pair("original_size", value, 1) == (64, 48)


def test_sizes_change_a_drawing_and_are_kept_with_it(models):
    sd = models("sdxl")
    own = sd("a leaf", **SMALL)
    told = sd("a leaf", **SMALL, original_size="32x16", crop=(4, 2))
    assert not np.array_equal(own.latents, told.latents)
    same = sd("a leaf", **SMALL, original_size=(64, 64), crop="0,0", target_size=(64, 64))
    assert np.array_equal(own.latents, same.latents)
    read = metadata.from_json(metadata.to_json(told.settings[0])).settings
    assert (read.original_size, read.crop, read.target_size) == ("32x16", "4,2", None)
    assert np.array_equal(sd(**read.arguments()).latents, told.latents)


def test_nothing_at_all_is_not_an_empty_text(models):
    sd = models("sdxl")
    empty, none = (sd("a leaf", **SMALL, negative_prompt=text) for text in ("", None))
    assert not np.array_equal(empty.latents, none.latents)
    read = metadata.from_json(metadata.to_json(none.settings[0])).settings
    assert np.array_equal(sd(**read.arguments()).latents, none.latents)
    # By another road: with rescaled guidance both halves are asked alone.
    rescaled = [
        sd("a leaf", **SMALL, negative_prompt=text, guidance_rescale=1e-6) for text in ("", None)
    ]
    assert np.abs(rescaled[0].latents - empty.latents).max() < 1e-3
    assert np.abs(rescaled[1].latents - none.latents).max() < 1e-3
    # A second drawing that is told what to avoid avoids that.
    larger = {**SMALL, "negative_prompt": None, "hires_scale": 1, "hires_steps": 1}
    same, told = (sd("a leaf", **larger, hires_negative_prompt=text) for text in (None, "snow"))
    assert not np.array_equal(same.latents, told.latents)
    nothing = zeroed(Conditioning(context=mx.ones((1, 2, 3)), pooled=mx.ones((1, 4))))
    assert not np.array(nothing.context).any() and not np.array(nothing.pooled).any()


@pytest.mark.parametrize("negative", ["", None], ids=["empty", "nothing"])
def test_sdxl_reads_the_prompt_language(models, negative):
    """With two encoders, a vector beside the time, and a second drawing at another size."""
    sd = models("sdxl")
    small = {**SMALL, "negative_prompt": negative}
    leaf = sd("a leaf", **small).latents
    assert np.array_equal(leaf, sd("[a leaf:snow:9.5]", **small).latents)
    assert np.allclose(leaf, sd("a leaf AND snow :0", **small).latents, atol=1e-3)
    for other in ("a (leaf:1.4)", "a leaf AND snow", "[a leaf:snow:-1]", "a leaf BREAK snow"):
        assert not np.array_equal(leaf, sd(other, **small).latents)
    second = sd("a leaf", **small, hires_scale=1.5, hires_steps=1)
    assert second.images[0].size == tuple(
        int(1.5 * side) for side in sd("a", **small).images[0].size
    )
    assert np.isfinite(second.latents).all()


def test_the_layer_before_the_last_is_sdxls_own(models):
    sd = models("sdxl")
    own = sd("a leaf", **SMALL)
    assert own.settings[0].clip_skip == 2
    assert np.array_equal(own.latents, sd("a leaf", **SMALL, clip_skip=2).latents)
    assert not np.array_equal(own.latents, sd("a leaf", **SMALL, clip_skip=1).latents)


def test_both_encoders_are_there_and_fill_up_differently(models):
    sd = models("sdxl")
    first, second = (each[0] for each in sd.text_encoders.tokenize("a leaf"))
    assert first[:4] == second[:4] and first[-1] == 49407 and second[-1] == 0
    assert sd.text_encoder_2(mx.array([second])).pooled.shape == (1, 40)
    assert set(sd.info.components) == {"text_encoder", "text_encoder_2", "unet", "vae"}


def test_the_refiner_has_the_second_encoder_alone(models):
    refiner = models("sdxl-refiner")
    assert refiner.text_encoder_2 is not None and not hasattr(refiner, "text_encoder")
    assert models("sd2").text_encoder_2 is None and len(refiner.tokenize("a leaf")) == 1


# Forms of a model --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sdxl", "sdxl-refiner"])
def test_low_memory_draws_the_same(models, family):
    whole = models(family)("a leaf", **SMALL)
    parts = models(family, low_memory=True)("a leaf", **SMALL)
    assert np.abs(whole.latents - parts.latents).max() < 1e-3
    assert whole.settings == parts.settings


def test_two_pictures_are_the_ones_drawn_alone(models):
    both = models("sdxl")("a leaf", **SMALL, count=2)
    second = models("sdxl")("a leaf", **{**SMALL, "seed": 6})
    assert np.array_equal(both.latents[1:], second.latents)


def test_the_autoencoder_computes_in_float32_where_half_precision_overflows(models):
    parts = models("sdxl", dtype="float16").info.components
    assert {name: part.dtype for name, part in parts.items()} == {
        "text_encoder": "float16",
        "text_encoder_2": "float16",
        "unet": "float16",
        "vae": "float32",
    }
    assert models("sd2", dtype="float16").info.components["vae"].dtype == "float16"


def test_both_encoders_are_quantised(models):
    parts = models("sdxl", quantize=8).info.components
    assert [part.bits for part in parts.values()] == [8, 8, 8, None]


def test_a_maple_folder_draws_the_same(files, models, tmp_path):
    convert(files("sdxl-distilled"), tmp_path / "maple", digest=False)
    own = models("sdxl-distilled")("a leaf", **SMALL)
    again = mlx_maple.load(tmp_path / "maple")("a leaf", **SMALL)
    assert np.array_equal(own.latents, again.latents)


# What SD 2.x predicts ----------------------------------------------------------------------------


@pytest.mark.parametrize("share, prediction", [(1.0, "epsilon"), (0.07, "v_prediction")])
def test_a_network_that_repeats_noise_predicts_it(share, prediction):
    """A velocity at the last timestep is 0.068 of the noise and the rest of the picture."""
    picture = mx.random.normal((1, 16, 16, 4), key=mx.random.key(1))

    def unet(latents, timesteps, context):
        assert timesteps.item() == 999 and context.shape == (1, 77, 768)
        return share * latents + (1 - share) * picture

    assert seen_prediction(unet, UNetConfig())[0] == prediction


def test_what_the_files_do_not_say_is_seen_and_said(files, models):
    sd = models("sd2")
    assert sd.info.prediction == "v_prediction"
    assert any("what the UNet predicts" in note for note in sd.info.notes)
    said = models("sd2", prediction="epsilon")
    assert said.info.prediction == "epsilon"
    assert not any("what the UNet predicts" in note for note in said.info.notes)
    with pytest.raises(ValueError, match="prediction must be epsilon or v_prediction"):
        mlx_maple.load(files("sd2"), cache=False, prediction="noise")


def test_a_folder_leaves_open_what_its_file_did(files, tmp_path):
    convert(files("sd2"), tmp_path / "open", digest=False)
    convert(files("sd2"), tmp_path / "said", digest=False, config={"prediction": "epsilon"})
    assert mlx_maple.load(tmp_path / "open").info.prediction == "v_prediction"
    assert mlx_maple.load(tmp_path / "said").info.prediction == "epsilon"


# The refiner -----------------------------------------------------------------------------------


def test_a_refiner_draws_the_last_part(models):
    sd, refiner = models("sdxl"), models("sdxl-refiner")
    steps = {**SMALL, "steps": 5, "sampler": "ddim", "schedule": "leading"}
    alone = sd("a leaf", **steps)
    never = sd("a leaf", **steps, refiner=refiner, refiner_start=1)
    assert np.array_equal(alone.latents, never.latents)
    half = sd("a leaf", **steps, refiner=refiner, refiner_start=0.5)
    assert not np.array_equal(alone.latents, half.latents)
    all_of_it = sd("a leaf", **steps, refiner=refiner, refiner_start=0)
    assert np.array_equal(all_of_it.latents, refiner("a leaf", **steps).latents)
    assert (half.settings[0].refiner, half.settings[0].refiner_start) == ("sdxl-refiner", 0.5)
    recipe = metadata.from_json(metadata.to_json(half.settings[0]))
    assert any("was refined by sdxl-refiner from 0.5 on" in note for note in recipe.notes)
    assert "refiner" not in recipe.settings.arguments()


def test_a_refiner_avoids_an_empty_text_where_sdxl_avoids_nothing(models):
    refiner = models("sdxl-refiner")
    empty, none = (refiner("a leaf", **SMALL, negative_prompt=text) for text in ("", None))
    assert np.array_equal(empty.latents, none.latents)


def test_a_refiner_sees_its_score(models):
    sd, refiner = models("sdxl"), models("sdxl-refiner")
    drawn = [
        sd("a leaf", **SMALL, refiner=refiner, refiner_start=0.1, **score).latents
        for score in ({}, {"aesthetic_score": 2.0}, {"negative_aesthetic_score": 6.0})
    ]
    assert not np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


def test_a_model_that_cannot_go_on(models):
    with pytest.raises(ValueError, match="the refiner predicts v_prediction"):
        models("sdxl")("a leaf", **SMALL, refiner=models("sd2"))


def test_a_refiner_does_not_go_with_tile(models):
    with pytest.raises(ValueError, match="tile does not go with a refiner"):
        models("sdxl")("a leaf", **SMALL, refiner=models("sdxl-refiner"), tile="xy")


def test_what_steers_a_model_leaves_a_refiner_of_another_shape_alone(files, models, tmp_path):
    config = {**families.FAMILIES["sdxl"]["unet"], "hint_channels": 3, "hint_widths": [4, 6, 8, 10]}
    del config["out_channels"]
    random = np.random.default_rng(3)
    state = {
        f"control_model.{row.published}": random.normal(0, 0.1, row.published_shape).astype("f")
        for row in LAYOUTS["controlnet"].rows(config, "compvis_linear")
    }
    path = tiny.save_safetensors(tmp_path / "edges.safetensors", state)
    sd, refiner = (
        mlx_maple.load(files("sdxl"), cache=False, controlnet=path),
        models("sdxl-refiner"),
    )
    steps = {**SMALL, "steps": 4, "sampler": "ddim", "schedule": "leading"}
    hint = Image.new("RGB", (64, 64), "red")

    def drawn(start: float, **more):
        return sd("a leaf", **steps, refiner=refiner, refiner_start=start, **more)

    refined = drawn(0, control_image=hint)
    assert np.array_equal(refined.latents, refiner("a leaf", **steps).latents)
    assert "the refiner draws without the ControlNet" in " ".join(refined.notes)
    assert not np.array_equal(drawn(0.5, control_image=hint).latents, drawn(0.5).latents)


def test_a_model_that_lacks_a_network(tmp_path):
    state = families.compvis("sdxl-refiner", np.float16)
    state = {k: v for k, v in state.items() if not k.startswith("conditioner.")}
    with pytest.raises(UnsupportedCheckpoint, match="no text_encoder_2"):
        mlx_maple.load(tiny.save_safetensors(tmp_path / "x.safetensors", state), cache=False)


# From the hub


@pytest.mark.parametrize("encoders", [(), ("text_encoder",), ("text_encoder", "text_encoder_2")])
def test_what_is_fetched_of_a_diffusers_repository(encoders):
    """SDXL has two text encoders, its refiner the second alone; one there must be."""
    stems = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
    stems |= dict.fromkeys(encoders or ("text_encoder_2",), "model")
    present = {f"{part}/{stem}.fp16.safetensors" for part, stem in stems.items()}
    present |= {f"{part}/config.json" for part in stems}
    words = {part.replace("text_encoder", "tokenizer") for part in stems if "text" in part}
    present |= {f"{folder}/vocab.json" for folder in words} | {"model_index.json"}
    chosen = hub._choose_diffusers(hub.HubName("a/b"), present, "float16", None)
    assert set(chosen.files) == present
    without = {file for file in present if "text_encoder" not in file}
    with pytest.raises(hub.HubError, match="no weights that can be read in text_encoder/"):
        hub._choose_diffusers(hub.HubName("a/b"), without, "float16", None)


@pytest.mark.parametrize("stated", [None, True, False])
def test_sdxls_autoencoder_from_elsewhere_is_read_as_sdxls(files, tmp_path, stated):
    """Its tensors are those of SD 1's: a bare file's scale and range are the model's family's."""
    parts = families.FAMILIES["sdxl"]
    arrays = families.native("sdxl", np.float16)["vae"]
    path = tmp_path / "vae.safetensors"
    if stated is not None:
        (tmp_path / "vae").mkdir()
        path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
        config = diffusers_config.write("vae", parts["vae"], 64) | {"force_upcast": stated}
        tiny.write_json(path.with_name("config.json"), config)
    state = tiny.published("vae", parts["vae"], arrays, "diffusers")
    tiny.save_safetensors(path, state)
    vae = path if stated is None else path.parent
    sd = mlx_maple.load(files("sdxl"), vae=vae, dtype="float16", cache=False)
    assert sd.configs["vae"].scaling_factor == 0.13025
    assert sd.info.components["vae"].dtype == ("float16" if stated is False else "float32")
    other = mlx_maple.load(files("sd2"), vae=vae, dtype="float16", cache=False)
    if stated is None:
        assert other.configs["vae"].scaling_factor == 0.18215
        assert other.info.components["vae"].dtype == "float16"
