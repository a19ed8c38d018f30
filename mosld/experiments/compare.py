"""`mosld compare`: methods side by side on the same tasks, over seeds; every finished cell is kept and never run again.

row     a method with its options, such as "lora" or "mosld-rank4"; a line of the table for each setting
setting "mixture", one adapter trained on all tasks, "single", one adapter a task, or "merged": the single LoRAs made one
cell    one row, setting, seed and, where single, task: a Stage, with its file under stages/

Equal for all rows: the frozen base, the tasks and test items, passes over every training example, batch size, schedule, and
for a seed the order of the examples. Single and mixture: every example is seen equally often, so the steps of one adapter a
task add up to those of the mixture (but for the last, smaller batch of each pass). Not equal: the learning rate, which is
the method's, and the initial adapters, whose shapes differ.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..files.errors import LESS_MEMORY, CellsFailed, first_line, free_memory, out_of_memory
from ..merging.merge import MergeSettings
from ..merging.unlabelled import without_labels
from ..tasks.encode import Encoder
from ..tasks.examples import Task, TaskFileError
from ..tasks.proportions import parse_proportions
from ..training.arguments import training_arguments
from . import commands, compare_merged, compare_report
from .loading import load_model
from .methods import LORA, METHODS, NAMES, Adapter, targets
from .plan import Recipe, Stage
from .results import versions
from .run_folder import COMPARE, check_free, claim, free_folder, model_state
from .stages import count_trained, drop_checkpoints, finish, finished, run_stage, score_base
from .task_options import EMBEDDED, check_quick, chosen_tasks, task_settings

EQUAL = "lora_equal"  # PEFT's LoRA of the rank whose parameters come nearest to those of the reference
REFERENCE = "mosld"
KNOWN = (*METHODS[:2], EQUAL, *METHODS[2:])
DEFAULT = (LORA, EQUAL, "hydralora", "mola", "mosl", REFERENCE)
SETTINGS = ("mixture", "single")

# Found on the embedded model for LoRA of rank 8 and for MoSLD; every other method takes MoSLD's.
EMBEDDED_RATES = {LORA: "6e-3"}
EMBEDDED_RATE = "4e-3"
# A share of the steps for warm-up, so that one adapter a task has the mixture's schedule.
EMBEDDED_TRAINER = ["--num_train_epochs", "4", "--warmup_steps", "0.13", "--per_device_train_batch_size", "32"]
QUICK_TRAINER = ["--num_train_epochs", "1", "--warmup_steps", "0.25", "--per_device_train_batch_size", "32"]


@dataclass(frozen=True)
class Row:
    """rate: the learning rate where it is not the method's own."""

    name: str
    title: str
    adapter: Adapter
    rate: str | None = None


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


def prepare(options: argparse.Namespace, trainer_words: Sequence[str]) -> Comparison:
    """Everything of `mosld compare` that can fail for a reason of the user's, in the order of what it costs.

    raises ValueError (TaskFileError, RunFolderError and ModelError among them); nothing is trained or written then.
    """
    _check(options)
    names = _method_names(options)
    rates = _rates(options.learning_rates, names)
    merges = compare_merged.chosen(options.merge, options.merge_options, names, options.setting)
    if merges and options.sweep:
        raise ValueError("--merge contradicts --sweep, whose rows are no plain LoRAs of single tasks")
    instead = {"--seed": "--seeds N", "--output_dir": "--output DIR", "--max_steps": "--num_train_epochs"}
    commands.refuse_words(trainer_words, instead, "mosld compare")
    tasks = _tasks(options)
    proportions = parse_proportions(options.proportions, [task.name for task in tasks])
    training_arguments([*commands.COMMON_TRAINER, *trainer_words], Path("unused"))
    settings = _settings(options, proportions)
    folder = Path(options.output) if options.output else free_folder(_folder_name(options), settings, COMPARE)
    check_free(folder, settings, options.overwrite, COMPARE)
    base, tokenizer = load_model(options)
    encoder = Encoder(tokenizer, commands.longest_input(options, base))
    commands.check_fit(encoder, tasks)
    if any(merge.kind.adaptive for merge in merges.values()):
        for task in tasks:
            without_labels(encoder, task)
    rows = _rows(names, options, base, rates, len(tasks))
    recipe = Recipe(
        {row.name: row.adapter for row in rows},
        {row.name: _words(options, row, trainer_words) for row in rows},
        proportions,
        options.eval_batch_size,
    )
    settings["rows"] = {row.name: {**asdict(row), "trainer": recipe.trainer[row.name]} for row in rows}
    settings["rows"] |= {name: asdict(merge) for name, merge in merges.items()}
    check_free(folder, settings, options.overwrite, COMPARE)
    chosen = SETTINGS if options.setting == "both" else (options.setting,)
    stages = plan([row.name for row in rows], chosen, options.seeds, [task.name for task in tasks])
    stages += compare_merged.plan(list(merges), options.seeds)
    if PartialState().is_main_process and claim(folder, settings, options.overwrite, COMPARE):
        print(f"going on with the comparison in {folder}")
    PartialState().wait_for_everyone()
    return Comparison(folder, settings, rows, recipe, stages, tasks, base, encoder, options.quick, merges)


