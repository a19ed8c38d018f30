"""The merges of `mosld compare`: the LoRAs of the single setting, one a task, made one model by a merging method.

A cell is a method and a seed. Its LoRAs are those that the seed's single cells have trained and saved; its parameters and
seconds include theirs, since nothing can be merged that has not been trained.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel

from ..merging.adaptive import AdaptiveSettings
from ..merging.concrete import ConcreteSettings
from ..merging.merge import MergeSettings, merge
from ..merging.methods import METHODS, WIRELESS
from ..merging.read import read_task_vectors
from ..merging.save import applied
from ..merging.unlabelled import Unlabelled, without_labels
from ..tasks.encode import Encoder
from ..tasks.examples import Task
from ..tasks.scoring import score_tasks
from .methods import LORA
from .plan import Stage
from .results import MERGED, SINGLE
from .stages import finished

KNOWN = tuple(name for name in METHODS if name != WIRELESS)  # without noise it is task arithmetic


def row(name: str) -> str:
    """The merge's name among the rows."""
    return f"{name}{MERGED}"


OPTIONS = {"steps": int, "learning_rate": float, "batch_size": int}


def chosen(text: str | None, options: str | None, rows: Sequence[str], setting: str) -> dict[str, MergeSettings]:
    """ "ties,adamerging_task" -> row -> settings; raises ValueError for what cannot be merged, and why."""
    if not text:
        if options is not None:
            raise ValueError(f"--merge-options {options} is for --merge, which is not given")
        return {}
    names = text.split(",")
    if unknown := [name for name in names if name not in KNOWN]:
        raise ValueError(f"merge must be of {', '.join(KNOWN)}, got {', '.join(unknown)}")
    if LORA not in rows:
        raise ValueError(
            f"--merge merges the LoRAs of single tasks: {LORA} must be among the methods, got {', '.join(rows)}"
        )
    if setting == "mixture":
        raise ValueError("--merge merges the LoRAs of single tasks, which --setting mixture does not train")
    given = _options(options)
    return {
        row(name): MergeSettings(
            name,
            adaptive=AdaptiveSettings(**{"steps": METHODS[name].steps, **given}),
            concrete=ConcreteSettings(**{"steps": METHODS[name].mask_steps, **given}),
        )
        for name in dict.fromkeys(names)
    }


def _options(text: str | None) -> dict[str, Any]:
    """ "steps=100,learning_rate=5e-3" -> fields of both settings"""
    given = {}
    for part in text.split(",") if text else ():
        name, _, value = part.partition("=")
        try:
            given[name] = OPTIONS[name](value)
        except (KeyError, ValueError):
            raise ValueError(f"merge-options must be name=number,... of {', '.join(OPTIONS)}, got {part!r}") from None
    return given


def plan(merges: Sequence[str], seeds: int) -> list[Stage]:
    return [Stage(label, LORA, seed) for seed in range(seeds) for label in merges]


def needs(stage: Stage, tasks: Sequence[Task]) -> list[str]:
    """The cells whose LoRAs a merge makes one."""
    return [Stage(f"{LORA}{SINGLE}", LORA, stage.seed, task.name).name for task in tasks]


def run(
    base: PreTrainedModel, encoder: Encoder, tasks: Sequence[Task], stage: Stage, settings: MergeSettings, folder: Path,
    batch_size: int,
) -> dict:  # fmt: skip
    """Merge the LoRAs of the stage's seed, in `folder` of the comparison, and score the model; `base` is left as it was."""
    singles = needs(stage, tasks)
    trained = [result for name in singles if (result := finished(folder, name)) is not None]
    start = time.perf_counter()
    vectors = read_task_vectors([folder / "adapters" / name for name in singles])
    unlabelled: list[Unlabelled] = []
    if settings.kind.adaptive:
        unlabelled = [without_labels(encoder, task) for task in tasks]
    own = replace(
        settings, seed=stage.seed,
        adaptive=replace(settings.adaptive, seed=stage.seed), concrete=replace(settings.concrete, seed=stage.seed),
    )  # fmt: skip
    # Every process finds the same; one keeps what it finds.
    state = folder / "checkpoints" / stage.name if PartialState().is_main_process else None
    merged = merge(base, vectors, own, unlabelled, state)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    with applied(base, merged) as model:
        scores = score_tasks(model, encoder, tasks, batch_size, label=f"score {stage.name}")
    learnt = merged.coefficients.numel() if settings.kind.adaptive else 0
    learnt += sum(mask.numel() for mask in (merged.masks or {}).values())
    return {
        "tasks": {name: score.summary() for name, score in scores.items()},
        "items": {name: score.right for name, score in scores.items()},
        "trainable_parameters": sum(result["trainable_parameters"] for result in trained) + learnt,
        "train_seconds": sum(result["train_seconds"] for result in trained) + seconds,
        "merge_seconds": seconds,
        "score_seconds": time.perf_counter() - start,
        "loss": list(enumerate(merged.losses, 1)),
        "coefficients": merged.coefficients.tolist(),
    }
