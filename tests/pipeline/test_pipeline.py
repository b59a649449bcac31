"""Drawing with a tiny model of random weights: what the pipeline promises whatever the weights."""

import time
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mlx_maple import images
from mlx_maple.drawing.arguments import MASK_CONTENTS
from mlx_maple.drawing.autoencode import decode, encode
from mlx_maple.drawing.denoise import encode_prompts, guided_unet
from mlx_maple.drawing.starts import Outside
from mlx_maple.engine.compiled import GuidedSteps
from mlx_maple.engine.prepare import prepare_unet, prepare_vae
from mlx_maple.models import AutoencoderKL, UNet
from mlx_maple.pipeline import StableDiffusion, fit_latent_rgb_factors
from mlx_maple.sampling import SAMPLERS, make_plan
from mlx_maple.sampling.noise import NOISE_SOURCES, initial_noise, noise_generator


def picture(width: int = 128, height: int = 64) -> Image.Image:
    generator = np.random.default_rng(5)
    small = generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(small.repeat(8, 0).repeat(8, 1))


def right_half(width: int = 128, height: int = 64) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def same(a, b) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def weights(sd: StableDiffusion) -> list:
    parts = (sd.text_encoder, sd.unet, sd.vae)
    return [(name, w.dtype, w) for part in parts for name, w in tree_flatten(part.parameters())]


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the UNet's calls."""
    seen = []
    plain = UNet.__call__

    def spy(self, latents, timesteps, context, *more, **told):
        seen.append((latents.shape[0], context.shape[0]))
        return plain(self, latents, timesteps, context, *more, **told)

    monkeypatch.setattr(UNet, "__call__", spy)
    return seen


# What comes out ----------------------------------------------------------------------------------


def test_a_call_gives_pictures_latents_and_settings(sd, defaults):
    result = sd("a red maple leaf", seed=7)
    assert [image.size for image in result.images] == [(128, 64)]
    assert result.images[0].mode == "RGB"
    assert result.latents.shape == (1, 8, 16, 4) and result.latents.dtype == np.float32
    assert result.notes == []
    assert result.timings.keys() == {"text", "sample", "step", "decode", "total"}
    settings = result.settings[0]
    assert settings.prompt == "a red maple leaf" and settings.seed == 7
    for name, value in defaults.items():
        assert getattr(settings, name) == value
    assert (settings.noise, settings.clip_skip, settings.dtype) == ("torch", 1, "float32")
    assert (settings.model, settings.model_hash) == ("tiny", "0123456789")
    assert settings.version.startswith("mlx-maple ")


def test_progress_tells_every_step(sd):
    told = list(sd.generate("a", seed=1, image=picture(), strength=0.5))
    assert [(p.stage, p.index) for p in told] == [
        ("text", 0),
        ("encode", 0),
        ("sample", 1),
        ("sample", 2),
        ("sample", 3),
        ("decode", 3),
        ("done", 3),
    ]
    assert {p.total for p in told} == {3}
    assert [p.result is not None for p in told] == [False] * 6 + [True]
    assert [p.seconds_per_step > 0 for p in told] == [False] * 2 + [True] * 5
    assert told[-1].result.timings.keys() >= {"encode", "step"}


def test_the_callers_time_is_not_counted(sd):
    start = time.perf_counter()
    told = [(progress, time.sleep(0.1)) for progress in sd.generate("a", steps=2, width=64)]
    elapsed = time.perf_counter() - start
    assert told[-1][0].result.timings["total"] <= elapsed - 0.1 * (len(told) - 1)


def test_info(sd):
    info = sd.info
    assert (info.name, info.family, info.prediction) == ("tiny", "sd1", "epsilon")
    assert (info.width, info.height, info.notes) == (128, 64, ("a note",))
    assert info.components.keys() == {"text_encoder", "unet", "vae", "taesd"}
    assert info.parameters == sum(part.parameters for part in info.components.values())
    assert info.bytes == 4 * info.parameters
    assert info.components["unet"].dtype == "float32"


def test_the_parts_are_at_hand(sd):
    ids = sd.tokenize("a red maple leaf")
    assert [len(chunk) for chunk in ids] == [77]
    states = sd.text_encoder(mx.array(ids))
    out = sd.unet(mx.zeros((1, 8, 8, 4)), mx.array([3.0]), states.last)
    assert sd.vae.decode(out).shape == (1, 64, 64, 3)


def test_numpys_numbers_will_do(sd):
    given = {"seed": np.int64(3), "steps": np.int32(1), "count": np.int8(2), "width": np.uint16(64)}
    result = sd("a", guidance_scale=np.float32(2), **given)
    plain = sd("a", guidance_scale=2.0, seed=3, steps=1, count=2, width=64)
    assert result.settings == plain.settings and type(result.settings[0].seed) is int
    assert same(result.latents, plain.latents)


