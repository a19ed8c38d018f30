"""What adaptive merging may see of a task: prompts and choices, never which choice is right.

p(choice | prompt) = softmax over the choices of the sum of their log-likelihoods      (language models)
H = -sum p log p, averaged over examples
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tasks.encode import Encoded, Encoder
from ..tasks.examples import Task, TaskFileError

Forward = Callable[
    [Tensor, Tensor], Tensor
]  # input_ids, attention_mask [rows, tokens] -> logits [rows, tokens, vocabulary]


@dataclass(frozen=True)
class Question:
    """A prompt with its choices, encoded. There is no answer here to be read."""

    choices: tuple[Encoded, ...]


@dataclass(frozen=True)
class Unlabelled:
    """One task's questions, in an order that a seed decides."""

    name: str
    questions: tuple[Question, ...]

    def batches(self, size: int, seed: int) -> Iterator[list[Question]]:
        """Batches for ever; each pass over the questions has an order of its own, decided by `seed`."""
        generator = torch.Generator().manual_seed(seed)
        size = min(size, len(self.questions))
        while True:
            order = torch.randperm(len(self.questions), generator=generator).tolist()
            for start in range(0, len(order) - size + 1, size):
                yield [self.questions[i] for i in order[start : start + size]]


def without_labels(encoder: Encoder, task: Task, limit: int | None = None) -> Unlabelled:
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
    return Unlabelled(task.name, questions)


def choice_entropy(forward: Forward, questions: Sequence[Question], pad: int) -> Tensor:
    """-> mean entropy over the questions, in nats; carries gradients to whatever `forward` depends on"""
    rows = [choice for question in questions for choice in question.choices]
    width = max(len(row.prompt) + len(row.answer) for row in rows)
    input_ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    target = torch.zeros(len(rows), width, dtype=torch.bool)  # the answers' positions
    for i, row in enumerate(rows):
        length = len(row.prompt) + len(row.answer)
        input_ids[i, :length] = torch.tensor(row.prompt + row.answer)
        mask[i, :length] = 1
        target[i, len(row.prompt) : length] = True
    logits = forward(input_ids, mask)
    input_ids, target = input_ids.to(logits.device), target.to(logits.device)
    log_probs = logits[:, :-1].float().log_softmax(-1).gather(2, input_ids[:, 1:].unsqueeze(2)).squeeze(2)
    totals = torch.where(target[:, 1:], log_probs, 0.0).sum(1)  # of each choice
    entropies = [entropy(own) for own in totals.split([len(question.choices) for question in questions])]
    return torch.stack(entropies).mean()


def entropy(logits: Tensor) -> Tensor:
    """[..., n] -> [...], in nats"""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)
