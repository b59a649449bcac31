"""How many primitives a step evaluates, and that the number does not grow unseen."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_maple.engine.compiled import GuidedSteps
from mlx_maple.engine.count import as_on_a_gpu, count, described_recipe
from mlx_maple.engine.prepare import prepare_unet, prepare_vae
from mlx_maple.engine.prepared_forms import set_form
from mlx_maple.models import AutoencoderKL, UNet, UNetConfig, VAEConfig
from mlx_maple.models.forms import PLAIN, Form
from mlx_maple.models.freeu import Factors
from mlx_maple.models.unet import attention_channels

WIDTHS = (32, 64, 128, 128)  # a tenth of SD 1's; the structure is the same
CONTEXT = 64
LATENTS = (1, 64, 64, 4)
# Measured; a lower number is an improvement to be written down here, a higher one a regression.
GUIDED_STEP = {"metal": 377, "cuda": 371}
# Three of the decoder's on CUDA put a doubled map together, which has had 16 products for 36.
DECODER = {"metal": 87, "cuda": 90}
# Of a guided step, more: in what it says of a prompt's spread, in four numbers of FreeU's, and in
# what stands around each of the 52 maps that are convolved.
RESCALE, FREEU, CLOSED = 9, 30, 52
PUBLISHED_STEP = 2019


def weights(module):
    return dict(tree_flatten(module.parameters()))


def half(module):
    """Its weights in float16, in which attention is fused."""
    module.set_dtype(mx.float16)
    mx.eval(module.parameters())
    return module


@pytest.fixture(scope="module")
def unet():
    return half(UNet(UNetConfig(block_out_channels=WIDTHS, cross_attention_dim=CONTEXT)))


def guided_step(unet, backend, form=PLAIN, compiles=True, **told):
    prepared = prepare_unet(unet, described_recipe(backend))
    mx.eval(prepared.parameters())
    set_form(prepared, form)
    prompts = (mx.zeros((1, 77, CONTEXT)) for _ in range(2))
    steps = GuidedSteps(prepared, compiles=compiles, in_parts=False)
    model = steps.model(*prompts, 7.5, [10.0], **told)
    latents = mx.zeros(LATENTS)
    return count(lambda x: model(x, 10.0), latents, weights=weights(prepared)), prepared


def test_a_picture_beside_the_prompt_costs_an_attention_and_a_sum_a_layer(unet):
    """16 cross-attentions; the sums of a second picture join the first one's."""
    prepared = prepare_unet(unet, described_recipe("metal"))
    mx.eval(prepared.parameters())
    *others, middle = attention_channels(unet.config)
    widths = [*others[:6], middle, *others[6:]]
    seen = [mx.zeros((1, 4, 2 * width), mx.float16) for width in widths]
    prompts = [mx.zeros((1, 77, CONTEXT)) for _ in range(2)]
    steps = GuidedSteps(prepared, compiles=True, in_parts=False)

    def counted(pictures):
        model = steps.model(*prompts, 7.5, [10.0], images=[(seen, seen)] * pictures)
        return count(lambda x: model(x, 10.0), mx.zeros(LATENTS), weights=weights(prepared)).kernels

    assert [counted(n) - GUIDED_STEP["metal"] for n in range(3)] == [0, 16 + 16, 16 + 16 + 16]


@pytest.mark.parametrize("backend", GUIDED_STEP)
def test_a_guided_step_of_sd1s_structure(unet, backend):
    counted, _ = guided_step(unet, backend)
    assert counted.kernels <= GUIDED_STEP[backend], dict(counted.by_name)
    assert counted.by_name["CustomKernel"] > 100  # norms are ours, and were seen


@pytest.mark.parametrize("backend", GUIDED_STEP)
def test_a_rescaled_step_takes_a_few_more(unet, backend):
    counted, plain = (guided_step(unet, backend, guidance_rescale=r)[0].kernels for r in (0.7, 0.0))
    assert 0 < counted - plain <= RESCALE