def compare(run: Comparison) -> None:
    """Train and score every cell that is not finished yet, then show and write the results.

    raises CellsFailed where some had too little memory, after the others are finished.
    """
    writes = PartialState().is_main_process
    base_result = finished(run.folder, "base") or score_base(run.base, run.encoder, run.tasks, run.recipe)
    if writes:
        finish(run.folder, "base", base_result)
    results = []
    failed: dict[str, str] = {}
    with tqdm(total=len(run.stages), desc="compare", unit="cell", disable=not writes) as progress:
        for stage in run.stages:
            result = finished(run.folder, stage.name)
            if result is not None and writes:
                drop_checkpoints(run.folder, stage.name)  # the process may have been killed before it did
            if result is None:
                result = _try_cell(run, stage, failed)
                if writes and result is not None:
                    finish(run.folder, stage.name, result)
            if result is not None:
                results.append(result)
            progress.update()
    if failed:
        raise CellsFailed(_without(failed, run))
    if writes:
        titles = {row.name: row.title for row in run.rows}
        titles |= {name: merge.kind.title for name, merge in run.merges.items()}
        data = compare_report.gather(titles, _reference(titles), base_result, run.stages, results)
        data |= {"settings": run.settings, "versions": versions()}
        compare_report.write(data, run.folder)
        print(f"\n{compare_report.text(data)}")
        if run.quick:
            print("\nA quick comparison shows that every step works; it is too short to learn the tasks.")
        print(f"\nwritten to {run.folder}: compare.json, compare.md, accuracy.png, parameters.png")


def _run_cell(run: Comparison, stage: Stage) -> dict[str, Any]:
    if stage.label in run.merges:
        settings, size = run.merges[stage.label], run.recipe.eval_batch_size
        return compare_merged.run(run.base, run.encoder, run.tasks, stage, settings, run.folder, size)
    adapter_dir = run.folder / "adapters" / stage.name
    return run_stage(run.base, run.encoder, run.tasks, stage, run.recipe, run.folder, adapter_dir)


def _try_cell(run: Comparison, stage: Stage, failed: dict[str, str]) -> dict[str, Any] | None:
    """The cell's result; None, with the reason in `failed`, where memory was lacking or a LoRA that it merges has failed.

    raises CellsFailed at once where several processes train: the others wait for this one in the middle of the cell.
    """
    needs = compare_merged.needs(stage, run.tasks) if stage.label in run.merges else []
    if lacking := [name for name in needs if name in failed]:
        failed[stage.name] = f"merges {', '.join(lacking)}"
        return None
    try:
        return _run_cell(run, stage)
    except Exception as error:
        if not out_of_memory(error):
            raise
        failed[stage.name] = first_line(error)
        if PartialState().num_processes > 1:
            raise CellsFailed(_without(failed, run)) from error
    free_memory()
    tqdm.write(f"out of memory in {stage.name}; the other cells go on")
    return None


def _without(failed: dict[str, str], run: Comparison) -> str:
    """What to say of a comparison without the cells `failed`, cell -> reason."""
    cells = "".join(f"\n  {name}: {reason}" for name, reason in failed.items())
    return (
        f"out of memory in {len(failed)} of {len(run.stages)} cells:{cells}\n"
        f"Every finished cell is kept in {run.folder}; the tables are written when all are finished. Free memory on the device, "
        "or take a larger one, and run the same command again: it runs what is missing alone. "
        f"{LESS_MEMORY['compare'].capitalize()} needs less, but changes every row: give it with another --output. A table "
        "without a method: the same command with the other --methods."
    )