def test_unset_values_come_from_the_model_and_zero_is_a_value(sd):
    settings = sd("a", width=64, guidance_scale=0, seed=0).settings[0]
    assert (settings.width, settings.height, settings.seed) == (64, 64, 0)
    assert settings.guidance_scale == 0 and settings.sampler == "euler_a"


def test_another_sampler_takes_its_own_schedule(sd):
    usual = sd("a", sampler="ddim", steps=1, width=64).settings[0]
    assert usual.schedule == SAMPLERS["ddim"].schedules[0]
    named = sd("a", sampler="ddim", schedule="trailing", steps=1, width=64).settings[0]
    assert named.schedule == "trailing"
    assert sd("a", sampler="euler_a", steps=1, width=64).settings[0].schedule == "karras"


def test_a_seed_is_drawn_and_told(sd):
    first, second = sd("a", steps=1, width=64), sd("a", steps=1, width=64)
    assert first.settings[0].seed != second.settings[0].seed
    again = sd("a", steps=1, width=64, seed=first.settings[0].seed)
    assert same(again.latents, first.latents)


# Seeds and batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_picture_is_the_same_alone_and_in_a_batch(sd, sampler):
    together = sd("a cat", seed=40, count=3, sampler=sampler, steps=3, width=64)
    for i in range(3):
        alone = sd("a cat", seed=40 + i, sampler=sampler, steps=3, width=64)
        assert same(alone.latents[0], together.latents[i])
        assert same(alone.images[0], together.images[i])
        assert alone.settings[0] == together.settings[i]
    assert not same(together.latents[0], together.latents[1])


@pytest.mark.parametrize("more", [{"image": picture()}, {"image": picture(), "mask": right_half()}])
def test_so_it_is_from_a_picture(sd, more):
    arguments = {"steps": 3, "strength": 0.7, "noise": "nvidia", "ensd": 31337, **more}
    together = sd("a cat", seed=40, count=2, **arguments)
    for i in range(2):
        alone = sd("a cat", seed=40 + i, **arguments)
        assert same(alone.latents[0], together.latents[i])
        assert same(alone.images[0], together.images[i])


def test_a_variation_keeps_the_seed_and_counts_its_own(sd):
    arguments = {"seed": 3, "steps": 2, "width": 64, "variation_strength": 0.3}
    together = sd("a", variation_seed=50, count=2, **arguments)
    assert [(s.seed, s.variation_seed) for s in together.settings] == [(3, 50), (3, 51)]
    alone = sd("a", variation_seed=51, **arguments)
    assert same(alone.latents[0], together.latents[1])
    assert not same(together.latents[0], together.latents[1])


@pytest.mark.parametrize("noise", NOISE_SOURCES)
def test_every_source_of_noise(sd, noise):
    result = sd("a", seed=9, noise=noise, steps=2, width=64, sampler="euler")
    given = initial_noise(noise, 9, (8, 8, 4))[None]
    injected = sd("a", seed=1, latents=given, steps=2, width=64, sampler="euler")
    assert same(result.latents, injected.latents)
    assert result.settings[0].noise == noise
    assert injected.settings[0].injected == "latents"


def test_the_steps_noise_follows_the_starting_noise(sd):
    generator = noise_generator("torch", 9)
    generator.normal((8, 8, 4))
    draws = np.stack([generator.normal((8, 8, 4))[None] for _ in range(3)])
    arguments = {"seed": 9, "steps": 4, "width": 64}
    plain = sd("a", **arguments)
    assert same(plain.latents, sd("a", step_noise=draws, **arguments).latents)
    assert same(plain.latents, sd("a", step_noise=lambda i, shape: draws[i], **arguments).latents)
    as_mlx = sd("a", step_noise=mx.array(draws), **arguments)
    assert same(plain.latents, as_mlx.latents)
    assert as_mlx.settings[0].injected == "step_noise"
    assert not same(plain.latents, sd("a", step_noise=draws * 0, **arguments).latents)
    assert not same(plain.latents, sd("a", ensd=1, **arguments).latents)


@pytest.mark.parametrize(
    "more",
    [
        {"sampler": "dpmpp_sde", "noise": "nvidia", "ensd": 5},
        {"variation_seed": 4, "variation_strength": 0.2, "clip_skip": 2},
        {"sampler": "ddim", "eta": 0.5, "negative_prompt": "a dog"},
        {"sampler": "dpm2", "discard_penultimate": True},
        {"image": picture(), "strength": 0.6, "sample_posterior": True},
        {"image": picture(100, 60), "mask": right_half(50, 30), "fit": "crop", "mask_blur": 2},
    ],
)
def test_written_settings_draw_the_picture_again(sd, tmp_path, more):
    given = {name: more[name] for name in ("image", "mask") if name in more}
    result = sd("a cat", count=2, seed=5, steps=3, **more)
    for image, settings in zip(result.images, result.settings, strict=True):
        path = images.save_image(image, tmp_path / "a.png", settings)
        again = sd(**images.read_settings(path).settings.arguments(), **given)
        assert same(again.images[0], images.open_image(path))
        assert again.settings == [settings]


