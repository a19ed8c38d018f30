"""`mosld compare`: its options, what they decide, and the comparison that they ask for."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..embedded.base_model import EMBEDDED
from ..experiments import compare_merged
from ..experiments.compare import Comparison, run_comparison
from ..experiments.inputs import (
    RunInputs,
    check_examples,
    check_quick,
    chosen_tasks,
    hold_out,
    model_state,
    names_of,
    questions_for,
    task_encoder,
    task_settings,
)
from ..experiments.loading import load_model
from ..experiments.plan import COMMON_TRAINER, OWN_TRAINER, Recipe, plan_comparison, plan_merges
from ..experiments.results import versions
from ..experiments.rows import (
    DEFAULT,
    EQUAL,
    KNOWN,
    LORA,
    RATE,
    REFERENCE,
    Row,
    check_known,
    make_rows,
    positive_number,
)
from ..experiments.run_folder import COMPARE, check_free, claim, free_folder
from ..merging.merge import MergeSettings
from ..tasks.examples import Task
from ..tasks.proportions import parse_proportions
from ..training.arguments import training_arguments
from .options import add_data, check_at_least_one, inputs_of, refuse_trainer_words, refusing

HELP = "compare methods on the same tasks, over seeds"
EXAMPLES = """examples:
  mosld compare --quick --setting mixture --seeds 2
  mosld compare --methods lora,hydralora,mosld --seeds 5 --output runs/three
  mosld compare --merge task_arithmetic,ties,adamerging_layer      the single LoRAs, merged, in the same table
  mosld compare --sweep rank=2,4,8,16,32          the paper's ablations: rank, experts by parts of the layers, dropout
  mosld compare --sweep experts=2-8,8-2,5-5       first and second half; four numbers are quarters
  mosld compare --methods lora,mosld --sweep learning_rate=2e-3,4e-3,8e-3 --validation 0.1

