"""From the stages of a run to `results.json`, the printed table, and the charts."""

import platform
import statistics
import unicodedata
from collections.abc import Sequence
from importlib.metadata import version

from ..files.version import __version__
from .methods import NAMES
from .plan import Stage

PACKAGES = ("torch", "transformers", "peft", "accelerate")
SINGLE, MERGED = "-single", "-merged"


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "unicode": unicodedata.unidata_version,
        "mosld": __version__,
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