def test_settings_of_a_drawing_from_arrays_say_so(sd, tmp_path):
    result = sd("a", latents=np.zeros((1, 8, 8, 4)), width=64, steps=1)
    path = images.save_image(result.images[0], tmp_path / "a.png", result.settings[0])
    assert any("arrays" in note for note in images.read_settings(path).notes)


# Prompts and guidance ----------------------------------------------------------------------------


def test_guidance_1_runs_half_of_the_network(sd, calls):
    arguments = {"seed": 1, "steps": 2, "width": 64, "sampler": "euler"}
    sd("a", guidance_scale=1, **arguments)
    assert calls == [(1, 1)] * 2
    calls.clear()
    sd("a", guidance_scale=1.5, **arguments)
    assert calls == [(2, 2)] * 2


def test_guidance_is_a_line_through_both_predictions(sd):
    arguments = {"seed": 1, "steps": 1, "width": 64, "sampler": "euler"}
    wanted = sd("a cat", guidance_scale=1, **arguments).latents
    avoided = sd("a dog", guidance_scale=1, **arguments).latents
    both = sd("a cat", negative_prompt="a dog", guidance_scale=3, **arguments).latents
    assert np.abs(wanted - avoided).max() > 1e-4
    assert np.allclose(both, avoided + 3 * (wanted - avoided), rtol=0, atol=1e-4)
    none = sd("a cat", guidance_scale=0, negative_prompt="a dog", **arguments).latents
    assert np.allclose(none, avoided, rtol=0, atol=1e-5)


def test_an_empty_negative_prompt_is_encoded(sd):
    arguments = {"seed": 1, "steps": 1, "width": 64}
    assert same(sd("a", **arguments).latents, sd("a", negative_prompt="", **arguments).latents)
    assert not same(sd("a", **arguments).latents, sd("a", negative_prompt="b", **arguments).latents)


def test_clip_skip_reads_another_layer(sd):
    arguments = {"seed": 1, "steps": 1, "width": 64}
    drawn = [sd("a", clip_skip=k, **arguments).latents for k in (None, 1, 2, 3)]
    assert same(drawn[0], drawn[1])
    assert not same(drawn[1], drawn[2]) and not same(drawn[2], drawn[3])


def test_a_prompt_that_is_too_long_is_told(sd):
    long, arguments = "leaf " * 80, {"steps": 1, "width": 64, "syntax": "plain"}
    result = sd(long, negative_prompt=long, **arguments)
    assert result.notes == [
        "the prompt is too long; left out: leaf leaf leaf leaf leaf",
        "the negative prompt is too long; left out: leaf leaf leaf leaf leaf",
    ]
    assert sd(long, negative_prompt=long, guidance_scale=1, **arguments).notes[1:] == []
    note = sd("a\n" * 5000, **arguments).notes[0]
    assert note.endswith("…") and "\n" not in note and len(note) < 300


# From pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "schedule", "strength", "steps"),
    [("ddim", "leading", 0.5, 4), ("ddim", "leading", 0.05, 1), ("euler", "karras", 0.5, 5)],
)
def test_strength_takes_as_many_steps_as_its_reference(sd, sampler, schedule, strength, steps):
    arguments = {"sampler": sampler, "schedule": schedule, "steps": 8, "strength": strength}
    told = list(sd.generate("a", image=picture(), **arguments))
    assert told[-1].index == told[-1].total == steps
    assert told[-1].result.settings[0].steps == 8


def test_little_strength_keeps_the_latents(sd):
    clean = np.array(sd.vae.encode(mx.array(images.to_pixels(picture()))[None]).mean)
    arguments = {"image": picture(), "seed": 1, "steps": 20, "sampler": "ddim", "guidance_scale": 1}
    near, far = (sd("a", strength=s, **arguments).latents for s in (0.05, 1.0))
    assert np.abs(near - clean).max() < 0.5 < np.abs(far - clean).max()


def test_the_mean_unless_a_sample_is_asked_for(sd):
    arguments = {"image": picture(), "seed": 1, "steps": 3, "sampler": "ddim", "strength": 0.5}
    mean, sample = (sd("a", sample_posterior=s, **arguments) for s in (False, True))
    assert not same(mean.latents, sample.latents)
    # diffusers' order: the posterior's noise first, the starting noise second
    generator = noise_generator("torch", 1)
    posterior, start = (generator.normal((8, 16, 4))[None] for _ in range(2))
    moments = sd.vae.encode(mx.array(images.to_pixels(picture()))[None])
    std = np.exp(np.array(moments.logvar) / 2)
    plan = make_plan(sd.noise_schedule, "ddim", "leading", 3, strength=0.5)
    x = plan.initial(start, mx.array(np.array(moments.mean) + std * posterior))
    job = checked(sd, arguments)
    model = guided_unet(sd, job, encode_prompts(sd, job, []))
    for step in plan.sample(model, x):
        last = step.latents
    assert np.allclose(np.array(last), sample.latents, rtol=0, atol=1e-5)


