"""The merges of `mosld compare`: the LoRAs of the single setting, one a task, made one model by a merging method.

A cell is a method and a seed. Its LoRAs are those that the seed's single cells have trained and saved; its parameters
and seconds include theirs, since nothing can be merged that has not been trained.
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
from ..tasks.encode import Encoder
from ..tasks.examples import Task
from ..tasks.scoring import score_tasks
from .inputs import names_of, questions_for
from .methods import LORA
from .plan import MERGED, Stage, single_stages
from .results import scored
from .rows import check_known
from .stages import finished

KNOWN = tuple(name for name in METHODS if name != WIRELESS)  # without noise it is task arithmetic
OPTIONS = {"steps": int, "learning_rate": float, "batch_size": int}


def parse_merges(text: str | None, options: str | None, rows: Sequence[str], setting: str) -> dict[str, MergeSettings]:
    """ "ties,adamerging_task" -> name among the rows -> settings.

    raises ValueError for what cannot be merged, and why.
    """
    if not text:
        if options is not None:
            raise ValueError(f"--merge-options {options} is for --merge, which is not given")
        return {}
    names = text.split(",")
    check_known("merge", names, KNOWN)
    if LORA not in rows:
        raise ValueError(
            f"--merge merges the LoRAs of single tasks: {LORA} must be among the methods, got {', '.join(rows)}"
        )
    if setting == "mixture":
        raise ValueError("--merge merges the LoRAs of single tasks, which --setting mixture does not train")
    given = _parse_options(options)
    merges = {}
    for name in names:
        adaptive = AdaptiveSettings(**{"steps": METHODS[name].steps, **given})
        concrete = ConcreteSettings(**{"steps": METHODS[name].mask_steps, **given})
        merges[f"{name}{MERGED}"] = MergeSettings(name, adaptive=adaptive, concrete=concrete)
    return merges


def _parse_options(text: str | None) -> dict[str, Any]:
    """ "steps=100,learning_rate=5e-3" -> fields of both settings"""
    given = {}
    for part in text.split(",") if text else ():
        name, _, value = part.partition("=")
        try:
            given[name] = OPTIONS[name](value)
        except (KeyError, ValueError):
            raise ValueError(f"merge-options must be name=number,... of {', '.join(OPTIONS)}, got {part!r}") from None
    return given


def merged_cells(stage: Stage, tasks: Sequence[Task]) -> list[str]:
    """The cells whose LoRAs a merge makes one."""
    singles = single_stages(LORA, stage.seed, names_of(tasks))
    return [single.name for single in singles]


def run_merge_cell(
    base: PreTrainedModel,
    encoder: Encoder,
    tasks: Sequence[Task],
    stage: Stage,
    settings: MergeSettings,
    folder: Path,
    batch_size: int,
) -> dict:
    """Merge the LoRAs of the stage's seed, in `folder` of the comparison, and score; `base` is left as it was."""
    singles = merged_cells(stage, tasks)
    start = time.perf_counter()
    vectors = read_task_vectors([folder / "adapters" / name for name in singles])
    questions = questions_for(settings, encoder, tasks)
    # Every process finds the same; one keeps what it finds.
    state = folder / "checkpoints" / stage.name if PartialState().is_main_process else None
    merged = merge(base, vectors, _with_seed(settings, stage.seed), questions, state)
    merge_seconds = time.perf_counter() - start
    start = time.perf_counter()
    with applied(base, merged) as model:
        scores = score_tasks(model, encoder, tasks, batch_size, label=f"score {stage.name}")
    score_seconds = time.perf_counter() - start
    # Trained are the coefficients and masks that data decides, and the LoRAs before they were merged.
    parameters = merged.coefficients.numel() if settings.kind.adaptive else 0
    for mask in (merged.masks or {}).values():
        parameters += mask.numel()
    train_seconds = merge_seconds
    for name in singles:
        trained = finished(folder, name)
        if trained is not None:
            parameters += trained["trainable_parameters"]
            train_seconds += trained["train_seconds"]
    return {
        **scored(scores),
        "trainable_parameters": parameters,
        "train_seconds": train_seconds,
        "merge_seconds": merge_seconds,
        "score_seconds": score_seconds,
        "loss": list(enumerate(merged.losses, 1)),
        "coefficients": merged.coefficients.tolist(),
    }


def _with_seed(settings: MergeSettings, seed: int) -> MergeSettings:
    return replace(
        settings,
        seed=seed,
        adaptive=replace(settings.adaptive, seed=seed),
        concrete=replace(settings.concrete, seed=seed),
    )
