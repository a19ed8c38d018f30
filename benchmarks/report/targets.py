"""What the CPU path is meant to reach, and whether the tables given reach it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..peers.known import LORA, OURS

Tables = Sequence[dict]


class Target(NamedTuple):
    """One line of the list: `measured(tables)` -> the figure, or None where nothing given measures it."""

    text: str
    most: float
    measured: Callable[[Tables], float | None]


def ratio(tables: Tables, name: str, dtype: str, peer: str = OURS, step: str = "both", mode: str | None = None):
    """The peer's ratio over the frozen layer in the first table of this name, dtype and mode; None without one."""
    for table in tables:
        if table["verb"] == "layer" and (table["name"], table["dtype"], table.get("mode")) == (name, dtype, mode):
            for row in table.get("rows", ()):
                if row["name"] == peer and row.get("step") == step:
                    return row["ratio"]
    return None


def _over_frozen(name: str, dtype: str) -> Callable[[Tables], float | None]:
    return lambda tables: ratio(tables, name, dtype)


def _over_lora(name: str, dtype: str, step: str = "both", mode: str | None = None) -> Callable[[Tables], float | None]:
    def measured(tables: Tables) -> float | None:
        ours = ratio(tables, name, dtype, OURS, step, mode)
        lora = ratio(tables, name, dtype, LORA, step, mode)
        return None if ours is None or lora is None else ours / lora

    return measured


def _experts(tables: Tables) -> float | None:
    """Time at E = 64 over time at E = 8."""
    times = {}
    for table in tables:
        if table.get("swept") == "E" and table["shape"]["K"] == 2:
            for row in table["rows"]:
                if (row["name"], row.get("step")) == (OURS, "both"):
                    times[table["value"]] = row["median_ms"]
    return times[64] / times[8] if {8, 64} <= times.keys() else None


def _training(tables: Tables) -> float | None:
    """MoSLD's step over LoRA's, q and v of every block adapted."""
    for table in tables:
        if table.get("kind") == "training" and table["targets"] == "qv":
            times = {row["name"]: row["median_ms"] for row in table["rows"] if row.get("step") == "both"}
            if {OURS, LORA} <= times.keys():
                return times[OURS] / times[LORA]
    return None


TARGETS = (
    Target("4096 tokens, 1024 → 1024, float32: over the frozen layer", 1.15, _over_frozen("cpu-1024", "float32")),
    Target("4096 tokens, 1024 → 1024, bfloat16: over the frozen layer", 1.30, _over_frozen("cpu-1024", "bfloat16")),
    Target("2048 tokens, 2048 → 2048, float32: over the frozen layer", 1.06, _over_frozen("cpu-2048", "float32")),
    Target("2048 tokens, 2048 → 2048, bfloat16: over the frozen layer", 1.16, _over_frozen("cpu-2048", "bfloat16")),
    Target("4096 tokens, 768 → 3072, float32: over PEFT LoRA", 1.0, _over_lora("cpu-768-3072", "float32")),
    Target("4096 tokens, 768 → 3072, bfloat16: over PEFT LoRA", 1.0, _over_lora("cpu-768-3072", "bfloat16")),
    Target("1 token, 2048 → 2048, float32, trained: over PEFT LoRA", 1.5, _over_lora("decode-2048", "float32")),
    Target("1 token, 2048 → 2048, bfloat16, trained: over PEFT LoRA", 1.5, _over_lora("decode-2048", "bfloat16")),
    Target(
        "1 token, 2048 → 2048, float32, eval mode: over PEFT LoRA",
        1.5,
        _over_lora("decode-2048", "float32", step="forward", mode="eval"),
    ),
    Target(
        "1 token, 2048 → 2048, bfloat16, eval mode: over PEFT LoRA",
        1.5,
        _over_lora("decode-2048", "bfloat16", step="forward", mode="eval"),
    ),
    Target("64 experts over 8, two chosen", 1.6, _experts),
    Target(
        "eval mode, 4096 tokens, 1024 → 1024, float32: over the frozen layer",
        1.10,
        lambda tables: ratio(tables, "cpu-1024", "float32", step="forward", mode="eval"),
    ),
    Target("training step of a small LLaMA, q and v adapted: over PEFT LoRA", 1.0, _training),
)


def lines(tables: Tables) -> list[str]:
    """The list as a Markdown table."""
    out = ["| | wanted | measured | reached |", "|---|---|---|---|"]
    for target in TARGETS:
        figure = target.measured(tables)
        if figure is None:
            measured, reached = "not measured", "-"
        else:
            measured, reached = f"{figure:.2f}", "yes" if figure <= target.most else "**no**"
        out.append(f"| {target.text} | ≤ {target.most:.2f} | {measured} | {reached} |")
    return out
