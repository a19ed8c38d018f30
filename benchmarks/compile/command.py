"""`python -m benchmarks compile`: its options, without Triton, so that the list of verbs needs none."""

import argparse
import os
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 90, 100], help="of 80, 90, 100 (default: all)")
    parser.add_argument("--quick", action="store_true", help="one layer a dtype instead of the whole grid")
    parser.add_argument("--out", type=Path, help="also write the table to this JSON file")


def run(options: argparse.Namespace) -> int:
    """-> 1 where a kernel is at fault; raises ValueError where Triton would interpret, and for an unknown
    architecture."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 interprets the kernels: unset it to compile them")
    from .run import compile_grid  # here, because it imports Triton

    return 1 if compile_grid(options.arch, options.quick, options.out) else 0
