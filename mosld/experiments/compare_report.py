"""What `mosld compare` says: the table, the paired differences with their intervals, and two charts.

Everything is drawn from the dictionary that compare.json holds, so the page of a committed file can be written anew.
"""

import json
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from ..files.atomic import write_text_atomic
from .charts import draw_compared_accuracy, draw_compared_sizes
from .intervals import interval
from .plan import MERGED, SINGLE, Stage
from .results import FIGURES, GUESSES, Cells, cells_by_label
from .tables import aligned, markdown_table, percent

HOW = (
    "Differences are paired: the same seed and the same test item for both. The 95 % intervals take seeds and "
    "items both for samples: variance over seeds of the average, divided by their number, plus variance over "
    "items of the mean over seeds, divided by theirs; Student's t with Welch and Satterthwaite's degrees of "
    "freedom. Each part holds some of the other's noise, so the intervals are a little too wide rather than too "
    "narrow. An interval that contains 0 is no evidence of a difference; each stands for itself, so of twenty "
    "comparisons of equals one is expected to leave 0 out."
)
ONE_SEED = "With one seed the intervals know of the items alone: how far runs differ is not in them."
EQUAL = (
    "Equal for all rows: frozen base, tasks, test items, passes over every training example, batch size, schedule "
    "and, for a seed, the order of the examples. Single is one adapter a task, whose parameters and seconds are "
    "summed, and whose steps add up to those of the mixture. Learning rates are the rows' own. Merged is the "
    "single LoRAs of the seed made one model: parameters and seconds include theirs, and differences are to the "
    "reference's mixture."
)
FIRST_COLUMNS = ["method", "setting"]
WORDS = (0, 1)  # the columns that are aligned on the left