def _reference(rows: Sequence[str] | dict[str, str]) -> str:
    return REFERENCE if REFERENCE in rows else next(iter(rows))


def plan(rows: Sequence[str], settings: Sequence[str], seeds: int, task_names: Sequence[str]) -> list[Stage]:
    """A whole seed of a setting after the other, so that what is finished early compares all methods."""
    stages = []
    for setting in settings:
        for seed in range(seeds):
            for row in rows:
                if setting == "mixture":
                    stages.append(Stage(row, row, seed))
                else:
                    stages += [Stage(f"{row}-single", row, seed, name) for name in task_names]
    return stages


def _check(options: argparse.Namespace) -> None:
    if options.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {options.seeds}")
    if options.eval_batch_size < 1:
        raise ValueError(f"eval-batch-size must be at least 1, got {options.eval_batch_size}")
    if options.validation is not None and not 0 < options.validation < 1:
        raise ValueError(f"validation must be a share in (0, 1), got {options.validation:g}")
    check_quick(options)


def _method_names(options: argparse.Namespace) -> list[str]:
    names: list[str] = [REFERENCE] if options.sweep else [*DEFAULT]
    if options.methods:
        names = options.methods.split(",")
    if unknown := [name for name in names if name not in KNOWN]:
        raise ValueError(f"methods must be of {', '.join(KNOWN)}, got {', '.join(unknown)}")
    if len(set(names)) < len(names):
        raise ValueError(f"methods must differ, got {options.methods}")
    if options.sweep and EQUAL in names and options.sweep.partition("=")[0] != RATE:
        raise ValueError(f"--sweep contradicts {EQUAL}, whose rank follows from the reference's size")
    return names


def _rates(text: str | None, names: Sequence[str]) -> dict[str, str]:
    """ "lora=6e-3,mosld=4e-3" -> method -> rate, as given"""
    rates = {}
    for part in text.split(",") if text else ():
        name, _, rate = part.partition("=")
        if name not in names:
            raise ValueError(f"learning-rates must be name=rate,... of the methods {', '.join(names)}, got {part!r}")
        rates[name] = _number("learning-rates", rate)
    return rates


def _number(what: str, text: str) -> str:
    try:
        if not 0 < float(text) < float("inf"):
            raise ValueError
    except ValueError:
        raise ValueError(f"{what} must be positive and finite numbers, got {text!r}") from None
    return text


def _tasks(options: argparse.Namespace) -> list[Task]:
    tasks = chosen_tasks(options)
    if options.validation is not None:
        tasks = [_validation(task, options.validation) for task in tasks]
    for side in ("train", "test"):
        if empty := [task.name for task in tasks if not getattr(task, side)]:
            raise TaskFileError(f"nothing to {'train on' if side == 'train' else 'compare on'} for {', '.join(empty)}")
    return tasks


def _validation(task: Task, share: float) -> Task:
    """A part of the training examples in the place of the test items, the same part in every run."""
    order = Random(f"validation/{task.name}").sample(range(len(task.train)), len(task.train))
    held = set(order[: round(share * len(order))])
    train = [example for place, example in enumerate(task.train) if place not in held]
    return Task(task.name, train, [example for place, example in enumerate(task.train) if place in held])


def _settings(options: argparse.Namespace, proportions: dict[str, float] | str) -> dict[str, Any]:
    """What decides the results beside the rows, the seeds and which of the settings are run."""
    return {
        "model": options.model or EMBEDDED,
        **task_settings(options),
        "validation": options.validation,
        "model_files": model_state(options.model) if options.model else {},
        "versions": versions(),
        "max_length": options.max_length,
        "proportions": proportions,
        "eval_batch_size": options.eval_batch_size,
        "processes": PartialState().num_processes,
    }


def _folder_name(options: argparse.Namespace) -> str:
    sweep = options.sweep.partition("=")[0] if options.sweep else None
    parts = ["compare", sweep, "quick" if options.quick else None, "own" if options.model else None]
    return "-".join(part for part in parts if part)


