"""How cost grows: one size at a time varied around a middle one, the frozen layer beside every value."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..peers.known import FROZEN, LORA, OURS, Builder
from ..timing.shapes import LayerShape
from ..timing.timers import Budget
from . import layer

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


def tables(sweeps: Sequence[str], values: Mapping[str, Sequence] = SWEEPS, middle=MIDDLE) -> list[layer.Table]:
    """One table a value of each sweep. raises ValueError for a sweep that does not exist, listing those that do."""
    unknown = [name for name in sweeps if name not in SWEEPS]
    if unknown:
        raise ValueError(f"there is no sweep {', '.join(unknown)}; there are: {', '.join(SWEEPS)}")
    found = []
    for swept in sweeps:
        for value in values[swept]:
            shape = middle if swept == "dtype" else middle._replace(**{swept: value})
            shape = shape._replace(K=min(shape.K, shape.E))
            dtype = value if swept == "dtype" else "float32"
            found.append(layer.Table(f"{swept}={value}", shape, dtype, keys={"swept": swept, "value": value}))
    return found


def run(wanted: Sequence[layer.Table], peers: Mapping[str, Builder], budget: Budget, out: Path | None) -> dict:
    """Measure the tables and write them to `out` after each, as `layer.run` does."""
    return layer.run(wanted, peers, budget, out, verb="scaling")
