"""`maple convert`: the converter's own verb, which here has CLIP's vocabulary at hand.

A checkpoint file brings no vocabulary and a diffusers folder needs one, so that ``--to diffusers``
writes CLIP's where the source has none; ``maple-convert``, which knows of no text, leaves it out.
"""

import argparse
import json
import tempfile
from pathlib import Path

from maple_convert import cli as converter

add_arguments = converter.add_convert_arguments


def run(args: argparse.Namespace) -> int:
    """Convert."""
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
