"""Guided steps draw as the plain network does, compiled or not; and what is made ready, when."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_networks import CONTEXT, SMALL, XL, error, normal, unet, vae

from mlx_maple.engine import attention, compiled, prepare
from mlx_maple.engine.compiled import GuidedSteps, compile_works, guided_steps, made_ready
from mlx_maple.engine.kernels import Plain, kernels_for
from mlx_maple.engine.prepare import PreparedUNet, PreparedVAE, Recipe, prepare_unet, prepare_vae
from mlx_maple.engine.quantize import quantize
from mlx_maple.models import CLIPTextConfig, CLIPTextEncoder
from mlx_maple.sampling.denoiser import guided

RECIPE = Recipe("cpu", Plain())
# Largest differences over the std. Guidance multiplies rounding: 1.4e-5 was measured.
SAME, OTHER = 1e-4, 1e-2
TIMES = [801.0, 400.5, 13.0]


pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("MAPLE_CACHE", str(tmp_path))
    for known in (kernels_for, compile_works):
        known.cache_clear()
    yield
    for known in (kernels_for, compile_works):
        known.cache_clear()


@pytest.fixture(scope="module")
def plain():
    return unet(**SMALL)


@pytest.fixture(scope="module")
def ready(plain):
    return prepare_unet(plain, RECIPE)


def prompts(batch=1):
    return (normal(batch, 9, CONTEXT, seed=seed) for seed in (5, 6))


def latents(batch=1, rows=16, columns=16):
    return normal(batch, rows, columns, 4, seed=7)


# Guided steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_guided_step_is_that_of_the_samplers(plain, ready, compiles, one_by_one):
    steps = GuidedSteps(ready, compiles=compiles, one_by_one=one_by_one)
    positive, negative = prompts(2)
    x = latents(2)
    model = steps.model(positive, negative, 7.5, TIMES)
    wanted = guided(plain, positive, negative, 7.5, mx.float32)
    for time in (801.0, 13.0):
        found = model(x, time)
        assert found.dtype == mx.float32
        assert error(found, wanted(x, time)) < SAME
    other = steps.model(negative, positive, 7.5, TIMES)
    assert error(other(x, time), found) > OTHER  # the control


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_guided_step_is_brought_back_to_the_prompts_own_spread(
    plain, ready, compiles, one_by_one
):
    """Each picture to its own: they differ in how far guidance spreads them."""
    steps = GuidedSteps(ready, compiles=compiles, one_by_one=one_by_one)
    positive, negative = prompts(2)
    x = latents(2) * mx.array([1.0, 3.0]).reshape(2, 1, 1, 1)
    for share in (0.7, 1.0):
        model = steps.model(positive, negative, 7.5, TIMES, guidance_rescale=share)
        wanted = guided(plain, positive, negative, 7.5, mx.float32, guidance_rescale=share)
        found = model(x, 13.0)
        assert found.dtype == mx.float32
        assert error(found, wanted(x, 13.0)) < SAME
    other = steps.model(positive, negative, 7.5, TIMES, guidance_rescale=0.7)(x, 13.0)
    assert error(other, found) > OTHER  # the control; and so is a drawing without
    assert error(steps.model(positive, negative, 7.5, TIMES)(x, 13.0), found) > OTHER


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize(("has_negative", "scale"), [(True, 1), (True, 1.0), (False, 7.5)])
def test_without_guidance_the_network_runs_once(plain, ready, has_negative, scale, compiles):
    positive, negative = prompts(2)
    model = GuidedSteps(ready, compiles=compiles).model(
        positive, negative if has_negative else None, scale, TIMES
    )
    batches = []
    begin = ready.begin
    ready.begin = lambda x, *given: (batches.append(x.shape[0]), begin(x, *given))[1]
    try:
        found = model(latents(2), 13.0)
    finally:
        del ready.begin
    assert batches == [2]
    assert error(found, guided(plain, positive, None, 1, mx.float32)(latents(2), 13.0)) < SAME


@pytest.mark.parametrize("shape", [(1, 16, 16), (2, 17, 19)])
def test_a_step_in_two_parts_is_the_step(ready, shape):
    positive, negative = prompts(shape[0])
    x = latents(*shape)
    for scale in (7.5, 1):
        whole, parts = (
            GuidedSteps(ready, compiles=True, in_parts=in_parts).model(
                positive, negative, scale, TIMES
            )
            for in_parts in (False, True)
        )
        for time in TIMES:
            assert error(parts(x, time), whole(x, time)) < SAME
    assert error(parts(x, TIMES[0]), whole(x, TIMES[1])) > OTHER  # the control


def test_each_half_is_a_function_of_its_own(ready, monkeypatch):
    """In one, MLX finds that both dequantise the same weights, and keeps them: 1.7 GB of SD 1."""
    traced, begin = [], type(ready).begin
    monkeypatch.setattr(
        type(ready), "begin", lambda self, *a, **k: traced.append(len(a[0])) or begin(self, *a, **k)
    )
    latents, prompt = mx.zeros((1, 8, 8, 4)), mx.zeros((1, 77, ready.config.cross_attention_dim))
    steps = GuidedSteps(ready, compiles=True, one_by_one=True)
    model = steps.model(prompt, prompt + 1, 7.5, [500.0, 400.0])
    for timestep in (500.0, 400.0):
        mx.eval(model(latents, timestep))
    assert traced == [1]  # the second half, and the second step, are the same function again


@pytest.mark.parametrize("one_by_one", [False, True])
def test_vectors_go_with_their_prompts(one_by_one):
    plain = unet(**XL, vector_channels=24)
    steps = GuidedSteps(prepare_unet(plain, RECIPE), compiles=True, one_by_one=one_by_one)
    positive, negative = prompts(2)
    wanted, avoided = normal(2, 24, seed=8), normal(2, 24, seed=9)
    x = latents(2)
    model = steps.model(positive, negative, 7.5, TIMES, vectors=(wanted, avoided))
    for time in (*TIMES, 77.0):
        p = plain(x, mx.array([time]), positive, wanted)
        n = plain(x, mx.array([time]), negative, avoided)
        assert error(model(x, time), n + 7.5 * (p - n)) < SAME
    swapped = steps.model(positive, negative, 7.5, TIMES, vectors=(avoided, wanted))
    assert error(swapped(x, time), n + 7.5 * (p - n)) > OTHER  # the control
    alone = steps.model(positive, None, 1, TIMES, vectors=(wanted, None))
    assert error(alone(x, 77.0), p) < SAME


@pytest.mark.parametrize("scale", [0.0, 3.0, -1.0])
def test_scales_are_arguments(plain, ready, scale):
    positive, negative = prompts()
    found = GuidedSteps(ready, compiles=True).model(positive, negative, scale, TIMES)
    wanted = guided(plain, positive, negative, scale, mx.float32)
    assert error(found(latents(), 13.0), wanted(latents(), 13.0)) < SAME


def test_times_that_were_not_announced_are_made_when_asked_for(plain, ready):
    positive, negative = prompts()
    wanted = guided(plain, positive, negative, 5, mx.float32)
    for announced in ([], [999.0]):
        model = GuidedSteps(ready, compiles=True).model(positive, negative, 5, announced)
        for time in (500.25, 999.0):
            assert error(model(latents(), time), wanted(latents(), time)) < SAME


def test_announced_times_are_made_once(ready, monkeypatch):
    asked = []
    times = PreparedUNet.times
    monkeypatch.setattr(
        PreparedUNet,
        "times",
        lambda self, t, more: (asked.append(t.tolist()), times(self, t, more))[1],
    )
    model = GuidedSteps(ready, compiles=False).model(*prompts(), 5, [13.0, 801.0, 13.0])
    for time in (801.0, 13.0, 801.0):
        model(latents(), time)
    assert asked == [[13.0, 801.0]]
    model(latents(), 7.0)
    assert asked[1:] == [[7.0]]


def test_a_step_is_traced_once_for_a_size(plain, ready):
    steps = GuidedSteps(ready, compiles=True)
    traced = []
    finish = ready.finish
    ready.finish = lambda *given: (traced.append(1), finish(*given))[1]
    try:
        for scale in (7.5, 3.0):
            for positive, negative in (prompts(), reversed(list(prompts()))):
                model = steps.model(positive, negative, scale, TIMES)
                mx.eval([model(latents(), time) for time in (*TIMES, 77.0)])
        assert len(traced) == 1
        positive, negative = prompts()
        found = steps.model(positive, negative, 7.5, TIMES)(latents(1, 17, 16), 13.0)
        wanted = guided(plain, positive, negative, 7.5, mx.float32)(latents(1, 17, 16), 13.0)
        assert error(found, wanted) < SAME and len(traced) == 2
    finally:
        del ready.finish


def test_the_second_half_waits_for_the_first(ready, monkeypatch):
    waits = []
    depends = mx.depends
    monkeypatch.setattr(mx, "depends", lambda *given: (waits.append(1), depends(*given))[1])
    for one_by_one in (False, True):
        steps = GuidedSteps(ready, compiles=False, one_by_one=one_by_one)
        mx.eval(steps.model(*prompts(), 5, TIMES)(latents(), 13.0))
        assert len(waits) == one_by_one


def test_a_drawing_in_half_precision_keeps_the_guidance_in_float32(plain):
    half = unet(**SMALL)
    half.set_dtype(mx.float16)
    positive, negative = prompts()
    steps = GuidedSteps(prepare_unet(half, RECIPE), compiles=False)
    model = steps.model(positive, negative, 7.5, TIMES)
    found = model(latents(), 13.0)
    wanted = guided(plain, positive, negative, 7.5, mx.float32)(latents(), 13.0)
    assert found.dtype == mx.float32 and 0 < error(found, wanted) < 0.2


# What is made ready ------------------------------------------------------------------------------


@pytest.fixture(params=["cuda", "metal"])
def gpu(request, monkeypatch):
    """A GPU that refuses every kernel: there is none behind the name."""
    for module in (attention, prepare, compiled):
        monkeypatch.setattr(module, "running_backend", lambda: request.param)
    return request.param


def parameters(network):
    return dict(tree_flatten(network.parameters()))


def test_the_cpu_gets_the_plain_networks_back(plain):
    autoencoder = vae()
    for low_memory in (False, True):
        assert made_ready(plain, low_memory=low_memory) is plain
        assert made_ready(autoencoder, low_memory=low_memory, consumes=True) is autoencoder
    assert parameters(plain) and parameters(autoencoder)


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_gpu_without_kernels_gets_prepared_networks_with_plain_ones(
    gpu, plain, compiles, low_memory
):
    found = made_ready(plain, compiles=compiles, low_memory=low_memory)
    assert isinstance(found, PreparedUNet)
    assert isinstance(found._recipe.kernels, Plain) and found._recipe.backend == gpu
    line = kernels_for(gpu, mx.float32)[1]
    assert line.startswith("not used on this device (group norm") and "\n" not in line
    bound = attention.LOW_MEMORY_SCORE_BYTES if low_memory else attention.SCORE_BYTES
    assert found._recipe.score_bytes == bound
    steps = guided_steps(found)
    assert steps is found.steps and steps.one_by_one is low_memory
    assert (steps.begin == steps._begun) is not compiles
    assert steps.in_parts is not low_memory
    positive, negative = prompts()
    wanted = guided(plain, positive, negative, 7.5, mx.float32)(latents(), 13.0)
    assert error(steps.model(positive, negative, 7.5, TIMES)(latents(), 13.0), wanted) < SAME


def test_matrices_are_turned_beforehand(gpu, plain):
    found = made_ready(plain)
    leaves = [m for m in found.modules() if isinstance(m, prepare.Product | prepare.Convolution)]
    assert len(leaves) > 50 and all(leaf._matrix is not None for leaf in leaves)


def test_an_autoencoder_is_made_ready_unless_memory_matters_more(gpu):
    network = vae()
    assert made_ready(network, low_memory=True) is network
    found = made_ready(network)
    assert isinstance(found, PreparedVAE)
    assert found.encoder.in_stages and found.decoder.in_stages
    assert isinstance(found.decoder._recipe.kernels, Plain)
    assert found.encoder.compiled_for == found.decoder.compiled_for == mx.float32
    x = normal(1, 8, 8, 4)
    assert error(found.decode(x), network.decode(x)) < SAME


def test_an_autoencoder_is_traced_only_where_that_is_wanted_and_works(gpu, monkeypatch):
    def halves(**options):
        found = made_ready(vae(), **options)
        return [found.encoder.compiled_for, found.decoder.compiled_for]

    assert halves() == [mx.float32] * 2 and halves(compiles=False) == [None] * 2
    monkeypatch.setattr(compiled, "compile_works", lambda backend: (False, "it does not"))
    assert halves() == [None] * 2


def test_what_has_been_made_ready_and_other_networks_stay(gpu, plain):
    facts = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    text_encoder = CLIPTextEncoder(CLIPTextConfig(**facts, num_attention_heads=2))
    for network in (prepare_unet(plain, RECIPE), prepare_vae(vae(), RECIPE), text_encoder):
        for low_memory in (False, True):
            assert made_ready(network, low_memory=low_memory) is network


@pytest.mark.parametrize("bits", [None, 4])
def test_a_plain_network_may_be_emptied_as_it_is_read(gpu, bits):
    network, other = unet(**SMALL), unet(**SMALL)
    if bits is not None:
        quantize(network, bits)
        quantize(other, bits)
    x, time, (context, _) = latents(), mx.array([13.0]), prompts()
    found = made_ready(network, consumes=True)
    assert not parameters(network)  # its attributes are gone, and with them its arrays
    assert error(found(x, time, context), other(x, time, context)) < SAME
    kept = made_ready(other)
    assert parameters(other)
    for name, value in parameters(kept).items():
        assert mx.array_equal(value, parameters(found)[name]), name


def test_steps_are_made_for_a_network_that_has_none(plain):
    found = prepare_unet(plain, RECIPE)
    assert found.steps is None
    steps = guided_steps(found)
    assert guided_steps(found) is steps and not steps.one_by_one


# Where mx.compile does not work ------------------------------------------------------------------


def test_compiling_works_here():
    assert compile_works("cpu") == (True, "mx.compile works")


def fails(function):
    raise RuntimeError("nvrtc: no such file\nat line 3")


def fails_silently(function):
    def call(x):
        raise RuntimeError

    return call


@pytest.mark.parametrize(
    ("broken", "line"),
    [
        (fails, "mx.compile fails on this cuda (nvrtc: no such file)"),
        (fails_silently, "mx.compile fails on this cuda (RuntimeError)"),
        (lambda f: lambda x: f(x) + 1e-3, "mx.compile differs by 1.0e-03 on this cuda"),
        (
            lambda f: lambda x: f(x) * mx.array(float("nan")),
            "mx.compile differs by nan on this cuda",
        ),
    ],
    ids=["raises", "raises-when-called", "wrong", "no-number"],
)
def test_a_compiler_that_fails_is_left_out(plain, monkeypatch, broken, line):
    for module in (attention, prepare, compiled):
        monkeypatch.setattr(module, "running_backend", lambda: "cuda")
    monkeypatch.setattr(mx, "compile", broken)
    assert compile_works("cuda") == (False, line)
    found = made_ready(plain)
    positive, negative = prompts()
    model = guided_steps(found).model(positive, negative, 7.5, TIMES)
    wanted = guided(plain, positive, negative, 7.5, mx.float32)(latents(), 13.0)
    assert error(model(latents(), 13.0), wanted) < SAME


def test_compiling_is_tried_once_a_process(monkeypatch):
    calls = []
    compile_ = mx.compile
    monkeypatch.setattr(mx, "compile", lambda f: (calls.append(f), compile_(f))[1])
    assert compile_works("cpu") == compile_works("cpu")
    assert len(calls) == 1


def test_who_forbids_compiling_gets_none(gpu, plain, monkeypatch):
    monkeypatch.setattr(mx, "compile", None)
    steps = made_ready(plain, compiles=False).steps
    assert np.isfinite(np.array(steps.model(*prompts(), 5, TIMES)(latents(), 13.0))).all()
