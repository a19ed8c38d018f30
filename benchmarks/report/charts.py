"""The pictures of the report: overhead and memory by method, cost against a swept size, the operator's steps on a roof."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

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


def _largest(tables: Sequence[dict]) -> dict | None:
    """The table with most peers, the first of equals: the one worth a picture."""
    counted = [(len({row["name"] for row in table["rows"]}), -i) for i, table in enumerate(tables)]
    return tables[-max(counted)[1]] if counted else None


def _bars(rows: Sequence[tuple[str, float]], label: str, heading: str, marked: float | None = None) -> Figure:
    rows = sorted(rows, key=lambda row: row[1])
    figure, axes = plt.subplots(figsize=(8, 0.35 * len(rows) + 1.2))
    bars = axes.barh([r[0] for r in rows], [r[1] for r in rows])
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
    table = _largest([t for t in tables if t["verb"] == "layer" and "rows" in t and t.get("mode") != "eval"])
    if not table:
        return None
    rows = [(r["name"], r["ratio"]) for r in table["rows"] if r.get("step") == "both" and r["name"] != FROZEN]
    figure = _bars(rows, "time over the frozen layer, forward + backward (log scale)", _sizes(table), marked=1.0)
    return figure, "overhead.png", f"Time over the frozen layer by method: {_sizes(table)}"


def _growth(swept: str, word: str) -> Callable[[Sequence[dict]], Found]:
    def chart(tables: Sequence[dict]) -> Found:
        own = [t for t in tables if t.get("swept") == swept and "rows" in t]
        if len(own) < 2:
            return None
        figure, axes = plt.subplots(figsize=(7, 4))
        names = [name for name in dict.fromkeys(r["name"] for t in own for r in t["rows"]) if name != FROZEN]
        for name, color in zip(names, LINES, strict=False):
            points = [
                (t["value"], r["ratio"]) for t in own for r in t["rows"] if (r["name"], r.get("step")) == (name, "both")
            ]
            axes.plot(
                *zip(*points, strict=True), marker="o", color=color, label=name, linewidth=2.5 if name == OURS else 1.2
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(word)
        axes.set_ylabel("time over the frozen layer (log scale)")
        axes.axhline(1, color="black", linewidth=0.8)
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        return figure, f"by_{word}.png", f"Time over the frozen layer against {word}, forward and backward"

    return chart


def _memory(tables: Sequence[dict]) -> Found:
    table = _largest([t for t in tables if t["verb"] == "memory"])
    if not table:
        return None
    rows = [(r["name"], r["saved_bytes"] / 2**20) for r in table["rows"] if "saved_bytes" in r]
    return (
        _bars(rows, "MiB kept for backward beside x", _sizes(table)),
        "memory.png",
        f"Memory by method: {_sizes(table)}",
    )


def _roofline(tables: Sequence[dict]) -> Found:
    own = [t for t in tables if t["verb"] == "kernels" and "rows" in t]
    if not own:
        return None
    table = own[0]
    rates = table["rates"][table["dtype"]]
    figure, axes = plt.subplots(figsize=(7, 4))
    intensities = [2.0**power for power in range(-2, 12)]
    roof = [min(rates["matmul_flops"], i * rates["copy_bytes"]) / 1e9 for i in intensities]
    axes.plot(intensities, roof, color="black", linewidth=1)
    for row in table["rows"]:
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
