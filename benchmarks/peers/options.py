"""The options that choose who is measured."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .known import PEERS, Builder, choose


def add_peers(parser: argparse.ArgumentParser, default: Sequence[str] | None = None) -> None:
    """default: the names measured where none is given; all without one."""
    shown = ", ".join(default) if default else "all"
    text = f"of {', '.join(map(repr, PEERS))} (default: {shown})"
    parser.add_argument("--peers", nargs="+", default=default, help=text)
    text = "folder of an optional peer's source, put on the import path; may be given again"
    parser.add_argument("--checkout", type=Path, action="append", default=[], help=text)


def peers_of(options: argparse.Namespace) -> dict[str, Builder]:
    """raises ValueError as `choose` does."""
    return choose(options.peers, options.checkout)