def _words(options: argparse.Namespace, row: Row, given: Sequence[str]) -> list[str]:
    """The Trainer's arguments of a row; what the user gave comes last, and a rate for this row after it."""
    if options.model:
        own = commands.OWN_TRAINER
    else:
        # LoRA's rate was found at rank 8: a far larger one takes that of the others.
        default = EMBEDDED_RATES.get(row.adapter.method, EMBEDDED_RATE) if row.name != EQUAL else EMBEDDED_RATE
        own = ["--learning_rate", default, *(QUICK_TRAINER if options.quick else EMBEDDED_TRAINER)]
    return [*commands.COMMON_TRAINER, *own, *given, *(["--learning_rate", row.rate] if row.rate else [])]


def _rows(
    names: Sequence[str], options: argparse.Namespace, base: PreTrainedModel, rates: dict[str, str], num_tasks: int
) -> list[Row]:
    """raises ValueError for a sweep that a method cannot take and for targets that the model has not."""
    rows = []
    for name in names:
        if name == EQUAL:
            adapter = _equal_lora(base, targets(LORA, options.target_modules), num_tasks)
            title = f"LoRA, rank {adapter.options['r']}"
        else:
            adapter, title = Adapter(name, {}, targets(name, options.target_modules)), NAMES.get(name, name)
        row = Row(name, title, adapter, rates.get(name))
        rows += _swept(row, options.sweep, base) if options.sweep else [row]
    for row in rows:
        count_trained(base, row.adapter, num_tasks)
    return rows


def _equal_lora(base: PreTrainedModel, places: str | list[str], num_tasks: int) -> Adapter:
    """LoRA with MoSLD's number of parameters, or the nearest to it; alpha / r as in every LoRA here."""
    one = count_trained(base, Adapter(LORA, {"r": 1}, places), num_tasks)
    wanted = count_trained(base, Adapter(REFERENCE, {}, places), num_tasks)
    rank = max(1, round(wanted / one))
    return Adapter(LORA, {"r": rank, "alpha": 2.0 * rank}, places)


RATE = "learning_rate"
SWEEPS = ("rank", "experts", "dropout", RATE)


def _swept(row: Row, sweep: str, base: PreTrainedModel) -> list[Row]:
    """ "rank=2,4" -> a row of the method for each value."""
    what, _, values = sweep.partition("=")
    if what not in SWEEPS or not all(values.split(",")):
        raise ValueError(f"sweep must be {'=..., '.join(SWEEPS)}=..., with values after commas, got {sweep!r}")
    if len(set(values.split(","))) < len(values.split(",")):
        raise ValueError(f"values of a sweep must differ, got {sweep!r}")
    rows = []
    for value in values.split(","):
        adapter, own_rate = row.adapter, row.rate
        if what == RATE:
            own_rate = _number("learning rates of a sweep", value)
        else:
            adapter = replace(adapter, options=_options(adapter.method, what, value, base))
        title = f"{row.title}, {what.replace('_', ' ')} {value}"
        rows.append(Row(f"{row.name}-{what}{value}", title, adapter, own_rate))
    return rows


def _options(method: str, what: str, value: str, base: PreTrainedModel) -> dict[str, Any]:
    try:
        if what == "dropout":
            return {"dropout": float(value)}
        if what == "rank":
            mixture = Adapter(method).mixture()
            return {"r": int(value), "alpha": int(value) * (2.0 if mixture is None else mixture.scale)}
        counts = [int(part) for part in value.split("-")]
    except ValueError:
        raise ValueError(f"{what} of a sweep must be numbers, got {value!r}") from None
    if len(counts) == 1:
        return {"num_experts": counts[0]}
    home, layers = _layers(base)
    if len(counts) > layers:
        raise ValueError(
            f"experts={value} has {len(counts)} parts of the layers, and the model has {layers} layers: give at most as many"
        )
    pattern = {
        rf"{re.escape(home)}\.({'|'.join(str(i) for i in range(layers) if i * len(counts) // layers == part)})\..*": count
        for part, count in enumerate(counts)
    }
    return {"num_experts": max(counts), "num_experts_pattern": pattern}


def _layers(base: PreTrainedModel) -> tuple[str, int]:
    """Name and length of the list of the model's layers."""
    count = base.config.get_text_config().num_hidden_layers
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, count
    raise ValueError(
        f"experts by parts of the layers need a list of {count} layers, which {type(base).__name__} has not"
    )
