"""`mosld compare`: methods side by side on the same tasks, over seeds; every finished cell is kept and never run again.

row     a method with its options, such as "lora" or "mosld-rank4"; a line of the table for each setting
setting "mixture", one adapter trained on all tasks, "single", one a task, or "merged": the single LoRAs made one
cell    one row, setting, seed and, where single, task: a Stage, with its file under stages/

Equal for all rows: the frozen base, the tasks and test items, passes over every training example, batch size, schedule,
and for a seed the order of the examples. Single and mixture: every example is seen equally often, so the steps of one
adapter a task add up to those of the mixture (but for the last, smaller batch of each pass). Not equal: the learning
rate, which is the method's, and the initial adapters, whose shapes differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..files.errors import LESS_MEMORY, CellsFailed, first_line, free_memory, out_of_memory
from ..merging.merge import MergeSettings
from ..tasks.encode import Encoder
from ..tasks.examples import Task
from . import compare_merged, compare_report
from .plan import Recipe, Stage
from .results import versions
from .rows import REFERENCE, Row
from .stages import drop_checkpoints, finish, finished, run_stage, score_base


@dataclass(frozen=True)
class Comparison:
    """A comparison whose every setting has been checked, with its folder claimed and its model loaded."""

    folder: Path
    settings: dict[str, Any]
    rows: list[Row]
    recipe: Recipe
    stages: list[Stage]
    tasks: list[Task]
    base: PreTrainedModel
    encoder: Encoder
    quick: bool
    merges: dict[str, MergeSettings]


def run_comparison(run: Comparison) -> None:
    """Train and score every cell that is not finished yet, then show and write the results.

    raises CellsFailed where some had too little memory, after the others are finished.
    """
    writes = PartialState().is_main_process
    base_result = finished(run.folder, "base") or score_base(run.base, run.encoder, run.tasks, run.recipe)
    if writes:
        finish(run.folder, "base", base_result)
    results = []
    failed: dict[str, str] = {}
    with tqdm(total=len(run.stages), desc="compare", unit="cell", disable=None if writes else True) as progress:
        for stage in run.stages:
            result = _finished_or_run(run, stage, failed)
            if result is not None:
                results.append(result)
            progress.update()
    if failed:
        raise CellsFailed(_without_cells(failed, run))
    if writes:
        _report(run, base_result, results)


def _finished_or_run(run: Comparison, stage: Stage, failed: dict[str, str]) -> dict[str, Any] | None:
    writes = PartialState().is_main_process
    result = finished(run.folder, stage.name)
    if result is not None:
        if writes:
            drop_checkpoints(run.folder, stage.name)  # the process may have been killed before it did
        return result
    result = _try_cell(run, stage, failed)
    if writes and result is not None:
        finish(run.folder, stage.name, result)
    return result


def _run_cell(run: Comparison, stage: Stage) -> dict[str, Any]:
    if stage.label in run.merges:
        settings = run.merges[stage.label]
        batch_size = run.recipe.eval_batch_size
        return compare_merged.run_merge_cell(run.base, run.encoder, run.tasks, stage, settings, run.folder, batch_size)
    adapter_dir = run.folder / "adapters" / stage.name
    return run_stage(run.base, run.encoder, run.tasks, stage, run.recipe, run.folder, adapter_dir)


def _try_cell(run: Comparison, stage: Stage, failed: dict[str, str]) -> dict[str, Any] | None:
    """The cell's result; None, with the reason in `failed`, where it or a LoRA that it merges had too little memory.

    raises CellsFailed at once where several processes train: the others wait for this one in the middle of the cell.
    """
    needed = compare_merged.merged_cells(stage, run.tasks) if stage.label in run.merges else []
    lacking = [name for name in needed if name in failed]
    if lacking:
        failed[stage.name] = f"merges {', '.join(lacking)}"
        return None
    try:
        return _run_cell(run, stage)
    except Exception as error:
        if not out_of_memory(error):
            raise
        failed[stage.name] = first_line(error)
        if PartialState().num_processes > 1:
            raise CellsFailed(_without_cells(failed, run)) from error
    # Only here, where the error is gone, does nothing hold the frames of the failed cell any more.
    free_memory()
    tqdm.write(f"out of memory in {stage.name}; the other cells go on")
    return None


def _without_cells(failed: dict[str, str], run: Comparison) -> str:
    """What to say of a comparison without the cells `failed`, cell -> reason."""
    cells = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
    return (
        f"out of memory in {len(failed)} of {len(run.stages)} cells:{cells}\n"
        f"Every finished cell is kept in {run.folder}; the tables are written when all are finished. Free memory on "
        "the device, or take a larger one, and run the same command again: it runs what is missing alone. "
        f"{LESS_MEMORY['compare'].capitalize()} needs less, but changes every row: give it with another --output. A "
        "table without a method: the same command with the other --methods."
    )


def _report(run: Comparison, base_result: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    titles = {}
    for row in run.rows:
        titles[row.name] = row.title
    for name, merge in run.merges.items():
        titles[name] = merge.kind.title
    reference = REFERENCE if REFERENCE in titles else next(iter(titles))
    data = compare_report.summarise_rows(titles, reference, base_result, run.stages, results)
    data |= {"settings": run.settings, "versions": versions()}
    compare_report.write_comparison(data, run.folder)
    print(f"\n{compare_report.text(data)}")
    if run.quick:
        print("\nA quick comparison shows that every step works; it is too short to learn the tasks.")
    print(f"\nwritten to {run.folder}: compare.json, compare.md, accuracy.png, parameters.png")
