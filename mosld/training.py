"""One run of `mosld train`: score the frozen base, train each adapter with transformers' Trainer, score it, save it.

A run is a list of stages. Each finished stage leaves `stages/NAME.json` in the run's folder, and training leaves
checkpoints, so that the same command, given again after an interruption, goes on where it stopped.
"""

import contextlib
import json
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm.auto import tqdm
from transformers import (
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from .at_once import folder_at_once, write_at_once
from .card import write_card
from .checkpoints import STATE, WholeCheckpointsMixin, last_whole_checkpoint
from .methods import LORA, Adapter, task_setter
from .progress import show_progress
from .router import RouterUse
from .tasks.encode import IGNORED, Encoder
from .tasks.examples import Task
from .tasks.mixing import mix_with_tasks
from .tasks.scoring import score_tasks
from .trainer import MoSLDTrainer


@dataclass(frozen=True)
class Recipe:
    """Everything a stage needs beside the model and the tasks: by `Stage.method`, the adapter and the Trainer's arguments."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    trainer: dict[str, list[str]] = field(default_factory=dict)
    proportions: dict[str, float] | str = "proportional"
    eval_batch_size: int = 64


@dataclass(frozen=True)
class Stage:
    """One adapter to train, on all tasks or on one. `label` names the column in the results, `method` the recipe."""

    label: str
    method: str
    seed: int
    task: str | None = None

    @property
    def name(self) -> str:
        return "-".join([self.label, *([self.task] if self.task else []), f"seed{self.seed}"])


class LoraTrainer(WholeCheckpointsMixin, Trainer):
    """transformers' Trainer, whose checkpoints can be gone on from after any process was killed."""


class Interrupted(KeyboardInterrupt):
    """Training stopped on request, after saving a checkpoint."""


def plan(method: str, *, compare_lora: bool, single: bool, seeds: int, task_names: Sequence[str]) -> list[Stage]:
    """LoRA beside the method unless it is the method, then one model a task where that is wanted; every seed of each."""
    stages = []
    for seed in range(seeds):
        if compare_lora and method != LORA:
            stages.append(Stage(LORA, LORA, seed))
        stages.append(Stage(method, method, seed))
        if single:
            stages += [Stage(f"{method}-single", method, seed, name) for name in task_names]
    return stages


def count_trained(base: PreTrainedModel, adapter: Adapter, num_tasks: int) -> int:
    """How many parameters the adapter trains in `base`, which is left as it was.

    raises ValueError, naming the targets, when none of them is in the model or one cannot be adapted.
    """
    model = _adapted(base, adapter.config(num_tasks))
    try:
        return model.get_nb_trainable_parameters()[0]
    finally:
        _restore(base, model)


def _restore(base: PreTrainedModel, model: PeftModel) -> None:
    """Take the adapter out of `base` again."""
    model.unload()
    _forget_peft(base)


def _forget_peft(base: PreTrainedModel) -> None:
    vars(base).pop("peft_config", None)  # PEFT leaves it there and would warn of a second adapter


def _adapted(base: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """`base` with an adapter in its layers; where that fails (out of memory), `base` is left as it was."""
    try:
        return get_peft_model(base, config)
    except BaseException:
        layers = [(name, module) for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
        for name, layer in layers:
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, layer.get_base_layer())
        _forget_peft(base)
        raise


def score_base(base: PreTrainedModel, encoder: Encoder, tasks: Sequence[Task], recipe: Recipe) -> dict:
    start = time.perf_counter()
    scores = score_tasks(base, encoder, tasks, recipe.eval_batch_size, label="score the frozen base")
    return {
        "tasks": {name: score.summary() for name, score in scores.items()},
        "items": {name: score.right for name, score in scores.items()},
        "trainable_parameters": 0,
        "train_seconds": 0.0,
        "score_seconds": time.perf_counter() - start,
    }


def run_stage(
    base: PreTrainedModel, encoder: Encoder, tasks: Sequence[Task], stage: Stage, recipe: Recipe, run_dir: Path,
    adapter_dir: Path,
) -> dict:  # fmt: skip
    """Train one adapter, save it to `adapter_dir`, score it; `base` is left as it was.

    raises Interrupted after a checkpoint when the user stops the training.
    """
    chosen = [task for task in tasks if stage.task in (None, task.name)]
    adapter = recipe.adapters[stage.method]
    mixture = adapter.mixture(len(chosen))
    set_seed(stage.seed)
    model = _adapted(base, adapter.config(len(chosen)))
    try:
        start = time.perf_counter()
        loss = _train(model, encoder, chosen, stage, recipe, run_dir / "checkpoints" / stage.name)
        train_seconds = time.perf_counter() - start
        if PartialState().is_main_process:  # each process has the whole adapter, and PEFT makes a folder in each
            save_adapter(model, adapter_dir)
        start, use = time.perf_counter(), RouterUse()
        counts = mixture is not None and mixture.balances
        on_batch = (lambda task, mask: use.update(task.name, model, mask)) if counts else None
        scores = score_tasks(
            model, encoder, chosen, recipe.eval_batch_size, on_batch, f"score {stage.name}",
            task_setter(model, chosen, mixture),
        )  # fmt: skip
        result = {
            "tasks": {name: score.summary() for name, score in scores.items()},
            "items": {name: score.right for name, score in scores.items()},
            "trainable_parameters": model.get_nb_trainable_parameters()[0],
            "train_seconds": train_seconds,
            "score_seconds": time.perf_counter() - start,
            "loss": loss,
            "experts": use.shares(),
        }
        if not adapter.is_lora and PartialState().is_main_process:
            write_card(adapter_dir, result["tasks"])
    finally:
        _restore(base, model)
    return result


def save_adapter(model: PeftModel, folder: Path) -> None:
    """`model.save_pretrained(folder)`, all at once or not at all; what `folder` held before is gone then."""
    with folder_at_once(folder) as aside:
        model.save_pretrained(str(aside))


def _train(
    model: PeftModel, encoder: Encoder, tasks: Sequence[Task], stage: Stage, recipe: Recipe, checkpoints: Path
) -> list[tuple[int, float]]:
    """-> (step, loss) as the Trainer logged them"""
    adapter, mixture = recipe.adapters[stage.method], recipe.adapters[stage.method].mixture(len(tasks))
    examples = mix_with_tasks(tasks, recipe.proportions if stage.task is None else "proportional", stage.seed)
    rows: list[dict[str, Any]] = [dict(encoder.training_row(example)) for _, example in examples]
    if mixture is not None and mixture.wants_tasks:
        rows = [{**row, "task_ids": place} for row, (place, _) in zip(rows, examples, strict=True)]
    arguments = training_arguments([*recipe.trainer.get(stage.method, []), "--seed", str(stage.seed)], checkpoints)
    trainer_class = LoraTrainer if adapter.is_lora else MoSLDTrainer
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=cast(Any, rows),  # a list serves; what a Dataset is depends on whether `datasets` is installed
        data_collator=DataCollatorForSeq2Seq(encoder.tokenizer, label_pad_token_id=IGNORED),
    )
    show_progress(trainer, f"train {stage.name}")
    last = last_whole_checkpoint(checkpoints)
    state = TrainerState.load_from_json(str(Path(last, STATE))) if last else None
    if last and state and state.global_step >= state.max_steps:
        trainer._load_from_checkpoint(last)  # all steps are done; `train` would take one more in the middle of an epoch
    else:
        with _stop_on_interrupt(trainer):
            trainer.train(resume_from_checkpoint=last)
        state = trainer.state
    return [(int(entry["step"]), entry["loss"]) for entry in state.log_history if "loss" in entry]


def training_arguments(arguments: Sequence[str], output_dir: Path) -> TrainingArguments:
    """Command-line words -> TrainingArguments; raises ValueError for a word that the Trainer does not know."""
    if {word.partition("=")[0] for word in arguments} & {"--fsdp", "--deepspeed"}:
        raise ValueError(
            "mosld train keeps the whole model in every process: --fsdp and --deepspeed cannot be given; "
            "docs/tutorials/several_processes.md tells how to shard in a script of your own"
        )
    parser = HfArgumentParser(cast(Any, TrainingArguments), allow_abbrev=False)
    parser.error = _raise_value_error
    # Unless told so, accelerate takes processes without an accelerator for strangers, each of which trains by itself.
    device = [] if torch.accelerator.is_available() else ["--use_cpu", "true"]
    words = ["--report_to", "none", "--save_total_limit", "1", "--ddp_find_unused_parameters", "false", *device]
    words += [*arguments, "--output_dir", str(output_dir)]
    parsed, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        _raise_value_error(
            f"{' '.join(unknown)} (mosld train --help lists the first, the transformers documentation the second)"
        )
    if parsed.eval_strategy != "no" or parsed.load_best_model_at_end:
        raise ValueError(
            "mosld train scores the test files when the training has ended: --eval_strategy and --load_best_model_at_end "
            "cannot be given"
        )
    return parsed


def _raise_value_error(message: str):
    raise ValueError(f"not an argument of mosld train or of transformers' TrainingArguments: {message}")


class _SaveAndStop(TrainerCallback):
    requested = False

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested:
            control.should_save = control.should_training_stop = True


@contextlib.contextmanager
def _stop_on_interrupt(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C saves a checkpoint at the end of the step and stops; the second stops at once."""
    callback = _SaveAndStop()
    trainer.add_callback(callback)

    def request(signum, frame):
        if callback.requested:
            raise KeyboardInterrupt
        callback.requested = True
        tqdm.write("stopping after this step; press Ctrl-C again to stop at once")

    previous = signal.signal(signal.SIGINT, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if callback.requested:
        raise Interrupted


def finished(run_dir: Path, name: str) -> dict | None:
    """What a finished stage left, or None."""
    path = run_dir / "stages" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def finish(run_dir: Path, name: str, result: dict) -> None:
    """Keep a stage's result, then drop its checkpoints; an interruption anywhere leaves the one or the other."""
    path = run_dir / "stages" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_at_once(path, json.dumps(result))
    drop_checkpoints(run_dir, name)


def drop_checkpoints(run_dir: Path, name: str) -> None:
    """Those of a finished stage."""
    shutil.rmtree(run_dir / "checkpoints" / name, ignore_errors=True)
