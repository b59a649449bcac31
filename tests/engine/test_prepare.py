"""Networks made ready give the plain ones' numbers, rewrite by rewrite; broken ones do not."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map
from tiny_networks import CONTEXT, SD1, SMALL, XL, error, normal, unet, vae

from mlx_maple.engine import prepare
from mlx_maple.engine.kernels import Plain
from mlx_maple.engine.prepare import (
    Product,
    Recipe,
    Resnet,
    Transformer,
    prepare_unet,
    prepare_vae,
)
from mlx_maple.engine.quantize import quantize

RECIPE = Recipe("cpu", Plain())
# Largest differences over the std: rounding gives 6e-6, what is broken here 1.5e-2 and more.
SAME, OTHER = 3e-5, 5e-3


pytestmark = pytest.mark.usefixtures("on_the_cpu")


def inputs(batch=1, rows=16, columns=16, tokens=11):
    times = mx.array([801.0, 13.5][:batch])
    context = normal(batch, tokens, CONTEXT, seed=2)
    return normal(batch, rows, columns, 4, seed=1), times, context


def differs(plain, ready, *given) -> float:
    given = given or inputs()
    return error(ready(*given), plain(*given))


def leaves(network, kind):
    return [module for module in network.modules() if isinstance(module, kind)]


# The UNet ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd1():
    return unet(**SD1)


@pytest.mark.parametrize(
    ("batch", "rows", "columns"),
    [(1, 16, 16), (2, 17, 19), (2, 24, 16)],  # odd sizes are cut on the way up
)
def test_a_unet_of_sd1s_structure(sd1, batch, rows, columns):
    given = inputs(batch, rows, columns)
    assert differs(sd1, prepare_unet(sd1, RECIPE), *given) < SAME


@pytest.mark.parametrize("facts", [XL, SMALL], ids=["attention-below", "one-block-a-level"])
@pytest.mark.parametrize(("batch", "rows", "columns"), [(2, 17, 19), (1, 16, 24)])
def test_unets_of_other_structures(facts, batch, rows, columns):
    plain = unet(**facts)
    assert differs(plain, prepare_unet(plain, RECIPE), *inputs(batch, rows, columns)) < SAME


@pytest.mark.parametrize(
    "facts",
    [
        {"vector_channels": 24},
        {"mid_transformer_layers": 0},
        {"mid_transformer_layers": None},
        {"mid_transformer_layers": None, "transformer_layers": (1, 1, 0)},  # small-sd
        {"up_transformer_layers": (1, 2, 3, 1, 2, 1, 0, 0, 0)},
        {"time_cond_dim": 8},
    ],
    ids=["vector", "one-block-middle", "no-middle", "plain-below", "depths", "told-guidance"],
)
def test_networks_of_other_families(facts):
    plain = unet(**{**XL, **facts})
    told = {}
    if "vector_channels" in facts:
        told["vector"] = normal(2, 24, seed=5)
    if "time_cond_dim" in facts:
        told["guidance"] = mx.array([4.0, 8.0])
    given = inputs(2)
    ready = prepare_unet(plain, RECIPE)
    wanted = plain(*given, **told)
    assert error(ready(*given, **told), wanted) < SAME
    if told:  # the control
        ((name, value),) = told.items()
        assert error(ready(*given, **{name: value[::-1]}), wanted) > OTHER
        with pytest.raises(ValueError, match="UNet"):
            ready(*given)


@pytest.mark.parametrize("facts", [SD1, XL], ids=["sd1", "xl"])
def test_what_controls_a_drawing_is_added_where_the_plain_one_adds_it(facts):
    plain = unet(**facts)
    ready = prepare_unet(plain, RECIPE)
    given = inputs(2)
    widths, shapes = facts["block_out_channels"], []
    for i, width in enumerate(widths):
        side = 16 >> i
        shapes += [(side, widths[max(i - 1, 0)]), (side, width), (side, width)]
    control = [0.3 * normal(2, s, s, c, seed=20 + i) for i, (s, c) in enumerate(shapes)]
    control.append(0.3 * normal(2, *control[-1].shape[1:], seed=50))
    wanted = plain(*given, control=control)
    assert error(ready(*given, control=control), wanted) < SAME
    assert error(ready(*given, control=[*control[1:2], *control[1:]]), wanted) > OTHER
    with pytest.raises(ValueError, match=f"expected {len(control)} maps of control"):
        ready(*given, control=control[:-1])
    is_late = not facts["transformer_layers"][0]
    features = [
        0.3
        * normal(1, 16 >> (i + (is_late and i == 0)), 16 >> (i + (is_late and i == 0)), c, seed=i)
        for i, c in enumerate(widths)
    ]
    features.append(0.3 * normal(1, *features[-1].shape[1:], seed=60))
    wanted = plain(*given, features=features)
    assert error(ready(*given, features=features), wanted) < SAME
    assert error(ready(*given), wanted) > OTHER


def test_each_sample_has_its_own_time():
    latents, times, context = inputs(2)
    plain = unet(**SMALL)
    ready = prepare_unet(plain, RECIPE)
    assert error(ready(latents, times[::-1], context), plain(latents, times, context)) > OTHER
    for one in (times[:1], times[0], 801.0):  # one for all
        assert differs(plain, ready, latents, one, context) < SAME


def test_wrong_shapes_are_refused_as_by_the_plain_one(sd1):
    latents, times, context = inputs(2)
    for given in (
        (latents.transpose(0, 3, 1, 2), times, context),
        (latents, times, context[:1]),
        (latents, mx.zeros((3,)), context),
    ):
        messages = []
        for network in (sd1, prepare_unet(sd1, RECIPE)):
            with pytest.raises(ValueError, match=r"\[UNet\]") as raised:
                network(*given)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]


def owed_rows(network):
    """Each float32 row of biases that a norm or a doubling adds: whose, and its name."""
    return [
        (module, name)
        for module in network.modules()
        for name in module
        if name.startswith("shift") or name == "time_bias"
    ]


def test_what_is_owed_is_paid_everywhere():
    """Each row of owed biases counts: without any one of them the output is another."""
    plain = unet(**SMALL)
    ready = prepare_unet(plain, RECIPE)
    given = inputs()
    wanted = plain(*given)
    rows = owed_rows(ready)
    assert len(rows) == 8 + 4 * 4 + 2 + 1 + 1  # resnets, transformers, resamplers, the end, times
    for module, name in rows:
        kept = module[name]
        module[name] = mx.zeros_like(kept)
        assert error(ready(*given), wanted) > OTHER, (type(module).__name__, name)
        module[name] = kept
    assert error(ready(*given), wanted) < SAME


def test_small_maps_are_convolved_by_products(sd1, monkeypatch):
    given = inputs(2, 17, 19)
    wanted = sd1(*given)
    by_product = prepare.Convolution.on_neighbours
    seen = []

    def watched(self, x):
        seen.append(x.shape)
        return by_product(self, x)

    monkeypatch.setattr(prepare.Convolution, "on_neighbours", watched)
    for pixels, count in ((0, 0), (5 * 5, 24), (17 * 19, 44)):  # of 22 residual blocks, two each
        ready = prepare_unet(sd1, replace(RECIPE, unfold_pixels=pixels))
        seen.clear()
        assert error(ready(*given), wanted) < SAME
        assert len(seen) == count
    for block in leaves(ready, Resnet):  # the control: neighbours in another order
        block.conv1.weight = block.conv1.weight.transpose(0, 2, 1, 3)
    assert error(ready(*given), wanted) > OTHER


def test_scores_are_bounded_by_the_recipe(sd1):
    given = inputs(2)
    bounded = replace(RECIPE, score_bytes=2 * 4 * 256 * 4 * 7)  # seven queries at a time
    assert differs(sd1, prepare_unet(sd1, bounded), *given) < SAME


# Heads -------------------------------------------------------------------------------------------

METAL = replace(RECIPE, backend="metal")
WIDE = {  # heads of 40, which are padded to 64; of 80, which are not; of 160, beyond all kernels
    "block_out_channels": (160, 160, 160),
    "transformer_layers": (1, 1, 0),
    "num_attention_heads": (4, 2, 1),
    "layers_per_block": 1,
}


@pytest.fixture(scope="module")
def wide():
    return unet(**WIDE)


def blocks(ready):
    return [block for each in leaves(ready, Transformer) for block in each.blocks]


def test_heads_are_padded_to_what_metal_fuses(wide):
    ready = prepare_unet(wide, METAL)
    assert differs(wide, ready) < SAME
    widths = {
        block._heads: block.qkv.weight.shape[0] // 3 // block._heads for block in blocks(ready)
    }
    assert widths == {4: 64, 2: 80, 1: 160}
    assert {b.kv.weight.shape[0] // 2 // 4 for b in blocks(ready) if b._heads == 4} == {64}
    for block in blocks(ready):  # the control: scores scaled by the padded width
        block._scale = (block.qkv.weight.shape[0] // 3 // block._heads) ** -0.5
    assert differs(wide, ready) > OTHER


def test_elsewhere_heads_stay(wide):
    for backend in ("cpu", "cuda"):
        ready = prepare_unet(wide, replace(RECIPE, backend=backend))
        assert {block.qkv.weight.shape[0] for block in blocks(ready)} == {3 * 160}


def test_quantised_heads_are_padded_as_they_come():
    facts = {"block_out_channels": (160, 64), "transformer_layers": (1, 0)}
    plain = unet(**facts, num_attention_heads=(4, 1), layers_per_block=1)
    quantize(plain, 4)
    ready = prepare_unet(plain, METAL)
    assert {(block._heads, block._pad) for block in blocks(ready)} == {(4, 24), (1, 0)}
    assert differs(plain, ready) < SAME
    for block in blocks(ready):  # the control: heads that nobody cuts back
        block._pad = 0
        block._scale *= 1.5
    assert differs(plain, ready) > OTHER


def test_heads_of_which_some_products_are_quantised_and_some_are_not():
    """A row of 40 numbers has no group of 32, the prompt's has."""
    facts = {**SMALL, "block_out_channels": (40, 80), "num_attention_heads": (4, 4)}
    plain = unet(**facts)
    quantize(plain, 8)
    attention = plain.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    assert isinstance(attention.to_k, nn.QuantizedLinear)
    assert isinstance(attention.to_q, nn.Linear)
    for recipe in (RECIPE, METAL):
        assert differs(plain, prepare_unet(plain, recipe)) < SAME


