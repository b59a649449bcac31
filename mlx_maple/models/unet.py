"""UNet: the network that looks at noisy latents, a time and a prompt, and tells the noise.

Legend   B batch; h, w latent rows and columns; C channels; T prompt tokens; D their width.
         Channels last.
Source   Ronneberger et al. 2015 (arXiv:1505.04597); Ho et al. 2020 (arXiv:2006.11239); Rombach et
         al. 2022 (arXiv:2112.10752), section 3.3; CompVis/stable-diffusion @21f890f
         ldm/modules/diffusionmodules/openaimodel.py, class UNetModel.
Variants Podell et al. 2023 (arXiv:2307.01952), table 1 and section 2.2: the vector beside the
         time. Distilled networks leave out blocks: Kim et al. 2023 (arXiv:2305.15798), Gupta et al.
         2024 (arXiv:2401.02677).
Differs  Blocks are cut as in diffusers 0.42.1 (models/unets/unet_2d_condition.py), and bear its
         names; 1x1 convolutions are Linear layers. Tolerances: tests/parity/test_unet_parity.py.
Names    convert/maple_convert/layouts/unet.py maps published checkpoints onto these.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_maple.models import checks
from mlx_maple.models.attention import Context, SpatialTransformer
from mlx_maple.models.layers import GroupNorm, TimeEmbedding, sinusoids
from mlx_maple.models.resnet import Downsample, ResnetBlock, Upsample

NORM_EPS = 1e-5  # residual blocks and the last norm; the transformers' own norm has 1e-6
TIME_EXPANSION = 4  # the time embedding is this many times as wide as the first level


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Architecture facts of one published UNet; the defaults are SD 1.x.

    Attributes:
        in_channels: 4 latent channels; 8 and 9 where an edit or inpainting model is given more.
        out_channels: 4.
        block_out_channels: C at each level, fine to coarse. Each further level halves h and w.
        layers_per_block: residual blocks a level on the way down; one more on the way up.
        transformer_layers: depth of the transformers at each level; 0 means none there.
        up_transformer_layers: the same on the way up, where it is not as on the way down: a depth
            for each residual block, from the coarsest level's first to the finest level's last.
        num_attention_heads: heads at each level. Published configs call it ``attention_head_dim``.
        cross_attention_dim: D of the prompt's states.
        mid_transformer_layers: depth of the transformer in the middle. 0 is one residual block
            alone (SSD-1B), None no middle at all (the small models distilled from SD 1.x).
        norm_num_groups: groups of every GroupNorm.
        vector_channels: V of the vector that is told beside the time, or None: SDXL's pooled text
            and sizes (2816; the refiner's 2560).
        time_cond_dim: waves of the guidance scale that a latent consistency model is told; None
            where guidance takes a second pass, as everywhere else.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    transformer_layers: tuple[int, ...] = (1, 1, 1, 0)
    num_attention_heads: tuple[int, ...] = (8, 8, 8, 8)
    cross_attention_dim: int = 768
    mid_transformer_layers: int | None = 1
    norm_num_groups: int = 32
    up_transformer_layers: tuple[int, ...] | None = None
    vector_channels: int | None = None
    time_cond_dim: int | None = None

    def __post_init__(self) -> None:
        def check(name: str, low: int, high: int) -> None:
            checks.integer("UNetConfig", name, getattr(self, name), low, high)

        def check_levels(name: str, low: int, high: int, length: int | None = None) -> None:
            value = checks.integers("UNetConfig", name, getattr(self, name), low, high, length)
            object.__setattr__(self, name, value)

        check("in_channels", 1, checks.MAX_WIDTH)
        check("out_channels", 1, checks.MAX_WIDTH)
        check("layers_per_block", 1, checks.MAX_LAYERS)
        check("cross_attention_dim", 1, checks.MAX_WIDTH)
        if self.mid_transformer_layers is not None:
            check("mid_transformer_layers", 0, checks.MAX_LAYERS)
        if self.vector_channels is not None:
            check("vector_channels", 1, checks.MAX_WIDTH)
        check("norm_num_groups", 1, checks.MAX_WIDTH)
        if self.time_cond_dim is not None:
            check("time_cond_dim", 4, checks.MAX_WIDTH)
        check_levels("block_out_channels", 2, checks.MAX_WIDTH)
        widths = self.block_out_channels
        check_levels("transformer_layers", 0, checks.MAX_LAYERS, len(widths))
        check_levels("num_attention_heads", 1, checks.MAX_WIDTH, len(widths))
        checks.multiples(
            "UNetConfig", "block_out_channels", widths, self.norm_num_groups, "norm_num_groups"
        )
        if self.up_transformer_layers is not None:
            blocks = len(widths) * (self.layers_per_block + 1)
            check_levels("up_transformer_layers", 0, checks.MAX_LAYERS, blocks)
        depths = list(self.transformer_layers)
        for level in range(len(widths)):
            ups = self.up_depths(level)
            if min(ups) == 0 < max(ups):
                raise ValueError(
                    "[UNetConfig] up_transformer_layers: a level has transformers behind every "
                    f"residual block or behind none, got {list(ups)}."
                )
            depths[level] = max(depths[level], *ups)
        depths[-1] = max(depths[-1], self.mid_transformer_layers or 0)
        for width, heads, depth in zip(widths, self.num_attention_heads, depths, strict=True):
            if depth:  # heads are told for levels without transformers too, and mean nothing there
                checks.multiples("UNetConfig", "block_out_channels", [width], heads, "heads there")

    @property
    def kept_states(self) -> int:
        """How many maps the way down leaves for the way up."""
        levels = len(self.block_out_channels)
        return 1 + levels * self.layers_per_block + levels - 1

    def up_depths(self, level: int) -> tuple[int, ...]:
        """Depth of the transformer behind each residual block of a level on the way up.

        Args:
            level: counted from the finest.
        """
        layers = self.layers_per_block + 1
        if self.up_transformer_layers is None:
            return (self.transformer_layers[level],) * layers
        start = (len(self.block_out_channels) - 1 - level) * layers
        return self.up_transformer_layers[start : start + layers]


class DownBlock(nn.Module):
    """One level on the way down: (B, h, w, C_in) to (B, ~h/2, ~w/2, C), and what it passed.

    Every state is kept for the way up. The last level has no ``downsamplers`` and keeps h and w; a
    level of depth 0 has no ``attentions``.
    """

    def __init__(
        self, config: UNetConfig, level: int, in_channels: int, time_channels: int
    ) -> None:
        super().__init__()
        channels = config.block_out_channels[level]
        depth = config.transformer_layers[level]
        self.resnets = [
            ResnetBlock(
                in_channels if i == 0 else channels,
                channels,
                groups=config.norm_num_groups,
                eps=NORM_EPS,
                time_channels=time_channels,
            )
            for i in range(config.layers_per_block)
        ]
        if depth:
            self.attentions = [_transformer(config, level, depth) for _ in self.resnets]
        if level < len(config.block_out_channels) - 1:
            self.downsamplers = [Downsample(channels, symmetric=True)]

    def __call__(
        self,
        x: mx.array,
        time: mx.array,
        context: mx.array | Context,
        feature: mx.array | None = None,
    ) -> tuple[mx.array, list[mx.array]]:
        """Descend a level.

        ``feature`` is a T2I-Adapter's map. Those of SD 1 are added before the halving; SDXL's
        first, for a level without transformers, is made for the halved size.
        """
        passed = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if "attentions" in self:
                x = self.attentions[i](x, context)
            passed.append(x)
        is_late = "attentions" not in self and "downsamplers" in self
        if feature is not None and not is_late:
            passed[-1] = x = x + feature
        if "downsamplers" in self:
            x = self.downsamplers[0](x)
            passed.append(x)
        if feature is not None and is_late:
            passed[-1] = x = x + feature
        return x, passed


class MidBlock(nn.Module):
    """The coarsest level: residual block, transformer, residual block: (B, h, w, C) to the same.

    At depth 0 there is one residual block and no more.
    """

    def __init__(self, config: UNetConfig, time_channels: int) -> None:
        super().__init__()
        channels = config.block_out_channels[-1]
        depth = config.mid_transformer_layers or 0
        self.resnets = [
            ResnetBlock(
                channels,
                channels,
                groups=config.norm_num_groups,
                eps=NORM_EPS,
                time_channels=time_channels,
            )
            for _ in range(2 if depth else 1)
        ]
        if depth:
            self.attentions = [_transformer(config, -1, depth)]

    def __call__(self, x: mx.array, time: mx.array, context: mx.array | Context) -> mx.array:
        x = self.resnets[0](x, time)
        if "attentions" not in self:
            return x
        x = self.attentions[0](x, context)
        return self.resnets[1](x, time)


class UpBlock(nn.Module):
    """One level on the way up: (B, h, w, C_in) and kept states to (B, ~2h, ~2w, C).

    Args:
        config: the whole network's.
        level: counted from the finest, as on the way down.
        in_channels: C_in, from the level below.
        skip_channels: C of each kept state, in the order in which they are taken.
        time_channels: width of the time embedding.
    """

    def __init__(
        self,
        config: UNetConfig,
        level: int,
        in_channels: int,
        skip_channels: list[int],
        time_channels: int,
    ) -> None:
        super().__init__()
        channels = config.block_out_channels[level]
        depths = config.up_depths(level)
        self.resnets = [
            ResnetBlock(
                (in_channels if i == 0 else channels) + skip,
                channels,
                groups=config.norm_num_groups,
                eps=NORM_EPS,
                time_channels=time_channels,
            )
            for i, skip in enumerate(skip_channels)
        ]
        if any(depths):
            self.attentions = [_transformer(config, level, depth) for depth in depths]
        if level > 0:
            self.upsamplers = [Upsample(channels)]

    def __call__(
        self,
        x: mx.array,
        skips: list[mx.array],
        time: mx.array,
        context: mx.array | Context,
        layers: range | None = None,
    ) -> mx.array:
        """Climb a level, taking from the end of ``skips`` what this level needs.

        What is left on top of the stack came from the next finer level and has its size: where
        halving had rounded an odd size up, doubling is cut to it. ``layers`` are some of the
        residual blocks, of which the last has the doubling behind it; None is all of them.
        """
        layers = range(len(self.resnets)) if layers is None else layers
        for i in layers:
            x = self.resnets[i](mx.concatenate([x, skips.pop()], axis=-1), time)
            if "attentions" in self:
                x = self.attentions[i](x, context)
        if "upsamplers" in self and layers.stop == len(self.resnets):
            _, rows, columns, _ = skips[-1].shape
            x = self.upsamplers[0](x, (rows, columns))
        return x


class UNet(nn.Module):
    """Predicts the noise (or velocity) in latents: (B, h, w, C_in) to (B, h, w, C_out)."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        time_channels = TIME_EXPANSION * widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], kernel_size=3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], time_channels, config.time_cond_dim)
        if config.vector_channels is not None:
            self.add_embedding = TimeEmbedding(config.vector_channels, time_channels)

        channels = widths[0]
        kept = [channels]  # C of every state that the way down leaves for the way up
        self.down_blocks = []
        for level, width in enumerate(widths):
            block = DownBlock(config, level, channels, time_channels)
            self.down_blocks.append(block)
            kept += [width] * (len(block.resnets) + ("downsamplers" in block))
            channels = width

        if config.mid_transformer_layers is not None:
            self.mid_block = MidBlock(config, time_channels)

        self.up_blocks = []
        for level in reversed(range(len(widths))):
            taken = [kept.pop() for _ in range(config.layers_per_block + 1)]
            self.up_blocks.append(UpBlock(config, level, channels, taken, time_channels))
            channels = widths[level]

        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, kernel_size=3, padding=1)

    def __call__(
        self,
        latents: mx.array,
        timesteps: mx.array | float,
        context: mx.array,
        vector: mx.array | None = None,
        guidance: mx.array | None = None,
        control: Sequence[mx.array] | None = None,
        features: Sequence[mx.array] | None = None,
        image: Sequence[Sequence[mx.array]] = (),
    ) -> mx.array:
        """Predict lazily; nothing runs until the caller evaluates.

        Args:
            latents: (B, h, w, in_channels), scaled to the sampler's unit variance. Any h and w.
            timesteps: (B,), or one for the whole batch: 0 to 999, fractions allowed. Under
                ``mx.compile`` pass an array, or each new number is traced again.
            context: (B, T, cross_attention_dim), the text encoder's states; any T.
            vector: (B, vector_channels), for a network that has such a width.
            guidance: (B,) guidance scales, for a network that is told them (``time_cond_dim``).
            control: what a ControlNet adds: a map for each kept state, then one for the middle.
            features: what a T2I-Adapter adds: a map for each level on the way down, and perhaps one
                more for the middle.
            image: of each image prompt what every cross-attention sees, (B, S, 2C) in the order of
                their use: ``IPAdapter.keys_values``.

        Returns:
            (B, h, w, out_channels), in the weights' dtype.

        Raises:
            ValueError: if an argument has another shape (an NCHW array?).
        """
        x, skips, time, seen = self.descend(
            latents, timesteps, context, vector, guidance, control, features, image
        )
        for block in self.up_blocks:
            x = block(x, skips, time, seen)
        return self.leave(x)

    def descend(
        self,
        latents: mx.array,
        timesteps: mx.array | float,
        context: mx.array,
        vector: mx.array | None = None,
        guidance: mx.array | None = None,
        control: Sequence[mx.array] | None = None,
        features: Sequence[mx.array] | None = None,
        image: Sequence[Sequence[mx.array]] = (),
    ) -> tuple[mx.array, list[mx.array], mx.array, mx.array | Context]:
        """All before the way up: the middle's map, the kept states, time and context for it."""
        check_inputs(self.config, latents, context, vector)
        check_guidance(self.config, guidance)
        dtype = self.conv_in.weight.dtype
        seen: mx.array | Context = context.astype(dtype)
        if image:
            check_image(self.config, image)
            seen = Context(seen, zip(*_in(dtype, image), strict=True))
        waves = sinusoids(as_times(timesteps, latents.shape[0]), self.config.block_out_channels[0])
        time = self.time_embedding(waves.astype(dtype), guidance)
        if vector is not None:
            time = time + self.add_embedding(vector.astype(dtype))

        x = self.conv_in(latents.astype(dtype))
        skips = [x]
        added = [each.astype(dtype) for each in features or ()]
        for block in self.down_blocks:
            x, passed = block(x, time, seen, added.pop(0) if added else None)
            skips += passed
        if self.config.mid_transformer_layers is not None:
            x = self.mid_block(x, time, seen)
        if added:
            x = x + added.pop(0)
        if control is not None:
            skips, x = controlled(skips, x, control)
        return x, skips, time, seen

    def leave(self, x: mx.array) -> mx.array:
        """What the finest level's last map (B, h, w, C) says."""
        return self.conv_out(nn.silu(self.conv_norm_out(x)))


