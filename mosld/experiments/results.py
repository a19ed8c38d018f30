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


def _by_seed(cells: Cells) -> dict[int, list[Mapping[str, Any]]]:
    """Seed -> the results of its stages, one or one a task, in the order of seeds."""
    results: dict[int, list[Mapping[str, Any]]] = {}
    for stage, result in cells:
        results.setdefault(stage.seed, []).append(result)
    return dict(sorted(results.items()))


def _of_first_seed(cells: Cells, key: str) -> int:
    first, *_ = _by_seed(cells).values()
    return sum(result[key] for result in first)


def _mean_over_seeds(cells: Cells, key: str) -> float:
    return sum(result[key] for _, result in cells) / len(_by_seed(cells))


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


def accuracies(tasks: Mapping[str, Mapping[str, Any]]) -> list[float]:
    """Of all tasks, from summaries of their scores."""
    return [score["accuracy"] for score in tasks.values()]


def summarise_methods(base: dict, stages: Sequence[Stage], stage_results: Sequence[dict]) -> dict[str, dict]:
    """Label -> method: the mean over seeds, and for one model a task their scores side by side."""
    summary = {**base, "average": _average(base["tasks"])}
    summary.pop("items", None)  # of which results.json has no use
    methods = {"base": summary}
    for label, cells in cells_by_label(stages, stage_results).items():
        methods[label] = _summarise_method(cells)
    return methods


def cells_by_label(stages: Sequence[Stage], results: Sequence[Mapping[str, Any]]) -> dict[str, Cells]:
    """Label -> its stages, each with its result, in their order."""
    cells: dict[str, list[tuple[Stage, Mapping[str, Any]]]] = {}
    for stage, result in zip(stages, results, strict=True):
        cells.setdefault(stage.label, []).append((stage, result))
    return dict(cells)


def figures_of(cells: Cells) -> dict[str, float]:
    """Key in results.json -> the number, of every figure."""
    return {figure.key: figure.of(cells) for figure in FIGURES}


def _summarise_method(cells: Cells) -> dict[str, Any]:
    by_seed = list(_by_seed(cells).values())
    tasks_by_seed = list(map(_all_tasks, by_seed))
    averages = list(map(_average, tasks_by_seed))
    known = [average for average in averages if average is not None]
    tasks = {}
    for name in tasks_by_seed[0]:
        tasks[name] = _mean_score([tasks[name] for tasks in tasks_by_seed])
    # A curve and a use of experts are one adapter's: of one adapter a task there would be several.
    alone = by_seed[0][0] if len(by_seed[0]) == 1 else {"loss": [], "experts": {}}
    return {
        "tasks": tasks,
        "average": statistics.fmean(known) if known else None,
        "average_per_seed": averages,
        **figures_of(cells),
        "loss": alone["loss"],
        "experts": alone["experts"],
    }


def _all_tasks(results: Iterable[Mapping[str, Any]]) -> dict[str, dict]:
    """Task name -> score, of all the stages of a seed."""
    tasks = {}
    for result in results:
        tasks |= result["tasks"]
    return tasks


def _average(tasks: dict[str, dict]) -> float | None:
    return statistics.fmean(accuracies(tasks)) if tasks else None


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
    rows = [["task", "n", *GUESSES, *map(display_name, methods)]]
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
    empty = [""] * (1 + len(GUESSES))  # under n and the guesses
    average = ["average", *empty]
    deviation = ["deviation between seeds", *empty]
    several_seeds = False
    for method in methods:
        per_seed = method.get("average_per_seed", [])
        average.append(percent(method["average"]))
        deviation.append(percent(statistics.stdev(per_seed)) if len(per_seed) > 1 else "")
        several_seeds = several_seeds or len(per_seed) > 1
    rows = [average, deviation] if several_seeds else [average]
    for figure in FIGURES:
        if figure.train_title:
            numbers = [figure.text(method[figure.key]) for method in methods]
            rows.append([figure.train_title, *empty, *numbers])
    return rows
