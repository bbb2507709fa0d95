"""The command line of ``fxquant safetensors``."""

from __future__ import annotations

import argparse

from fxquant.cli.arguments import place
from fxquant.evaluation.to_safetensors import to_safetensors
from fxquant.frontends.weight_files import INDEX
from fxquant.ir.counted import counted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=place, metavar="DIR", help="holds pytorch_model*.bin")


def run(options: argparse.Namespace) -> int:
    written = to_safetensors(options.directory)
    print(f"{counted(len(written), 'safetensors file')} and {INDEX} written to {options.directory}")
    return 0