def checked(sd, arguments):
    """The checked arguments inside a generator that has not begun."""
    return sd.generate("a", **arguments).gi_frame.f_locals["job"]


def test_an_image_brings_its_size(sd):
    result = sd("a", image=picture(136, 72), steps=1, strength=0.5)
    assert result.images[0].size == (136, 72) and result.notes == []
    result = sd("a", image=picture(1360, 720), steps=1, strength=0.5)
    assert result.images[0].size == (184, 96)
    assert result.notes == ["the image of 1360x720 is drawn at 184x96"]
    assert sd("a", image=picture(), width=64, steps=1).images[0].size == (64, 64)


def test_arrays_are_pictures_too(sd):
    arguments = {"steps": 2, "seed": 1, "strength": 0.5}
    drawn = sd("a", image=picture(), mask=right_half(), **arguments)
    array = sd("a", image=np.array(picture()), mask=np.array(right_half()), **arguments)
    assert same(drawn.images[0], array.images[0])


# Inpainting --------------------------------------------------------------------------------------


@pytest.mark.parametrize("blur", [0, 4])
@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpmpp_2m", "heun", "euler_a", "unipc"])
def test_outside_the_mask_nothing_changes(sd, sampler, blur):
    result = sd(
        "a", image=picture(), mask=right_half(), mask_blur=blur, sampler=sampler, steps=4, seed=1
    )
    kept = images.blurred(right_half(), blur) == 0
    assert same(np.asarray(result.images[0])[kept], np.asarray(picture())[kept])
    assert not same(result.images[0], picture())
    clean = np.array(sd.vae.encode(mx.array(images.to_pixels(picture()))[None]).mean)
    assert same(result.latents[:, :, :8], clean[:, :, :8])
    assert np.abs(result.latents - clean)[:, :, 8:].max() > 1e-3


def test_a_black_mask_gives_the_picture_back(sd):
    result = sd("a", image=picture(), mask=Image.new("L", (8, 8), 0), steps=2)
    assert same(result.images[0], picture())
    assert "nothing is redrawn" in result.notes[0]


def test_a_white_mask_at_full_strength_is_text_to_image(sd):
    white = Image.new("L", (128, 64), 255)
    arguments = {"seed": 3, "steps": 3, "sampler": "ddim"}
    result = sd("a", image=picture(), mask=white, strength=1, **arguments)
    assert same(result.latents, sd("a", **arguments).latents)
    assert same(result.images[0], sd("a", **arguments).images[0])


def test_the_picture_shows_through_in_every_step(sd):
    """The noised picture stands outside the mask after each step, with the starting noise."""
    arguments = {"image": picture(), "mask": right_half(), "mask_blur": 0, "strength": 0.75}
    arguments |= {"sampler": "ddim", "steps": 8, "seed": 1}
    job = checked(sd, arguments)
    noise = mx.array(initial_noise("torch", 1, (8, 16, 4))[None])
    clean = encode(sd, picture(), [])[0]
    inside = mx.array(images.latent_mask(job.mask, 8)) > 0
    outside = Outside(job.plan, inside, noise, clean)
    seen = []
    model = guided_unet(sd, job, encode_prompts(sd, job, []))
    for step in job.plan.sample(model, job.plan.initial(noise, clean)):
        blended = np.array(outside.kept(step))
        known = np.array(job.plan.noised(clean, noise, step.index))
        assert same(blended[:, :, :8], known[:, :, :8])
        assert same(blended[:, :, 8:], np.array(step.latents)[:, :, 8:])
        seen.append(np.abs(known - np.array(clean)).mean())
    assert seen == sorted(seen, reverse=True) and seen[-1] == 0 and len(seen) == 6


@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [("plms", "leading"), ("heun", "linspace"), ("dpm2", "karras"), ("dpmpp_sde", "karras")],
)
def test_the_network_sees_the_picture_in_every_call(sd, monkeypatch, sampler, schedule):
    """At the level of the timestep that it is told, whether a step begins there or not."""
    arguments = {"image": picture(), "mask": right_half(), "mask_blur": 0, "strength": 0.75}
    arguments |= {"sampler": sampler, "schedule": schedule, "steps": 6, "seed": 1}
    noise = initial_noise("torch", 1, (8, 16, 4))[None]
    clean = np.array(encode(sd, picture(), [])[0])
    errors = []

    def spy(self, latents, timesteps, context, *more):
        sigma = float(sd.noise_schedule.sigma_at(np.array(float(timesteps[0]))))
        known = (clean + sigma * noise) / np.sqrt(1 + sigma**2)
        errors.append(np.abs(np.array(latents)[:1] - known)[:, :, :8].max())
        return latents

    monkeypatch.setattr(UNet, "__call__", spy)
    told = list(sd.generate("a", **arguments))
    assert len(errors) > told[-1].total
    assert max(errors) < (0.02 if schedule == "linspace" else 1e-4)  # that one interpolates sigma


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_what_is_masked_can_begin_otherwise(sd, strength):
    """Outside nothing changes; from noise alone it does not matter what was inside."""
    arguments = {"image": picture(), "mask": right_half(), "mask_blur": 0, "seed": 1, "steps": 4}
    arguments |= {"strength": strength, "sampler": "ddim"}
    found = [sd("a", mask_content=c, **arguments) for c in MASK_CONTENTS]
    for content, result in zip(MASK_CONTENTS, found, strict=True):
        assert same(np.asarray(result.images[0])[:, :64], np.asarray(picture())[:, :64])
        assert result.settings[0].mask_content == content
    drawn = {np.array(result.images[0]).tobytes() for result in found}
    # The filled picture's latents differ a little outside too, where both stand in every step.
    assert len(drawn) == (4 if strength < 1 else 2)


