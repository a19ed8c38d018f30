"""What `mosld compare` says: the table, the paired differences with their intervals, and two charts.

Everything is drawn from the dictionary that compare.json holds, so a committed file can be told anew.
"""

import json
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from matplotlib.figure import Figure

from ..files.atomic import write_text_atomic
from .plan import Stage
from .results import MERGED, SINGLE, aligned

CONFIDENCE = 0.95
HOW = (
    "Differences are paired: the same seed and the same test item for both. The 95 % intervals take seeds and items both for "
    "samples: variance over seeds of the average, divided by their number, plus variance over items of the mean over seeds, "
    "divided by theirs; Student's t with Welch and Satterthwaite's degrees of freedom. Each part holds some of the other's noise, so "
    "the intervals are a little too wide rather than too narrow. An interval that contains 0 is no evidence of a difference; each "
    "stands for itself, so of twenty comparisons of equals one is expected to leave 0 out."
)
ONE_SEED = "With one seed the intervals know of the items alone: how far runs differ is not in them."
EQUAL = (
    "Equal for all rows: frozen base, tasks, test items, passes over every training example, batch size, schedule and, for a seed, "
    "the order of the examples. Single is one adapter a task, whose parameters and seconds are summed, and whose steps add up to those of "
    "the mixture. Learning rates are the rows' own. Merged is the single LoRAs of the seed made one model: parameters and seconds "
    "include theirs, and differences are to the reference's mixture."
)


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def interval(values: Sequence[numpy.ndarray]) -> Interval:
    """values: for each task [seeds, items] -> the mean over tasks of their means, with its 95 % interval.

        v_seeds = var over seeds of the average / S          v_items = sum over tasks of (var over items of the mean over
                                                                       seeds / n) / tasks^2
    half width = t(df) sqrt(v_seeds + v_items),   df = (v_seeds + v_items)^2 / (v_seeds^2 / (S - 1) + v_items^2 / (n - tasks))

    With one seed v_seeds is unknown and left out, with one item of a task that task's part of v_items.
    """
    per_seed = numpy.mean([task.mean(1) for task in values], axis=0)
    seeds, items = len(per_seed), sum(task.shape[1] for task in values)
    mean = float(per_seed.mean())
    v_seeds = float(per_seed.var(ddof=1)) / seeds if seeds > 1 else 0.0
    parts = [task.mean(0).var(ddof=1) / task.shape[1] for task in values if task.shape[1] > 1]
    v_items = float(sum(parts)) / len(values) ** 2
    if v_seeds + v_items == 0:
        return Interval(mean, mean, mean)
    terms = ((v_seeds, seeds - 1), (v_items, items - len(values)))
    freedom = (v_seeds + v_items) ** 2 / sum(v * v / df for v, df in terms if v)
    half = t_quantile(freedom) * math.sqrt(v_seeds + v_items)
    return Interval(mean, mean - half, mean + half)


def t_quantile(freedom: float, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| < t) = confidence, for Student's T; by Simpson's rule and bisection, to about 1e-6 of itself."""
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)

    def inside(t: float) -> float:
        # x = sqrt(freedom) tan(angle): the tails of few degrees of freedom are long, the angle's range is short.
        angles = numpy.linspace(0, math.atan(t / math.sqrt(freedom)), 2001)
        density = numpy.cos(angles) ** (freedom - 1)
        weights = numpy.ones(2001)
        weights[1:-1:2], weights[2:-1:2] = 4, 2
        total = (weights * density).sum() * (angles[1] - angles[0]) / 3
        return 2 * math.exp(log_scale) * math.sqrt(freedom) * float(total)

    low, high = 0.0, 1.0
    while inside(high) < confidence:
        high *= 2
    while high - low > 1e-7 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < confidence else (low, middle)
    return (low + high) / 2


def gather(
    titles: Mapping[str, str], reference: str, base: Mapping[str, Any], stages: Sequence[Stage],
    results: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Cells -> what compare.json holds beside settings and versions.

    titles: row -> how it is called. results: of the stages, in their order; `items` has one character a test item.
    """
    tasks = list(base["tasks"])
    lines = []
    for label in dict.fromkeys(stage.label for stage in stages):
        cells = [(s, r) for s, r in zip(stages, results, strict=True) if s.label == label]
        row = label if label in titles else cells[0][0].method  # a merge has a label of its own
        lines.append(_line(label, cells, titles[row], tasks))
    hits = {(line["row"], line["setting"]): _hits(line, tasks) for line in lines}
    for line in lines:
        line["average"] = interval(hits[line["row"], line["setting"]])._asdict() | line["average"]
        against = "mixture" if line["setting"] == "merged" else line["setting"]
        other = hits.get((reference, against))
        if line["row"] != reference and other is not None:
            own = hits[line["row"], line["setting"]]
            differences = [a - b for a, b in zip(own, other, strict=True)]
            line["difference"] = {
                "average": interval(differences)._asdict(),
                **{task: interval([d])._asdict() for task, d in zip(tasks, differences, strict=True)},
            }
    return {
        "reference": reference,
        "tasks": {
            name: {key: score[key] for key in ("n", "chance", "majority")} for name, score in base["tasks"].items()
        },
        "base": {
            "accuracy": {name: score["accuracy"] for name, score in base["tasks"].items()},
            "average": statistics.fmean(score["accuracy"] for score in base["tasks"].values()),
        },
        "seeds": sorted({stage.seed for stage in stages}),
        "rows": lines,
    }