def controlled(
    skips: list[mx.array], middle: mx.array, control: Sequence[mx.array]
) -> tuple[list[mx.array], mx.array]:
    """The kept states and the middle's with what a ControlNet adds to each.

    Raises:
        ValueError: if there is not one map for each.
    """
    if len(control) != len(skips) + 1:
        raise ValueError(f"[UNet] expected {len(skips) + 1} maps of control, got {len(control)}.")
    added = [each.astype(middle.dtype) for each in control]
    kept = [skip + each for skip, each in zip(skips, added, strict=False)]
    return kept, middle + added[-1]


def check_guidance(config: UNetConfig, guidance: mx.array | None) -> None:
    """Raise unless a network that is told a guidance scale gets one, and no other does.

    Raises:
        ValueError: saying which.
    """
    if (guidance is None) != (config.time_cond_dim is None):
        takes = "takes no" if config.time_cond_dim is None else "is told a"
        raise ValueError(f"[UNet] this network {takes} guidance scale.")


def check_image(config: UNetConfig, image: Sequence[Sequence[mx.array]]) -> None:
    """Raise unless each image prompt has keys and values for every cross-attention.

    Raises:
        ValueError: saying how many there are.
    """
    count = len(attention_channels(config))
    for each in image:
        if len(each) != count:
            expected = f"expected keys and values for {count} cross-attentions"
            raise ValueError(f"[UNet] {expected}, got {len(each)}.")