def test_nothing_in_a_mask_begins_with_the_noise_of_its_level(sd):
    arguments = {"image": picture(), "mask": right_half(), "mask_blur": 0, "strength": 0.5}
    job = checked(sd, {**arguments, "mask_content": "nothing", "sampler": "ddim", "steps": 4})
    seen = []

    def spy(self, latents, timesteps, context, *more):
        seen.append(np.array(latents))
        return mx.zeros_like(latents)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet, "__call__", spy)
        sd("a", **arguments, mask_content="nothing", sampler="ddim", steps=4, seed=1)
    noise = mx.array(initial_noise("torch", 1, (8, 16, 4))[None])
    expected = np.array(job.plan.initial(noise, mx.zeros_like(noise)))
    assert np.allclose(seen[0][:1, :, 8:], expected[:, :, 8:], atol=1e-5)
    assert not np.allclose(seen[0][:1, :, :8], expected[:, :, :8], atol=1e-2)


def test_noise_in_a_mask_is_the_seeds_own_whatever_varies_the_start(sd, monkeypatch):
    """As in A1111: the seeds alone draw it, while the start is turned towards another noise."""
    arguments = {"image": picture(), "mask": right_half(), "mask_blur": 0, "strength": 0.5}
    arguments |= {"mask_content": "noise", "sampler": "ddim", "steps": 4, "guidance_scale": 1}
    job = checked(sd, arguments)
    seen = []

    def spy(self, latents, timesteps, context, *more):
        seen.append(np.array(latents))
        return mx.zeros_like(latents)

    monkeypatch.setattr(UNet, "__call__", spy)
    sd("a", **arguments, seed=1, count=2, variation_seed=9, variation_strength=0.4)
    own = initial_noise("torch", 1, (8, 16, 4))  # with a variation the seed stays in a batch
    for i in range(2):
        varied = initial_noise("torch", 1, (8, 16, 4), variation_seed=9 + i, variation_strength=0.4)
        expected, wrong = (
            np.array(job.plan.initial(mx.array(varied[None]), mx.array(inside[None])))
            for inside in (own, varied)
        )
        assert np.allclose(seen[i][:, :, 8:], expected[:, :, 8:], atol=1e-5)
        assert not np.allclose(seen[i][:, :, 8:], wrong[:, :, 8:], atol=1e-2)


@pytest.mark.parametrize("content", MASK_CONTENTS)
def test_what_is_not_kept_is_filled_before_it_is_encoded(sd, monkeypatch, content):
    """The encoder sees beyond the mask's edge, also where noise or nothing covers the inside."""
    encoded = []

    def spy(self, pixels):
        encoded.append(np.array(pixels))
        return plain(self, pixels)

    plain = AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", spy)
    arguments = {"image": picture(), "mask": right_half(), "mask_blur": 0, "seed": 1, "steps": 2}
    sd("a", mask_content=content, **arguments)
    kept = np.allclose(encoded[0][0], images.to_pixels(picture()), atol=1e-5)
    assert kept == (content == "original")
    assert np.allclose(encoded[0][0, :, :56], images.to_pixels(picture())[:, :56], atol=1e-5)


# Previews ----------------------------------------------------------------------------------------


def test_previews_are_full_size_pictures(sd):
    for kind in ("linear", "taesd", None):
        for progress in sd.generate("a", count=2, steps=2, preview=kind, seed=1):
            if progress.stage == "text":
                assert progress.preview() is None
            else:
                first, second = progress.preview(), progress.preview(1)
                assert first.size == second.size == (128, 64) and first.mode == "RGB"
                assert not same(first, second)
    assert progress.preview(1) is progress.result.images[1]


def test_a_linear_preview_uses_the_models_factors(build):
    factors = [[0.0, 0, 0]] * 4 + [[1.0, 0, 0]]
    model = build(latent_rgb_factors=factors)
    told = list(model.generate("a", steps=1, preview="linear", seed=1))
    assert told[1].preview().getcolors() == [(128 * 64, (255, 0, 0))]


