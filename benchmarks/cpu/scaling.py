"""How cost grows: one size at a time varied around a middle one, the frozen layer beside every value."""

import argparse
from collections.abc import Mapping, Sequence

from ..peers.known import FROZEN, LORA, OURS
from ..peers.options import add_peers, peers_of
from ..timing.names import require_known
from ..timing.options import add_budget, add_out, budget_of
from ..timing.shapes import LayerShape
from .layer import Table, measure_tables

MIDDLE = LayerShape(1024, 1024, 1024, 8, 8, 2)
TOY = LayerShape(16, 32, 32, 4, 4, 2)
PEERS = (FROZEN, OURS, LORA, "concatenated product", "HydraLoRA loop", "MoLA loop")
SWEEPS: dict[str, tuple] = {
    "T": (1, 16, 256, 1024, 4096, 16384, 65536),
    "E": (1, 2, 4, 8, 16, 32, 64),
    "R": (4, 8, 16, 32, 64, 128),
    "K": (1, 2, 4, 8),
    "dtype": ("float32", "bfloat16", "float16"),
}


def tables(sweeps: Sequence[str], values: Mapping[str, Sequence] = SWEEPS, middle=MIDDLE) -> list[Table]:
    """One table a value of each sweep. raises ValueError for a sweep that does not exist, listing those that do."""
    require_known("sweep", sweeps, SWEEPS)
    found = []
    for swept in sweeps:
        for value in values[swept]:
            shape = middle if swept == "dtype" else middle._replace(**{swept: value})
            shape = shape._replace(K=min(shape.K, shape.E))
            dtype = value if swept == "dtype" else "float32"
            found.append(Table(f"{swept}={value}", shape, dtype, keys={"swept": swept, "value": value}))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks scaling`."""
    parser.add_argument("--sweep", nargs="+", default=["E"], help=f"of {', '.join(SWEEPS)} (default: E)")
    parser.add_argument("--toy", action="store_true", help="a tiny layer in the middle, to see that it runs")
    add_budget(parser, rounds=20, seconds=20)
    add_peers(parser, default=PEERS)
    add_out(parser)


def run(options: argparse.Namespace) -> int:
    """raises ValueError for a sweep or peer that does not exist, listing those that do."""
    wanted = tables(options.sweep, middle=TOY if options.toy else MIDDLE)
    measure_tables(wanted, peers_of(options), budget_of(options), options.out, verb="scaling")
    return 0
