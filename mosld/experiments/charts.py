"""The charts of a run: accuracy, loss, use of experts."""

import re
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure

from .results import display_name


def draw_charts(methods: dict[str, dict], main: str, run_dir: Path, top_k: int = 2) -> list[Path]:
    """accuracy.png, loss.png and, for a mixture whose tokens choose `top_k` experts, experts.png."""
    charts = []
    if methods["base"]["tasks"]:
        charts.append(_draw_accuracy(methods, run_dir / "accuracy.png"))
    if any(method.get("loss") for method in methods.values()):
        charts.append(_draw_loss(methods, run_dir / "loss.png"))
    if methods[main]["experts"]:
        charts.append(draw_experts(methods[main]["experts"], run_dir / "experts.png", top_k))
    return charts


def _draw_accuracy(methods: dict[str, dict], path: Path) -> Path:
    tasks = methods["base"]["tasks"]
    figure = Figure(figsize=(2 + 1.3 * len(tasks), 4), layout="constrained")
    axes = figure.add_subplot(ylabel="accuracy, %", ylim=(0, 100), title="Accuracy on held-out items")
    width = 0.8 / len(methods)
    for i, (label, method) in enumerate(methods.items()):
        places = [place + (i - (len(methods) - 1) / 2) * width for place in range(len(tasks))]
        heights = [100 * method["tasks"][task]["accuracy"] for task in tasks]
        axes.bar(places, heights, width, label=display_name(label))
    lines: list[tuple[str, Literal["dotted", "dashed"]]] = [("chance", "dotted"), ("majority", "dashed")]
    for key, style in lines:
        known = [(place, 100 * score[key]) for place, score in enumerate(tasks.values()) if score[key] is not None]
        if known:
            places, heights = zip(*known, strict=True)
            starts, ends = [place - 0.45 for place in places], [place + 0.45 for place in places]
            axes.hlines(heights, starts, ends, colors="black", linestyles=style, linewidth=1, label=key)
    axes.set_xticks(range(len(tasks)), list(tasks))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, dpi=120)
    return path


def _draw_loss(methods: dict[str, dict], path: Path) -> Path:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="training loss", title="Training loss (answer tokens)")
    for label, method in methods.items():
        if method.get("loss"):
            steps, losses = zip(*method["loss"], strict=True)
            axes.plot(steps, losses, label=display_name(label))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    return path


MAX_PANELS = 28  # layers shown in experts.png; results.json holds all


def draw_experts(experts: dict[str, dict[str, list[float]]], path: Path, top_k: int = 2) -> Path:
    """One panel a layer, tasks down and experts across: rows that differ are tasks routed differently.

    experts: task -> layer -> each expert's share of the chosen places, as `RouterUse.shares` gives it.
    top_k: no share is above 1 / top_k, which is where the colours end.
    """
    tasks = list(experts)
    layers = list(experts[tasks[0]])
    shown = layers[:: -(-len(layers) // MAX_PANELS)]
    columns = min(7, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(1.2 + 1.7 * columns, 0.8 + 1.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel, layer in zip(axes.flat, shown, strict=False):
        image = panel.imshow(
            [experts[task][layer] for task in tasks], vmin=0, vmax=1 / top_k, cmap="viridis", aspect="auto"
        )
        panel.set_title(short_name(layer), fontsize=7)
        panel.set_xticks([])
        panel.set_yticks(range(len(tasks)), tasks if panel in axes[:, 0] else [], fontsize=7)
    for panel in axes.flat[len(shown) :]:
        panel.set_axis_off()
    figure.colorbar(image, ax=axes, label="share of tokens' choices", shrink=0.8)
    figure.suptitle("Expert use by task (experts across)", fontsize=10)
    figure.savefig(path, dpi=120)
    return path


def short_name(layer: str) -> str:
    """base_model.model.model.layers.0.self_attn.q_proj -> 0 q_proj"""
    number = re.findall(r"\.(\d+)\.", layer)
    return " ".join([*number[:1], layer.rpartition(".")[2]])
