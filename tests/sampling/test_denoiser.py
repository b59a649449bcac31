"""From raw predictions to clean latents, and guidance."""

import mlx.core as mx
import numpy as np
import pytest
from synthetic import gaussian_noise

from mlx_maple.sampling import Denoiser, NoiseSchedule, guided, make_plan
from mlx_maple.sampling.denoiser import rescale, scalings

SHAPE = (2, 3, 5, 4)


# --- scalings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6])
def test_along_sigma_they_are_k_diffusions(sigma):
    root = np.sqrt(sigma**2 + 1)
    assert scalings("epsilon", 1.0, sigma) == pytest.approx((1 / root, 1, -sigma))
    assert scalings("v_prediction", 1.0, sigma) == pytest.approx(
        (1 / root, 1 / (sigma**2 + 1), -sigma / root)
    )


@pytest.mark.parametrize("a", [0.9991, 0.5, 0.0047])
def test_along_timesteps_they_are_the_papers(a):
    alpha, sigma = np.sqrt(a), np.sqrt(1 - a)
    assert scalings("epsilon", alpha, sigma) == pytest.approx((1, 1 / alpha, -sigma / alpha))
    assert scalings("v_prediction", alpha, sigma) == pytest.approx((1, alpha, -sigma))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ["euler", "ddim"])
def test_a_perfect_network_gives_the_clean_latents_back(prediction, sampler):
    schedule = NoiseSchedule.from_betas(prediction=prediction)
    grid = make_plan(schedule, sampler, "leading", 8).grid
    clean, noise = gaussian_noise(0, SHAPE), gaussian_noise(1, SHAPE)
    at = grid.timesteps[3] if sampler == "ddim" else grid.sigmas[3]
    alpha, sigma, timestep = grid.level(at)
    a = schedule.alphas_cumprod[int(timestep)]
    truth = noise if prediction == "epsilon" else np.sqrt(a) * noise - np.sqrt(1 - a) * clean
    seen = []

    def network(x, t):
        seen.append((np.array(x), t))
        return mx.array(truth)

    x = mx.array(alpha * clean + sigma * noise)
    np.testing.assert_allclose(Denoiser(network, grid)(x, at), clean, atol=3e-6)
    latents_in, t = seen[0]
    assert t == timestep == 501
    np.testing.assert_allclose(latents_in, np.sqrt(a) * clean + np.sqrt(1 - a) * noise, atol=1e-6)


# --- guidance ----------------------------------------------------------------------------------


class Network:
    """Records its inputs; predicts the mean of the context plus the time plus the latents."""

    def __init__(self, dtype=mx.float32):
        self.dtype = dtype
        self.calls = []

    def __call__(self, latents, timesteps, context):
        self.calls.append((latents, timesteps, context))
        offset = context.astype(mx.float32).mean(axis=(1, 2)) + timesteps / 1000
        return (latents + offset[:, None, None, None]).astype(self.dtype)


def test_guidance_is_one_batch_negative_first():
    network = Network()
    positive, negative = mx.full((2, 7, 3), 2.0), mx.full((2, 7, 3), 0.5)
    model = guided(network, positive, negative, 5.0, mx.float32)
    latents = mx.array(gaussian_noise(0, SHAPE))
    out = model(latents, 250.5)
    sent, timesteps, context = network.calls[0]
    assert len(network.calls) == 1
    assert sent.shape == (4, *SHAPE[1:])
    assert timesteps.tolist() == [250.5] * 4
    assert timesteps.dtype == mx.float32
    assert context[:, 0, 0].tolist() == [0.5, 0.5, 2.0, 2.0]
    np.testing.assert_array_equal(sent[:2], sent[2:])
    np.testing.assert_allclose(out, latents + 0.2505 + 0.5 + 5 * 1.5, atol=1e-5)


@pytest.mark.parametrize(("negative", "scale"), [(None, 7.5), (mx.zeros((2, 7, 3)), 1.0)])
def test_without_a_second_half_it_is_skipped(negative, scale):
    network = Network()
    model = guided(network, mx.ones((2, 7, 3)), negative, scale, mx.float32)
    out = model(mx.zeros(SHAPE), 0.0)
    assert network.calls[0][0].shape == SHAPE
    np.testing.assert_array_equal(out, np.ones(SHAPE))


def test_the_network_gets_its_dtype_and_guidance_stays_float32():
    network = Network(mx.float16)
    positive, negative = mx.full((1, 2, 2), 1.0), mx.full((1, 2, 2), 0.999)
    model = guided(network, positive, negative, 7.5, mx.float16)
    out = model(mx.full((1, 2, 2, 4), 100.0), 0.0)
    sent, timesteps, context = network.calls[0]
    assert (sent.dtype, timesteps.dtype, context.dtype) == (mx.float16, mx.float32, mx.float16)
    assert out.dtype == mx.float32
    # 101 and 100.999 are one number in float16; the sum must not be rounded again
    single = guided(network, positive, None, 1.0, mx.float16)
    assert single(mx.zeros((1, 2, 2, 4)), 1.0).dtype == mx.float32


def test_a_compiled_network_is_traced_once():
    traces = []

    @mx.compile
    def network(latents, timesteps, context):
        traces.append(1)
        return latents * timesteps[:, None, None, None] + context.mean()

    model = guided(network, mx.ones((2, 7, 3)), mx.zeros((2, 7, 3)), 3.0, mx.float32)
    for t in (999.0, 500.5, 1.0):
        mx.eval(model(mx.ones(SHAPE), t))
    assert len(traces) == 1


def test_prompts_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 7, 3\) and \(1, 14, 3\)"):
        guided(Network(), mx.ones((1, 14, 3)), mx.ones((1, 7, 3)), 3.0, mx.float32)


def test_rescaled_guidance_has_the_positives_std():
    loud, wanted = 3 * gaussian_noise(0, SHAPE), gaussian_noise(1, SHAPE)
    full = np.array(rescale(mx.array(loud), mx.array(wanted), 1.0))
    axes = (1, 2, 3)
    np.testing.assert_allclose(full.std(axis=axes), wanted.std(axis=axes), rtol=1e-5)
    ratio = wanted.std(axis=axes, keepdims=True) / loud.std(axis=axes, keepdims=True)
    partly = np.array(rescale(mx.array(loud), mx.array(wanted), 0.7))
    np.testing.assert_allclose(partly, 0.7 * loud * ratio + 0.3 * loud, rtol=1e-5)


def test_rescale_is_applied_to_the_guided_prediction():
    def network(latents, timesteps, context):
        return latents * context[:, :1, :1, None]

    latents = mx.array(gaussian_noise(0, SHAPE))
    positive, negative = mx.full((2, 1, 1), 2.0), mx.full((2, 1, 1), 1.0)
    plain = guided(network, positive, negative, 4.0, mx.float32)(latents, 0.0)
    np.testing.assert_allclose(plain, 5 * latents, rtol=1e-6)
    model = guided(network, positive, negative, 4.0, mx.float32, guidance_rescale=1.0)
    np.testing.assert_allclose(model(latents, 0.0), 2 * latents, rtol=1e-5)