# Few bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("facts", [SD1, XL], ids=["sd1", "xl"])
def test_a_quantised_unet(bits, facts):
    plain = unet(**facts)
    given = inputs()
    exact = plain(*given)
    quantize(plain, bits)
    wanted = plain(*given)
    assert error(exact, wanted) > OTHER  # the control: quantising is seen
    for pixels in (0, 8 * 8):
        ready = prepare_unet(plain, replace(RECIPE, unfold_pixels=pixels))
        assert error(ready(*given), wanted) < SAME


def test_the_last_products_of_a_transformer_are_one(sd1):
    recipe = replace(RECIPE, merges_outputs=True)
    for plain in (sd1, unet(**XL)):  # whose transformers have several blocks
        ready = prepare_unet(plain, recipe)
        transformers = leaves(ready, Transformer)
        assert transformers and not any("proj_out" in each for each in transformers)
        assert differs(plain, ready) < SAME
    last = transformers[0].blocks[-1].ff_out  # the control
    last.weight = mx.roll(last.weight, 1, axis=1)
    assert differs(plain, ready) > OTHER


def test_quantised_products_are_not_merged():
    plain = unet(**SD1)
    quantize(plain, 8)
    ready = prepare_unet(plain, replace(RECIPE, merges_outputs=True))
    assert all("proj_out" in each for each in leaves(ready, Transformer))
    assert differs(plain, ready) < SAME