@pytest.mark.parametrize("backend", GUIDED_STEP)
@pytest.mark.parametrize(
    ("form", "more"), [(Form(freeu=Factors(1.5, 1.6, 0.9, 0.2)), FREEU), (Form(tile="xy"), CLOSED)]
)
def test_a_step_in_another_form_takes_some_more(unet, backend, form, more):
    counted, plain = (guided_step(unet, backend, form)[0].kernels for form in (form, PLAIN))
    assert 0 < counted - plain <= more


@pytest.mark.parametrize("backend", DECODER)
def test_the_decoder_of_sd1s_structure(backend):
    vae = half(AutoencoderKL(VAEConfig(block_out_channels=(32, 64, 128, 128))))
    prepared = prepare_vae(vae, described_recipe(backend))
    mx.eval(prepared.parameters())
    counted = count(prepared.decode, mx.zeros(LATENTS, mx.float16), weights=weights(prepared))
    assert counted.kernels <= DECODER[backend], dict(counted.by_name)


def test_the_published_network_takes_many_times_more(unet):
    """The control: its norms alone are 61 times a dozen primitives."""
    latents, context = mx.zeros((2, *LATENTS[1:])), mx.zeros((2, 77, CONTEXT))
    counted = count(unet, latents, mx.array([10.0, 10.0]), context, weights=weights(unet))
    assert counted.kernels == PUBLISHED_STEP
    assert counted.by_name["Convolution"] == 52
    assert counted.by_name["ScaledDotProductAttention"] == 32
    assert counted.by_name["LayerNorm"] == 48


def test_a_step_reads_each_weight_but_those_of_the_prompt_and_the_time(unet):
    counted, prepared = guided_step(unet, "cuda", compiles=False)
    left = [
        weight.nbytes
        for name, weight in weights(prepared).items()
        if name.startswith("time_") or ".kv." in name or name.endswith(".owed")
    ]
    every = sum(weight.nbytes for weight in weights(prepared).values())
    assert len(left) > 16
    assert counted.weight_bytes == every - sum(left)


def test_views_are_not_counted_and_repeated_use_is_counted_once():
    x, w = mx.ones((4, 6)), mx.ones((6, 6))
    mx.eval(w)

    def work(x):
        y = (x @ w).reshape(2, 2, 6).transpose(1, 0, 2)[:, None]
        return y + y

    counted = count(work, x, weights={"w": w, "unused": mx.ones((50,))})
    assert counted.by_name == {"Matmul": 1, "Add": 1}
    assert counted.kernels == 2
    assert counted.views >= 3
    assert counted.weight_bytes == w.nbytes


def test_the_device_that_runs_can_be_counted_too():
    q = mx.ones((1, 2, 9, 8))

    def work(q):
        return mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0)

    fused = {"ScaledDotProductAttention": 1}
    assert count(work, q, weights={}).by_name == fused
    here = count(work, q, weights={}, on_a_gpu=False)
    if mx.default_device().type == mx.DeviceType.cpu:  # where it is taken apart
        assert here.by_name["Matmul"] == 2 and here.by_name["Softmax"] == 1
    else:
        assert here.kernels >= 1


def test_a_kernel_with_two_outputs_is_one():
    with as_on_a_gpu():
        kernel = mx.fast.metal_kernel(
            name="two", input_names=["x"], output_names=["a", "b"], source=""
        )

        def work(x):
            a, b = kernel(
                inputs=[x],
                grid=(1, 1, 1),
                threadgroup=(1, 1, 1),
                output_shapes=[(3,), (2, 2)],
                output_dtypes=[mx.float16, mx.float32],
            )
            assert (a.shape, b.shape, a.dtype, b.dtype) == (
                (3,),
                (2, 2),
                mx.float16,
                mx.float32,
            )
            return [a, b]

        assert count(work, mx.ones((5,)), weights={}).by_name == {"CustomKernel": 1}


def test_nothing_is_left_behind():
    before = mx.fast.layer_norm, mx.fast.metal_kernel
    with pytest.raises(RuntimeError, match="broken"):
        count(broken, mx.ones((1,)), weights={})
    assert (mx.fast.layer_norm, mx.fast.metal_kernel) == before


def broken(x):
    raise RuntimeError("broken")
