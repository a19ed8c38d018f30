"""The options that verbs which time things share."""

import argparse
from pathlib import Path

from .timers import Budget


def add_budget(parser: argparse.ArgumentParser, rounds: int, seconds: float) -> None:
    text = f"runs of every candidate at most (default: {rounds})"
    parser.add_argument("--rounds", type=int, default=rounds, help=text)
    text = f"seconds after which a table ends, once it has {Budget().least} rounds (default: {seconds:g})"
    parser.add_argument("--seconds", type=float, default=seconds, help=text)


def budget_of(options: argparse.Namespace) -> Budget:
    """raises ValueError for fewer than two rounds, or no time."""
    if options.rounds < 2:
        raise ValueError(f"rounds must be at least 2, got {options.rounds}")
    if not options.seconds > 0:
        raise ValueError(f"seconds must be positive, got {options.seconds}")
    return Budget(options.rounds, options.seconds, min(options.rounds, Budget().least))


def add_out(parser: argparse.ArgumentParser) -> None:
    text = "also write the rows to this JSON file, after every table"
    parser.add_argument("--out", type=Path, help=text)
