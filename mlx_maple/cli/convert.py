"""`maple convert`: the converter's own verb, with what needs more than the converter has.

A checkpoint file brings no vocabulary and a diffusers folder needs one, so that ``--to diffusers``
writes CLIP's where the source has none; ``maple-convert``, which knows of no text, leaves it out.
Quantising is MLX's arithmetic, so that ``--quantize`` is here alone, too.
"""

import argparse
import json
import tempfile
from pathlib import Path

from maple_convert import cli as converter
from mlx_maple.cli import USAGE, Failure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options: the converter's, and --quantize."""
    converter.add_convert_arguments(parser)
    parser.add_argument(
        "--quantize",
        type=int,
        choices=(8, 4),
        help="bits to store the weights of the text encoder and the UNet in (a maple folder's)",
    )


def run(args: argparse.Namespace) -> int:
    """Convert."""
    if args.quantize is not None:
        if args.to != "maple":
            raise Failure(USAGE, f"--quantize is for maple folders, not for --to {args.to}")
        from mlx_maple.engine.quantize import Quantizer

        return converter.run_convert(args, quantizer=Quantizer(args.quantize))
    if args.to != "diffusers":
        return converter.run_convert(args)
    with tempfile.TemporaryDirectory() as folder:
        return converter.run_convert(args, tokenizer=_vocabulary(Path(folder)))


def _vocabulary(folder: Path) -> dict[str, Path]:
    """CLIP's vocabulary as the two files that transformers reads."""
    from mlx_maple.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.bundled()
    files = {"vocab": folder / "vocab.json", "merges": folder / "merges.txt"}
    files["vocab"].write_text(json.dumps(tokenizer._vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *tokenizer._ranks]
    files["merges"].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files
