"""The layouts against diffusers and transformers themselves: names, values, and drawn latents."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from maple_convert import convert, open_model
from maple_convert.layouts import LAYOUTS, diffusers_config
from maple_convert.open_file import complete
from mlx_maple.cli import main as maple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "convert"))
import tiny

pytestmark = [
    pytest.mark.parity,
    # diffusers 0.42.1 calls deprecated parts of itself, of torch and of numpy
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

PROMPT = "a red maple leaf on a white background"
STEPS, GUIDANCE = 20, 5.0


# Names and shapes


def rows(name, config, spelling):
    return {row.published: row.published_shape for row in LAYOUTS[name].rows(config, spelling)}


def shapes(module):
    found = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    return {key: shape for key, shape in found.items() if not key.endswith("position_ids")}


def plain(name, **changes):
    found = {**LAYOUTS[name].published_config, **changes}
    return complete(name, {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()})


UNETS = [
    {},
    {"block_out_channels": [64, 128, 64, 64], "cross_attention_dim": 128},
    {"block_out_channels": [32, 64], "transformer_layers": [0, 2], "mid_transformer_layers": 2},
    {"block_out_channels": [32, 64, 32], "transformer_layers": [1, 1, 0], "layers_per_block": 3},
]
VAES = [{}, {"block_out_channels": [32, 64, 96, 64]}, {"block_out_channels": [32, 64]}]


@pytest.mark.parametrize("changes", UNETS)
def test_unet_names_and_shapes(changes):
    """The module is built from the config.json that we write, which proves that, too."""
    config = plain("unet", **changes)
    with torch.device("meta"):
        module = UNet2DConditionModel.from_config(diffusers_config.write("unet", config, 512))
    assert rows("unet", config, "diffusers") == shapes(module)


@pytest.mark.parametrize("changes", VAES)
def test_vae_names_and_shapes(changes):
    config = plain("vae", **changes)
    with torch.device("meta"):
        module = AutoencoderKL.from_config(diffusers_config.write("vae", config, 512))
    assert rows("vae", config, "diffusers") == shapes(module)


def test_taesd_names_and_shapes():
    config = plain("taesd")
    with torch.device("meta"):
        module = AutoencoderTiny.from_config(diffusers_config.write("taesd", config, 512))
    assert rows("taesd", config, "diffusers") == shapes(module)


@pytest.mark.parametrize("projection", [None, 24])
def test_text_encoder_names_and_shapes(projection):
    config = plain("text_encoder", projection_dim=projection)
    written = CLIPTextConfig(**diffusers_config.write("text_encoder", config, 512))
    kind = CLIPTextModel if projection is None else CLIPTextModelWithProjection
    with torch.device("meta"):
        module = kind(written)
    spelling = "transformers_flat" if projection is None else "transformers"
    assert rows("text_encoder", config, spelling) == shapes(module)


# Values, against diffusers' own conversion of CompVis files


@pytest.mark.parametrize("component", ["unet", "vae"])
def test_values_as_diffusers_converts_them(component):
    config = tiny.CONFIGS[component]
    native = tiny.arrays(component, config)
    prefix = tiny.COMPVIS[component][1]
    state = tiny.published(component, config, native, "compvis", prefix)
    state = {key: torch.from_numpy(value) for key, value in state.items()}
    written = diffusers_config.write(component, config, 64)
    convert_ldm = {"unet": convert_ldm_unet_checkpoint, "vae": convert_ldm_vae_checkpoint}
    theirs = convert_ldm[component](state, config=written)
    ours = tiny.published(component, config, native, "diffusers")
    assert theirs.keys() == ours.keys()
    for key, value in theirs.items():
        assert np.array_equal(value.numpy(), ours[key]), key


# Latents


def draw(pipeline, noise):
    pipeline.set_progress_bar_config(disable=True)
    scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="leading", steps_offset=1
    )
    pipeline.scheduler = scheduler
    with torch.no_grad():
        return pipeline(
            PROMPT,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            latents=noise.clone(),
            output_type="latent",
        ).images.numpy()


def load(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, torch_dtype=torch.float32, local_files_only=True
    )
    return pipeline


@pytest.fixture(scope="module")
def noise():
    return torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def original(trial, noise):
    return draw(load(trial / "diffusers"), noise)


@pytest.fixture(scope="module")
def trial(weights):
    return weights / "emoji-trial"


@pytest.mark.weights
def test_diffusers_draws_the_same_from_our_folder(trial, tmp_path, noise, original, parity_record):
    source = trial / "diffusers"
    convert(source, tmp_path / "maple")
    convert(tmp_path / "maple", tmp_path / "diffusers", to="diffusers")
    latents = draw(load(tmp_path / "diffusers"), noise)
    error = float(np.abs(latents - original).max())
    parity_record("diffusers on our folder (emoji-trial), 20 steps", max_error=error, bar="equal")
    assert error == 0
    # Negative control: one transform broken, in the written file.
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "diffusers", broken)
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight"
    state[key] = np.ascontiguousarray(state[key].T)  # square: no shape would tell
    save_file(state, file)
    wrong = float(np.abs(draw(load(broken), noise) - original).max())
    parity_record("  one square matrix left transposed", max_error=wrong, bar="> 0.01")
    assert wrong > 0.01


@pytest.mark.weights
def test_diffusers_draws_the_same_from_our_compvis_file(
    trial, tmp_path, noise, original, parity_record
):
    source = trial / "diffusers"
    file = tmp_path / "model.safetensors"
    convert(source, file, to="compvis")
    pipeline = StableDiffusionPipeline.from_single_file(
        str(file),
        config=str(source),
        safety_checker=None,
        torch_dtype=torch.float32,
        local_files_only=True,
    )
    error = float(np.abs(draw(pipeline, noise) - original).max())
    parity_record("diffusers on our CompVis file (emoji-trial)", max_error=error, bar="equal")
    assert error == 0


@pytest.mark.weights
def test_diffusers_draws_from_the_ckpt_by_way_of_maple_convert(
    trial, tmp_path, noise, original, parity_record
):
    """The .ckpt has CLIP's whole vocabulary, which ``maple convert`` brings for the folder.

    Its twin, the published folder, has a pruned one; the prompt's words are in both.
    """
    source = trial / "emoji-trial.ckpt"
    assert maple(["convert", str(source), str(tmp_path / "folder"), "--to", "diffusers"]) == 0
    pipeline = load(tmp_path / "folder")
    assert pipeline.tokenizer("a maple leaf").input_ids[-1] == 49407
    latents = draw(pipeline, noise)
    with open_model(source) as model:
        state = {
            key: torch.from_numpy(tensor.array).float()
            for key, tensor in model.components["text_encoder"].tensors()
        }
    # The same arrays put into transformers' module by hand: the folder changed nothing.
    found = pipeline.text_encoder.state_dict()
    assert {key.removeprefix("text_model.") for key in found} == set(state)
    for key, value in found.items():
        assert torch.equal(value, state[key.removeprefix("text_model.")]), key
    error = float(np.abs(latents - original).max())
    parity_record("diffusers on a folder from the .ckpt", max_error=error, bar="<= 1e-4")
    assert error <= 1e-4
