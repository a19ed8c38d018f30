"""`mosld train`: its options, what each of them decides, and the run that they ask for.

A new option is a change of this file alone: it is declared in `add_arguments`, and becomes part of an adapter, of the
recipe or of the settings here.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState

from ..embedded.base_model import EMBEDDED
from ..experiments.inputs import (
    RunInputs,
    check_examples,
    check_quick,
    chosen_tasks,
    model_state,
    names_of,
    task_encoder,
    task_settings,
)
from ..experiments.loading import load_model
from ..experiments.methods import LORA, LORA_DEFAULTS, METHODS, Adapter, targets
from ..experiments.plan import COMMON_TRAINER, OWN_TRAINER, Recipe, plan_training
from ..experiments.results import versions
from ..experiments.run_folder import check_free, claim, free_folder
from ..experiments.stages import count_trained
from ..experiments.train import TrainingRun, run_training
from ..tasks.proportions import parse_proportions
from ..training.arguments import training_arguments
from .options import add_data, check_at_least_one, inputs_of, refuse_trainer_words, refusing

HELP = "train adapters on several tasks and compare them"
EXAMPLES = """examples:
  mosld train                         six small tasks and a tiny language model made on the spot, no download
  mosld train --quick                 the same, far smaller, in under 50 seconds
  mosld train --model meta-llama/Llama-3.2-1B --task arc=arc.jsonl:arc_test.jsonl --task csqa=csqa.jsonl \\
              --output runs/mine

a task file has one JSON object a line:
  {"prompt": "...", "choices": ["...", "..."], "answer": 0}     or     {"prompt": "...", "completion": "..."}

every argument of transformers' TrainingArguments can be given as well, for example
  --learning_rate 1e-3 --num_train_epochs 2 --per_device_train_batch_size 4 --bf16 true --gradient_checkpointing true