def shortcuts(ready):
    return [block for block in leaves(ready, Resnet) if "shortcut" in block]


def test_a_skip_is_joined_before_its_shortcut(sd1):
    ready = prepare_unet(sd1, RECIPE)
    joined = [b for b in shortcuts(ready) if b.shortcut.weight.shape[1] == b.shift1.shape[1]]
    assert len(joined) == len(shortcuts(ready)) == 13  # of the way down one, which has no skip
    assert differs(sd1, ready, *inputs()) < SAME
    block = joined[1]
    block.shortcut.weight = mx.roll(block.shortcut.weight, 1, axis=1)  # the control
    assert differs(sd1, ready, *inputs()) > OTHER


# Times and prompts -------------------------------------------------------------------------------


def test_times_are_made_together_or_alone(sd1):
    ready = prepare_unet(sd1, RECIPE)
    every = mx.array([999.0, 801.0, 400.25, 13.5, 0.0])
    together = ready.times(every)
    alone = mx.concatenate([ready.times(every[i : i + 1]) for i in range(5)])
    assert together.dtype == mx.float32
    assert error(together, alone) < SAME
    assert error(together[::-1], alone) > OTHER


def test_a_prompt_is_read_once_for_many_steps(sd1, monkeypatch):
    ready = prepare_unet(sd1, RECIPE)
    latents, times, context = inputs(2)
    prompt = ready.prompt(context)
    assert len(prompt) == len(blocks(ready)) == 16
    monkeypatch.setattr(prepare.Block, "keys_values", None)  # nobody asks again
    for time in (times, times[::-1]):
        found = ready.predict(latents, ready.times(time), prompt)
        assert error(found, sd1(latents, time, context)) < SAME
    assert len(prompt) == 16
    found = ready.predict(latents, ready.times(times), [prompt[1], prompt[0], *prompt[2:]])
    assert error(found, sd1(latents, times, context)) > OTHER


