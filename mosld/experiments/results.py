"""What is reported of a run: one list of figures, from which results.json, compare.json and every table are made.

A figure of a task's score is a field of `tasks.scoring.Score`; it is in both files of itself, and in the tables where
GUESSES names it. A figure of an adapter, such as its size, is an entry of FIGURES.
"""

import platform
import statistics
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

from ..files.version import __version__
from ..tasks.scoring import Score
from .methods import NAMES
from .plan import SINGLE, Stage
from .tables import aligned, percent

PACKAGES = ("torch", "transformers", "peft", "accelerate")
Cells = Sequence[tuple[Stage, Mapping[str, Any]]]  # stages of one label, each with its result


def _of_first_seed(cells: Cells, key: str) -> int:
    first = min(stage.seed for stage, _ in cells)
    return sum(result[key] for stage, result in cells if stage.seed == first)


def _mean_over_seeds(cells: Cells, key: str) -> float:
    seeds = {stage.seed for stage, _ in cells}
    return sum(result[key] for _, result in cells) / len(seeds)


class Figure(NamedTuple):
    """A number that every stage has beside the scores of its tasks.

    key: its name in a stage's file and in results.json.
    compare_key: its name in compare.json; None where it is not there.
    total: of all stages of a label, one a task and seed, the number of the label.
    train_title, compare_title: its name in the tables of `mosld train` and `mosld compare`; None: in no table.
    form: how it is written there.
    """

    key: str
    compare_key: str | None
    total: Callable[[Cells, str], float]
    train_title: str | None
    compare_title: str | None
    form: str

    def of(self, cells: Cells) -> float:
        return self.total(cells, self.key)

    def text(self, number: float) -> str:
        return self.form.format(number)


FIGURES = (
    Figure(
        "trainable_parameters", "trained_parameters", _of_first_seed,
        "trained parameters", "trained parameters", "{:,}",
    ),
    Figure("train_seconds", "train_seconds", _mean_over_seeds, "training, seconds", "training, s", "{:.0f}"),
    Figure("score_seconds", None, _mean_over_seeds, None, None, "{:.0f}"),
)  # fmt: skip
GUESSES = ("chance", "majority")  # fields of Score that no model is needed for, a row or column of every table
OF_SEEDS = ("accuracy", "accuracy_norm")  # fields of Score that differ between seeds


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "unicode": unicodedata.unidata_version, "mosld": __version__}
    for package in PACKAGES:
        found[package] = version(package)
    return found


def summaries(scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
    """Task name -> its score, as results.json has it."""
    return {name: score.summary() for name, score in scores.items()}


def scored(scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
    """What a stage keeps of its scores: `tasks`, and `items` with one character a test item, "1" where it is right."""
    items = {name: score.right for name, score in scores.items()}
    return {"tasks": summaries(scores), "items": items}


def summarise_methods(base: dict, stages: Sequence[Stage], stage_results: Sequence[dict]) -> dict[str, dict]:
    """Label -> method: the mean over seeds, and for one model a task their scores side by side."""
    methods = {"base": _summarise_base(base)}
    for label in dict.fromkeys(stage.label for stage in stages):
        methods[label] = _summarise_method(cells_of(label, stages, stage_results))
    return methods


def cells_of(label: str, stages: Sequence[Stage], results: Sequence[Mapping[str, Any]]) -> Cells:
    """The label's stages, each with its result."""
    return [cell for cell in zip(stages, results, strict=True) if cell[0].label == label]


def _summarise_base(base: dict) -> dict:
    summary = {name: value for name, value in base.items() if name != "items"}
    summary["average"] = _average(base["tasks"])
    return summary


def _summarise_method(cells: Cells) -> dict[str, Any]:
    seeds = sorted({stage.seed for stage, _ in cells})
    per_seed = []
    for seed in seeds:
        per_seed.append(_union(result["tasks"] for stage, result in cells if stage.seed == seed))
    averages = [_average(tasks) for tasks in per_seed]
    known = [average for average in averages if average is not None]
    of_first_seed = [result for stage, result in cells if stage.seed == seeds[0]]
    # A curve and a use of experts are one adapter's: of one adapter a task there would be several.
    alone = of_first_seed[0] if len(of_first_seed) == 1 else {"loss": [], "experts": {}}
    return {
        "tasks": {name: _mean_score([tasks[name] for tasks in per_seed]) for name in per_seed[0]},
        "average": statistics.fmean(known) if known else None,
        "average_per_seed": averages,
        **{figure.key: figure.of(cells) for figure in FIGURES},
        "loss": alone["loss"],
        "experts": alone["experts"],
    }


def _union(parts: Iterable[dict]) -> dict:
    whole = {}
    for part in parts:
        whole |= part
    return whole


def _average(tasks: dict[str, dict]) -> float | None:
    return statistics.fmean(score["accuracy"] for score in tasks.values()) if tasks else None


def _mean_score(scores: list[dict]) -> dict:
    """Accuracies averaged over seeds; the rest does not depend on the seed."""
    mean = dict(scores[0])
    for key in OF_SEEDS:
        if mean[key] is not None:
            mean[key] = statistics.fmean(score[key] for score in scores)
    mean["accuracy_per_seed"] = [score["accuracy"] for score in scores]
    return mean


def display_name(label: str) -> str:
    method, single, _ = label.partition(SINGLE)
    return NAMES.get(method, method) + (", one model a task" if single else "")


def table(methods: dict[str, dict]) -> str:
    """Accuracy in percent by task and method, with what guessing reaches, as text."""
    labels = list(methods)
    rows = [["task", "n", *GUESSES, *map(display_name, labels)]]
    for task, score in methods["base"]["tasks"].items():
        row = [task, str(score["n"])]
        for guess in GUESSES:
            row.append(percent(score[guess]))
        for method in methods.values():
            row.append(percent(method["tasks"].get(task, {}).get("accuracy")))
        rows.append(row)
    rows += _rows_of_methods(list(methods.values()))
    return aligned(rows)


def _rows_of_methods(methods: Sequence[dict]) -> list[list[str]]:
    """The last rows of the table: of each method as a whole."""
    empty = [""] * (1 + len(GUESSES))
    rows = [["average", *empty, *(percent(method["average"]) for method in methods)]]
    per_seed = [method.get("average_per_seed", []) for method in methods]
    if any(len(averages) > 1 for averages in per_seed):
        rows.append(["deviation between seeds", *empty, *map(_deviation, per_seed)])
    for figure in FIGURES:
        if figure.train_title:
            rows.append([figure.train_title, *empty, *(figure.text(method[figure.key]) for method in methods)])
    return rows


def _deviation(averages: Sequence[float]) -> str:
    return percent(statistics.stdev(averages)) if len(averages) > 1 else ""