def _line(label: str, cells: Sequence[tuple[Stage, Mapping[str, Any]]], title: str, tasks: Sequence[str]) -> dict:
    seeds = sorted({stage.seed for stage, _ in cells})
    items = {task: [_of(cells, seed, task)["items"][task] for seed in seeds] for task in tasks}
    accuracies = {task: [right.count("1") / len(right) for right in own] for task, own in items.items()}
    averages = [statistics.fmean(own[i] for own in accuracies.values()) for i in range(len(seeds))]
    ends = {SINGLE: "single", MERGED: "merged"}
    setting = next((name for end, name in ends.items() if label.endswith(end)), "mixture")
    return {
        "row": label.removesuffix(SINGLE),
        "title": title,
        "setting": setting,
        "accuracy": {
            task: {"mean": statistics.fmean(own), "std": _std(own), "per_seed": own} for task, own in accuracies.items()
        },
        "average": {"std": _std(averages), "per_seed": averages},
        "trained_parameters": sum(r["trainable_parameters"] for s, r in cells if s.seed == seeds[0]),
        "train_seconds": sum(r["train_seconds"] for _, r in cells) / len(seeds),
        "last_loss": {s.name: r["loss"][-1][1] for s, r in cells if r["loss"]},
        "items": items,
    }


def _of(cells: Sequence[tuple[Stage, Mapping[str, Any]]], seed: int, task: str) -> Mapping[str, Any]:
    return next(result for stage, result in cells if stage.seed == seed and stage.task in (None, task))


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _hits(line: Mapping[str, Any], tasks: Sequence[str]) -> list[numpy.ndarray]:
    """For each task [seeds, items] of 0.0 and 1.0"""
    return [numpy.array([[float(c) for c in right] for right in line["items"][task]]) for task in tasks]


def text(data: Mapping[str, Any]) -> str:
    """For the terminal: the table, the paired differences, and how to read them."""
    heading = "accuracy in percent on held-out items" + _spread(data)
    parts = [heading, "", aligned(_table(data), left=2)]
    if differences := _differences(data):
        parts += ["", f"difference to {_title(data)}, in points, with 95 % interval", "", aligned(differences, left=2)]
    return "\n".join([*parts, "", *_notes(data)])


def markdown(data: Mapping[str, Any]) -> str:
    """The same as a page."""
    parts = [f"Accuracy in percent on held-out items{_spread(data)}.", "", _pipes(_table(data))]
    if differences := _differences(data):
        parts += ["", f"Difference to {_title(data)}, in points, with its 95 % interval:", "", _pipes(differences)]
    notes = [textwrap.fill(note, 120, break_long_words=False, break_on_hyphens=False) for note in _notes(data)]
    return "\n".join([*parts, "", "\n\n".join(notes), ""])


def _spread(data: Mapping[str, Any]) -> str:
    seeds = len(data["seeds"])
    return f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ", one seed"


def _title(data: Mapping[str, Any]) -> str:
    return next(line["title"] for line in data["rows"] if line["row"] == data["reference"])


def _notes(data: Mapping[str, Any]) -> list[str]:
    return [*_verdict(data), EQUAL, HOW, *([ONE_SEED] if len(data["seeds"]) == 1 else [])]


def _verdict(data: Mapping[str, Any]) -> list[str]:
    """Which differences of the average are more than their interval."""
    averages = [(line, line["difference"]["average"]) for line in data["rows"] if "difference" in line]
    if not averages:
        return []
    apart = [
        f"{line['title']}, {line['setting']}, {_points(own)}" for line, own in averages if own["low"] * own["high"] > 0
    ]
    return [f"Averages whose interval leaves out 0: {'; '.join(apart) or 'none'}, of {len(averages)}."]


