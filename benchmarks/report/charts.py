"""The pictures of the report: overhead and memory by method, cost against a swept size, the operator's steps on a
roof."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt
from matplotlib.figure import Figure  # noqa: E402

from ..peers.known import FROZEN, OURS

HIGHLIGHT, PLAIN = "#c2410c", "#64748b"
LINES = ("#c2410c", "#1d4ed8", "#0f766e", "#7c3aed", "#64748b", "#a16207")
DPI = 120


def draw(tables: Sequence[dict], folder: Path) -> dict[str, str]:
    """Draw what the tables have data for; -> file name and alternative text of each picture."""
    drawn = {}
    for chart in (_overhead, _growth("E", "experts"), _growth("T", "tokens"), _memory, _roofline):
        found = chart(tables)
        if found:
            figure, name, alt = found
            figure.savefig(folder / name, dpi=DPI, bbox_inches="tight", metadata={"Software": None})
            plt.close(figure)
            drawn[name] = alt
    return drawn


Found = tuple[Figure, str, str] | None


def _measured(tables: Sequence[dict], verb: str) -> list[dict]:
    """The tables of one verb that were not left out."""
    return [table for table in tables if table["verb"] == verb and "rows" in table]


def _largest(tables: Sequence[dict]) -> dict | None:
    """The table with most peers, the first of equals: the one worth a picture."""
    return max(tables, key=_count_peers, default=None)


def _count_peers(table: dict) -> int:
    return len({row["name"] for row in table["rows"]})


def _bars(rows: Sequence[tuple[str, float]], label: str, heading: str, marked: float | None = None) -> Figure:
    rows = sorted(rows, key=lambda row: row[1])
    figure, axes = plt.subplots(figsize=(8, 0.35 * len(rows) + 1.2))
    names, values = zip(*rows, strict=True)
    bars = axes.barh(names, values)
    for bar, (name, value) in zip(bars, rows, strict=True):
        bar.set_color(HIGHLIGHT if name.startswith(OURS) else PLAIN)
        axes.annotate(f" {value:.2f}", (value, bar.get_y() + bar.get_height() / 2), va="center", fontsize=8)
    if marked is not None:
        axes.axvline(marked, color="black", linewidth=0.8)
        axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_title(heading, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    return figure


def _sizes(table: dict) -> str:
    s = table["shape"]
    sizes = f"{s['T']} tokens, {s['D_in']} → {s['D_out']}, R={s['R']}, E={s['E']}, K={s['K']}"
    return f"{sizes}, {table['dtype']}"


def _overhead(tables: Sequence[dict]) -> Found:
    training = [table for table in _measured(tables, "layer") if table.get("mode") != "eval"]
    table = _largest(training)
    if not table:
        return None
    rows = []
    for row in table["rows"]:
        if row.get("step") == "both" and row["name"] != FROZEN:
            rows.append((row["name"], row["ratio"]))
    figure = _bars(rows, "time over the frozen layer, forward + backward (log scale)", _sizes(table), marked=1.0)
    return figure, "overhead.png", f"Time over the frozen layer by method: {_sizes(table)}"


def _growth(swept: str, word: str) -> Callable[[Sequence[dict]], Found]:
    def chart(tables: Sequence[dict]) -> Found:
        own = [table for table in tables if table.get("swept") == swept and "rows" in table]
        if len(own) < 2:
            return None
        figure, axes = plt.subplots(figsize=(7, 4))
        for (name, points), color in zip(_points(own).items(), LINES, strict=False):
            sizes, ratios = zip(*points, strict=True)
            width = 2.5 if name == OURS else 1.2
            axes.plot(sizes, ratios, marker="o", color=color, label=name, linewidth=width)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(word)
        axes.set_ylabel("time over the frozen layer (log scale)")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        return figure, f"by_{word}.png", f"Time over the frozen layer against {word}, forward and backward"

    return chart


def _points(tables: Sequence[dict]) -> dict[str, list[tuple[float, float]]]:
    """Peer -> swept value and ratio over the frozen layer, in the order of the tables."""
    points: dict[str, list[tuple[float, float]]] = {}
    for table in tables:
        for row in table["rows"]:
            if row["name"] != FROZEN and row.get("step") == "both":
                points.setdefault(row["name"], []).append((table["value"], row["ratio"]))
    return points


def _memory(tables: Sequence[dict]) -> Found:
    table = _largest(_measured(tables, "memory"))
    if not table:
        return None
    rows = []
    for row in table["rows"]:
        if "saved_bytes" in row:
            rows.append((row["name"], row["saved_bytes"] / 2**20))
    figure = _bars(rows, "MiB kept for backward beside x", _sizes(table))
    return figure, "memory.png", f"Memory by method: {_sizes(table)}"


def _roofline(tables: Sequence[dict]) -> Found:
    measured = _measured(tables, "kernels")
    if not measured:
        return None
    table = measured[0]
    rates = table["rates"][table["dtype"]]
    figure, axes = plt.subplots(figsize=(7, 4))
    intensities = 2.0 ** np.arange(-2, 12)
    roof = np.minimum(rates["matmul_flops"], intensities * rates["copy_bytes"]) / 1e9
    axes.plot(intensities, roof, color="black", linewidth=1)
    for row in table["rows"]:
        # A step without arithmetic has no place on a roof.
        if row["flops"]:
            point = (row["flops"] / row["bytes"], row["flops"] / row["median_ms"] / 1e6)
            axes.plot(*point, "o", color=PLAIN if row["name"] == "frozen layer" else HIGHLIGHT)
            axes.annotate(f" {row['name']} ({row['direction']})", point, fontsize=7)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("FLOP per byte moved")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"The operator's steps under the two measured rates: {_sizes(table)}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, "roofline.png", "The operator's steps on the roofline of this CPU"
