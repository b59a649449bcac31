"""A ControlNet made ready to draw: the way down of a UNet, rewritten exactly as a UNet's is.

Legend   B batch; h, w rows and columns; C channels; T prompt tokens; D their width.
Source   mlx_maple/models/controlnet.py; the blocks are those of prepare.py.
Differs  The "zero" layers make of each kept map's debt, once, what they would make of it at every
         step. The embedding of the picture, which is made once a drawing, stays as it is.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_maple.engine.prepare import Keys, PreparedUNet, Product, Recipe, Resnet, Transformer
from mlx_maple.engine.traced import Traced
from mlx_maple.models import ControlNet
from mlx_maple.models.controlnet import check_hint
from mlx_maple.models.unet import as_times, check_inputs

# (latents, row of times, keys and values of the prompt, embedded picture) -> maps
Maps = Callable[[mx.array, mx.array, list[Keys], mx.array], list[mx.array]]


class PreparedControlNet(nn.Module):
    """models.ControlNet, made ready: the same arguments, maps and errors.

    Attributes:
        config: the plain network's.
        unet: the way down and the middle, as of a UNet without a way up.
        layers: the last product of each map.
    """

    def __init__(self, network: ControlNet, recipe: Recipe) -> None:
        super().__init__()
        self.config = network.config
        self.controlnet_cond_embedding = network.controlnet_cond_embedding
        self.unet = PreparedUNet(_without_a_way_up(network), recipe)
        for name in ("norm_out", "shift_out", "conv_out", "bias_out"):
            self.unet.pop(name)
        layers = [*network.controlnet_down_blocks, network.controlnet_mid_block]
        self.layers = [Product([layer]) for layer in layers]
        self.shifts = [
            (layer.bias.astype(mx.float32) + product.of(owed)).astype(self.unet.dtype)
            for layer, product, owed in zip(layers, self.layers, self._owed(network), strict=True)
        ]
        self._maps: Maps = self.maps

    def _owed(self, network: ControlNet) -> list[mx.array]:
        """What each kept map owes, and the middle's, float32."""
        kept = [network.conv_in.bias.astype(mx.float32)]
        for steps in self.unet.down:
            for step, behind in zip(steps, [*steps[1:], None], strict=True):
                # A residual block with a transformer behind it leaves the transformer's map.
                if not (isinstance(step, Resnet) and isinstance(behind, Transformer)):
                    kept.append(step.owed)
        return [*kept, self.unet.mid[-1].owed if self.unet.mid else kept[-1]]

    def compile(self) -> None:
        """Trace the maps of a size once, and run that again; the weights stay as they are."""
        self._maps = Traced(self.maps)

    def fix(self) -> None:
        """Evaluate the weights, and what a step would otherwise make of them each time."""
        self.unet.fix()
        mx.eval(
            self.parameters(), [made for each in self.layers if (made := each.fix()) is not None]
        )

    def embed_hint(self, hint: mx.array) -> mx.array:
        """As models.ControlNet: (B, H, W, 3) in [0, 1] to (B, h, w, C)."""
        return self.controlnet_cond_embedding(hint)

    def __call__(
        self,
        latents: mx.array,
        timesteps: mx.array | float,
        context: mx.array,
        hint: mx.array,
        vector: mx.array | None = None,
    ) -> list[mx.array]:
        """As models.ControlNet: same arguments, shapes and errors."""
        check_inputs(self.config, latents, context, vector)
        check_hint(latents, hint)
        times = self.unet.times(as_times(timesteps, latents.shape[0]), vector)
        return self._maps(latents, times, self.unet.prompt(context), hint)

    def maps(
        self, latents: mx.array, times: mx.array, prompt: Sequence[Keys], hint: mx.array
    ) -> list[mx.array]:
        """What to add, of what ``times`` and ``prompt`` of the way down have made."""
        skips = self.unet.begin(latents, times, prompt, hint=hint)
        middle, skips, _ = self.unet.descend(skips, times, prompt)
        kept = [*skips, middle]
        for each in kept:
            each.settle()
        rows = zip(self.layers, self.shifts, kept, strict=True)
        return [layer(x.tokens, shift).reshape(*x.size, -1) for layer, shift, x in rows]


def prepare_controlnet(network: ControlNet, recipe: Recipe | None = None) -> PreparedControlNet:
    """Rearrange a ControlNet's weights; those that stay as they are, are shared with it."""
    return PreparedControlNet(network, recipe or Recipe.usual(network.conv_in.weight.dtype))


def _without_a_way_up(network: ControlNet) -> Any:
    """What ``PreparedUNet`` reads of a UNet; stand-ins for what lies behind the middle."""
    unet: Any = nn.Module()
    for name in ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block"):
        if name in network:
            unet[name] = network[name]
    unet.config, unet.up_blocks = network.config, []
    unet.conv_norm_out, unet.conv_out = network.down_blocks[0].resnets[0].norm1, network.conv_in
    return unet
