"""`mosld train`: the frozen base and every adapter of a run, trained and scored, and what is reported of them."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedModel

from ..files.atomic import write_text_atomic
from ..tasks.encode import Encoder
from ..tasks.examples import Task
from .charts import draw_charts
from .inputs import RunInputs
from .methods import LORA
from .plan import Recipe, Stage
from .results import display_name, summarise_methods, table, versions
from .stages import drop_checkpoints, finish, finished, run_stage, score_base


@dataclass(frozen=True)
class TrainingRun:
    """A run whose every setting has been checked, with its folder claimed and its model loaded.

    settings: what decides the results, as run.json has it.
    method: the one that the run is about; LoRA may be beside it.
    """

    folder: Path
    settings: dict[str, object]
    method: str
    seeds: int
    inputs: RunInputs
    recipe: Recipe
    tasks: list[Task]
    stages: list[Stage]
    base: PreTrainedModel
    encoder: Encoder


def run_training(run: TrainingRun) -> None:
    """Score the base, train and score every stage that is not finished yet, show and save the results."""
    start = time.perf_counter()
    writes = PartialState().is_main_process
    base_result = finished(run.folder, "base") or score_base(run.base, run.encoder, run.tasks, run.recipe)
    if writes:
        finish(run.folder, "base", base_result)
    results = []
    for stage in run.stages:
        result = finished(run.folder, stage.name)
        if result is not None and writes:
            drop_checkpoints(run.folder, stage.name)  # the process may have been killed before it did
        if result is None:
            folder = adapter_folder(run, stage)
            result = run_stage(run.base, run.encoder, run.tasks, stage, run.recipe, run.folder, folder)
            if writes:
                finish(run.folder, stage.name, result)
        results.append(result)
    if writes:
        methods = summarise_methods(base_result, run.stages, results)
        _report(methods, run, time.perf_counter() - start)


def adapter_folder(run: TrainingRun, stage: Stage) -> Path:
    """The run's own adapter is `adapter`; other seeds, methods and single tasks are under `adapters`."""
    if stage.label == run.method and stage.seed == 0:
        return run.folder / "adapter"
    return run.folder / "adapters" / stage.name


def _report(methods: dict[str, dict], run: TrainingRun, seconds: float) -> None:
    """Draw and write the results, then print what a reader wants first."""
    mixture = run.recipe.adapters[run.method].mixture(len(run.tasks))
    top_k = mixture.experts_per_token if mixture else 1
    charts = draw_charts(methods, run.method, run.folder, top_k)
    results = {
        "tasks": methods[run.method]["tasks"],
        "methods": methods,
        "settings": run.settings,
        "seeds": list(range(run.seeds)),
        "versions": versions(),
        "seconds": seconds,
    }
    write_text_atomic(run.folder / "results.json", json.dumps(results, indent=2) + "\n")
    if methods["base"]["tasks"]:
        print(f"\naccuracy in percent on held-out items\n\n{table(methods)}")
    _print_notes(run)
    written = ["results.json", "adapter"]
    for chart in charts:
        written.append(chart.name)
    print(f"\nwritten to {run.folder}: {', '.join(written)} ({seconds:.0f} s)")
    _print_loading(run)


def _print_notes(run: TrainingRun) -> None:
    """What the table does not say of itself."""
    untested = [task.name for task in run.tasks if not task.test]
    if untested:
        print(f"\ntrained on but not scored, since they have no test file: {', '.join(untested)}")
    if run.inputs.quick:
        print("\nA quick run shows that every step works; it is too short to learn the tasks.")
    elif not run.inputs.tasks:
        print(
            "\nThis run shows that the library trains and learns on this machine. It does not rank methods: the tasks "
            "are small,\nthe model is tiny, and seeds differ by more than methods do."
        )


def _print_loading(run: TrainingRun) -> None:
    lines = []
    if run.method != LORA:
        lines.append("import mosld  # makes the method known to PEFT")
    lines.append("from peft import AutoPeftModelForCausalLM")
    lines.append(f"model = AutoPeftModelForCausalLM.from_pretrained({str(run.folder / 'adapter')!r})")
    print(f"load the {display_name(run.method)} adapter:\n\n    " + "\n    ".join(lines))
