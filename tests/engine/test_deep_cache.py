"""DeepCache in networks that are made ready, compiled or not, is that of the plain ones."""

import mlx.core as mx
import pytest
from tiny_networks import CONTEXT, SMALL, XL, error, normal, unet

from mlx_maple.engine.compiled import GuidedSteps
from mlx_maple.engine.deep_cache import CachedCalls, DeepCache, cached_step, keeping
from mlx_maple.engine.kernels import Plain
from mlx_maple.engine.prepare import Recipe, prepare_unet
from mlx_maple.sampling.denoiser import guided

RECIPE = Recipe("cpu", Plain())
SAME, OTHER = 1e-4, 1e-2
TIMES = [801.0, 600.0, 400.5, 13.0]
INTERVAL = 3


pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def plain():
    return unet(**SMALL)


@pytest.fixture(scope="module")
def ready(plain):
    return prepare_unet(plain, RECIPE)


def latents(call: int) -> mx.array:
    return normal(2, 9, 7, 4, seed=20 + call)


def prompts():
    return (normal(2, 9, CONTEXT, seed=seed) for seed in (5, 6))


def expected(plain, cache, **options):
    """What the plain network says in each call, by the definition: features of call 0 and 3."""
    positive, negative = prompts()
    calls = CachedCalls(cache, lambda: plain)
    model = guided(calls, positive, negative, 7.5, mx.float32, **options)
    found = []
    for call, time in enumerate(TIMES):
        calls.begin()
        found.append(model(latents(call), time))
    return found


@pytest.mark.parametrize(
    ("branch", "compiles", "told"),
    [(0, True, {}), (1, False, {"guidance_rescale": 0.7}), (3, True, {"guidance_rescale": 0.7})],
)
def test_steps_are_those_of_the_plain_network(plain, ready, branch, compiles, told):
    cache = DeepCache(INTERVAL, branch)
    positive, negative = prompts()
    wanted = expected(plain, cache, **told)
    without = guided(plain, positive, negative, 7.5, mx.float32, **told)
    for options in ({}, {"in_parts": False}, {"one_by_one": True}):
        steps = GuidedSteps(ready, compiles=compiles, **options)
        step = cached_step(steps, cache)
        model = steps.model(positive, negative, 7.5, TIMES, step=step, **told)
        for call, time in enumerate(TIMES):
            found = model(latents(call), time)
            assert error(found, wanted[call]) < SAME
            difference = error(found, without(latents(call), time))
            assert difference > OTHER if call % INTERVAL else difference < SAME


def test_each_model_keeps_its_own_features(ready):
    positive, negative = prompts()
    steps = GuidedSteps(ready, compiles=True)
    cache = DeepCache(INTERVAL)
    alone = steps.model(positive, None, 1, TIMES, step=cached_step(steps, cache))
    wanted = [alone(latents(call), time) for call, time in enumerate(TIMES[:3])]
    first, second = (
        steps.model(prompt, None, 1, TIMES, step=cached_step(steps, cache))
        for prompt in (positive, negative)
    )
    for call, time in enumerate(TIMES[:3]):
        assert error(first(latents(call), time), wanted[call]) == 0
        assert error(second(latents(call), time), wanted[call]) > OTHER


def test_halves_that_go_one_by_one_keep_their_own(plain):
    positive, negative = prompts()
    calls = CachedCalls(DeepCache(2), lambda: plain)
    model = guided(calls, positive, negative, 7.5, mx.float32, together=False)
    wanted = expected(plain, DeepCache(2))
    for call, time in enumerate(TIMES):
        calls.begin()
        assert error(model(latents(call), time), wanted[call]) < SAME


def test_a_shallow_call_runs_little_of_the_network():
    """It does not see that the middle is damaged, and sees that the last block is."""
    plain = unet(**XL)
    ready = prepare_unet(plain, RECIPE)
    given = latents(0), mx.array([400.0]), next(prompts())
    deep = [keeping(each, 0, None, *given)[1] for each in (plain, ready)]
    before, _ = keeping(plain, 0, deep[0], *given)
    middle, last = plain.mid_block.resnets[0].conv1, plain.up_blocks[-1].resnets[-1].conv1
    middle.weight = middle.weight + float("nan")
    for each, kept in zip((plain, prepare_unet(plain, RECIPE)), deep, strict=True):
        assert error(keeping(each, 0, kept, *given)[0], before) < SAME
        assert mx.isnan(each(*given)).all()
    last.weight = 1.1 * last.weight
    assert error(keeping(plain, 0, deep[0], *given)[0], before) > OTHER


def test_what_steers_is_added_to_the_states_that_are_new(plain, ready):
    given = latents(0), mx.array([400.0]), next(prompts())
    _, skips, _, _ = plain.descend(*given)
    middle = plain.descend(*given)[0]
    control = [normal(*each.shape, seed=i) for i, each in enumerate([*skips, middle])]
    far = [*control[:2], *(mx.full(each.shape, float("nan")) for each in control[2:])]
    deep = [keeping(each, 1, None, *given, control=control)[1] for each in (plain, ready)]
    wanted, _ = keeping(plain, 1, deep[0], *given, control=control)
    for each, kept in zip((plain, ready), deep, strict=True):
        for maps in (control, far):
            assert error(keeping(each, 1, kept, *given, control=maps)[0], wanted) < SAME
        assert error(keeping(each, 1, kept, *given)[0], wanted) > OTHER


def test_a_branch_that_is_not_there(plain, ready):
    given = latents(0), mx.array([400.0]), next(prompts())
    for each in (plain, ready):
        with pytest.raises(ValueError, match="a branch from 0 to 3, got 4"):
            keeping(each, 4, None, *given)
