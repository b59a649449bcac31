"""Every network through the same checks: shapes, types, batches, sizes, and what it refuses."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_maple.models import (
    TAESD,
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextEncoder,
    TAESDConfig,
    UNet,
    UNetConfig,
    VAEConfig,
)

UNET = UNetConfig(
    block_out_channels=(16, 32, 32, 32),
    num_attention_heads=(2, 4, 2, 2),
    cross_attention_dim=24,
    norm_num_groups=8,
)
VAE = VAEConfig(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4)
CLIP = CLIPTextConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    eos_token_id=63,
    projection_dim=12,
)
TINY = TAESDConfig(width=8)


@dataclass(frozen=True)
class Case:
    """One way through a network.

    Attributes:
        build: makes the module.
        inputs: a generator and a batch size to the arguments of ``call``.
        call: the module and its arguments to the outputs, whose first axis is the batch.
        shapes: of one sample's outputs.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[np.random.Generator, int], list[np.ndarray]]
    call: Callable[..., tuple[mx.array, ...]]
    shapes: tuple[tuple[int, ...], ...]


def _unet(h: int, w: int, config: UNetConfig = UNET, tokens: int = 7) -> Case:
    return Case(
        lambda: UNet(config),
        lambda random, batch: [
            random.standard_normal((batch, h, w, config.in_channels), np.float32),
            random.uniform(0, 999, batch).astype(np.float32),
            random.standard_normal((batch, tokens, config.cross_attention_dim), np.float32),
        ],
        lambda unet, *args: (unet(*args),),
        ((h, w, config.out_channels),),
    )


def _tokens(random: np.random.Generator, batch: int) -> list[np.ndarray]:
    ids = random.integers(0, 63, (batch, 11))
    for row in ids:
        row[random.integers(1, 11) :] = 63
    return [ids]


def _images(h: int, w: int) -> Callable[[np.random.Generator, int], list[np.ndarray]]:
    return lambda random, batch: [random.uniform(-1, 1, (batch, h, w, 3)).astype(np.float32)]


def _latents(h: int, w: int) -> Callable[[np.random.Generator, int], list[np.ndarray]]:
    return lambda random, batch: [random.standard_normal((batch, h, w, 4), np.float32)]


CASES = {
    "unet": _unet(8, 8),
    "unet, odd sizes": _unet(9, 13),
    "unet, one cell": _unet(1, 1),
    "unet, a long strip": _unet(2, 31),
    "unet, nine channels in": _unet(8, 8, UNetConfig(**{**vars(UNET), "in_channels": 9}), tokens=1),
    "unet, three layers, deep transformers, two levels": _unet(
        5,
        8,
        UNetConfig(
            block_out_channels=(8, 24),
            layers_per_block=3,
            transformer_layers=(0, 2),
            mid_transformer_layers=3,
            num_attention_heads=(1, 3),
            cross_attention_dim=10,
            norm_num_groups=4,
        ),
    ),
    "unet, one level, one layer": _unet(
        3,
        4,
        UNetConfig(
            block_out_channels=(8,),
            layers_per_block=1,
            transformer_layers=(1,),
            num_attention_heads=(2,),
            cross_attention_dim=6,
            norm_num_groups=2,
        ),
    ),
    "text encoder": Case(
        lambda: CLIPTextEncoder(CLIP),
        _tokens,
        lambda clip, ids: clip(ids),
        ((11, 32), (11, 32), (12,)),
    ),
    "text encoder, clip skip": Case(
        lambda: CLIPTextEncoder(CLIP),
        _tokens,
        lambda clip, ids: clip(ids, clip_skip=3),
        ((11, 32), (11, 32), (12,)),
    ),
    "vae encode": Case(
        lambda: AutoencoderKL(VAE),
        _images(24, 40),
        lambda vae, x: vae.encode(x),
        ((3, 5, 4), (3, 5, 4)),
    ),
    "vae decode": Case(
        lambda: AutoencoderKL(VAE),
        _latents(3, 5),
        lambda vae, z: (vae.decode(z),),
        ((24, 40, 3),),
    ),
    "taesd encode": Case(
        lambda: TAESD(TINY), _images(24, 40), lambda taesd, x: (taesd.encode(x),), ((3, 5, 4),)
    ),
    "taesd decode": Case(
        lambda: TAESD(TINY), _latents(3, 5), lambda taesd, z: (taesd.decode(z),), ((24, 40, 3),)
    ),
}
COSINES = {mx.float32: 1 - 1e-9, mx.float16: 0.9999, mx.bfloat16: 0.999}


