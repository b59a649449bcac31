"""A1111's text block and our JSON: written, read back, and refused where they cannot be true."""

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_maple import metadata
from mlx_maple.metadata import Settings, from_json, from_parameters, to_json, to_parameters
from mlx_maple.sampling import SAMPLERS, SCHEDULES, NoiseSchedule, make_plan
from mlx_maple.sampling.noise import NOISE_SOURCES

FULL = Settings(
    prompt="a cat, sitting\non a mat: (really)",
    negative_prompt="dog,\nblurry",
    width=512,
    height=768,
    steps=25,
    sampler="dpmpp_2m",
    schedule="karras",
    guidance_scale=7.5,
    seed=2**40,
    noise="torch",
    clip_skip=2,
    strength=0.6,
    fit="crop",
    mask_blur=4.0,
    mask_content="noise",
    variation_seed=9,
    variation_strength=0.25,
    ensd=31337,
    eta=0.5,
    discard_penultimate=True,
    model='odd, "name": one',
    model_hash="cc6cb27103",
    unet="other-unet",
    vae="other-vae",
    dtype="float16",
    version=metadata.program(),
)


def block(last: str, prompt: str = "a cat", negative: str = "") -> str:
    return "\n".join([prompt, *([f"Negative prompt: {negative}"] if negative else []), last])


def read(last: str, **more: str) -> Settings:
    return from_parameters(block(last, **more)).settings


# Writing and reading back ------------------------------------------------------------------------


def test_json_says_everything():
    assert from_json(to_json(FULL)).settings == FULL


def test_the_block_says_all_but_what_a1111_has_no_word_for():
    assert from_parameters(to_parameters(FULL)).settings == replace(FULL, fit=None, dtype="")


def test_the_block_is_written_as_a1111_writes_it():
    settings = Settings(
        prompt="a cat",
        negative_prompt="dog",
        width=512,
        height=512,
        steps=20,
        sampler="dpmpp_2m",
        schedule="karras",
        guidance_scale=7.0,
        seed=7,
        noise="nvidia",
        clip_skip=1,
        model="some-model",
        model_hash="0123456789",
        version="mlx-maple 1.2.3",
    )
    assert to_parameters(settings) == (
        "a cat\n"
        "Negative prompt: dog\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 7, "
        "Size: 512x512, Model hash: 0123456789, Model: some-model, RNG: NV, "
        "Version: mlx-maple 1.2.3"
    )


plain = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]))
drawn = st.builds(
    Settings,
    prompt=plain,
    negative_prompt=plain,
    width=st.integers(64, 4096),
    height=st.integers(64, 4096),
    steps=st.integers(1, 1000),
    sampler=st.sampled_from(sorted(SAMPLERS)),
    schedule=st.sampled_from(SCHEDULES),
    guidance_scale=st.floats(-100, 100, allow_subnormal=False),
    seed=st.integers(0, 2**64 - 1),
    noise=st.sampled_from(NOISE_SOURCES),
    clip_skip=st.none() | st.integers(2, 12),  # the last layer is not written, nor said
    model=plain,
    version=st.just(metadata.program()),
)


@given(drawn)
def test_any_settings_come_back_from_json(settings):
    assert from_json(to_json(settings)).settings == settings


@given(drawn)
def test_any_settings_come_back_from_the_block(settings):
    # The block cannot tell a prompt's outer spaces, or a prompt that looks like its own next line.
    one_line = " ".join(settings.prompt.split()).removeprefix("Negative prompt:").strip()
    negative = " ".join(settings.negative_prompt.split())
    negative = negative.removeprefix("Negative prompt:").strip()
    settings = replace(settings, prompt=one_line, negative_prompt=negative)
    assert from_parameters(to_parameters(settings)).settings == settings


@given(st.text())
def test_any_text_is_read_or_refused_in_one_line(text):
    for read_text in (from_parameters, from_json):
        try:
            read_text(text)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 200


@given(st.text(), st.sampled_from([*metadata._PLAIN, "Size", "Sampler", "RNG", "Hashes"]))
def test_any_value_is_read_or_refused_in_one_line(value, key):
    try:
        from_parameters(
            f"a cat\nSteps: 20, Sampler: Euler, Seed: 1, {key}: {value}, {key}: {value}"
        )
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 200


# A1111's words -----------------------------------------------------------------------------------


def test_every_sampler_and_schedule_of_ours_has_its_row():
    assert {row.ours for row in metadata._SAMPLERS} == set(SAMPLERS)
    assert set(metadata._SCHEDULES) == set(SCHEDULES)
    assert set(metadata._SCHEDULE_WORDS.values()) == set(SCHEDULES)
    assert set(metadata._NOISE.values()) <= set(NOISE_SOURCES)


