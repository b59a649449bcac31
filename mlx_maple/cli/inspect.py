"""`maple inspect`: the converter's own verb."""

import argparse

from maple_convert import cli as converter

add_arguments = converter.add_inspect_arguments


def run(args: argparse.Namespace) -> int:
    """Print what a checkpoint holds."""
    return converter.run_inspect(args)
