"""One stage of a run: an adapter trained with transformers' Trainer, saved, and scored; or the frozen base, scored.

A finished stage leaves `stages/NAME.json` in the run's folder, and training leaves checkpoints, so that the same
command, given again after an interruption, goes on where it stopped.
"""

import contextlib
import json
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm.auto import tqdm
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    set_seed,
)

from ..files.atomic import atomic_folder, write_text_atomic
from ..layers.stats import RouterUse
from ..tasks.encode import IGNORED, Encoder
from ..tasks.examples import Task
from ..tasks.proportions import mix_with_tasks
from ..tasks.scoring import score_tasks
from ..training.arguments import training_arguments
from ..training.checkpoints import STATE, WholeCheckpointsMixin, last_whole_checkpoint
from ..training.progress import show_progress
from ..training.trainer import MoSLDTrainer
from ..tuner.card import write_card
from ..tuner.config import MoSLDConfig
from .methods import Adapter, task_setter, use_recorder
from .plan import Recipe, Stage
from .results import scored


class LoraTrainer(WholeCheckpointsMixin, Trainer):
    """transformers' Trainer, whose checkpoints can be gone on from after any process was killed."""


class Interrupted(KeyboardInterrupt):
    """Training stopped on request, after saving a checkpoint."""


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
        for name, layer in list(base.named_modules()):
            if isinstance(layer, BaseTunerLayer):
                parent, _, child = name.rpartition(".")
                setattr(base.get_submodule(parent), child, layer.get_base_layer())
        _forget_peft(base)
        raise


def score_base(base: PreTrainedModel, encoder: Encoder, tasks: Sequence[Task], recipe: Recipe) -> dict:
    start = time.perf_counter()
    scores = score_tasks(base, encoder, tasks, recipe.eval_batch_size, label="score the frozen base")
    return {
        **scored(scores),
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
    # Before the adapter is made, whose initial weights are drawn from it.
    set_seed(stage.seed)
    model = _adapted(base, adapter.config(len(chosen)))
    try:
        start = time.perf_counter()
        loss = _train(model, encoder, chosen, stage, recipe, run_dir / "checkpoints" / stage.name)
        train_seconds = time.perf_counter() - start
        if PartialState().is_main_process:  # each process has the whole adapter, and PEFT makes a folder in each
            save_adapter(model, adapter_dir)
        start = time.perf_counter()
        use = RouterUse()
        scores = score_tasks(
            model,
            encoder,
            chosen,
            recipe.eval_batch_size,
            on_batch=use_recorder(use, model, mixture),
            label=f"score {stage.name}",
            on_task=task_setter(model, chosen, mixture),
        )
        result = {
            **scored(scores),
            "trainable_parameters": model.get_nb_trainable_parameters()[0],
            "train_seconds": train_seconds,
            "score_seconds": time.perf_counter() - start,
            "loss": loss,
            "experts": use.shares(),
        }
        if not adapter.is_lora and PartialState().is_main_process:
            write_card(adapter_dir, MoSLDConfig.from_pretrained(str(adapter_dir)), result["tasks"])
    finally:
        _restore(base, model)
    return result


def save_adapter(model: PeftModel, folder: Path) -> None:
    """`model.save_pretrained(folder)`, all at once or not at all; what `folder` held before is gone then."""
    with atomic_folder(folder) as aside:
        model.save_pretrained(str(aside))


def _train(
    model: PeftModel, encoder: Encoder, tasks: Sequence[Task], stage: Stage, recipe: Recipe, checkpoints: Path
) -> list[tuple[int, float]]:
    """-> (step, loss) as the Trainer logged them"""
    rows = _training_rows(encoder, tasks, stage, recipe)
    arguments = training_arguments([*recipe.trainer.get(stage.method, []), "--seed", str(stage.seed)], checkpoints)
    trainer_class = LoraTrainer if recipe.adapters[stage.method].is_lora else MoSLDTrainer
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


def _training_rows(encoder: Encoder, tasks: Sequence[Task], stage: Stage, recipe: Recipe) -> list[dict[str, Any]]:
    """The examples in the stage's order; with the place of each one's task for methods that route by task."""
    mixture = recipe.adapters[stage.method].mixture(len(tasks))
    proportions = recipe.proportions if stage.task is None else "proportional"
    rows = []
    for place, example in mix_with_tasks(tasks, proportions, stage.seed):
        row: dict[str, Any] = dict(encoder.training_row(example))
        if mixture is not None and mixture.wants_tasks:
            row["task_ids"] = place
        rows.append(row)
    return rows


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
    write_text_atomic(path, json.dumps(result))
    drop_checkpoints(run_dir, name)


def drop_checkpoints(run_dir: Path, name: str) -> None:
    """Those of a finished stage."""
    shutil.rmtree(run_dir / "checkpoints" / name, ignore_errors=True)
