"""`maple convert`: the converter's own verb, with a bar."""

import argparse

from maple_convert import cli as converter

add_arguments = converter.add_convert_arguments


def run(args: argparse.Namespace) -> int:
    """Convert."""
    return converter.run_convert(args)