# Weights -----------------------------------------------------------------------------------------


def test_matrices_that_are_fixed_are_those_of_the_weights(sd1):
    given = inputs()
    ready = prepare_unet(sd1, replace(RECIPE, unfold_pixels=5 * 5))
    ready.fix()
    assert differs(sd1, ready, *given) < SAME
    before = ready(*given)
    product = leaves(ready, Product)[0]
    product.weight = 2 * product.weight
    assert error(ready(*given), before) == 0  # the control: what is fixed is what is used
    ready.fix()
    assert error(ready(*given), before) > OTHER


def test_constants_of_norms_and_debts_are_float32_whatever_the_weights():
    plain = unet(**SMALL)
    plain.set_dtype(mx.float16)
    ready = prepare_unet(plain, RECIPE)
    assert {product.weight.dtype for product in leaves(ready, Product)} == {mx.float16}
    for norm in leaves(ready, prepare.MapNorm):
        assert norm.constants.weight.dtype == norm.constants.bias.dtype == mx.float32
    assert {module[name].dtype for module, name in owed_rows(ready)} == {mx.float32}
    assert {block.norm1_weight.dtype for block in blocks(ready)} == {mx.float32}
    assert ready.times(mx.array([5.0])).dtype == mx.float32


def test_half_precision_stays_near_and_keeps_its_type():
    exact = unet(**SMALL)
    given = inputs(2)
    wanted = exact(*given)
    exact.set_dtype(mx.float16)
    ready = prepare_unet(exact, RECIPE)
    found = ready(*given)
    assert found.dtype == mx.float16
    found = found.astype(mx.float32)
    cosine = (found * wanted).sum() / mx.sqrt(mx.square(found).sum() * mx.square(wanted).sum())
    assert cosine.item() > 0.9999


# The autoencoder ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def autoencoder():
    return vae()


def coded(network, half):
    if half == "decoder":
        return network.decode(normal(2, 8, 10, 4, seed=4))
    return mx.concatenate(network.encode(normal(2, 32, 40, 3, seed=3)), axis=-1)


HALVES = ("encoder", "decoder")


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("in_stages", [False, True])
def test_an_autoencoder(autoencoder, half, in_stages, monkeypatch):
    ready = prepare_vae(autoencoder, replace(RECIPE, has_phases=in_stages))
    waits = []
    evaluate = mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda *made: (waits.append(made), evaluate(*made)))
    ready[half].in_stages = in_stages
    assert error(coded(ready, half), coded(autoencoder, half)) < SAME
    assert len(waits) == (len(ready[half].steps) if in_stages else 0)


@pytest.mark.parametrize("half", HALVES)
def test_small_maps_of_an_autoencoder_are_convolved_by_products(autoencoder, half):
    ready = prepare_vae(autoencoder, replace(RECIPE, unfold_pixels=32 * 40))
    assert error(coded(ready, half), coded(autoencoder, half)) < SAME


def test_a_large_map_is_waited_for_when_others_are_under_way(autoencoder, monkeypatch):
    ready = prepare_vae(autoencoder, RECIPE)
    ready.decoder.in_stages = True
    begin, wait, running, longest = mx.async_eval, mx.eval, [], []
    monkeypatch.setattr(mx, "async_eval", lambda maps: (running.append(maps), begin(maps)))
    monkeypatch.setattr(
        mx, "eval", lambda maps: (longest.append(len(running)), running.remove(maps), wait(maps))
    )
    latents = normal(1, 8, 10, 4, seed=4)
    for bound, most in ((1, 2), (10**9, 0)):
        monkeypatch.setattr(prepare, "AHEAD_BYTES", bound)
        ready.decode(latents)
        assert (max(longest) if longest else 0) == most
        assert len(longest) == (len(ready.decoder.steps) - 1 if most else 0)
        running.clear(), longest.clear()