def attention_channels(config: UNetConfig) -> tuple[int, ...]:
    """C of each cross-attention of a UNet, down, up and the middle last, as adapters count them."""
    widths = config.block_out_channels
    down = [
        width
        for width, depth in zip(widths, config.transformer_layers, strict=True)
        for _ in range(depth * config.layers_per_block)
    ]
    up = [
        widths[level]
        for level in reversed(range(len(widths)))
        for depth in config.up_depths(level)
        for _ in range(depth)
    ]
    return (*down, *up, *[widths[-1]] * (config.mid_transformer_layers or 0))


def _in(dtype: mx.Dtype, image: Sequence[Sequence[mx.array]]) -> list[list[mx.array]]:
    return [[keys_values.astype(dtype) for keys_values in each] for each in image]


def as_times(timesteps: mx.array | float, batch: int) -> mx.array:
    """``timesteps`` as (B,) or (1,).

    Raises:
        ValueError: if there are neither one nor as many as samples.
    """
    times = timesteps if isinstance(timesteps, mx.array) else mx.array(timesteps)
    if times.ndim > 1 or times.size not in (1, batch):
        raise ValueError(f"[UNet] expected timesteps () or ({batch},), got {tuple(times.shape)}.")
    return times.reshape(-1)


def check_inputs(
    config: UNetConfig, latents: mx.array, context: mx.array, vector: mx.array | None = None
) -> None:
    """Raise unless latents, context and vector have the shapes that a UNet takes.

    Raises:
        ValueError: naming both shapes.
    """
    checks.channels_last("UNet", "latents", latents, config.in_channels)
    batch, width = latents.shape[0], config.cross_attention_dim
    if context.ndim != 3 or context.shape[0] != batch or context.shape[2] != width:
        expected = f"({batch}, T, {width})"
        raise ValueError(f"[UNet] expected context {expected}, got {tuple(context.shape)}.")
    found = None if vector is None else tuple(vector.shape)
    wanted = None if config.vector_channels is None else (batch, config.vector_channels)
    if found != wanted:
        raise ValueError(f"[UNet] expected vector {wanted}, got {found}.")


def _transformer(config: UNetConfig, level: int, depth: int) -> SpatialTransformer:
    return SpatialTransformer(
        config.block_out_channels[level],
        config.num_attention_heads[level],
        config.cross_attention_dim,
        depth,
        config.norm_num_groups,
    )