@pytest.mark.parametrize("row", metadata._SAMPLERS, ids=lambda row: row.label)
def test_what_a_label_stands_for_can_be_drawn(row):
    for schedule in (row.automatic, row.earlier):
        make_plan(
            NoiseSchedule.from_betas(), row.ours, schedule, 20, discard_penultimate=row.discards
        )


@pytest.mark.parametrize(
    ("words", "sampler", "schedule"),
    [
        ("Sampler: Euler a", "euler_a", "uniform"),
        ("Sampler: euler a", "euler_a", "uniform"),
        ("Sampler: DPM++ 2M Karras", "dpmpp_2m", "karras"),
        ("Sampler: DPM++ 2M", "dpmpp_2m", "uniform"),
        ("Sampler: DPM++ 2M, Version: v1.6.0", "dpmpp_2m", "uniform"),
        ("Sampler: DPM++ 2M, Version: v1.9.4", "dpmpp_2m", "karras"),
        ("Sampler: DPM++ 2M, Version: v1.10.1", "dpmpp_2m", "karras"),
        ("Sampler: DPM++ 2M, Schedule type: Automatic", "dpmpp_2m", "karras"),
        ("Sampler: DPM++ 2M, Schedule type: Exponential", "dpmpp_2m", "exponential"),
        ("Sampler: DPM++ 2M Karras, Schedule type: Automatic", "dpmpp_2m", "karras"),
        ("Sampler: DPM++ 2M SDE Exponential", "dpmpp_2m_sde", "exponential"),
        ("Sampler: DPM++ 2M SDE Heun Karras", "dpmpp_2m_sde", "karras"),
        ("Sampler: DPM++ 3M SDE Karras", "dpmpp_3m_sde", "karras"),
        ("Sampler: DPM++ SDE Karras", "dpmpp_sde", "karras"),
        ("Sampler: DPM++ 2S a Karras", "dpmpp_2s_a", "karras"),
        ("Sampler: DPM2 a Karras", "dpm2_a", "karras"),
        ("Sampler: DPM2", "dpm2", "uniform"),
        ("Sampler: LMS Karras", "lms", "karras"),
        ("Sampler: Heun, Schedule type: Karras", "heun", "karras"),
        ("Sampler: DDIM", "ddim", "leading"),
        ("Sampler: DDIM, Schedule type: Automatic", "ddim", "leading"),
        ("Sampler: DDIM, Schedule type: Karras", "ddim", "leading"),
        ("Sampler: PLMS", "plms", "leading"),
        ("Sampler: UniPC", "unipc", "linspace"),
        ("Sampler: LCM", "lcm", "trailing"),
        ("Sampler: Euler, Schedule type: SGM Uniform", "euler", "sgm_uniform"),
        ("Sampler: Euler, Schedule type: Normal", "euler", "uniform"),
        ("Sampler: Euler, Schedule type: Align Your Steps", "euler", "ays"),
        ("Sampler: dpmpp_2m, Schedule type: karras", "dpmpp_2m", "karras"),
        ("Sampler: Euler, Schedule type: KL Optimal", "euler", None),
        ("Sampler: Restart", None, None),
    ],
)
def test_sampler_names_old_and_new(words, sampler, schedule):
    settings = read(f"Steps: 20, {words}, CFG scale: 7, Seed: 1")
    assert (settings.sampler, settings.schedule) == (sampler, schedule)


@pytest.mark.parametrize(
    ("words", "noise", "noted"),
    [
        ("Seed: 1", "nvidia", True),
        ("RNG: GPU", "nvidia", True),
        ("RNG: NV", "nvidia", False),
        ("RNG: CPU", "torch", False),
    ],
)
def test_whose_random_numbers(words, noise, noted):
    recipe = from_parameters(block(f"Steps: 20, Sampler: Euler, CFG scale: 7, {words}"))
    assert recipe.settings.noise == noise
    assert any("RNG" in note for note in recipe.notes) is noted


def test_a_block_of_the_oldest_kind():
    recipe = from_parameters("Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512")
    assert recipe.settings == Settings(
        width=512,
        height=512,
        steps=20,
        sampler="euler_a",
        schedule="uniform",
        guidance_scale=7.0,
        seed=1,
        noise="nvidia",
    )


