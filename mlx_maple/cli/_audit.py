"""Whether Apple's GPUs have a fast kernel for all that a model does, as `maple doctor --audit`."""

import argparse
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlx_maple.cli import DONE, _default_model, _plan, _terminal

if TYPE_CHECKING:
    from mlx_maple.engine.audit import Operation, Report

NAMES = {"text_encoder": "text encoder", "unet": "UNet, a guided step", "vae": "decoder"}
LISTED = 12  # operations of a network that are shown to a person, beside all slow ones


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; the model, its size and --json are the verb's own."""
    parser.add_argument_group("of --audit").add_argument(
        "--audit",
        action="store_true",
        help="say which kernels Apple's GPUs have for what the model does, on any machine",
    )


def run(args: argparse.Namespace) -> int:
    """Print the audit of the model that would draw."""
    from mlx_maple import loading

    # In low-memory mode loading reads what the networks are made of, and no weights.
    sd = loading.load(
        args.model or _default_model.chosen()[0],
        low_memory=True,
        cache=False,
        local_files_only=True,
    )
    width = sd.defaults["width"] if args.width is None else args.width
    height = sd.defaults["height"] if args.height is None else args.height
    _plan.check_size(width, height)
    reports = audit_networks(sd.configs, width, height)
    if args.json:
        size = {"width": width, "height": height}
        found = {part: as_json(report) for part, report in reports.items()}
        print(json.dumps({"model": sd.info.name, **size, "networks": found}))
        return DONE
    print("\n".join(lines(reports, f"{sd.info.name}, {width}x{height}, float16")))
    return DONE


def audit_networks(configs: Mapping[str, Any], width: int, height: int) -> dict[str, "Report"]:
    """A report for each network of a model, made ready for Metal in float16."""
    import mlx.core as mx

    from mlx_maple.engine.audit import audit, metal_recipe, without_weights
    from mlx_maple.engine.prepare import prepare_unet, prepare_vae
    from mlx_maple.models import AutoencoderKL, CLIPTextEncoder, UNet

    half, recipe = mx.float16, metal_recipe()
    encoder = without_weights(CLIPTextEncoder(configs["text_encoder"]), half)
    unet = prepare_unet(without_weights(UNet(configs["unet"]), half), recipe)
    vae = prepare_vae(without_weights(AutoencoderKL(configs["vae"]), half), recipe)
    downscale, tokens = configs["vae"].downscale, configs["text_encoder"].max_position_embeddings
    rows, columns = height // downscale, width // downscale
    latents = mx.zeros((2, rows, columns, configs["unet"].in_channels), half)
    context = mx.zeros((2, tokens, configs["unet"].cross_attention_dim), half)
    clean = mx.zeros((1, rows, columns, configs["vae"].latent_channels), half)
    return {
        "text_encoder": audit(lambda ids: encoder(ids).last, mx.zeros((1, tokens), mx.int32)),
        "unet": audit(unet, latents, mx.array([10.0, 10.0]), context),
        "vae": audit(vae.decode, clean),
    }


def lines(reports: Mapping[str, "Report"], title: str) -> list[str]:
    """The reports for a person."""
    from mlx_maple.engine.audit import RULES_OF

    found = [f"{title}, on Metal by the rules of {RULES_OF}"]
    for part, report in reports.items():
        found += ["", f"{NAMES[part]}: {report.flops / 1e12:.3f} TFLOP"]
        shown = list(report.operations[:LISTED])
        shown += [each for each in report.operations[LISTED:] if not each.is_fast]
        found += [_line(report, each) for each in shown]
        if left := len(report.operations) - len(shown):
            found.append(f"  and {left} kinds of lesser ones, all fast")
    slow = [each for report in reports.values() for each in report.slow]
    found += ["", f"{len(slow)} of weight have no fast kernel" if slow else "nothing heavy is slow"]
    return found


def _line(report: "Report", each: "Operation") -> str:
    mark = " " if each.is_fast else "!" if report.is_heavy(each) else "-"
    stored = f", {_terminal.size(each.stored)}" if each.stored else ""
    share = f"{report.share(each):6.1%}" if each.flops else f"{'':6}"
    return f"{mark} {each.calls:3} x {each.kind:<12}{each.shape:<46}{share}  {each.kernel}{stored}"


def as_json(report: "Report") -> dict[str, Any]:
    """A report as JSON values; sizes in bytes."""
    return {
        "flops": report.flops,
        "operations": [
            {
                "kind": each.kind,
                "shape": each.shape,
                "kernel": each.kernel,
                "fast": each.is_fast,
                "heavy": report.is_heavy(each),
                "flops": each.flops,
                "stored": each.stored,
                "calls": each.calls,
            }
            for each in report.operations
        ],
    }
