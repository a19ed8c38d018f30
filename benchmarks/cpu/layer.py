"""Adapted linear layers beside their peers on the CPU: each chosen shape and dtype is one table of `compare`'s rows."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..model import cpu as cpu_model
from ..peers.compare import compare
from ..peers.known import Builder
from ..peers.options import add_peers, peers_of
from ..timing.files import Writer
from ..timing.machine import machine
from ..timing.names import require_known
from ..timing.options import add_budget, add_out, budget_of
from ..timing.shapes import DROPOUT, DTYPES, LAYERS, LayerShape, named
from ..timing.timers import Budget

# Of the frozen layer; beyond it a table would take minutes.
LONGEST_STEP_S = 2.0


@dataclass(frozen=True)
class Table:
    name: str
    shape: LayerShape
    dtype: str
    training: bool = True
    keys: dict = field(default_factory=dict)  # put into the result as they are


def layers(names: Sequence[str], dtypes: Sequence[str], training: bool = True) -> list[Table]:
    """raises ValueError for a shape that does not exist, listing those that do."""
    tables = []
    for name, shape in named(LAYERS, names).items():
        for dtype in dtypes:
            tables.append(Table(name, shape, dtype, training))
    return tables


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks layer`."""
    parser.add_argument("--shape", nargs="+", default=["cpu-1024"], help=f"of {', '.join(LAYERS)} (default: cpu-1024)")
    text = "of float32, bfloat16, float16 (default: the first two)"
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help=text)
    parser.add_argument("--eval", action="store_true", help="forward in eval mode without gradients instead")
    add_budget(parser, rounds=60, seconds=60)
    add_peers(parser)
    add_out(parser)


def run(options: argparse.Namespace) -> int:
    """raises ValueError for a shape, dtype or peer that does not exist, listing those that do."""
    tables = layers(options.shape, options.dtype, training=not options.eval)
    measure_tables(tables, peers_of(options), budget_of(options), options.out)
    return 0


def measure_tables(
    tables: Sequence[Table], peers: Mapping[str, Builder], budget: Budget, out: Path | None, verb: str = "layer"
) -> dict:
    """Measure the tables one after the other, print each, and write all that is measured to `out` after each.

    raises ValueError for a dtype that does not exist, listing those that do.
    """
    dtypes = [table.dtype for table in tables]
    require_known("", dtypes, DTYPES)
    rates = cpu_model.rates_of(dtypes)
    settings = {"dropout": DROPOUT, **budget._asdict(), "peers": list(peers)}
    if budget.seconds == float("inf"):
        settings["seconds"] = None  # JSON has no infinity
    head = {"verb": verb, "machine": machine(), "settings": settings}
    writer = Writer({**head, "rates": cpu_model.as_json(rates), "tables": []}, out)
    for table in tables:
        writer.add(_measured(table, peers, budget, rates[table.dtype]))
    return writer.result


def _measured(table: Table, peers: Mapping[str, Builder], budget: Budget, rates: cpu_model.Rates) -> dict:
    """The table as the result file holds it, printed as well: its rows, or why it is left out."""
    problem = cpu_model.problem(table.shape, rates, DTYPES[table.dtype])
    entry = {"name": table.name, "shape": table.shape._asdict(), "dtype": table.dtype, **table.keys}
    if not table.training:
        entry["mode"] = "eval"
    step_s = 2 * problem.base / 1e6
    if step_s > LONGEST_STEP_S:
        gflops = rates.matmul_flops / 1e9
        entry["left_out"] = f"{table.dtype} products run at {gflops:.1f} GFLOP/s here: {step_s:.0f} s a step"
        print(f"\n{table.name}, {table.dtype}: left out: {entry['left_out']}")
        return entry
    label = f"{table.name} {table.dtype}"
    rows = compare(peers, table.shape, DTYPES[table.dtype], budget, label, table.training)
    cpu_model.add_predictions(rows, problem)
    entry["rows"] = rows
    what, step = ("forward + backward", "both") if table.training else ("forward, eval mode, no gradients", "forward")
    print(f"\n{table.shape}, {table.dtype}: {what}\n{text(rows, step)}")
    return entry


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