@pytest.mark.parametrize("has_phases", [False, True])
def test_steps_of_an_autoencoder_are_traced_once_for_a_size(autoencoder, has_phases, monkeypatch):
    ready, traced = prepare_vae(autoencoder, replace(RECIPE, has_phases=has_phases)), []
    ready.compile()
    described = prepare.Half._step
    monkeypatch.setattr(
        prepare.Half,
        "_step",
        lambda half, *given: (traced.append(given), described(half, *given))[1],
    )
    steps = len(ready.decoder.steps)
    sizes = [(1, 8, 10), (1, 8, 10), (1, 10, 8), (2, 8, 10), (1, 10, 8)]  # of as many pixels, too
    for size, count in zip(sizes, (1, 1, 2, 3, 3), strict=True):
        latents = normal(*size, 4, seed=4)
        assert error(ready.decode(latents), autoencoder.decode(latents)) < SAME
        assert len(traced) == count * steps
    monkeypatch.setattr(prepare, "TRACES", len(ready.decoder._traced))
    ready.decode(normal(1, 6, 6, 4))
    assert len(ready.decoder._traced) == steps
    for half in HALVES:
        assert error(coded(ready, half), coded(autoencoder, half)) < SAME


def test_other_weights_for_a_while_are_not_those_that_were_traced(autoencoder):
    ready = prepare_vae(autoencoder, RECIPE)
    ready.set_dtype(mx.float16)
    ready.compile()
    latents = normal(1, 8, 10, 4, seed=4)
    before, kept = ready.decode(latents), ready.parameters()
    ready.update(tree_map(lambda weight: 2 * weight.astype(mx.float32), kept))
    wide = ready.decode(latents)
    assert wide.dtype == mx.float32 and error(wide, before.astype(mx.float32)) > OTHER
    ready.update(kept)
    assert mx.array_equal(ready.decode(latents), before)


def test_a_doubling_is_part_of_its_convolution(autoencoder):
    ready = prepare_vae(autoencoder, replace(RECIPE, has_phases=True))
    assert not leaves(ready.decoder, prepare.Resample) and leaves(ready.encoder, prepare.Resample)
    wanted = coded(autoencoder, "decoder")
    assert error(coded(ready, "decoder"), wanted) < SAME
    for found in leaves(ready.decoder, prepare.Doubling):
        first, second, *others = mx.split(found.conv.weight, 4)
        found.conv.weight = mx.concatenate([second, first, *others])
        assert error(coded(ready, "decoder"), wanted) > OTHER
        found.conv.weight = mx.concatenate([first, second, *others])


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("has_phases", [False, True])
def test_an_autoencoder_pays_what_it_owes(autoencoder, half, has_phases):
    ready = prepare_vae(autoencoder, replace(RECIPE, has_phases=has_phases))
    wanted = coded(autoencoder, half)
    rows = owed_rows(ready[half])
    assert len(rows) == {"encoder": 14, "decoder": 20}[half]
    for module, name in rows:
        kept = module[name]
        module[name] = mx.zeros_like(kept)
        assert error(coded(ready, half), wanted) > OTHER, (type(module).__name__, name)
        module[name] = kept


def test_the_encoder_pads_right_and_below_only(autoencoder):
    ready = prepare_vae(autoencoder, RECIPE)
    for step in leaves(ready.encoder, prepare.Resample):
        assert not step._symmetric
        step._symmetric = True
    assert error(coded(ready, "encoder"), coded(autoencoder, "encoder")) > OTHER


# Recipes -----------------------------------------------------------------------------------------


def test_a_backend_that_does_not_run_is_made_ready_for_without_kernels():
    for backend in ("metal", "cuda"):
        recipe = Recipe.usual(mx.float16, backend=backend)
        assert recipe.backend == backend and isinstance(recipe.kernels, Plain)
    assert Recipe.usual(mx.float16, backend="cuda").unfold_pixels > 0
    assert Recipe.usual(mx.float16, backend="metal").unfold_pixels == 0
    assert Recipe.usual(mx.float32).backend == "cpu"


@pytest.mark.parametrize(
    ("width", "padded"), [(8, 64), (40, 64), (64, 64), (88, 96), (128, 128), (160, 160)]
)
def test_head_widths(width, padded):
    assert METAL.head_width(width) == padded
    assert RECIPE.head_width(width) == width
