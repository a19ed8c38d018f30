"""Few-shot realignment of a merged model (R-MTLLMF, arXiv 2411.18220): a short training on labelled examples.

The paper's body was not at hand: what it trains and on how many examples is our reading. The weights that the users
sent are trained, embeddings stay frozen, and every task gives the same number of examples.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, cast

from torch import nn
from transformers import DataCollatorForSeq2Seq, Trainer, set_seed

from ..tasks.encode import IGNORED, Encoder
from ..tasks.examples import Example, Task
from ..training.arguments import training_arguments
from ..training.progress import show_progress


@dataclass(frozen=True)
class RealignSettings:
    """How a merged model is realigned.

    Args:
        shots: Examples of each task.
        epochs: Of transformers' Trainer.
        learning_rate: Of the Trainer.
        batch_size: Of the Trainer.
        seed: Decides which examples, and their order.

    Raises:
        ValueError: For a number that is not positive.

    >>> from mosld.merging import RealignSettings
    >>> RealignSettings(shots=4).epochs
    5
    >>> RealignSettings(shots=0)
    Traceback (most recent call last):
    ValueError: shots must be at least 1, got 0
    """

    shots: int = 16
    epochs: float = 5
    learning_rate: float = 1e-4
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self):
        for name in ("shots", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("epochs", "learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")


def few(tasks: Sequence[Task], settings: RealignSettings) -> list[Example]:
    """The training examples that realignment sees; raises ValueError for a task with fewer than `shots`."""
    chosen = []
    for task in tasks:
        if len(task.train) < settings.shots:
            raise ValueError(
                f"task {task.name} has {len(task.train)} training examples, realignment needs {settings.shots}"
            )
        chosen += Random(f"realign/{task.name}/{settings.seed}").sample(task.train, settings.shots)
    return chosen


def realign(
    model: nn.Module,
    weights: Iterable[str],
    encoder: Encoder,
    tasks: Sequence[Task],
    settings: RealignSettings,
    folder: str | os.PathLike,
) -> None:
    """Train `weights` of `model`, in place, on a few examples of every task.

    Args:
        model: A merged model.
        weights: The names of its weights that are trained; the others stay frozen.
        encoder: Encodes the examples.
        tasks: Give `settings.shots` training examples each.
        settings: How many examples, and how they are trained on.
        folder: The Trainer's. Nothing is kept there.

    Raises:
        ValueError: For a task with fewer training examples.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    >>> from mosld.merging import RealignSettings, realign
    >>> from mosld.tasks.encode import Encoder
    >>> from mosld.tasks.examples import Example, Task
    >>> words = Tokenizer(models.WordLevel({"<pad>": 0, "odd": 1, "even": 2, "3": 3, "4": 4, "is": 5}, "<pad>"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"), max_length=8)
    >>> task = Task("parity", [Example.multiple_choice(f"{n} is", ["odd", "even"], answer=1 - n % 2) for n in (3, 4)])
    >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=6, **sizes))
    >>> before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    >>> realign(model, ["lm_head.weight"], encoder, [task], RealignSettings(shots=2, epochs=1), "run")
    >>> [name for name, weight in model.named_parameters() if not weight.equal(before[name])]
    ['lm_head.weight']
    """
    rows: list[dict[str, Any]] = [dict(encoder.training_row(example)) for example in few(tasks, settings)]
    set_seed(settings.seed)
    # The Trainer's arguments are built as those of every training here, from the words of a command line.
    words = []
    for name, value in _trainer_options(settings).items():
        words += [f"--{name}", str(value)]
    with trained_alone(model, weights):
        trainer = Trainer(
            model=cast(Any, model),
            args=training_arguments(words, Path(folder)),
            train_dataset=cast(Any, rows),
            data_collator=DataCollatorForSeq2Seq(encoder.tokenizer, label_pad_token_id=IGNORED),
        )
        show_progress(trainer, "realign")
        trainer.train()


def _trainer_options(settings: RealignSettings) -> dict[str, Any]:
    return {
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "per_device_train_batch_size": settings.batch_size,
        "seed": settings.seed,
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": "false",
    }


@contextlib.contextmanager
def trained_alone(model: nn.Module, weights: Iterable[str]) -> Iterator[None]:
    """Within the block only `weights` require gradients; at its end all are as before, and `model` is in eval mode."""
    chosen = set(weights)
    before: list[tuple[nn.Parameter, bool]] = []
    for name, parameter in model.named_parameters():
        before.append((parameter, parameter.requires_grad))
        parameter.requires_grad_(name in chosen)
    try:
        yield
    finally:
        model.eval()
        for parameter, required in before:
            parameter.requires_grad_(required)
            parameter.grad = None