def test_a_block_with_everything():
    text = (
        "masterpiece, a cat: best\r\nsecond line, with: colons\r\n"
        "Negative prompt: dog, (ugly),\r\nlowres\r\n"
        "Steps: 30, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7.5, Seed: 965400086, "
        'Size: 512x768, Model hash: 6ce0161689, Model: "a, b: c", VAE hash: 735e4c3a44, '
        "VAE: vae-ft-mse.safetensors, Variation seed: 42, Variation seed strength: 0.1, "
        "Denoising strength: 0.7, Clip skip: 2, ENSD: 31337, RNG: CPU, Mask blur: 8, Eta: 0.67, "
        'Lora hashes: "foo: 1a2b, bar: 3c4d", TI hashes: "easy: 5e6f", '
        'Hashes: {"vae": "735e, 4c", "model": "6ce0"}, Version: v1.10.1'
    )
    recipe = from_parameters(text)
    assert recipe.settings == Settings(
        prompt="masterpiece, a cat: best\nsecond line, with: colons",
        negative_prompt="dog, (ugly),\nlowres",
        width=512,
        height=768,
        steps=30,
        sampler="euler_a",
        schedule="uniform",
        guidance_scale=7.5,
        seed=965400086,
        noise="torch",
        clip_skip=2,
        strength=0.7,
        mask_blur=8.0,
        mask_content="original",
        variation_seed=42,
        variation_strength=0.1,
        ensd=31337,
        eta=0.67,
        model="a, b: c",
        model_hash="6ce0161689",
        vae="vae-ft-mse.safetensors",
        version="v1.10.1",
    )
    notes = "\n".join(recipe.notes)
    assert "Lora hashes, TI hashes" in notes  # named as not read, and nothing else is
    assert "Hashes" not in notes.replace("hashes", "")
    assert "a picture and a mask" in notes


def test_hires_fix_keeps_its_strength_to_itself():
    recipe = from_parameters(
        block(
            "Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Denoising strength: 0.5, "
            "Hires upscale: 2, Hires steps: 10, Hires upscaler: Latent"
        )
    )
    assert recipe.settings.strength is None and recipe.settings.hires_strength == 0.5
    assert not [note for note in recipe.notes if "not read" in note]


@pytest.mark.parametrize(
    ("pairs", "size"),
    [
        ("Size: 1024x768, First pass size: 512x384", (512, 384)),
        ("Size: 1024x768, First pass size: 0x0", (1024, 768)),
        ("Size: 512x384, Hires resize: 1024x768", (512, 384)),
    ],
)
def test_the_size_of_the_first_drawing(pairs, size):
    recipe = from_parameters(block(f"Steps: 20, Sampler: Euler, Seed: 1, {pairs}"))
    assert (recipe.settings.width, recipe.settings.height) == size
    assert [note for note in recipe.notes if "hires fix" in note]


def test_network_tags_stay_in_the_prompt():
    recipe = from_parameters(
        block("Steps: 20, Sampler: Euler, Seed: 1", prompt="a cat <lora:foo:0.8>, <hypernet:bar>x")
    )
    assert recipe.settings.prompt == "a cat <lora:foo:0.8>, <hypernet:bar>x"
    assert not any("foo" in note for note in recipe.notes)


def test_our_own_block_is_taken_at_its_word():
    prompt = "a <lora:foo:1> (cat:1.2)"
    settings = replace(FULL, prompt=prompt, sampler="ddim", schedule="karras", noise="mlx")
    recipe = from_parameters(to_parameters(settings))
    assert recipe.settings.prompt == prompt
    assert (recipe.settings.schedule, recipe.settings.noise) == ("karras", "mlx")


@pytest.mark.parametrize(
    ("last", "word"),
    [
        ("Sampler: DPM++ SDE Karras, Steps: 20, Seed: 1", "torchsde"),
        ("Sampler: UniPC, Steps: 20, Seed: 1", "another order"),
        ("Sampler: DDIM, Steps: 30, Seed: 1", "A1111 takes 31 times"),
        ("Sampler: Euler, Schedule type: Beta, Steps: 20, Seed: 1", "spaces sigmas"),
        ("Sampler: Nonesuch, Steps: 20, Seed: 1", "not known here"),
        ("Sampler: Euler, Schedule type: Turbo, Steps: 20, Seed: 1", "not known here"),
        ("Sampler: Euler, Steps: 20, ControlNet 0: something", "ControlNet 0"),
        ("Sampler: Euler, Steps: 20, RNG: Dice", "not known here"),
        ("Sampler: Euler, Steps: 20, Seed: 1, Version: v1.7.0", "float16"),
        ("Sampler: Euler, Steps: 20, Downcast alphas_cumprod: True, Version: v1.8.0", "float16"),
        ("Sampler: Euler, Steps: 20, Denoising strength: 0.5", "random sample"),
        ("Sampler: Euler, Steps: 20, Denoising strength: 0.5, Mask blur: 4", "into each step"),
    ],
)
def test_what_cannot_be_repeated_is_said(last, word):
    assert [note for note in from_parameters(block(last)).notes if word in note]