def _run(case: Case, dtype: mx.Dtype, batch: int) -> tuple[list[mx.array], nn.Module, list]:
    mx.random.seed(3)
    module = case.build()
    module.set_dtype(dtype)
    inputs = [mx.array(a) for a in case.inputs(np.random.default_rng(5), batch)]
    outputs = list(case.call(module, *inputs))
    mx.eval(outputs)
    return outputs, module, inputs


def _cosine(a: mx.array, b: mx.array) -> float:
    x = np.array(a.astype(mx.float32), np.float64).ravel()
    y = np.array(b.astype(mx.float32), np.float64).ravel()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", COSINES, ids=str)
def test_shape_dtype_and_precision(case: Case, dtype: mx.Dtype):
    outputs, _, _ = _run(case, dtype, batch=2)
    exact, _, _ = _run(case, mx.float32, batch=2)
    for output, reference, shape in zip(outputs, exact, case.shapes, strict=True):
        assert output.shape == (2, *shape)
        assert output.dtype == dtype
        assert mx.isfinite(output).all()
        assert _cosine(output, reference) >= COSINES[dtype]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_batch_is_its_samples(case: Case):
    outputs, module, inputs = _run(case, mx.float32, batch=2)
    for i in range(2):
        alone = case.call(module, *(a[i : i + 1] for a in inputs))
        for one, both in zip(alone, outputs, strict=True):
            # A BLAS may sum in another order for another number of rows: equal to rounding.
            np.testing.assert_allclose(one[0], both[i], rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_forward_pass_is_pure(case: Case):
    outputs, module, inputs = _run(case, mx.float32, batch=2)
    before = [np.array(a) for a in inputs]
    key = [np.array(k) for k in mx.random.state]
    again = case.call(module, *inputs)
    mx.eval(again)
    for a, b in zip(again, outputs, strict=True):
        assert np.array_equal(a, b)
    assert all(np.array_equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(mx.random.state, key, strict=True))


@pytest.mark.parametrize("name", ["unet, one level, one layer", "text encoder"])
def test_compiles_to_the_same_numbers(name: str):
    """Few cases only: on a CPU each compiled chain costs a run of the C++ compiler."""
    case = CASES[name]
    outputs, module, inputs = _run(case, mx.float32, batch=2)
    compiled = mx.compile(lambda *args: tuple(case.call(module, *args)))(*inputs)
    for a, b in zip(compiled, outputs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_float32_latents_meet_half_precision_weights():
    """The sampler's state is float32; the network casts it at its door."""
    _, unet, (latents, timesteps, context) = _run(CASES["unet"], mx.float16, batch=2)
    assert unet(latents, timesteps, context).dtype == mx.float16
    _, vae, (latents,) = _run(CASES["vae decode"], mx.bfloat16, batch=1)
    assert vae.decode(latents).dtype == mx.bfloat16


# Number of parameters and arrays, counted from the published checkpoints.
PUBLISHED = {
    "unet": (lambda: UNet(UNetConfig()), 859_520_964, 686),
    "vae": (lambda: AutoencoderKL(VAEConfig()), 83_653_863, 248),
    "text encoder": (lambda: CLIPTextEncoder(CLIPTextConfig()), 123_060_480, 196),
    "taesd": (lambda: TAESD(TAESDConfig()), 2_445_063, 134),
}


@pytest.mark.parametrize(("build", "parameters", "arrays"), PUBLISHED.values(), ids=PUBLISHED)
def test_true_sizes(build: Callable[[], nn.Module], parameters: int, arrays: int):
    flat = tree_flatten(build().parameters())  # lazy: nothing of this is computed
    assert sum(array.size for _, array in flat) == parameters
    assert len(flat) == arrays


NAMES = {
    "unet": """
        conv_in.weight time_embedding.linear_1.bias conv_norm_out.weight conv_out.bias
        down_blocks.0.resnets.1.time_emb_proj.weight down_blocks.1.resnets.0.conv_shortcut.weight
        down_blocks.2.downsamplers.0.conv.weight down_blocks.0.attentions.0.norm.weight
        down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight
        mid_block.attentions.0.transformer_blocks.0.ff.proj_in.bias mid_block.resnets.1.norm2.bias
        up_blocks.0.upsamplers.0.conv.bias up_blocks.3.attentions.2.proj_out.weight
        up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_out.bias""",
    "vae": """
        quant_conv.weight post_quant_conv.bias encoder.conv_in.weight
        encoder.down_blocks.0.downsamplers.0.conv.weight encoder.mid_block.resnets.1.conv2.bias
        encoder.mid_block.attentions.0.group_norm.weight encoder.conv_norm_out.bias
        decoder.mid_block.attentions.0.to_out.weight decoder.up_blocks.2.upsamplers.0.conv.bias
        decoder.up_blocks.2.resnets.0.conv_shortcut.weight decoder.up_blocks.3.resnets.2.norm1.bias
        """,
    "text encoder": """
        embeddings.token_embedding.weight embeddings.position_embedding.weight
        encoder.layers.11.self_attn.k_proj.bias encoder.layers.0.layer_norm2.weight
        encoder.layers.5.mlp.fc2.bias final_layer_norm.weight""",
    "taesd": """
        encoder.layers.0.bias encoder.layers.1.conv.4.weight encoder.layers.2.weight
        encoder.layers.14.weight decoder.layers.0.weight decoder.layers.2.conv.0.bias
        decoder.layers.6.weight decoder.layers.17.conv.2.weight decoder.layers.18.bias""",
}


@pytest.mark.parametrize("network", NAMES)
def test_published_names(network: str):
    names = {name for name, _ in tree_flatten(PUBLISHED[network][0]().parameters())}
    assert set(NAMES[network].split()) <= names


@pytest.mark.parametrize("network", PUBLISHED)
def test_load_is_strict(network: str):
    build = {
        "unet": lambda: UNet(UNET),
        "vae": lambda: AutoencoderKL(VAE),
        "text encoder": lambda: CLIPTextEncoder(CLIP),
        "taesd": lambda: TAESD(TINY),
    }[network]
    weights = tree_flatten(tree_map(lambda a: a + 1, build().parameters()))
    module = build()
    module.load_weights(weights)
    assert all(mx.array_equal(a, b) for (_, a), (_, b) in zip(weights, _flat(module), strict=True))
    with pytest.raises(ValueError, match="Missing 1 parameters"):
        build().load_weights(weights[:-1])
    with pytest.raises(ValueError, match="not in model"):
        build().load_weights([*weights, ("conv_shortcut.weight", mx.zeros((1,)))])


def _flat(module: nn.Module) -> list[tuple[str, mx.array]]:
    return tree_flatten(module.parameters())


class TestRefusals:
    """Each wrong input is a ValueError that names what came and what was expected."""

    latents = mx.zeros((2, 8, 8, 4))
    context = mx.zeros((2, 7, 24))

    @pytest.fixture
    def unet(self) -> UNet:
        return UNet(UNET)

    @pytest.fixture
    def vae(self) -> AutoencoderKL:
        return AutoencoderKL(VAE)

    def test_unet_latents(self, unet: UNet):
        with pytest.raises(ValueError, match=r"\(B, rows, columns, 4\), got \(2, 4, 8, 8\).*NCHW"):
            unet(self.latents.transpose(0, 3, 1, 2), 1.0, self.context)
        with pytest.raises(ValueError, match=r"got \(2, 8, 8, 9\)\.$"):
            unet(mx.zeros((2, 8, 8, 9)), 1.0, self.context)
        with pytest.raises(ValueError, match=r"got \(8, 8, 4\)"):
            unet(self.latents[0], 1.0, self.context)

    @pytest.mark.parametrize("shape", [(2, 7, 32), (1, 7, 24), (3, 7, 24), (7, 24), (2, 24)])
    def test_unet_context(self, unet: UNet, shape: tuple[int, ...]):
        with pytest.raises(ValueError, match=r"\[UNet\] expected context \(2, T, 24\), got"):
            unet(self.latents, 1.0, mx.zeros(shape))

    @pytest.mark.parametrize("shape", [(3,), (2, 1), (0,)])
    def test_unet_timesteps(self, unet: UNet, shape: tuple[int, ...]):
        with pytest.raises(ValueError, match=r"\[UNet\] expected timesteps \(\) or \(2,\), got"):
            unet(self.latents, mx.zeros(shape), self.context)

    def test_vae(self, vae: AutoencoderKL):
        with pytest.raises(ValueError, match=r"latents \(B, rows, columns, 4\).*NCHW"):
            vae.decode(mx.zeros((1, 4, 8, 8)))
        with pytest.raises(ValueError, match=r"images \(B, rows, columns, 3\).*NCHW"):
            vae.encode(mx.zeros((1, 3, 64, 64)))
        with pytest.raises(ValueError, match=r"multiples of 8, got 60x64 pixels"):
            vae.encode(mx.zeros((1, 64, 60, 3)))

    def test_taesd(self):
        taesd = TAESD(TINY)
        with pytest.raises(ValueError, match=r"latents \(B, rows, columns, 4\).*NCHW"):
            taesd.decode(mx.zeros((1, 4, 8, 8)))
        with pytest.raises(ValueError, match=r"images \(B, rows, columns, 3\), got \(1, 8, 8, 4\)"):
            taesd.encode(mx.zeros((1, 8, 8, 4)))
        with pytest.raises(ValueError, match=r"multiples of 8, got 64x60 pixels"):
            taesd.encode(mx.zeros((1, 60, 64, 3)))

    def test_text_encoder(self):
        clip = CLIPTextEncoder(CLIP)
        ids = mx.zeros((1, 5), mx.int32)
        with pytest.raises(ValueError, match=r"ids \(B, 1\.\.77\), got \(1, 78\)"):
            clip(mx.zeros((1, 78), mx.int32))
        with pytest.raises(ValueError, match=r"got \(5,\)"):
            clip(ids[0])
        with pytest.raises(ValueError, match=r"integer ids, got mlx\.core\.float32"):
            clip(mx.zeros((1, 5)))
        for layer in (0, 4, -1):
            with pytest.raises(ValueError, match=f"clip_skip is 1 to 3, got {layer}"):
                clip(ids, clip_skip=layer)


class TestTimesteps:
    def test_one_for_all(self):
        _, unet, (latents, _, context) = _run(CASES["unet"], mx.float32, batch=2)
        each = unet(latents, mx.array([250.5, 250.5]), context)
        for same in (250.5, mx.array(250.5), mx.array([250.5])):
            np.testing.assert_allclose(unet(latents, same, context), each, rtol=0, atol=2e-5)

    def test_whole_numbers_may_be_integers(self):
        _, unet, (latents, _, context) = _run(CASES["unet"], mx.float32, batch=2)
        floats = unet(latents, mx.array([7.0, 998.0]), context)
        assert mx.array_equal(unet(latents, mx.array([7, 998]), context), floats)

    def test_fractions_and_samples_matter(self):
        _, unet, (latents, _, context) = _run(CASES["unet"], mx.float32, batch=2)
        whole = unet(latents, mx.array([7.0, 998.0]), context)
        part = unet(latents, mx.array([7.5, 998.0]), context)
        assert not np.allclose(part[0], whole[0], atol=1e-4)
        np.testing.assert_allclose(part[1], whole[1], rtol=0, atol=2e-5)


class TestTextStates:
    def test_clip_skip_renorms_an_inner_layer(self):
        (_, penultimate, pooled), clip, (ids,) = _run(CASES["text encoder"], mx.float32, batch=2)
        skipped = clip(ids, clip_skip=2)
        assert mx.array_equal(skipped.last, clip.final_layer_norm(penultimate))
        assert mx.array_equal(skipped.penultimate, penultimate)
        assert mx.array_equal(skipped.pooled, pooled)

    def test_pooled_at_the_first_end_not_at_the_largest_id(self):
        """Textual inversion adds ids above the end of text; padding repeats it."""
        config = CLIPTextConfig(**{**vars(CLIP), "vocab_size": 70, "projection_dim": None})
        clip = CLIPTextEncoder(config)
        states = clip(mx.array([[1, 69, 5, 63, 63, 63], [2, 3, 4, 5, 6, 7]]))
        assert mx.array_equal(states.pooled[0], states.last[0, 3])
        assert mx.array_equal(states.pooled[1], states.last[1, 0])  # no end: as the reference

    @pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
    def test_later_tokens_are_not_seen(self, dtype: mx.Dtype):
        clip = CLIPTextEncoder(CLIP)
        clip.set_dtype(dtype)
        ids = np.random.default_rng(0).integers(0, 62, (1, 77))
        changed = ids.copy()
        changed[0, 40:] = 62
        a, b = clip(mx.array(ids)).last, clip(mx.array(changed)).last
        assert mx.array_equal(a[:, :40], b[:, :40])
        assert not mx.array_equal(a[:, 40], b[:, 40])
        assert mx.isfinite(a).all()