def summarise_rows(
    titles: Mapping[str, str],
    reference: str,
    base: Mapping[str, Any],
    stages: Sequence[Stage],
    results: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Cells -> what compare.json holds beside settings and versions.

    titles: row -> how it is called.
    results: of the stages, in their order; `items` has one character a test item.
    """
    lines = []
    for label, cells in cells_by_label(stages, results).items():
        row = label if label in titles else cells[0][0].method  # a merge has a label of its own
        lines.append(_line(label, cells, titles[row]))
    _add_intervals(lines, reference)
    tasks, accuracy = {}, {}
    for name, score in base["tasks"].items():
        tasks[name] = {key: score[key] for key in ("n", *GUESSES)}
        accuracy[name] = score["accuracy"]
    return {
        "reference": reference,
        "tasks": tasks,
        "base": {"accuracy": accuracy, "average": statistics.fmean(accuracy.values())},
        "seeds": sorted({stage.seed for stage in stages}),
        "rows": lines,
    }


def _line(label: str, cells: Cells, title: str) -> dict[str, Any]:
    """One line of the table, without its intervals."""
    items: dict[str, list[str]] = {}
    last_loss = {}
    for stage, result in sorted(cells, key=lambda cell: cell[0].seed):
        for task, right in result["items"].items():
            items.setdefault(task, []).append(right)
        if result["loss"]:
            last_loss[stage.name] = result["loss"][-1][1]
    accuracy, shares = {}, []
    for task, seeds in items.items():
        shares.append(list(map(_share, seeds)))
        accuracy[task] = _over_seeds(shares[-1])
    average = _over_seeds(list(map(statistics.fmean, zip(*shares, strict=True))))
    del average["mean"]  # which comes with its interval
    line = {
        "row": label.removesuffix(SINGLE),
        "title": title,
        "setting": _setting_of(label),
        "accuracy": accuracy,
        "average": average,
    }
    for figure in FIGURES:
        if figure.compare_key:
            line[figure.compare_key] = figure.of(cells)
    return {**line, "last_loss": last_loss, "items": items}


def _share(right: str) -> float:
    """Of the items that are right, of one character an item."""
    return right.count("1") / len(right)


def _over_seeds(shares: Sequence[float]) -> dict[str, Any]:
    std = statistics.stdev(shares) if len(shares) > 1 else None
    return {"mean": statistics.fmean(shares), "std": std, "per_seed": shares}


def _setting_of(label: str) -> str:
    if label.endswith(SINGLE):
        return "single"
    return "merged" if label.endswith(MERGED) else "mixture"


def _add_intervals(lines: Sequence[dict[str, Any]], reference: str) -> None:
    """To every line the interval of its average, and its paired differences to the reference."""
    hits = {(line["row"], line["setting"]): _hits(line) for line in lines}
    for line in lines:
        own = hits[line["row"], line["setting"]]
        line["average"] = interval(list(own.values()))._asdict() | line["average"]
        # A merge is one model for all tasks, as the mixture is; the reference itself is never merged.
        other = hits.get((reference, "mixture" if line["setting"] == "merged" else line["setting"]))
        if line["row"] == reference or other is None:
            continue
        paired = {task: own[task] - other[task] for task in own}
        line["difference"] = {"average": interval(list(paired.values()))._asdict()}
        for task, difference in paired.items():
            line["difference"][task] = interval([difference])._asdict()


def _hits(line: Mapping[str, Any]) -> dict[str, numpy.ndarray]:
    """Task -> [seeds, items] of 0.0 and 1.0"""
    hits = {}
    for task, seeds in line["items"].items():
        hits[task] = numpy.array(list(map(list, seeds))).astype(float)
    return hits


def text(data: Mapping[str, Any]) -> str:
    """For the terminal: the table, the paired differences, and how to read them."""
    heading = "accuracy in percent on held-out items" + _spread(data)
    parts = [heading, "", aligned(_table(data), WORDS)]
    differences = _differences(data)
    if differences:
        heading = f"difference to {_reference_title(data)}, in points, with 95 % interval"
        parts += ["", heading, "", aligned(differences, WORDS)]
    return "\n".join([*parts, "", *_notes(data)])


def markdown(data: Mapping[str, Any]) -> str:
    """The same as a page."""
    parts = [f"Accuracy in percent on held-out items{_spread(data)}.", "", markdown_table(_table(data))]
    differences = _differences(data)
    if differences:
        heading = f"Difference to {_reference_title(data)}, in points, with its 95 % interval:"
        parts += ["", heading, "", markdown_table(differences)]
    notes = [textwrap.fill(note, 120, break_long_words=False, break_on_hyphens=False) for note in _notes(data)]
    return "\n".join([*parts, "", "\n\n".join(notes), ""])


def _spread(data: Mapping[str, Any]) -> str:
    seeds = len(data["seeds"])
    return f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ", one seed"


def _reference_title(data: Mapping[str, Any]) -> str:
    return next(line["title"] for line in data["rows"] if line["row"] == data["reference"])


def _notes(data: Mapping[str, Any]) -> list[str]:
    notes = [*_verdict(data), EQUAL, HOW]
    if len(data["seeds"]) == 1:
        notes.append(ONE_SEED)
    return notes


def _compared(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The lines that differ from the reference's."""
    return [line for line in data["rows"] if "difference" in line]


def _verdict(data: Mapping[str, Any]) -> list[str]:
    """Which differences of the average are more than their interval."""
    compared = _compared(data)
    if not compared:
        return []
    apart = []
    for line in compared:
        own = line["difference"]["average"]
        if own["low"] * own["high"] > 0:
            apart.append(f"{line['title']}, {line['setting']}, {_points(own)}")
    return [f"Averages whose interval leaves out 0: {'; '.join(apart) or 'none'}, of {len(compared)}."]


def _table(data: Mapping[str, Any]) -> list[list[str]]:
    """The rows of the first table, with its head: what guessing reaches, the frozen base, and every line."""
    tasks, base = data["tasks"], data["base"]
    shown = [figure for figure in FIGURES if figure.compare_key and figure.compare_title]
    head = [*FIRST_COLUMNS, *tasks, "average"]
    frozen = ["frozen base", "", *map(percent, base["accuracy"].values()), percent(base["average"])]
    for figure in shown:
        head.append(str(figure.compare_title))
        frozen.append(figure.text(0))
    rows = [head]
    for guess in GUESSES:
        shares = [score[guess] for score in tasks.values()]
        # Nobody can guess a free text: with such a task there is no average of guesses.
        average = None if None in shares else statistics.fmean(shares)
        rows.append([guess, "", *map(percent, shares), percent(average), *[""] * len(shown)])
    rows.append(frozen)
    for line in data["rows"]:
        row = [line["title"], line["setting"]]
        for task in tasks:
            row.append(_mean_std(line["accuracy"][task]))
        row.append(_mean_std(line["average"]))
        for figure in shown:
            row.append(figure.text(line[figure.compare_key]))
        rows.append(row)
    return rows


def _differences(data: Mapping[str, Any]) -> list[list[str]]:
    """The rows of the second table, with its head; none where there is nothing to compare."""
    columns = [*data["tasks"], "average"]
    rows = [[*FIRST_COLUMNS, *columns]]
    for line in _compared(data):
        points = [_points(line["difference"][name]) for name in columns]
        rows.append([line["title"], line["setting"], *points])
    return rows if len(rows) > 1 else []


def _mean_std(value: Mapping[str, Any]) -> str:
    spread = "" if value["std"] is None else f" ± {percent(value['std'])}"
    return percent(value["mean"]) + spread


def _points(value: Mapping[str, float]) -> str:
    return f"{100 * value['mean']:+.1f} [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"


def write_comparison(data: Mapping[str, Any], folder: Path) -> None:
    """compare.json, compare.md, accuracy.png, parameters.png"""
    draw_compared_accuracy(data, folder / "accuracy.png")
    draw_compared_sizes(data, folder / "parameters.png")
    write_text_atomic(folder / "compare.md", markdown(data))
    write_text_atomic(folder / "compare.json", json.dumps(data, indent=1) + "\n")