a finished cell (method, setting, task, seed) is never run again: the same command goes on, and more methods, seeds or
settings may be added. Every argument of transformers' TrainingArguments can be given as well, for all methods
"""
TRAINER_ARGUMENTS = True
# What of the Trainer's arguments has an option here, since it is equal for all rows or differs between them.
INSTEAD = {"--seed": "--seeds N", "--output_dir": "--output DIR", "--max_steps": "--num_train_epochs"}

SETTINGS = ("mixture", "single")
# Found on the embedded model for LoRA of rank 8 and for MoSLD; every other method takes MoSLD's.
EMBEDDED_RATES = {LORA: "6e-3"}
EMBEDDED_RATE = "4e-3"
# A share of the steps for warm-up, so that one adapter a task has the mixture's schedule.
EMBEDDED_TRAINER = ["--num_train_epochs", "4", "--warmup_steps", "0.13", "--per_device_train_batch_size", "32"]
QUICK_TRAINER = ["--num_train_epochs", "1", "--warmup_steps", "0.25", "--per_device_train_batch_size", "32"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser, "name=train.jsonl:test.jsonl; once per task")
    parser.add_argument("--output", help="folder of the comparison (default: one under runs/)")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that --output holds")
    parser.add_argument(
        "--methods",
        metavar="A,B,...",
        help=f"of {', '.join(KNOWN)} (default: {','.join(DEFAULT)}; with --sweep {REFERENCE})",
    )
    parser.add_argument(
        "--setting",
        choices=(*SETTINGS, "both"),
        default="both",
        help="one adapter on all tasks, one a task, or both (default)",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (default: 3)")
    parser.add_argument(
        "--sweep", metavar="NAME=V,...", help="each value is a row: rank, experts, dropout, learning_rate"
    )
    parser.add_argument("--learning-rates", metavar="A=RATE,...", help="of single methods; --learning_rate is for all")
    parser.add_argument(
        "--merge",
        metavar="A,B,...",
        help=f"also merge the LoRAs of single tasks, by methods of {', '.join(compare_merged.KNOWN)}",
    )
    parser.add_argument(
        "--merge-options",
        metavar="NAME=V,...",
        help=f"of adaptive merging: {', '.join(compare_merged.OPTIONS)} (default: the method's)",
    )
    parser.add_argument(
        "--validation",
        type=float,
        metavar="SHARE",
        help="score this share of the training examples, held out, instead of the test items: for choosing settings",
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test of the whole way on the embedded tasks")
    parser.add_argument("--proportions", default="proportional", help="as in mosld train (default: proportional)")
    parser.add_argument(
        "--target-modules", help="comma-separated names, or all-linear (default: all-linear, of mixlora its preset's)"
    )


def run(options: argparse.Namespace, trainer_words: Sequence[str]) -> None:
    with refusing(ValueError):
        comparison = prepare_comparison(options, trainer_words)
    options.output = comparison.folder  # may have been chosen here; an error of the disk names it
    run_comparison(comparison)


def prepare_comparison(options: argparse.Namespace, trainer_words: Sequence[str]) -> Comparison:
    """Everything of `mosld compare` that can fail for a reason of the user's, in the order of what it costs.

    raises ValueError (TaskFileError, RunFolderError and ModelError among them); nothing is trained or written then.
    """
    inputs = inputs_of(options)
    _check(options, inputs)
    names = _method_names(options.methods, options.sweep)
    rates = _rates(options.learning_rates, names)
    merges = compare_merged.parse_merges(options.merge, options.merge_options, names, options.setting)
    if merges and options.sweep:
        raise ValueError("--merge contradicts --sweep, whose rows are no plain LoRAs of single tasks")
    refuse_trainer_words(trainer_words, INSTEAD, "mosld compare")
    tasks = _tasks(inputs, options.validation)
    task_names = names_of(tasks)
    proportions = parse_proportions(options.proportions, task_names)
    training_arguments([*COMMON_TRAINER, *trainer_words], Path("unused"))
    settings = _settings(inputs, options.validation, proportions)
    folder = Path(options.output) if options.output else free_folder(_folder_name(options), settings, COMPARE)
    # Before the model is loaded, which takes longest of all that is checked.
    check_free(folder, settings, options.overwrite, COMPARE)
    base, tokenizer = load_model(inputs)
    encoder = task_encoder(inputs, base, tokenizer, tasks)
    for merge in merges.values():
        questions_for(merge, encoder, tasks)  # what cannot be predicted on is known before anything is trained
    rows = make_rows(names, base, options.target_modules, rates, options.sweep, len(tasks))
    recipe = _recipe(rows, inputs, trainer_words, proportions)
    # Once more with the rows, whose sizes follow from the model.
    settings["rows"] = _row_settings(rows, recipe, merges)
    check_free(folder, settings, options.overwrite, COMPARE)
    chosen = SETTINGS if options.setting == "both" else (options.setting,)
    stages = plan_comparison(list(recipe.adapters), chosen, options.seeds, task_names)
    stages += plan_merges(list(merges), options.seeds)
    # One process makes the folder its own; the others must not write into it before.
    if PartialState().is_main_process and claim(folder, settings, options.overwrite, COMPARE):
        print(f"going on with the comparison in {folder}")
    PartialState().wait_for_everyone()
    return Comparison(
        folder=folder,
        settings=settings,
        rows=rows,
        recipe=recipe,
        stages=stages,
        tasks=tasks,
        base=base,
        encoder=encoder,
        quick=inputs.quick,
        merges=merges,
    )


def _check(options: argparse.Namespace, inputs: RunInputs) -> None:
    check_at_least_one("seeds", options.seeds)
    check_at_least_one("eval-batch-size", options.eval_batch_size)
    if options.validation is not None and not 0 < options.validation < 1:
        raise ValueError(f"validation must be a share in (0, 1), got {options.validation:g}")
    check_quick(inputs)


def _method_names(methods: str | None, sweep: str | None) -> list[str]:
    names: list[str] = [REFERENCE] if sweep else [*DEFAULT]
    if methods:
        names = methods.split(",")
    check_known("methods", names, KNOWN)
    if len(set(names)) < len(names):
        raise ValueError(f"methods must differ, got {methods}")
    if sweep and EQUAL in names and sweep.partition("=")[0] != RATE:
        raise ValueError(f"--sweep contradicts {EQUAL}, whose rank follows from the reference's size")
    return names


def _rates(text: str | None, names: Sequence[str]) -> dict[str, str]:
    """ "lora=6e-3,mosld=4e-3" -> method -> rate, as given"""
    rates = {}
    for part in text.split(",") if text else ():
        name, _, rate = part.partition("=")
        if name not in names:
            raise ValueError(f"learning-rates must be name=rate,... of the methods {', '.join(names)}, got {part!r}")
        rates[name] = positive_number("learning-rates", rate)
    return rates


def _tasks(inputs: RunInputs, validation: float | None) -> list[Task]:
    tasks = chosen_tasks(inputs)
    if validation is not None:
        tasks = [hold_out(task, validation) for task in tasks]
    check_examples(tasks, "train", "train on")
    check_examples(tasks, "test", "compare on")
    return tasks


def _settings(inputs: RunInputs, validation: float | None, proportions: dict[str, float] | str) -> dict[str, Any]:
    """What decides the results beside the rows, the seeds and which of the settings are run."""
    return {
        "model": inputs.model or EMBEDDED,
        **task_settings(inputs),
        "validation": validation,
        "model_files": model_state(inputs.model),
        "versions": versions(),
        "max_length": inputs.max_length,
        "proportions": proportions,
        "eval_batch_size": inputs.eval_batch_size,
        "processes": PartialState().num_processes,
    }


def _row_settings(rows: Sequence[Row], recipe: Recipe, merges: dict[str, MergeSettings]) -> dict[str, Any]:
    """What decides the results of each row."""
    settings = {}
    for row in rows:
        settings[row.name] = {**asdict(row), "trainer": recipe.trainer[row.name]}
    for name, merge in merges.items():
        settings[name] = asdict(merge)
    return settings


def _folder_name(options: argparse.Namespace) -> str:
    parts = ["compare"]
    if options.sweep:
        parts.append(options.sweep.partition("=")[0])
    if options.quick:
        parts.append("quick")
    if inputs_of(options).model:
        parts.append("own")
    return "-".join(filter(None, parts))


def _recipe(
    rows: Sequence[Row], inputs: RunInputs, trainer_words: Sequence[str], proportions: dict[str, float] | str
) -> Recipe:
    """What the user says of the Trainer comes after the defaults, and a rate for one row after it."""
    adapters, trainer = {}, {}
    for row in rows:
        words = [*COMMON_TRAINER, *_trainer_defaults(row, inputs), *trainer_words]
        if row.rate:
            words += ["--learning_rate", row.rate]
        adapters[row.name], trainer[row.name] = row.adapter, words
    return Recipe(adapters, trainer, proportions, inputs.eval_batch_size)


def _trainer_defaults(row: Row, inputs: RunInputs) -> list[str]:
    if inputs.model:
        return OWN_TRAINER
    rate = EMBEDDED_RATES.get(row.adapter.method, EMBEDDED_RATE)
    if row.name == EQUAL:
        rate = EMBEDDED_RATE  # LoRA's own was found at rank 8: a far larger one takes that of the others
    return ["--learning_rate", rate, *(QUICK_TRAINER if inputs.quick else EMBEDDED_TRAINER)]