"""
TRAINER_ARGUMENTS = True

# Found on the embedded model and its tasks; what other models take is the paper's, where it says.
EMBEDDED_RATES = {LORA: "6e-3"}
EMBEDDED_RATE = "4e-3"
EMBEDDED_TRAINER = ["--num_train_epochs", "4", "--warmup_steps", "100", "--per_device_train_batch_size", "32"]
QUICK_TRAINER = ["--num_train_epochs", "1", "--warmup_steps", "10", "--per_device_train_batch_size", "32"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser, "name=train.jsonl or name=train.jsonl:test.jsonl; once per task")
    parser.add_argument("--output", help="folder of the run (default: a new one under runs/)")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that --output holds")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="mosld",
        metavar="NAME",
        help=f"PEFT's LoRA or a preset: {', '.join(METHODS)} (default: mosld)",
    )
    parser.add_argument("--no-lora", action="store_true", help="do not train PEFT's LoRA beside the method")
    parser.add_argument("--single", action="store_true", help="also train one model a task")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="repeat with seeds 0 to N-1 (default: 1)")
    parser.add_argument("--quick", action="store_true", help="a smoke test of the whole way on the embedded tasks")
    parser.add_argument(
        "--proportions", default="proportional", help="proportional, equal or name=weight,... (default: proportional)"
    )
    adapter = parser.add_argument_group(
        "adapter", "Unless given, the method's own; in brackets those of mosld and lora."
    )
    adapter.add_argument("--r", type=int, help="rank (8)")
    adapter.add_argument("--alpha", type=float, help="the update is scaled by alpha / r (16)")
    adapter.add_argument("--num-experts", type=int, help="experts per layer (8)")
    adapter.add_argument("--top-k", type=int, help="experts per token (2)")
    adapter.add_argument("--dropout", type=float, help="on elements of the shared factor, of lora on the input (0.1)")
    adapter.add_argument("--balance-coef", type=float, help="weight of the balance loss (0.001)")
    adapter.add_argument(
        "--target-modules", help="comma-separated names, or all-linear (default: all-linear, of mixlora its preset's)"
    )


ADAPTER_OPTIONS = ("r", "alpha", "num_experts", "top_k", "dropout", "balance_coef")  # fields of MoSLDConfig


def run(options: argparse.Namespace, trainer_words: Sequence[str]) -> None:
    with refusing(ValueError):
        training = prepare_training(options, trainer_words)
    options.output = training.folder  # may have been chosen here; an error of the disk names it
    run_training(training)


def prepare_training(options: argparse.Namespace, trainer_words: Sequence[str]) -> TrainingRun:
    """Everything of `mosld train` that can fail for a reason of the user's, in the order of what it costs.

    raises ValueError (TaskFileError, RunFolderError and ModelError among them); nothing is trained or written then.
    """
    inputs = inputs_of(options)
    check_at_least_one("seeds", options.seeds)
    check_at_least_one("eval-batch-size", options.eval_batch_size)
    check_quick(inputs)
    tasks = chosen_tasks(inputs)
    check_examples(tasks, "train", "train on")
    task_names = names_of(tasks)
    adapters = _adapters(options, len(tasks))
    recipe = _recipe(inputs, adapters, trainer_words, parse_proportions(options.proportions, task_names))
    stages = plan_training(
        options.method,
        beside_lora=not options.no_lora,
        single=options.single,
        seeds=options.seeds,
        task_names=task_names,
    )
    settings = _settings(options, inputs, recipe)
    folder = Path(options.output) if options.output else free_folder(_folder_name(options.method, inputs), settings)
    # Before the model is loaded, which takes longest of all that is checked.
    check_free(folder, settings, options.overwrite)
    base, tokenizer = load_model(inputs)
    encoder = task_encoder(inputs, base, tokenizer, tasks)
    # On the real layers: a target that is not there is known before anything is trained.
    for adapter in recipe.adapters.values():
        count_trained(base, adapter, len(tasks))
    # One process makes the folder its own; the others must not write into it before.
    if PartialState().is_main_process and claim(folder, settings, options.overwrite):
        print(f"going on with the unfinished run in {folder}")
    PartialState().wait_for_everyone()
    return TrainingRun(
        folder=folder,
        settings=settings,
        method=options.method,
        seeds=options.seeds,
        inputs=inputs,
        recipe=recipe,
        tasks=tasks,
        stages=stages,
        base=base,
        encoder=encoder,
    )


def _adapters(options: argparse.Namespace, num_tasks: int) -> dict[str, Adapter]:
    """The method's and, unless it is that, PEFT's LoRA beside it; raises ValueError for options that cannot be used."""
    given, of_lora = {}, {}
    for name in ADAPTER_OPTIONS:
        value = getattr(options, name)
        if value is None:  # not given: the method's own value holds
            continue
        given[name] = value
        if name in LORA_DEFAULTS:
            of_lora[name] = value
    adapters = {options.method: Adapter(options.method, given, targets(options.method, options.target_modules))}
    if options.method != LORA and not options.no_lora:
        adapters[LORA] = Adapter(LORA, of_lora, targets(LORA, options.target_modules))
    for adapter in adapters.values():
        adapter.config(num_tasks)
    return adapters


def _recipe(
    inputs: RunInputs,
    adapters: dict[str, Adapter],
    trainer_words: Sequence[str],
    proportions: dict[str, float] | str,
) -> Recipe:
    """What the user says of the Trainer comes last, and so holds."""
    refuse_trainer_words(trainer_words, {"--seed": "--seeds N", "--output_dir": "--output DIR"}, "mosld train")
    trainer = {}
    for method in adapters:
        words = [*COMMON_TRAINER, *_trainer_defaults(method, inputs), *trainer_words]
        training_arguments(words, Path("unused"))  # a bad word is reported before anything is trained
        trainer[method] = words
    return Recipe(adapters, trainer, proportions, inputs.eval_batch_size)


def _trainer_defaults(method: str, inputs: RunInputs) -> list[str]:
    if inputs.model:
        return OWN_TRAINER
    rate = EMBEDDED_RATES.get(method, EMBEDDED_RATE)
    return ["--learning_rate", rate, *(QUICK_TRAINER if inputs.quick else EMBEDDED_TRAINER)]


def _settings(options: argparse.Namespace, inputs: RunInputs, recipe: Recipe) -> dict[str, object]:
    """What decides the results: two runs with equal settings are the same run."""
    return {
        "model": inputs.model or EMBEDDED,
        **task_settings(inputs),
        "method": options.method,
        "compare_lora": not options.no_lora,
        "single": options.single,
        "seeds": options.seeds,
        "processes": PartialState().num_processes,
        "model_files": model_state(inputs.model),
        "versions": versions(),
        "max_length": inputs.max_length,
        **asdict(recipe),
    }


def _folder_name(method: str, inputs: RunInputs) -> str:
    parts = [method]
    if inputs.quick:
        parts.append("quick")
    if inputs.model:
        parts.append("own")
    return "-".join(parts)
