"""What adaptive merging may see of a task: its inputs, never which answer is right.

language models   p(choice | prompt) = softmax over the choices of the sum of their log-likelihoods
classifiers       p(class | input) = softmax over the logits
H = -sum p log p, averaged over a batch
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..tasks.encode import Encoded, Encoder
from ..tasks.examples import Task, TaskFileError

# The model's arguments by name -> its logits. Of logits_to_keep [n], places in the sequence: those logits alone.
Forward = Callable[..., Tensor]


class Unlabelled(Protocol):
    """One task's inputs."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def entropy(self, forward: Forward, chosen: Sequence[int]) -> Tensor:
        """-> mean entropy of the predictions on the inputs `chosen`, in nats; carries gradients to what `forward` depends on"""
        ...


@dataclass(frozen=True)
class Question:
    """A prompt with its choices, encoded. There is no answer here to be read."""

    choices: tuple[Encoded, ...]


@dataclass(frozen=True)
class Questions:
    """One task's multiple choices for a causal language model; `pad` is the token that fills rows up."""

    name: str
    questions: tuple[Question, ...]
    pad: int

    def __len__(self) -> int:
        return len(self.questions)

    def entropy(self, forward: Forward, chosen: Sequence[int]) -> Tensor:
        questions = [self.questions[i] for i in chosen]
        rows = [choice for question in questions for choice in question.choices]
        width = max(len(row.prompt) + len(row.answer) for row in rows)
        input_ids, mask = torch.full((len(rows), width), self.pad), torch.zeros(len(rows), width, dtype=torch.long)
        target = torch.zeros(len(rows), width, dtype=torch.bool)  # the answers' positions
        for i, row in enumerate(rows):
            length = len(row.prompt) + len(row.answer)
            input_ids[i, :length] = torch.tensor(row.prompt + row.answer)
            mask[i, :length] = 1
            target[i, len(row.prompt) : length] = True
        first = (
            min(len(row.prompt) for row in rows) - 1
        )  # predicts the first answer: a large vocabulary is read from here
        logits = forward(input_ids=input_ids, attention_mask=mask, logits_to_keep=torch.arange(first, width - 1))
        said, target = (own[:, first + 1 :].to(logits.device) for own in (input_ids, target))
        log_probs = logits.float().log_softmax(-1).gather(2, said.unsqueeze(2)).squeeze(2)
        totals = torch.where(target, log_probs, 0.0).sum(1)  # of each choice
        return torch.stack([entropy(own) for own in totals.split([len(q.choices) for q in questions])]).mean()


@dataclass(frozen=True)
class Inputs:
    """One task's inputs for a classifier: argument of the model -> [items, ...].

    raises ValueError for labels among them, and for sizes that differ.
    """

    name: str
    arguments: Mapping[str, Tensor]

    def __post_init__(self):
        if labels := sorted(set(self.arguments) & {"labels", "label", "label_ids"}):
            raise ValueError(f"unlabelled data of {self.name} must have no labels, got {', '.join(labels)}")
        if len({len(value) for value in self.arguments.values()}) != 1:
            sizes = {key: len(value) for key, value in self.arguments.items()}
            raise ValueError(f"the inputs of {self.name} must be of one length, got {sizes}")

    def __len__(self) -> int:
        return len(next(iter(self.arguments.values())))

    def entropy(self, forward: Forward, chosen: Sequence[int]) -> Tensor:
        logits = forward(**{name: value[list(chosen)] for name, value in self.arguments.items()})
        return entropy(logits.float()).mean()


def batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Places in batches for ever; each pass over all `count` has an order of its own, decided by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]


def without_labels(encoder: Encoder, task: Task, limit: int | None = None) -> Questions:
    """The questions of the task's test examples (of its training examples where it has no others), answers left out.

    raises TaskFileError for a task without multiple choices.
    """
    examples = (task.test or task.train)[:limit]
    questions = tuple(
        Question(tuple(encoder.pair(example.prompt, text) for text in example.choices))
        for example in examples
        if example.choices
    )
    if not questions:
        raise TaskFileError(f"task {task.name} has no multiple choices, over which an entropy could be taken")
    return Questions(task.name, questions, encoder.pad)


def entropy(logits: Tensor) -> Tensor:
    """[..., n] -> [...], in nats"""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def on_device(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}