def test_without_factors_they_are_fitted_to_the_drawing_now_and_then(sd, monkeypatch):
    plain, decoded = AutoencoderKL.decode, []

    def decode(self, latents):
        decoded.append(latents.shape[0])
        return plain(self, latents)

    monkeypatch.setattr(AutoencoderKL, "decode", decode)
    fits = []
    for progress in sd.generate("a", steps=9, sampler="euler", count=2, preview="linear", seed=1):
        before = len(decoded)
        for image in (0, 1):
            progress.preview(image)
        if len(decoded) > before:
            fits.append(progress.index)
    assert fits == [1, 2, 4, 8] and decoded == [1] * 4 + [1, 1]
    assert sd.latent_rgb_factors is None


def test_a_fitted_preview_has_the_pictures_colours(sd):
    for progress in sd.generate("a", steps=2, sampler="euler", preview="linear", seed=1):
        if progress.stage == "decode":
            preview = np.asarray(progress.preview(), float)
    drawn = np.asarray(progress.result.images[0], float)
    assert np.abs(drawn.mean((0, 1)) - preview.mean((0, 1))).max() < 3
    assert np.ptp(drawn.mean((0, 1))) > 20  # a grey preview would not do


def test_fitted_factors_are_always_the_same(sd):
    latents = sd("a", seed=3, steps=1).latents
    factors = fit_latent_rgb_factors(sd.vae, latents)
    assert np.shape(factors) == (5, 3)
    assert fit_latent_rgb_factors(sd.vae, latents) == factors


# What goes wrong ---------------------------------------------------------------------------------

