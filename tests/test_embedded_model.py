"""The model that ships with the package draws what it is told, offline: text to pixels, judged.

Colours are read off the pixels; names by the judge, a classifier trained apart from the model. Each
of these fails if the text, the guidance, a sampler, a norm or the decoder breaks: the broken forms
below are the proof.
"""

import signal
import subprocess
import sys

import judge
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import mlx_maple as maple
from mlx_maple.models.layers import GroupNorm

STEPS = 10
WANTED = {  # prompt: the judge's name, object's hue, background
    "a blue maple leaf on a yellow background": ("maple leaf", (20, 90, 230), (255, 219, 51)),
    "an orange whale on a light blue background": ("whale", (255, 140, 20), (168, 217, 250)),
    "a green frog on a purple background": ("frog", (50, 180, 70), (128, 56, 191)),
    "a red rose on a black background": ("rose", (220, 30, 40), (10, 10, 13)),
    "a pink elephant on a green background": ("elephant", (240, 130, 190), (51, 171, 77)),
}


@pytest.fixture(scope="module")
def sd():
    return maple.load()


@pytest.fixture(scope="module")
def drawn(sd):
    return {prompt: sd(prompt, seed=i, steps=STEPS) for i, prompt in enumerate(WANTED)}


def pixels(result):
    return np.asarray(result.images[0], np.float32)


def border(picture):
    """Mean colour of the frame, four pixels wide."""
    inner = np.zeros(picture.shape[:2], bool)
    inner[4:-4, 4:-4] = True
    return picture[~inner].mean(axis=0)


def share_near(picture, colour, distance=90):
    return float((np.linalg.norm(picture - colour, axis=-1) < distance).mean())


def names_read(results):
    return sum(WANTED[prompt][0] in judge.best(r.images[0]) for prompt, r in results.items())


@pytest.mark.parametrize("prompt", WANTED)
def test_the_picture_shows_what_the_prompt_says(drawn, prompt):
    name, colour, background = WANTED[prompt]
    picture = pixels(drawn[prompt])
    assert name in judge.best(drawn[prompt].images[0])
    assert np.linalg.norm(border(picture) - background) < 45
    assert share_near(picture, colour) > 0.08


def test_the_judge_is_not_easily_pleased(drawn):
    flat = np.full((128, 128, 3), 128, np.uint8)
    noise = np.random.RandomState(0).randint(0, 255, (128, 128, 3)).astype(np.uint8)
    for nothing in (flat, noise):
        assert not {name for name, _, _ in WANTED.values()} & set(judge.best(nothing))


def test_without_the_text_nothing_wanted_is_drawn(sd, monkeypatch):
    encode = sd.text_encoder

    class Deaf:
        config = encode.config

        def __call__(self, ids, **options):
            states = encode(ids, **options)
            return states._replace(last=mx.zeros_like(states.last))

    monkeypatch.setattr(sd, "text_encoder", Deaf())
    assert names_read({p: sd(p, seed=i, steps=STEPS) for i, p in enumerate(WANTED)}) == 0


def test_the_negative_prompt_moves_colour_and_name_as_it_should(sd):
    def red(**settings):
        picture = pixels(sd("a maple leaf", seed=3, steps=STEPS, **settings))
        return share_near(picture, (230, 40, 60), 110)

    # An unnamed colour is the artwork's own, a red: away from it is less of it.
    assert red(negative_prompt="a red maple leaf") < red() - 0.05

    def score(name, prompt, seed, **settings):
        return judge.scores(sd(prompt, seed=seed, steps=6, **settings).images[0])[name]

    # The judge knows hearts by their colour. One drawn with nothing said of it is red.
    away = score("red heart", "a heart", 3, negative_prompt="a red heart")
    assert away < score("red heart", "a heart", 3) - 0.2


def test_guidance_moves_the_colour_towards_the_prompt(sd):
    """Colours that the artwork never has: the bare prediction hardly dares to use them."""

    def named(guidance_scale):
        asked = {"a red snail": ((220, 30, 40), 5), "a purple frog": ((128, 56, 191), 4)}
        return sum(
            share_near(pixels(sd(p, seed=seed, steps=6, guidance_scale=guidance_scale)), colour)
            for p, (colour, seed) in asked.items()
        )

    assert named(4) > named(1) + 0.05


