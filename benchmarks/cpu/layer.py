"""Adapted linear layers beside their peers on the CPU: every chosen shape and dtype is one table of `compare`'s rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..model import cpu as cpu_model
from ..peers.compare import DROPOUT, compare
from ..peers.known import Builder
from ..timing.files import Writer
from ..timing.shapes import LAYERS, LayerShape, named
from ..timing.timers import Budget, machine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LONGEST_STEP_S = 2.0  # of the frozen layer; beyond it a table would take minutes


@dataclass(frozen=True)
class Table:
    name: str
    shape: LayerShape
    dtype: str
    training: bool = True
    keys: dict = field(default_factory=dict)  # put into the result as they are


def run(tables: Sequence[Table], peers: Mapping[str, Builder], budget: Budget, out: Path | None, verb="layer") -> dict:
    """Measure the tables one after the other, print each, and write all that is measured to `out` after each.

    raises ValueError for a dtype that does not exist, listing those that do.
    """
    unknown = [table.dtype for table in tables if table.dtype not in DTYPES]
    if unknown:
        raise ValueError(f"there is no {', '.join(unknown)}; there are: {', '.join(DTYPES)}")
    settings = {"dropout": DROPOUT, **budget._asdict(), "peers": list(peers)}
    settings["seconds"] = None if budget.seconds == float("inf") else budget.seconds
    rates = {dtype: cpu_model.measure_rates(DTYPES[dtype]) for dtype in dict.fromkeys(t.dtype for t in tables)}
    head = {"verb": verb, "machine": machine(), "settings": settings}
    writer = Writer({**head, "rates": {name: rate._asdict() for name, rate in rates.items()}, "tables": []}, out)
    for table in tables:
        p = cpu_model.problem(table.shape, rates[table.dtype], DTYPES[table.dtype])
        entry = {"name": table.name, "shape": table.shape._asdict(), "dtype": table.dtype, **table.keys}
        if not table.training:
            entry["mode"] = "eval"
        if 2 * p.base / 1e6 > LONGEST_STEP_S:
            rate = rates[table.dtype].matmul_flops / 1e9
            entry["left_out"] = (
                f"{table.dtype} products run at {rate:.1f} GFLOP/s here: {2 * p.base / 1e6:.0f} s a step"
            )
            print(f"\n{table.name}, {table.dtype}: left out: {entry['left_out']}")
        else:
            label = f"{table.name} {table.dtype}"
            rows = compare(peers, table.shape, DTYPES[table.dtype], budget, label, table.training)
            cpu_model.add_predictions(rows, p)
            entry["rows"] = rows
            what = "forward + backward" if table.training else "forward, eval mode, no gradients"
            print(f"\n{table.shape}, {table.dtype}: {what}\n{text(rows, 'both' if table.training else 'forward')}")
        writer.add(entry)
    return writer.result


def layers(names: Sequence[str], dtypes: Sequence[str], training: bool = True) -> list[Table]:
    """raises ValueError for a shape that does not exist, listing those that do."""
    return [Table(name, shape, dtype, training) for name, shape in named(LAYERS, names).items() for dtype in dtypes]


def text(rows: Sequence[dict], step: str = "both") -> str:
    """The rows of one step as a table."""
    lines = [f"{'':32}{'median ms':>11}{'20 % to 80 %':>20}{'over frozen':>13}{'saved bytes':>13}{'over model':>12}"]
    for row in rows:
        if "failure" in row:
            lines.append(f"{row['name']:32}{row['failure']}")
        elif row["step"] == step:
            spread = f"{row['low_ms']:.2f} to {row['high_ms']:.2f}"
            model = f"{row['over_model']:12.2f}" if "over_model" in row else f"{'-':>12}"
            saved = f"{row['saved_bytes']:13,}" if "saved_bytes" in row else f"{'-':>13}"
            numbers = f"{row['median_ms']:11.2f}{spread:>20}{row['ratio']:12.2f}x{saved}{model}"
            lines.append(f"{row['name']:32}{numbers}")
    return "\n".join(lines)
