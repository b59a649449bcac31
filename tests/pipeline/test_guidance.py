"""Which prompt guides which call, and how predictions are put together."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_maple.conditioning import Conditioning, weighted
from mlx_maple.engine.compiled import GuidedSteps
from mlx_maple.engine.prepare import prepare_unet
from mlx_maple.guidance import Prompts, Wanted, guided_model
from mlx_maple.pipeline import StableDiffusion
from mlx_maple.text.editing import phases
from mlx_maple.text.prompt import encode_prompt

VALUES = {"n": 1.0, "a": 3.0, "b": 4.0, "c": 7.0}  # what the network says of each text


def prompts(*wanted, avoided="n", steps=4) -> Prompts:
    """Of texts, or of (weight, text)."""
    parts = [(1.0, each) if isinstance(each, str) else each for each in wanted]
    states = {text: Conditioning(context=mx.array(value)) for text, value in VALUES.items()}
    return Prompts(
        wanted=[Wanted(weight, phases(text, steps)) for weight, text in parts],
        avoided=None if avoided is None else phases(avoided, steps),
        states=states,
        truncated={},
    )


def outcomes(found: Prompts, scale: float = 2.0, calls: int = 4, **options):
    """The prediction of each call, and the pairs that a model was made for."""
    made = []

    def pair(positive, negative, guidance_scale):
        wanted = positive.context.item()
        avoided = wanted if negative is None else negative.context.item()
        made.append((wanted, None if negative is None else avoided, guidance_scale))
        value = avoided + guidance_scale * (wanted - avoided)
        return lambda latents, timestep: mx.full(latents.shape, value) * latents

    model = guided_model(found, pair, scale, calls, **options)
    latents = mx.ones((1, 2, 2, 4))
    return [model(latents, 1.0)[0, 0, 0, 0].item() for _ in range(calls)], made


def test_one_prompt_takes_one_model():
    assert outcomes(prompts("a")) == ([5.0] * 4, [(3.0, 1.0, 2.0)])


def test_without_a_negative_prompt_nothing_is_added():
    assert outcomes(prompts("a", avoided=None), 1.0) == ([3.0] * 4, [(3.0, None, 1.0)])


def test_a_changing_prompt_makes_each_model_once():
    values, made = outcomes(prompts("[a|b]"))
    assert values == [5.0, 5.0, 7.0, 5.0]  # the very first call does not count
    assert made == [(3.0, 1.0, 2.0), (4.0, 1.0, 2.0)]
    assert outcomes(prompts("a", avoided="[n:b:2]"))[0] == [5.0, 5.0, 5.0, 2.0]


def test_prompts_joined_by_and_add_up():
    weighed = 1 + 2 * (0.5 * (3 - 1) + 2.0 * (4 - 1))
    values, made = outcomes(prompts((0.5, "a"), (2.0, "b")))
    assert values == [weighed] * 4
    assert made == [(1.0, None, 1.0), (3.0, None, 1.0), (4.0, None, 1.0)]
    assert outcomes(prompts((1.0, "a"), (-1.0, "b")))[0] == [1 + 2 * (2 - 3)] * 4
    assert outcomes(prompts((1.0, "[a:c:2]"), (1.0, "b")))[0] == [11.0] * 3 + [19.0]


def test_guidance_in_a_part_of_the_way():
    values, _ = outcomes(prompts("a"), interval=(0.25, 0.75))
    assert values == [3.0, 5.0, 5.0, 3.0]
    assert outcomes(prompts("a"), interval=(0.5, 1.0))[0] == [3.0, 3.0, 5.0, 5.0]
    both = prompts((1.0, "a"), (1.0, "b"))
    assert outcomes(both, interval=(0.5, 1.0))[0] == [6.0, 6.0, 11.0, 11.0]


def test_rescaled_guidance_has_the_spread_of_the_prompts_own():
    def pair(positive, negative, scale):
        assert negative is None
        return lambda latents, timestep: positive.context * latents

    x = mx.array(np.random.default_rng(0).normal(size=(2, 4, 4, 4)), mx.float32)
    found = {
        share: guided_model(prompts("a"), pair, 2.0, 1, guidance_rescale=share)(x, 1.0)
        for share in (0.5, 1.0)
    }
    assert np.allclose(np.array(found[1.0]), 3 * np.array(x), atol=1e-5)
    assert np.allclose(np.array(found[0.5]), 4 * np.array(x), atol=1e-5)


# In the pipeline ---------------------------------------------------------------------------------

SMALL = {"seed": 1, "steps": 3, "width": 64}


def drawn(sd, prompt, **arguments):
    return sd(prompt, **{**SMALL, **arguments}).latents


@pytest.fixture(scope="module")
def leaf(sd):
    return drawn(sd, "a leaf")


def test_a_prompt_without_signs_is_the_same_in_both_syntaxes(sd, leaf):
    assert np.array_equal(leaf, drawn(sd, "a leaf", syntax="plain"))


@pytest.mark.parametrize(
    "text", ["[a leaf:snow:9]", "[snow:a leaf:-1]", "(a leaf:1.0)", "a leaf BREAK"]
)
def test_what_changes_nothing_changes_nothing(sd, leaf, text):
    assert np.array_equal(leaf, drawn(sd, text))


@pytest.mark.parametrize(
    "text", ["a (leaf:1.5)", "[a leaf:snow:1]", "a BREAK leaf", "a leaf AND snow", "leaf " * 80]
)
def test_what_changes_something_does(sd, leaf, text):
    assert not np.array_equal(leaf, drawn(sd, text))
    assert not np.array_equal(drawn(sd, text), drawn(sd, text, syntax="plain"))


def test_emphasis_with_and_without_the_mean(sd, leaf, monkeypatch):
    seen = []

    def spy(states, weights, *, keeps_mean):
        seen.append(keeps_mean)
        return weighted(states, weights, keeps_mean=keeps_mean)

    monkeypatch.setattr("mlx_maple.conditioning.weighted", spy)
    for emphasis in ("original", "no norm"):
        assert np.array_equal(leaf, drawn(sd, "a leaf", emphasis=emphasis))
    assert seen == [True, True, False, False]
    with pytest.raises(ValueError, match="unknown emphasis 'none': choose from original, no norm"):
        sd("a", emphasis="none")


def test_weights_multiply_states_and_keep_the_mean():
    states = mx.array(np.random.default_rng(0).normal(1, 1, (1, 4, 3)).astype(np.float32))
    weights = [[1.0, 2.0, 1.0, 0.5]]
    free = np.array(states) * np.array(weights)[..., None]
    assert np.allclose(np.array(weighted(states, weights, keeps_mean=False)), free)
    kept = np.array(weighted(states, weights))
    assert np.allclose(kept, free * np.array(states).mean() / free.mean(), atol=1e-6)
    assert weighted(states, [[1.0] * 4]) is states


def test_a_second_prompt_of_no_weight_is_not_there(sd, leaf):
    assert np.allclose(leaf, drawn(sd, "a leaf AND snow :0"), atol=1e-3)
    assert not np.allclose(leaf, drawn(sd, "a leaf AND snow :0.1"), atol=1e-3)


def test_the_negative_prompt_is_as_long_as_the_prompt(sd):
    lengths = []
    plain = type(sd.unet).__call__

    def spy(self, latents, timesteps, context, *more, **others):
        lengths.append(context.shape[:2])
        return plain(self, latents, timesteps, context, *more, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(sd.unet), "__call__", spy)
        drawn(sd, "leaf " * 80, steps=1)
        drawn(sd, "leaf", negative_prompt="snow " * 160, steps=1)
    assert lengths == [(2, 154), (2, 231)]


def test_a_prompt_that_cannot_be_read_is_refused_before_the_work(sd):
    with pytest.raises(ValueError, match="1000 is the most"):
        sd.generate("(a:5000)", **SMALL)
    with pytest.raises(ValueError, match="at most 9,600 tokens"):
        sd.generate("a", negative_prompt="leaf " * 10_000, **SMALL)
    with pytest.raises(ValueError, match="unknown syntax 'comfy'"):
        sd.generate("a", syntax="comfy")


def test_the_settings_say_how_it_was_read(sd):
    assert sd("a", **SMALL).settings[0].syntax == "a1111"
    assert sd("a", syntax="plain", **SMALL).settings[0].syntax == "plain"


def test_tokens_of_a_long_prompt(sd):
    assert len(sd.tokenize("leaf " * 80)) == 2
    assert len(sd.tokenize("leaf " * 80, syntax="plain")) == 1


def test_guidance_switches_in_a_drawing(sd, leaf):
    assert np.array_equal(leaf, drawn(sd, "a leaf", guidance_rescale=0, guidance_end=1.0))
    rescaled = drawn(sd, "a leaf", guidance_rescale=0.7)
    unguided = drawn(sd, "a leaf", guidance_scale=1)
    assert not np.allclose(leaf, rescaled, atol=1e-3)
    assert np.array_equal(drawn(sd, "a leaf", guidance_start=0, guidance_end=0), unguided)
    partly = drawn(sd, "a leaf", guidance_start=0.3, guidance_end=0.7)
    assert not np.array_equal(partly, unguided) and not np.array_equal(partly, leaf)
    with pytest.raises(ValueError, match="lies after guidance_end"):
        sd("a", guidance_start=0.8, guidance_end=0.5)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_gpu_rescales_within_its_guided_step(build, monkeypatch, one_by_one):
    arguments = {"guidance_rescale": 0.7, "count": 2, "sampler": "euler", "steps": 2}
    windows = {"width": 128, "height": 64, "window": 64}  # whose spreads are not the picture's
    sd, batches = build(), []
    expected = [drawn(sd, "a leaf", **arguments, **more) for more in ({}, windows)]
    ready = prepare_unet(sd.unet)
    ready.steps = GuidedSteps(ready, compiles=False, one_by_one=one_by_one)
    begin = ready.begin
    ready.begin = lambda x, *given: (batches.append(x.shape[0]), begin(x, *given))[1]
    sd.unet = ready
    monkeypatch.setattr(StableDiffusion, "is_on_cpu", False)
    for more, latents in zip(({}, windows), expected, strict=True):
        found = drawn(sd, "a leaf", **arguments, **more)
        assert np.allclose(found, latents, rtol=0, atol=1e-3)
        if not more:
            assert batches == ([2] * 4 if one_by_one else [4] * 2)
    without = drawn(sd, "a leaf", **{**arguments, "guidance_rescale": 0.0})
    assert not np.allclose(without, expected[0], rtol=0, atol=1e-2)  # the control


def test_a_closed_picture_is_the_same_wherever_its_edge_is(sd):
    """The starting noise rolled, and the picture comes out rolled; with edges it does not."""
    noise = np.random.default_rng(2).normal(size=(1, 8, 16, 4)).astype(np.float32)
    arguments = {"seed": 1, "steps": 2, "sampler": "euler", "schedule": "linspace"}

    def pixels(latents, tile):
        result = sd("a leaf", latents=latents, tile=tile, **arguments)
        assert result.settings[0].tile == tile
        return np.asarray(result.images[0], np.float32)

    rolled = np.roll(noise, 4, axis=2)
    for tile, most in (("x", 1), ("xy", 1)):
        difference = np.roll(pixels(noise, tile), 32, axis=1) - pixels(rolled, tile)
        assert np.abs(difference).max() <= most
    for tile in (None, "y"):
        difference = np.roll(pixels(noise, tile), 32, axis=1) - pixels(rolled, tile)
        assert np.abs(difference).max() > 8
    with pytest.raises(ValueError, match="unknown tile 'z': choose from x, y, xy"):
        sd("a", tile="z")


def test_after_a_closed_picture_the_model_is_what_it_was(sd, leaf):
    sd("a", tile="xy", **SMALL)
    assert np.array_equal(leaf, drawn(sd, "a leaf"))
    stopped = sd.generate("a", tile="xy", **SMALL)
    next(stopped)
    next(stopped)
    stopped.close()
    assert np.array_equal(leaf, drawn(sd, "a leaf"))


def test_freeu_in_a_drawing(sd, leaf):
    changed = sd("a leaf", freeu=(1.5, 1.6, 0.9, 0.2), **SMALL)
    assert not np.allclose(changed.latents, leaf, atol=1e-3)
    assert changed.settings[0].freeu == "1.5 1.6 0.9 0.2"
    again = sd(**changed.settings[0].arguments())
    assert np.array_equal(again.latents, changed.latents)
    assert np.array_equal(leaf, drawn(sd, "a leaf"))
    for wrong in ((1, 2, 3), "1 2 3 x", 5, (1, 1, 1, 99)):
        with pytest.raises(ValueError, match="freeu"):
            sd("a", freeu=wrong)


def test_windows_in_a_drawing(sd):
    """Small enough it is one window, and the picture the same; larger it is several."""
    arguments = {"seed": 1, "steps": 2, "width": 128, "height": 64}
    whole = sd("a leaf", **arguments).latents
    assert np.array_equal(whole, sd("a leaf", window=128, **arguments).latents)
    result = sd("a leaf AND snow", window=64, window_overlap=0.25, **arguments)
    assert result.latents.shape == whole.shape and not np.array_equal(whole, result.latents)
    assert (result.settings[0].window, result.settings[0].window_overlap) == (64, 0.25)
    for wrong, words in (({"window": 65}, "multiple of 8"), ({"window_overlap": 1}, "overlap")):
        with pytest.raises(ValueError, match=words):
            sd("a", **{"window": 64, **wrong})
    with pytest.raises(ValueError, match="neither a ControlNet nor tile"):
        sd("a", window=64, tile="x")


def test_tags_that_change_nothing_are_told(sd, leaf):
    result = sd("a leaf<hypernet:x:1>", negative_prompt="<lora:y:1>", **SMALL)
    assert np.array_equal(result.latents, leaf)
    assert result.notes == [
        "<hypernet:x> is left out: there are only LoRAs here",
        "<lora:y> is left out of the negative prompt: it belongs into the prompt",
    ]
    with pytest.raises(ValueError, match="takes no LoRAs"):
        sd("a leaf <lora:x:1>", **SMALL)


def test_texts_that_are_encoded_together_are_those_encoded_alone(sd):
    encoders = sd.text_encoders
    texts = ["a (red:1.3) leaf", "", "leaf " * 100]
    tokenizer = next(iter(encoders.tokenizers.values()))
    read = [encode_prompt(tokenizer, text, syntax="a1111") for text in texts]
    ids, weights = [[each.ids] for each in read], [each.weights for each in read]
    together = encoders.encode_all(ids, weights, together=True)
    assert [each.context.shape[1] for each in together] == [77, 77, 154]
    alone = [encoders.encode(*pair) for pair in zip(ids, weights, strict=True)]
    for both, one in zip(together, alone, strict=True):
        assert np.allclose(both.context, one.context, atol=1e-5)
    plain = encoders.encode(ids[0], None).context
    assert not np.allclose(plain, alone[0].context, atol=1e-3)  # the control
