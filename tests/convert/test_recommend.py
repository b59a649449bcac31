"""How a model is drawn with where something shows that it is not like the others."""

import json
from pathlib import Path

import pytest
import tiny

from maple_convert import convert, open_model
from maple_convert.recommend import recommended

PLAIN = {"rescale_zero_terminal_snr": False}


def of(name: str, unet=None, scheduler=PLAIN, **more):
    return recommended(Path(name), unet or {}, scheduler=scheduler, **more)


@pytest.mark.parametrize(
    ("name", "sampler", "steps"),
    [
        ("sdxl_lightning_4step.safetensors", "euler", 4),
        ("sdxl_lightning_8step_unet.safetensors", "euler", 8),
        ("juggernautXL_rdphtLightning.safetensors", "euler", 4),
        ("sd_xl_turbo_1.0_fp16.safetensors", "euler_a", 4),
        ("DreamShaperXL_Turbo_v2_1.safetensors", "euler_a", 4),
        ("Hyper-SDXL-8steps.safetensors", "ddim", 8),
        ("realisticVisionV60B1_v51HyperVAE.safetensors", "ddim", 8),
        ("DreamShaper8_LCM.safetensors", "lcm", 4),
    ],
)
def test_names_that_say_it(name, sampler, steps):
    settings, notes = of(name)
    assert settings == {
        "sampler": sampler,
        "schedule": "trailing",
        "steps": steps,
        "guidance_scale": 1.0,
    }
    assert len(notes) == 1 and "unless told otherwise" in notes[0] and sampler in notes[0]


@pytest.mark.parametrize(
    "name",
    ["v1-5-pruned.safetensors", "hyperrealism_v3.ckpt", "elcmodel.ckpt", "turbocharged.ckpt", "a"],
)
def test_names_that_only_sound_like_it(name):
    assert of(name) == ({}, [])


def test_a_repository_of_the_hubs_cache_goes_by_its_name(tmp_path):
    folder = tmp_path / "models--stabilityai--sd-turbo" / "snapshots" / "0a1b"
    folder.mkdir(parents=True)
    assert of(str(folder))[0]["sampler"] == "euler_a"


def test_tensors_and_schedulers_come_before_names():
    settings, notes = of("turbo.ckpt", {"time_cond_dim": 256})
    assert settings["sampler"] == "lcm" and settings["guidance_scale"] == 8.5
    assert "told its guidance" in notes[0]
    assert of("x", scheduler_class="LCMScheduler")[0]["sampler"] == "lcm"
    zero = {"rescale_zero_terminal_snr": True}
    assert of("x", scheduler=zero)[0] == {
        "sampler": "ddim",
        "schedule": "trailing",
        "guidance_rescale": 0.7,
    }


def test_what_is_recommended_stays_in_a_maple_folder(tmp_path):
    """Its own name says nothing any more."""
    tiny.save_safetensors(tmp_path / "a_lightning_2step.safetensors", tiny.compvis())
    convert(tmp_path / "a_lightning_2step.safetensors", tmp_path / "out")
    with open_model(tmp_path / "out") as model:
        assert model.defaults["steps"] == 2 and model.defaults["sampler"] == "euler"


def test_zero_terminal_snr_of_a_folder(tmp_path):
    tiny.save_safetensors(tmp_path / "a.safetensors", tiny.compvis())
    convert(tmp_path / "a.safetensors", tmp_path / "out", to="diffusers")
    path = tmp_path / "out" / "scheduler" / "scheduler_config.json"
    config = {**json.loads(path.read_text()), "rescale_betas_zero_snr": True}
    path.write_text(json.dumps({**config, "prediction_type": "v_prediction"}))
    convert(tmp_path / "out", tmp_path / "maple")
    with open_model(tmp_path / "maple") as model:
        assert model.defaults["guidance_rescale"] == 0.7
        assert model.scheduler["rescale_zero_terminal_snr"]
