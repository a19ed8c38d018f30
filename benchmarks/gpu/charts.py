"""Pictures of a GPU run: what each method adds to the frozen layer, and the measured beside the modelled."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..model.methods import DEVICES, METHODS, Device, Problem
from ..timing.shapes import LAYERS, LayerShape

# What the model calls each candidate. The model of plain torch counts its passes, not its kernels.
MODELLED = {
    "MoSLD triton": "ours",
    "MoSLD eager": "packed torch, dropout on A",
    "PEFT LoRA": "PEFT LoRA, eager",
    "HydraLoRA loop": "loop over experts",
}


def draw(result: Mapping, folder: Path) -> list[str]:
    """-> the names of the pictures that the rows of `result` allow, written to `folder` as PNG"""
    layers = {
        p["name"].removeprefix("layer "): _ratios(p["rows"]) for p in result["parts"] if p["name"][:6] == "layer "
    }
    layers = {name: ratios for name, ratios in layers.items() if ratios}
    drawn = []
    if layers:
        _save(_overhead(layers), folder / "overhead.png", drawn)
    for name, ratios in layers.items():
        if name == "gpu-4096 bfloat16" and set(MODELLED) & set(ratios):
            _save(_beside_model(ratios, LAYERS["gpu-4096"], _device(result)), folder / "modelled.png", drawn)
    return drawn


def _save(figure: Figure, path: Path, drawn: list[str]) -> None:
    figure.savefig(path, dpi=120)
    drawn.append(path.name)


def _ratios(rows: list[dict]) -> dict[str, dict[str, float]]:
    """-> candidate -> step -> ratio over the frozen layer, from graphs where there are any, else from eager runs"""
    ratios: dict[str, dict[str, float]] = {}
    for way in ("eager", "graph"):
        for row in rows:
            if row.get("way") == way and "ratio" in row:
                ratios.setdefault(row["name"], {})[row["step"]] = row["ratio"]
    return ratios


def _percent(ratio: float) -> float:
    return 100 * (ratio - 1)


def _overhead(layers: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    figure = Figure(figsize=(9, 2.2 * len(layers)), layout="constrained")
    axes = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
    for axis, (name, ratios) in zip(axes, layers.items(), strict=True):
        both = {candidate: _percent(steps["both"]) for candidate, steps in ratios.items() if "both" in steps}
        both = {candidate: percent for candidate, percent in both.items() if candidate != "frozen linear"}
        bars = axis.barh(list(both), list(both.values()), color="#4878a8")
        axis.bar_label(bars, fmt=" %.0f %%")
        axis.set_xscale("symlog", linthresh=10)
        axis.set_title(name, loc="left")
        axis.invert_yaxis()
    axes[-1].set_xlabel("forward and backward, percent over the frozen layer, measured")
    return figure


def _device(result: Mapping) -> Device:
    """The rates that this run measured, and the H200's where it did not."""
    device = DEVICES["H200"]
    rates = {row["name"]: row for part in result["parts"] if part["name"] == "rates" for row in part.get("rows", ())}
    flops, moved = rates.get("product", {}).get("tflop_per_s"), rates.get("copy", {}).get("gb_per_s")
    return device._replace(
        flops=1e12 * flops if flops else device.flops, bandwidth=1e9 * moved if moved else device.bandwidth
    )


def _beside_model(ratios: Mapping[str, Mapping[str, float]], shape: LayerShape, device: Device) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis: Axes = figure.subplots()
    names = [name for name in MODELLED if "both" in ratios.get(name, {})]
    measured = [_percent(ratios[name]["both"]) for name in names]
    modelled = [modelled_percent(name, shape, device) for name in names]
    for offset, values, label in ((-0.2, measured, "measured"), (0.2, modelled, "model")):
        bars = axis.barh([i + offset for i in range(len(names))], values, height=0.4, label=label)
        axis.bar_label(bars, fmt=" %.0f %%")
    axis.set_yticks(range(len(names)), names)
    axis.set_xscale("symlog", linthresh=10)
    axis.invert_yaxis()
    axis.set_xlabel(f"forward and backward, percent over the frozen layer; {shape}")
    axis.legend()
    return figure


def modelled_percent(name: str, shape: LayerShape, device: Device) -> float:
    """What the model says that a candidate adds to forward and backward, in percent of the frozen layer."""
    problem = Problem(device, *shape)
    return 100 * sum(METHODS[MODELLED[name]](problem)) / (2 * problem.base)
