"""The charts of all runs: accuracy, loss, use of experts, methods compared, and merges over a noisy channel."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .results import display_name

MAX_PANELS = 28  # layers shown in experts.png; results.json holds all
GUESS_LINES: tuple[tuple[str, Literal["dotted", "dashed"]], ...] = (("chance", "dotted"), ("majority", "dashed"))
BAR_GROUP = 0.8  # of the distance between two groups of bars


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
    width = BAR_GROUP / len(methods)
    for i, (label, method) in enumerate(methods.items()):
        heights = [100 * method["tasks"][task]["accuracy"] for task in tasks]
        places = numpy.arange(len(tasks)) + _shift(i, len(methods))
        axes.bar(places, heights, width, label=display_name(label))
    for guess, style in GUESS_LINES:
        _draw_guess(axes, list(tasks.values()), guess, style)
    axes.set_xticks(range(len(tasks)), list(tasks))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, dpi=120)
    return path


def _shift(i: int, bars: int) -> float:
    """Where the i-th of some bars stands, from the middle of their group."""
    return (i - (bars - 1) / 2) * BAR_GROUP / bars


def _draw_guess(
    axes: Axes, scores: Sequence[Mapping[str, Any]], guess: str, style: Literal["dotted", "dashed"]
) -> None:
    """A line across the bars of each task, at what guessing reaches where that is known."""
    starts, ends, heights = [], [], []
    for place, score in enumerate(scores):
        if score[guess] is not None:
            starts.append(place - 0.45)
            ends.append(place + 0.45)
            heights.append(100 * score[guess])
    if heights:
        axes.hlines(heights, starts, ends, colors="black", linestyles=style, linewidth=1, label=guess)


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


def draw_experts(experts: dict[str, dict[str, list[float]]], path: Path, top_k: int = 2) -> Path:
    """One panel a layer, tasks down and experts across: rows that differ are tasks routed differently.

    experts: task -> layer -> each expert's share of the chosen places, as `RouterUse.shares` gives it.
    top_k: no share is above 1 / top_k, which is where the colours end.
    """
    tasks = list(experts)
    layers = list(experts[tasks[0]])
    # Every n-th layer, with n rounded up so that no more than MAX_PANELS are left.
    shown = layers[:: -(-len(layers) // MAX_PANELS)]
    columns = min(7, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(1.2 + 1.7 * columns, 0.8 + 1.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel, layer in zip(axes.flat, shown, strict=False):
        shares = [experts[task][layer] for task in tasks]
        image = panel.imshow(shares, vmin=0, vmax=1 / top_k, cmap="viridis", aspect="auto")
        panel.set_title(short_name(layer), fontsize=7)
        panel.set_xticks([])
        panel.set_yticks(range(len(tasks)), tasks if panel in axes[:, 0] else [], fontsize=7)
    # The last row of panels may not be full.
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


def draw_compared_accuracy(data: Mapping[str, Any], path: Path) -> None:
    """A group of bars a method, a bar a setting with its interval, a dot a seed; data: of compare.json."""
    titles = _distinct(data, "title")
    settings = _distinct(data, "setting")
    figure = Figure(figsize=(3 + 1.0 * len(titles), 4.5), layout="constrained")
    axes = figure.add_subplot(ylabel="average accuracy, %", title=f"Held-out items, {_sampled(data)}")
    width = BAR_GROUP / len(settings)
    for i, setting in enumerate(settings):
        lines = _lines_of(data, setting)
        middles, means, halves = [], [], []
        for line in lines:
            middle = titles.index(line["title"]) + _shift(i, len(settings))
            mean, half = _error(line)
            middles.append(middle)
            means.append(mean)
            halves.append(half)
            seeds = 100 * numpy.array(line["average"]["per_seed"])
            axes.plot([middle] * len(seeds), seeds, ".", color="black", markersize=4)
        axes.bar(middles, means, 0.9 * width, yerr=halves, capsize=3, label=setting)
    _draw_base(axes, 100 * data["base"]["average"])
    axes.set_xticks(range(len(titles)), titles, rotation=30, ha="right")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def draw_compared_sizes(data: Mapping[str, Any], path: Path) -> None:
    """Accuracy of every row against the parameters that it trains."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="trained parameters",
        ylabel="average accuracy, %",
        xscale="log",
        title=f"Accuracy against size, {_sampled(data)}",
    )
    for setting, marker in (("mixture", "o"), ("single", "s"), ("merged", "^")):
        for line in _lines_of(data, setting):
            mean, half = _error(line)
            label = f"{line['title']}, {setting}"
            axes.errorbar(line["trained_parameters"], mean, half, fmt=marker, capsize=3, label=label)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, dpi=120)


def _distinct(data: Mapping[str, Any], key: str) -> list[str]:
    """What the lines have there, each once, in their order."""
    return list(dict.fromkeys(line[key] for line in data["rows"]))


def _lines_of(data: Mapping[str, Any], setting: str) -> list[Mapping[str, Any]]:
    return [line for line in data["rows"] if line["setting"] == setting]


def _sampled(data: Mapping[str, Any]) -> str:
    return f"95 % intervals over {'seeds and items' if len(data['seeds']) > 1 else 'items alone, one seed'}"


def _error(line: Mapping[str, Any]) -> tuple[float, float]:
    """-> mean and half width in percent"""
    return 100 * line["average"]["mean"], 50 * (line["average"]["high"] - line["average"]["low"])


def _draw_base(axes: Axes, height: float) -> None:
    axes.axhline(height, color="black", linestyle="dotted", linewidth=1, label="frozen base")


def draw_snr(channels: Sequence[Mapping[str, Any]], base: float, path: Path) -> None:
    """Average accuracy against the SNR, with and without realignment; without noise as a line across.

    channels: noise, snr_db and the averages in percent `received` and, where it was asked for, `realigned`.
    base: the frozen base's average in percent.
    """
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="SNR of each user's task vector, dB", ylabel="average accuracy, %")
    styles = (("received", "dashed", "as received"), ("realigned", "solid", "realigned"))
    by_noise: dict[str, list[Mapping[str, Any]]] = {}
    for channel in channels:
        by_noise.setdefault(channel["noise"], []).append(channel)
    for place, (noise, own) in enumerate(by_noise.items()):
        for key, style, label in styles:
            ratios, heights = [], []
            for channel in own:
                if key in channel:
                    ratios.append(channel["snr_db"])
                    heights.append(channel[key])
            line: dict[str, Any] = dict(color=f"C{place}", linestyle=style, label=f"{noise}, {label}")
            if not heights:
                continue
            if noise == "ideal":  # one point, whatever the SNR
                axes.axhline(heights[0], linewidth=1, **line)
            else:
                axes.plot(ratios, heights, marker="o", markersize=4, **line)
    _draw_base(axes, base)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