BAD = [
    ({"prompt": 7}, "prompt must be text"),
    ({"prompt": None}, "prompt must be text"),
    ({"prompt": ["a", "b"]}, "prompt must be text"),
    ({"negative_prompt": 7}, "negative_prompt must be text"),
    ({"negative_prompt": None}, "negative_prompt None is for SDXL"),
    ({"original_size": (64, 64)}, "original_size is for SDXL"),
    ({"width": 100}, "width must be a multiple of 8"),
    ({"width": 56}, "width must be a whole number from 64 to 4,096"),
    ({"height": 4104}, "height must be a whole number"),
    ({"height": 64.0}, "height must be a whole number"),
    ({"steps": 0}, "steps must be a whole number from 1 to 1,000"),
    ({"steps": 2.5}, "steps must be a whole number"),
    ({"steps": True}, "steps must be a whole number"),
    ({"guidance_scale": float("nan")}, "guidance_scale must be a number"),
    ({"guidance_scale": "7"}, "guidance_scale must be a number"),
    ({"seed": 2**64}, "seed must be a whole number"),
    ({"seed": 2**64 - 1, "count": 2}, "seed must be a whole number"),
    ({"seed": 1.5}, "seed must be a whole number"),
    ({"count": 0}, "count must be a whole number from 1 to 256"),
    ({"count": 257}, "count must be"),
    ({"count": "2"}, "count must be"),
    ({"sampler": "k_fast"}, "unknown sampler 'k_fast': choose from ddim"),
    ({"schedule": "fancy"}, "unknown schedule 'fancy': choose from leading"),
    ({"sampler": "ddim", "schedule": "karras"}, "ddim has no 'karras'"),
    ({"sampler": "euler", "eta": 0.5}, "euler has no eta"),
    ({"eta": 2}, "eta must be a number from 0 to 1"),
    ({"sampler": "ddim", "discard_penultimate": True}, "no level to discard"),
    ({"noise": "dice"}, "unknown noise 'dice': choose from torch, nvidia, numpy, mlx"),
    ({"clip_skip": 0}, "clip_skip must be"),
    ({"clip_skip": 4}, "clip_skip must be from 1 to 3"),
    ({"image": "photo.png"}, "expected a PIL image"),
    ({"image": picture(), "strength": 1.5}, "strength must be a number from 0 to 1"),
    ({"image": picture(), "fit": "fill"}, "unknown fit 'fill': choose from stretch, crop"),
    ({"mask": right_half()}, "a mask needs the image"),
    ({"image": picture(), "mask": 3}, "expected a PIL image"),
    ({"image": picture(), "mask": right_half(), "mask_blur": -1}, "mask_blur must be"),
    ({"mask_content": "x"}, "unknown mask_content 'x': choose from original, fill"),
    ({"image": picture(), "sample_posterior": True, "ensd": 1}, "does not go with"),
    ({"variation_strength": 2}, "variation_strength must be"),
    ({"variation_strength": 0.5, "variation_seed": "x"}, "variation_seed must be"),
    ({"latents": np.zeros((1, 4, 8, 16))}, r"\(1, 8, 16, 4\), got \(1, 4, 8, 16\). It looks like"),
    ({"latents": np.zeros((2, 8, 16, 4))}, "latents must have the shape"),
    ({"latents": np.full((1, 8, 16, 4), np.nan)}, "latents must be finite"),
    ({"latents": "noise"}, "latents must be an array of numbers"),
    ({"step_noise": np.zeros((1, 1, 8, 16, 4))}, r"step_noise must have the shape \(3, 1, 8, 16"),
    ({"step_noise": 3}, "step_noise must have the shape"),
    ({"preview": "fancy"}, "unknown preview"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda value: str(value)[:50])
def test_bad_arguments_are_refused_at_once_in_one_line(sd, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        sd.generate(**{"prompt": "a", **arguments})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_preview_without_its_network(build):
    model = build()
    model.taesd = None
    with pytest.raises(ValueError, match="needs a TAESD"):
        model.generate("a", preview="taesd")
    assert next(model.generate("a")).stage == "text"


def test_step_noise_of_the_wrong_shape_ends_the_run(sd):
    with pytest.raises(ValueError, match="step_noise must have the shape"):
        sd("a", step_noise=lambda i, shape: np.zeros((1, 4, 8, 16)))


def test_closing_cancels_at_any_step_and_leaves_no_trace(sd, calls):
    arguments = {"image": picture(), "mask": right_half(), "seed": 1, "steps": 3, "count": 2}
    before = sd("a", **arguments)
    every = len(calls)
    kept = weights(sd)
    for stop in range(len(list(sd.generate("a", **arguments)))):
        calls.clear()
        drawing = sd.generate("a", **arguments)
        for _ in range(stop + 1):
            progress = next(drawing)
        drawing.close()
        assert len(calls) == every * progress.index // progress.total
        with pytest.raises(StopIteration):
            next(drawing)
    assert same(sd("a", **arguments).latents, before.latents)
    for (name, dtype, weight), (_, now_dtype, now) in zip(kept, weights(sd), strict=True):
        assert now is weight and now_dtype == dtype, name


def test_a_generator_that_is_dropped_is_no_matter(sd):
    drawing = sd.generate("a", steps=3)
    next(drawing)
    next(drawing)
    del drawing
    assert sd("a", steps=1).images


def test_an_error_in_a_step_comes_through(sd, monkeypatch):
    plain, count = UNet.__call__, []

    def breaks(self, *arguments):
        count.append(1)
        if len(count) == 3:
            raise RuntimeError("[metal] out of memory")
        return plain(self, *arguments)

    monkeypatch.setattr(UNet, "__call__", breaks)
    with pytest.raises(RuntimeError, match="out of memory"):
        sd("a", steps=4)
    monkeypatch.undo()
    assert sd("a", steps=1).notes == []


@pytest.fixture
def half(build) -> StableDiffusion:
    return build(dtype=mx.float16)


@pytest.mark.parametrize(("value", "word"), [(np.nan, "as NaN"), (-3.0, "black")])
def test_a_failed_decode_is_repeated_in_float32(half, monkeypatch, value, word):
    plain = AutoencoderKL.decode
    dtypes = []

    def decode(self, latents):
        dtypes.append(self.post_quant_conv.weight.dtype)
        pixels = plain(self, latents)
        return pixels * 0 + value if dtypes[-1] == mx.float16 else pixels

    monkeypatch.setattr(AutoencoderKL, "decode", decode)
    result = half("a", steps=1, seed=1, width=64)
    assert dtypes == [mx.float16, mx.float32]
    assert result.notes == [f"the picture was decoded {word} in float16: done in float32"]
    assert result.images[0].getbbox() is not None
    assert {dtype for _, dtype, _ in weights(half)} == {mx.float16}


def test_a_decode_that_fails_in_float32_too(sd, half, monkeypatch):
    def decode(self, latents):
        return mx.full((1, 64, 64, 3), -1.0)

    monkeypatch.setattr(AutoencoderKL, "decode", decode)
    assert sd("a", steps=1, width=64).notes == ["the picture was decoded black"]
    assert half("a", steps=1, width=64).notes == [
        "the picture was decoded black in float16: done in float32, and is black there too"
    ]


def test_latents_of_nan_are_told_and_not_decoded_again(sd, monkeypatch):
    def overflow(self, latents, timesteps, context, *more):
        return latents * np.nan

    monkeypatch.setattr(UNet, "__call__", overflow)
    result = sd("a", steps=1, width=64)
    assert len(result.notes) == 1 and "not finite" in result.notes[0]
    assert result.images[0].getbbox() is None


def test_a_failed_encode_is_repeated_in_float32(half, monkeypatch):
    plain = AutoencoderKL.encode

    def encode(self, pixels):
        moments = plain(self, pixels)
        if self.quant_conv.weight.dtype == mx.float16:
            moments = moments._replace(mean=moments.mean * np.nan)
        return moments

    monkeypatch.setattr(AutoencoderKL, "encode", encode)
    result = half("a", image=picture(), steps=2, seed=1)
    assert result.notes == ["encoding the image overflowed float16: done in float32"]
    assert np.isfinite(result.latents).all()
    assert {dtype for _, dtype, _ in weights(half)} == {mx.float16}


def test_an_autoencoder_waits_at_every_map_where_memory_is_bounded(build, monkeypatch):
    """Both halves, and only as long as it is."""
    sd = build()
    ready, waits = prepare_vae(sd.vae), []
    ready.encoder.in_stages = ready.decoder.in_stages = True
    sd.vae = ready
    evaluate = mx.eval
    for bound in (1 << 30, None):
        sd.max_memory = bound
        for half in (ready.encoder, ready.decoder):
            with monkeypatch.context() as patch:
                patch.setattr(mx, "eval", lambda *made: (waits.append(made), evaluate(*made))[1])
                if half is ready.encoder:
                    encode(sd, picture(64), [])
                else:
                    decode(sd, mx.zeros((1, 8, 8, 4)), [])
            assert len(waits) > len(half.steps) if bound else len(waits) == 1
            waits.clear()


# Half precision, and the way of a GPU ------------------------------------------------------------


def test_half_precision_draws_nearly_the_same(sd, half):
    arguments = {"seed": 2, "steps": 3, "sampler": "ddim", "guidance_scale": 2}
    rough, full = half("a", **arguments), sd("a", **arguments)
    assert rough.latents.dtype == np.float32
    assert rough.settings == [replace(full.settings[0], dtype="float16")]
    cosine = (rough.latents * full.latents).sum()
    cosine /= np.linalg.norm(rough.latents) * np.linalg.norm(full.latents)
    assert cosine > 0.999


@pytest.mark.parametrize("more", [{}, {"image": picture(), "mask": right_half()}])
def test_a_gpus_way_draws_the_same(sd, calls, monkeypatch, more):
    """In one batch and one step ahead; a batch is rounded differently, and no more than that."""
    arguments = {"seed": 2, "steps": 4, "count": 2, "sampler": "dpmpp_2m", **more}
    expected = sd("a", **arguments)
    one_by_one = list(calls)
    calls.clear()
    monkeypatch.setattr(StableDiffusion, "is_on_cpu", False)
    told = list(sd.generate("a", **arguments))
    assert set(one_by_one) == {(2, 2)} and set(calls) == {(4, 4)}
    assert len(one_by_one) == 2 * len(calls)
    steps = [progress for progress in told if progress.stage == "sample"]
    assert [step.index for step in steps] == list(range(1, told[-1].total + 1))
    assert np.allclose(told[-1].result.latents, expected.latents, rtol=0, atol=1e-4)
    previews = [np.asarray(step.preview()) for step in steps]
    assert not same(previews[0], previews[-1])


@pytest.mark.parametrize("one_by_one", [False, True], ids=["together", "in-turn"])
@pytest.mark.parametrize(
    "more",
    [
        {"sampler": "dpmpp_2m"},
        {"sampler": "heun", "guidance_scale": 1},  # and times between those of the plan
        {"image": picture(), "mask": right_half(), "sampler": "ddim"},
    ],
    ids=["guided", "unguided", "inpainting"],
)
def test_networks_made_ready_draw_the_same(build, more, one_by_one):
    arguments = {"seed": 2, "steps": 4, "count": 2, "negative_prompt": "b", **more}
    sd = build()
    expected = sd("a", **arguments)
    ready = prepare_unet(sd.unet)
    ready.steps = GuidedSteps(ready, compiles=False, one_by_one=one_by_one)
    sd.unet, sd.vae = ready, prepare_vae(sd.vae)
    result = sd("a", **arguments)
    assert np.allclose(result.latents, expected.latents, rtol=0, atol=1e-4)
    for one, other in zip(result.images, expected.images, strict=True):
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1
    ready.bias_out = ready.bias_out + 0.01  # the control
    assert not np.allclose(sd("a", **arguments).latents, expected.latents, rtol=0, atol=1e-3)


def test_a_gpu_is_one_step_ahead_and_can_be_cancelled(sd, calls, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "is_on_cpu", False)
    drawing = sd.generate("a", steps=4, sampler="euler")
    progress = [next(drawing) for _ in range(2)][-1]
    assert (progress.stage, progress.index, len(calls)) == ("sample", 1, 2)
    drawing.close()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("prompt", "more"),
    [
        ("a [leaf:snow:0.3]", {}),
        ("a leaf AND snow :0.5", {}),
        ("a (leaf:1.3)", {"guidance_rescale": 0.7}),
        ("leaf " * 80, {"guidance_end": 0.6, "window": 64}),
    ],
    ids=["changing", "and", "rescaled", "long, in windows"],
)
def test_networks_made_ready_read_prompts_the_same(build, prompt, more):
    arguments = {"seed": 2, "steps": 4, "sampler": "euler", "negative_prompt": "b", **more}
    sd = build()
    expected = sd(prompt, **arguments).latents
    ready = prepare_unet(sd.unet)
    ready.steps = GuidedSteps(ready, compiles=False)
    sd.unet = ready
    assert np.allclose(sd(prompt, **arguments).latents, expected, rtol=0, atol=1e-4)
    assert not np.allclose(sd("a", **arguments).latents, expected, rtol=0, atol=1e-3)