def test_what_can_be_repeated_is_not_commented_on():
    last = "Steps: 20, Sampler: DDIM, CFG scale: 7, Seed: 1, Size: 512x512, RNG: CPU, User: me"
    assert from_parameters(block(last)).notes == []
    assert from_parameters(block(f"{last}, Version: v1.8.0")).notes == []
    assert from_parameters(block(f"{last}, Version: f2.0.1v1.10.1")).notes == []


def test_a_line_after_the_settings_is_passed_over():
    text = block("Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 1") + "\nTemplate: a {cat|dog}"
    assert from_parameters(text).settings.seed == 1


def test_any_seed_is_no_seed():
    assert read("Steps: 20, Sampler: Euler, Seed: -1").seed is None


# Hostile texts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pair",
    [
        "Steps: 1e999",
        "Steps: 20.5",
        "Steps: -1",
        "Steps: " + "9" * 100_000,
        "Steps: ٢٠x",
        "CFG scale: nan",
        "CFG scale: inf",
        "CFG scale: 1e999",
        "CFG scale: 1_0",
        "Seed: 99999999999999999999999",
        "Seed: 0x10",
        "Size: 512",
        "Size: 99999999x1",
        "Size: 0x0",
        "Size: 512x512x512",
        "Clip skip: 0",
        "Variation seed strength: 2",
        "Denoising strength: -0.1",
        "Mask blur: 1e9",
    ],
)
def test_numbers_that_cannot_be_true(pair):
    with pytest.raises(ValueError, match="must be") as caught:
        from_parameters(f"a cat\n{pair}, Sampler: Euler, CFG scale: 7, ENSD: 0")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just a prompt",
        "a: b, c: d",
        "x" * 10_000_000,
        "a " * 500_000,
        "Steps: " * 150_000,
        "," * 1_000_000,
        " " * 1_000_000,
        '"' * 1_000_000,
        "a: " + '"\\' * 400_000,
        "[" * 1_000_000,
    ],
    ids=lambda text: repr(text[:20]),
)
def test_no_settings_in_it(text):
    with pytest.raises(ValueError, match=r"no settings|characters"):
        from_parameters(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"steps": "20"}',
        '{"steps": true}',
        '{"steps": 1e999}',
        '{"steps": NaN}',
        '{"guidance_scale": Infinity}',
        '{"steps": ' + "9" * 5000 + "}",
        '{"steps": ' + "9" * 4000 + "}",
        '{"prompt": 7}',
        '{"prompt": ["a"]}',
        '{"sample_posterior": 1}',
        " " * 2_000_000,
    ],
    ids=lambda text: repr(text[:24]),
)
def test_json_that_cannot_be_true(text):
    with pytest.raises(ValueError) as caught:
        from_json(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_settings_of_a_later_version_are_said():
    recipe = from_json(json.dumps({"steps": 9, "colour": "red"}))
    assert recipe.settings.steps == 9
    assert "colour" in recipe.notes[0]


def test_control_characters_do_not_reach_a_message():
    with pytest.raises(ValueError) as caught:
        from_parameters("a\nSteps: \x1b[31m, Sampler: Euler, Seed: 1")
    assert "\x1b" not in str(caught.value)


# What drawing takes ------------------------------------------------------------------------------


def test_arguments_are_those_of_generate():
    from inspect import signature

    from mlx_maple.pipeline import StableDiffusion

    taken = set(signature(StableDiffusion.generate).parameters)
    assert FULL.arguments().keys() <= taken
    facts = {"control", "injected", "model", "model_hash", "unet", "vae", "dtype", "bits"}
    facts |= {"version"}
    facts |= {"image_prompts"}  # say what was looked at, not the pictures
    facts |= {"zeroed_negative"}  # is said by a negative prompt of None
    assert {field.name for field in fields(Settings)} - facts <= taken


def test_what_was_not_said_is_no_argument():
    assert "steps" not in Settings(prompt="a").arguments()
    assert Settings(prompt="a", seed=0).arguments()["seed"] == 0


def test_a_number_is_checked_by_name():
    assert metadata.check_number("guidance_scale", 7) == 7.0
    for value in (float("nan"), True, "7", None, 101, [1]):
        with pytest.raises(ValueError, match="guidance_scale must be a number from -100 to 100"):
            metadata.check_number("guidance_scale", value)
