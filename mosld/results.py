"""From the stages of a run to `results.json`, the printed table, and the charts."""

import platform
import re
import statistics
import unicodedata
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure

from .methods import NAMES
from .training import Stage

PACKAGES = ("mosld", "torch", "transformers", "peft", "accelerate")
SINGLE, MERGED = "-single", "-merged"


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "unicode": unicodedata.unidata_version,
        **{package: version(package) for package in PACKAGES},
    }


def gather(base: dict, stages: Sequence[Stage], stage_results: Sequence[dict]) -> dict[str, dict]:
    """Label -> method: the mean over seeds, and for one model a task their scores side by side."""
    methods: dict[str, dict] = {"base": {name: value for name, value in base.items() if name != "items"}}
    methods["base"]["average"] = _average(base["tasks"])
    for label in dict.fromkeys(stage.label for stage in stages):
        own = [(s, r) for s, r in zip(stages, stage_results, strict=True) if s.label == label]
        seeds = sorted({stage.seed for stage, _ in own})
        per_seed = [_union(result["tasks"] for stage, result in own if stage.seed == seed) for seed in seeds]
        first = [result for stage, result in own if stage.seed == seeds[0]]
        methods[label] = {
            "tasks": {name: _mean_score([tasks[name] for tasks in per_seed]) for name in per_seed[0]},
            "average": _average(_union(per_seed)) if len(seeds) == 1 else None,
            "average_per_seed": [_average(tasks) for tasks in per_seed],
            "trainable_parameters": sum(result["trainable_parameters"] for result in first),
            "train_seconds": sum(result["train_seconds"] for _, result in own) / len(seeds),
            "score_seconds": sum(result["score_seconds"] for _, result in own) / len(seeds),
            "loss": first[0]["loss"] if len(first) == 1 else [],
            "experts": first[0]["experts"] if len(first) == 1 else {},
        }
        averages = [a for a in methods[label]["average_per_seed"] if a is not None]
        methods[label]["average"] = statistics.fmean(averages) if averages else None
    return methods


def _union(parts) -> dict:
    return {name: score for part in parts for name, score in part.items()}


def _average(tasks: dict[str, dict]) -> float | None:
    return statistics.fmean(score["accuracy"] for score in tasks.values()) if tasks else None


def _mean_score(scores: list[dict]) -> dict:
    """Accuracies averaged over seeds; the rest does not depend on the seed."""
    mean = dict(scores[0])
    for key in ("accuracy", "accuracy_norm"):
        if mean[key] is not None:
            mean[key] = statistics.fmean(score[key] for score in scores)
    mean["accuracy_per_seed"] = [score["accuracy"] for score in scores]
    return mean


def display_name(label: str) -> str:
    method, single, _ = label.partition(SINGLE)
    return NAMES.get(method, method) + (", one model a task" if single else "")


def table(methods: dict[str, dict]) -> str:
    """Accuracy in percent by task and method, with chance and majority, as text."""
    labels = list(methods)
    rows = [["task", "n", "chance", "majority", *map(display_name, labels)]]
    for task, score in methods["base"]["tasks"].items():
        cells = [_percent(methods[label]["tasks"].get(task, {}).get("accuracy")) for label in labels]
        rows.append([task, str(score["n"]), _percent(score["chance"]), _percent(score["majority"]), *cells])
    rows.append(["average", "", "", "", *[_percent(methods[label]["average"]) for label in labels]])
    seeds = [methods[label].get("average_per_seed", []) for label in labels]
    if any(len(averages) > 1 for averages in seeds):
        spread = [f"{100 * statistics.stdev(a):.1f}" if len(a) > 1 else "" for a in seeds]
        rows.append(["deviation between seeds", "", "", "", *spread])
    rows.append(["trained parameters", "", "", "", *[f"{methods[x]['trainable_parameters']:,}" for x in labels]])
    rows.append(["training, seconds", "", "", "", *[f"{methods[label]['train_seconds']:.0f}" for label in labels]])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Text in columns under a head and a line; the first `left` columns are words, the others numbers."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


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