def test_dropped_guidance_is_seen(sd):
    """The bare prediction is another picture: at guidance 1 the latents spread less."""
    guided = sd("a rocket", seed=1, steps=STEPS, guidance_scale=6)
    bare = sd("a rocket", seed=1, steps=STEPS, guidance_scale=1)
    assert guided.latents.std() > 1.02 * bare.latents.std()
    assert judge.scores(guided.images[0])["rocket"] > 0.5


def test_a_wrong_eps_is_seen_in_the_picture(sd, drawn):
    """Ten thousand times the norm's eps: small streams shrink, and the picture changes."""
    prompt = next(iter(WANTED))
    norms = [m for m in sd.unet.modules() if isinstance(m, GroupNorm)]
    kept = [norm.eps for norm in norms]
    try:
        for norm in norms:
            norm.eps *= 1e4
        broken = sd(prompt, seed=0, steps=STEPS)
    finally:
        for norm, eps in zip(norms, kept, strict=True):
            norm.eps = eps
    difference = np.abs(broken.latents - drawn[prompt].latents).mean()
    assert difference > 1e-2


def test_wrongly_scaled_latents_are_seen(sd, drawn):
    decoded = np.array(sd.vae.decode(mx.array(drawn[next(iter(WANTED))].latents) * 0.18215))
    picture = ((decoded[0] + 1) * 127.5).clip(0, 255)
    assert share_near(picture, WANTED[next(iter(WANTED))][1]) < 0.02


def test_strength_moves_the_picture_monotonically_from_the_input(sd, drawn):
    first = drawn["a red rose on a black background"].images[0]
    start = np.asarray(first, np.float32)
    moved = []
    for strength in (0.2, 0.5, 0.8):
        picture = pixels(sd("a blue whale", image=first, strength=strength, seed=5, steps=STEPS))
        moved.append(float(np.abs(picture - start).mean()))
    assert moved[0] < moved[1] < moved[2]


def test_inpainting_leaves_the_rest_alone(sd, drawn):
    first = drawn["a green frog on a purple background"].images[0]
    mask = np.zeros((128, 128, 3), np.uint8)
    mask[64:, :] = 255
    picture = pixels(
        sd("a pizza", image=first, mask=mask, mask_blur=2, strength=1.0, seed=5, steps=STEPS)
    )
    start = np.asarray(first, np.float32)
    assert np.array_equal(picture[:48], start[:48])
    assert np.abs(picture[72:] - start[72:]).mean() > 5


def test_a_seed_draws_the_same_alone_in_a_batch_and_again(sd):
    batch = sd("a snail", seed=20, count=2, steps=3)
    alone = sd("a snail", seed=21, steps=3)
    fresh = maple.load()("a snail", seed=21, steps=3)
    assert np.array_equal(batch.latents[1], alone.latents[0])
    assert np.array_equal(alone.latents, fresh.latents)
    assert batch.images[1].tobytes() == alone.images[0].tobytes()


def test_a_rerun_after_a_kill_draws_the_same_picture(sd, tmp_path):
    """The process dies in its steps, without a chance to clean up; the next one starts anew."""
    folder, expected = tmp_path / "out", sd("a snail", seed=21, steps=4).images[0]
    command = [sys.executable, "-m", "mlx_maple", "generate", "a snail", "--seed", "21", "-o"]
    command += [str(folder / "snail.png"), "--progress", "-m", "demo", "--dtype", "float32", "-s"]
    with subprocess.Popen([*command, "400"], stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith("drawing"):
                break
        process.kill()
    assert process.returncode == -signal.SIGKILL and not list(tmp_path.rglob("*.png"))
    done = subprocess.run([*command, "4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Image.open(folder / "snail.png").tobytes() == expected.tobytes()


@pytest.mark.parametrize("sampler", ["euler_a", "dpmpp_2m", "unipc", "heun"])
def test_other_samplers_draw_it_too(sd, sampler):
    result = sd("a blue maple leaf on a yellow background", seed=7, steps=8, sampler=sampler)
    assert "maple leaf" in judge.best(result.images[0])


def test_previews_look_like_the_picture(sd):
    prompt = "a blue maple leaf on a yellow background"
    *_, last, _decoding, done = sd.generate(prompt, seed=0, steps=STEPS)
    preview = np.asarray(last.preview().resize((16, 16)), np.float32).ravel()
    picture = np.asarray(done.result.images[0].resize((16, 16)), np.float32).ravel()
    assert np.corrcoef(preview, picture)[0, 1] > 0.9
