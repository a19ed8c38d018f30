"""Pictures of a GPU run: what each method adds to the frozen layer, and the measured beside the modelled."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
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
    layers = {}
    for part in result["parts"]:
        if part["name"].startswith("layer ") and (ratios := _ratios(part["rows"])):
            layers[part["name"].removeprefix("layer ")] = ratios
    pictures = {}
    if layers:
        pictures["overhead.png"] = _overhead(layers)
    ratios = layers.get("gpu-4096 bfloat16", {})
    if set(MODELLED) & set(ratios):
        pictures["modelled.png"] = _beside_model(ratios, LAYERS["gpu-4096"], _device(result))
    for name, figure in pictures.items():
        figure.savefig(folder / name, dpi=120)
    return list(pictures)


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
        percents = {}
        for candidate, steps in ratios.items():
            if candidate != "frozen linear" and "both" in steps:
                percents[candidate] = _percent(steps["both"])
        bars = axis.barh(list(percents), list(percents.values()), color="#4878a8")
        axis.bar_label(bars, fmt=" %.0f %%")
        axis.set_xscale("symlog", linthresh=10)
        axis.set_title(name, loc="left")
        axis.invert_yaxis()
    axes[-1].set_xlabel("forward and backward, percent over the frozen layer, measured")
    return figure


def _device(result: Mapping) -> Device:
    """The rates that this run measured, and the H200's where it did not."""
    device = DEVICES["H200"]
    for part in result["parts"]:
        if part["name"] != "rates":
            continue
        for row in part.get("rows", ()):
            if row["name"] == "product" and row.get("tflop_per_s"):
                device = device._replace(flops=1e12 * row["tflop_per_s"])
            if row["name"] == "copy" and row.get("gb_per_s"):
                device = device._replace(bandwidth=1e9 * row["gb_per_s"])
    return device


def _beside_model(ratios: Mapping[str, Mapping[str, float]], shape: LayerShape, device: Device) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis: Axes = figure.subplots()
    measured, modelled = {}, {}
    for name in MODELLED:
        if "both" in ratios.get(name, {}):
            measured[name] = _percent(ratios[name]["both"])
            modelled[name] = modelled_percent(name, shape, device)
    rows = np.arange(len(measured))
    for offset, percents, label in ((-0.2, measured, "measured"), (0.2, modelled, "model")):
        bars = axis.barh(rows + offset, list(percents.values()), height=0.4, label=label)
        axis.bar_label(bars, fmt=" %.0f %%")
    axis.set_yticks(rows, list(measured))
    axis.set_xscale("symlog", linthresh=10)
    axis.invert_yaxis()
    axis.set_xlabel(f"forward and backward, percent over the frozen layer; {shape}")
    axis.legend()
    return figure


def modelled_percent(name: str, shape: LayerShape, device: Device) -> float:
    """What the model says that a candidate adds to forward and backward, in percent of the frozen layer."""
    problem = Problem(device, *shape)
    return 100 * sum(METHODS[MODELLED[name]](problem)) / (2 * problem.base)
