"""What a guided step and a decoding of SD 1.5 ask of the device, counted on any machine.

    python benchmarks/counts.py

Primitives that compute, views apart, and the bytes of weights that are read, for the published
networks and for those made ready for Metal and for CUDA, in float16. Nothing is evaluated but the
rearranged weights, which are zeros here.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "convert")]

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mlx_maple.engine.audit import without_weights  # noqa: E402
from mlx_maple.engine.compiled import GuidedSteps  # noqa: E402
from mlx_maple.engine.count import Count, count, described_recipe  # noqa: E402
from mlx_maple.engine.prepare import prepare_unet, prepare_vae  # noqa: E402
from mlx_maple.models import AutoencoderKL, UNet, UNetConfig, VAEConfig  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "counts.json"
TOKENS = 77


def weights(network: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(network.parameters()))


def published_step(side: int) -> Count:
    unet = without_weights(UNet(UNetConfig()), mx.float16)
    latents = mx.zeros((2, side, side, 4), mx.float16)
    context = mx.zeros((2, TOKENS, 768), mx.float16)
    return count(unet, latents, mx.array([10.0, 10.0]), context, weights=weights(unet))


def prepared_step(backend: str, side: int) -> Count:
    plain = without_weights(UNet(UNetConfig()), mx.float16)
    unet = prepare_unet(plain, described_recipe(backend))
    mx.eval(unet.parameters())
    wanted, avoided = (mx.zeros((1, TOKENS, 768), mx.float16) for _ in range(2))
    model = GuidedSteps(unet, compiles=True, in_parts=False).model(wanted, avoided, 7.5, [10.0])
    latents = mx.zeros((1, side, side, 4))
    return count(lambda x: model(x, 10.0), latents, weights=weights(unet))


def decoding(backend: str | None, side: int) -> Count:
    vae = without_weights(AutoencoderKL(VAEConfig()), mx.float16)
    if backend is not None:
        vae = prepare_vae(vae, described_recipe(backend))
        mx.eval(vae.parameters())
    latents = mx.zeros((1, side, side, 4), mx.float16)
    return count(vae.decode, latents, weights=weights(vae.decoder))


def row(what: str, size: int, form: str, found: Count) -> dict[str, Any]:
    return {
        "what": what,
        "size": size,
        "form": form,
        "kernels": found.kernels,
        "views": found.views,
        "weight_bytes": found.weight_bytes,
        "by_name": dict(found.by_name),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, action="append", help="pixels; default: 512 and 768")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows = []
    for size in args.size or (512, 768):
        side = size // 8
        rows.append(row("guided step", size, "published", published_step(side)))
        rows += [
            row("guided step", size, backend, prepared_step(backend, side))
            for backend in ("metal", "cuda")
        ]
        rows += [
            row("decoding", size, backend or "published", decoding(backend, side))
            for backend in (None, "metal", "cuda")
        ]
    for each in rows:
        print(
            f"{each['what']:<12}{each['size']:>5}  {each['form']:<10}{each['kernels']:>6} kernels"
            f"{each['views']:>6} views  {each['weight_bytes'] / 1e9:.3f} GB of weights"
        )
    args.output.write_text(json.dumps({"mlx": mx.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
