"""The work of `python -m benchmarks soak`, each function in a process of its own: it writes what it saw into files."""

import gc
import itertools
import json
import math
import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import peft
import torch
import transformers
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from mosld import MoSLDConfig, MoSLDTrainer

from ..cpu.training import TARGETS, Size, base_model
from ..timing import files
from .memory import Memory, live_tensors, memory
from .models import MODELS, text

ROWS = 512  # of training data
LOGGED = 50  # steps between the Trainer's logs
CHECKED = 10  # switches between forwards
SAMPLES = 60  # of memory, over a run
# A share of the run, after which memory must not grow.
WARM_UP = 1 / 6
# Steps after which the operator's cache of 512 masks is full, with 14 layers.
FILLED = 40


class Samples:
    """Memory in use, in bytes, at some of `total` steps; live tensors when the warm-up ends and at the end."""

    def __init__(self, total: int, least: int = 1):
        self.total, self.every = total, max(1, total // SAMPLES)
        self.warm = min(total - 1, max(least, math.ceil(total * WARM_UP)))
        self.rows: list[dict] = []

    def take(self, step: int) -> None:
        if step in (self.warm, self.total):
            # Counted first, because it collects: garbage must not make larger what is compared with.
            tensors = live_tensors()
            self.rows.append({"step": step, **memory()._asdict(), "tensors": tensors})
        elif step % self.every == 0:
            self.rows.append({"step": step, **memory()._asdict()})

    def summary(self) -> dict:
        """What is judged. growth: the greatest value after the warm-up over the one at its end, so that 0.01 is growth
        by 1 %."""
        after = [row for row in self.rows if row["step"] >= self.warm]
        start, end = after[0], after[-1]
        figures = {"warm_up": self.warm}
        for kind in (*Memory._fields, "tensors"):
            figures[f"{kind}_warm"] = start[kind]
            figures[f"{kind}_end"] = end[kind]
        for kind in Memory._fields:
            figures[f"{kind}_growth"] = max(row[kind] for row in after) / start[kind] - 1
        return {**figures, "samples": self.rows}


def configuration(size: Size, **changes) -> MoSLDConfig:
    m = size.mixture
    fields: dict[str, Any] = {
        "r": m.r,
        "alpha": 2 * m.r,
        "num_experts": m.num_experts,
        "top_k": m.top_k,
        "dropout": m.dropout,
        "balance_coef": 1e-2,
        "target_modules": list(TARGETS["all"]),
    }
    return MoSLDConfig(**{**fields, **changes})


class _Trainer(MoSLDTrainer):
    """Appends the loss of every step, unrounded, to a file, which a killed process leaves whole."""

    losses: Path

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        with self.losses.open("a") as file:
            file.write(json.dumps([self.state.global_step + 1, loss.item()]) + "\n")
        return loss


class _AtStep(TrainerCallback):
    def __init__(self, after: Callable[[int], None]):
        self.after = after

    def on_step_end(self, args, state, control, **kwargs):
        self.after(state.global_step)


def _begin() -> None:
    # The collector would copy what was imported into this process.
    gc.freeze()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT calls what it was
    transformers.logging.set_verbosity_error()


def train(folder: Path, name: str, model: str, steps: int, save_every: int, killed_after: int | None = None) -> None:
    """Train in `folder` to the end, or until SIGKILL ends the process after step `killed_after`, before it could be
    saved.

    Goes on from the newest whole checkpoint in `folder` where there is one. Leaves NAME.losses, lines of [step, loss],
    and at the end NAME.json with memory and seconds.
    """
    _begin()
    samples, start = Samples(steps, FILLED), time.perf_counter()

    def after(step: int) -> None:
        if step == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)
        samples.take(step)

    size = MODELS[model]
    transformers.set_seed(7)
    adapted = peft.get_peft_model(base_model(size), configuration(size))
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"), max_steps=steps, per_device_train_batch_size=size.batch,
        learning_rate=2e-3, logging_steps=LOGGED, save_steps=save_every, save_total_limit=2, report_to="none",
        use_cpu=True, disable_tqdm=True, seed=7, dataloader_pin_memory=False,
    )  # fmt: skip
    rows: Any = [{"input_ids": row, "labels": row} for row in text(size, ROWS)]
    trainer = _Trainer(model=cast(nn.Module, adapted), args=arguments, train_dataset=rows, callbacks=[_AtStep(after)])
    trainer.losses = folder / f"{name}.losses"
    trainer.remove_callback(transformers.PrinterCallback)
    checkpoints = list(folder.glob("checkpoints/checkpoint-*"))
    trainer.train(resume_from_checkpoint=True if checkpoints else None)
    adapted.save_pretrained(str(folder / "adapter"))
    written: dict[str, object] = {"seconds": time.perf_counter() - start}
    # A process that was resumed after the warm-up has seen too little to be judged.
    if samples.rows[0]["step"] <= samples.warm:
        written |= samples.summary()
    files.write(written, folder / f"{name}.json")


def switch(folder: Path, name: str, model: str, switches: int) -> None:
    """Switch between three adapters of different sizes; leaves NAME.json."""
    _begin()
    size, samples, start = MODELS[model], Samples(switches), time.perf_counter()
    adapted = _three_adapters(size)
    names = list(adapted.peft_config)
    ids = text(size, 2)

    @torch.no_grad()
    def logits() -> torch.Tensor:
        return adapted(input_ids=ids, use_cache=False).logits

    expected = {}
    for each in names:
        adapted.set_adapter(each)
        expected[each] = logits()
    checked, different, greatest = dict.fromkeys(names, 0), 0, 0.0
    for number in range(1, switches + 1):
        each = names[number % len(names)]
        adapted.set_adapter(each)
        if number % CHECKED == 0 or number > switches - len(names):
            out = logits()
            checked[each] += 1
            different += not torch.equal(out, expected[each])
            greatest = max(greatest, (out - expected[each]).abs().max().item())
        # Tensors are counted in the same state both times.
        if number in (samples.warm, samples.total):
            adapted.set_adapter(names[0])
            logits()
        samples.take(number)
    result = {
        "switches": switches,
        "adapters": {each: {"forwards": count} for each, count in checked.items()},
        "forwards": sum(checked.values()),
        "forwards_that_differ": different,
        "drift": greatest,
        # What a switch that did nothing would have to hide: the adapters' outputs are far apart.
        "least_distance": _least_distance(list(expected.values())),
        "seconds": time.perf_counter() - start,
        **samples.summary(),
    }
    files.write(result, folder / f"{name}.json")


def _three_adapters(size: Size) -> peft.PeftModel:
    """A model in eval mode with the adapters "first", "second" and "third", of different sizes."""
    r, experts = size.mixture.r, size.mixture.num_experts
    adapted = peft.PeftModel(base_model(size), configuration(size), adapter_name="first")
    adapted.add_adapter("second", configuration(size, r=r // 2, num_experts=experts + 1))
    adapted.add_adapter("third", configuration(size, num_experts=experts - 1, target_modules=list(TARGETS["qv"])))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        # As if trained: B would be zero, and all adapters the same.
        if "mosld_" in name:
            parameter.data.normal_(std=0.2)
    return adapted.eval()


def _least_distance(outputs: list[torch.Tensor]) -> float:
    return min((one - other).abs().max().item() for one, other in itertools.combinations(outputs, 2))