def _table(data: Mapping[str, Any]) -> list[list[str]]:
    tasks = list(data["tasks"])
    rows = [["method", "setting", *tasks, "average", "trained parameters", "training, s"]]
    guesses = [[data["tasks"][task][kind] for task in tasks] for kind in ("chance", "majority")]
    for name, values in (("chance", guesses[0]), ("majority", guesses[1])):
        known = [value for value in values if value is not None]
        mean = statistics.fmean(known) if len(known) == len(values) else None
        rows.append([name, "", *map(_percent, values), _percent(mean), "", ""])
    base = data["base"]
    rows.append(
        ["frozen base", "", *(_percent(base["accuracy"][t]) for t in tasks), _percent(base["average"]), "0", "0"]
    )
    for line in data["rows"]:
        cells = [_mean_std(line["accuracy"][task]) for task in tasks]
        size, seconds = f"{line['trained_parameters']:,}", f"{line['train_seconds']:.0f}"
        rows.append([line["title"], line["setting"], *cells, _mean_std(line["average"]), size, seconds])
    return rows


def _differences(data: Mapping[str, Any]) -> list[list[str]]:
    lines = [line for line in data["rows"] if "difference" in line]
    if not lines:
        return []
    tasks = list(data["tasks"])
    rows = [["method", "setting", *tasks, "average"]]
    for line in lines:
        own = line["difference"]
        rows.append([line["title"], line["setting"], *(_points(own[task]) for task in tasks), _points(own["average"])])
    return rows


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _mean_std(value: Mapping[str, Any]) -> str:
    return _percent(value["mean"]) + ("" if value["std"] is None else f" ± {100 * value['std']:.1f}")


def _points(value: Mapping[str, float]) -> str:
    return f"{100 * value['mean']:+.1f} [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"


def _pipes(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|" + "---|" * 2 + "---:|" * (len(rows[0]) - 2)
    return "\n".join([lines[0], rule, *lines[1:]])


def write(data: Mapping[str, Any], folder: Path) -> None:
    """compare.json, compare.md, accuracy.png, parameters.png"""
    _draw_accuracy(data, folder / "accuracy.png")
    _draw_parameters(data, folder / "parameters.png")
    write_text_atomic(folder / "compare.md", markdown(data))
    write_text_atomic(folder / "compare.json", json.dumps(data, indent=1) + "\n")


def _sampled(data: Mapping[str, Any]) -> str:
    return f"95 % intervals over {'seeds and items' if len(data['seeds']) > 1 else 'items alone, one seed'}"


def _error(line: Mapping[str, Any]) -> tuple[float, float]:
    """-> mean and half width in percent"""
    return 100 * line["average"]["mean"], 50 * (line["average"]["high"] - line["average"]["low"])


def _draw_accuracy(data: Mapping[str, Any], path: Path) -> None:
    titles = list(dict.fromkeys(line["title"] for line in data["rows"]))
    settings = list(dict.fromkeys(line["setting"] for line in data["rows"]))
    figure = Figure(figsize=(3 + 1.0 * len(titles), 4.5), layout="constrained")
    axes = figure.add_subplot(ylabel="average accuracy, %", title=f"Held-out items, {_sampled(data)}")
    width = 0.8 / len(settings)
    for place, setting in enumerate(settings):
        lines = [line for line in data["rows"] if line["setting"] == setting]
        middles = [titles.index(line["title"]) + (place - (len(settings) - 1) / 2) * width for line in lines]
        means, halves = zip(*map(_error, lines), strict=True)
        axes.bar(middles, means, 0.9 * width, yerr=halves, capsize=3, label=setting)
        for middle, line in zip(middles, lines, strict=True):
            own = [100 * value for value in line["average"]["per_seed"]]
            axes.plot([middle] * len(own), own, ".", color="black", markersize=4)
    axes.axhline(100 * data["base"]["average"], color="black", linestyle="dotted", linewidth=1, label="frozen base")
    axes.set_xticks(range(len(titles)), titles, rotation=30, ha="right")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)


def _draw_parameters(data: Mapping[str, Any], path: Path) -> None:
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="trained parameters", ylabel="average accuracy, %", xscale="log",
        title=f"Accuracy against size, {_sampled(data)}",
    )  # fmt: skip
    for setting, marker in (("mixture", "o"), ("single", "s"), ("merged", "^")):
        lines = [line for line in data["rows"] if line["setting"] == setting]
        for line in lines:
            mean, half = _error(line)
            label = f"{line['title']}, {setting}"
            axes.errorbar(line["trained_parameters"], mean, half, fmt=marker, capsize=3, label=label)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, dpi=120)
