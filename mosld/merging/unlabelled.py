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

# The model's arguments by name -> its logits. With logits_to_keep [n], places in the sequence, those logits alone.
Forward = Callable[..., Tensor]


class Unlabelled(Protocol):
    """One task's inputs."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def entropy(self, forward: Forward, chosen: Sequence[int]) -> Tensor:
        """-> mean entropy of the predictions on the inputs `chosen`, in nats; differentiable in what `forward` uses"""
        ...


@dataclass(frozen=True)
class Question:
    """A prompt with its choices, encoded. There is no answer here to be read."""

    choices: tuple[Encoded, ...]


@dataclass(frozen=True)
class Questions:
    """One task's multiple choices for a causal language model.

    Args:
        name: The task's.
        questions: Prompts with their encoded choices.
        pad: The token that fills rows up.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> from mosld.merging import Questions, without_labels
    >>> from mosld.tasks.encode import Encoder
    >>> from mosld.tasks.examples import Example, Task
    >>> words = Tokenizer(models.WordLevel({"<pad>": 0, "two": 1, "plus": 2, "is": 3, "five": 4, "four": 5}, "<pad>"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"), max_length=8)
    >>> example = Example.multiple_choice("two plus two is", ["five", "four"], answer=1)
    >>> questions: Questions = without_labels(encoder, Task("sums", [example]))
    >>> len(questions), questions.questions[0].choices[1]  # the choices, and not which of them is right
    (1, Encoded(prompt=[1, 2, 1, 3], answer=[5]))
    """

    name: str
    questions: tuple[Question, ...]
    pad: int

    def __len__(self) -> int:
        return len(self.questions)

    def entropy(self, forward: Forward, chosen: Sequence[int]) -> Tensor:
        """-> mean entropy of `forward`'s choice among the answers of the questions `chosen`, in nats.

        >>> import torch
        >>> from mosld.merging import Questions
        >>> from mosld.merging.unlabelled import Question
        >>> from mosld.tasks.encode import Encoded
        >>> sums = Questions("sums", (Question((Encoded([1, 2], [5]), Encoded([1, 2], [4]))),), pad=0)
        >>> def undecided(input_ids, attention_mask, logits_to_keep):
        ...     return torch.zeros(len(input_ids), len(logits_to_keep), 6)
        >>> sums.entropy(undecided, chosen=[0])  # log 2
        tensor(0.6931)
        """
        rows: list[Encoded] = []
        counts: list[int] = []  # how many rows each question has
        for i in chosen:
            rows += self.questions[i].choices
            counts.append(len(self.questions[i].choices))
        input_ids, mask, target = self._batch(rows)
        width = input_ids.shape[1]
        # The place that predicts the first answer. A large vocabulary is projected only from here on.
        first = min(len(row.prompt) for row in rows) - 1
        logits = forward(input_ids=input_ids, attention_mask=mask, logits_to_keep=torch.arange(first, width - 1))
        tokens = input_ids[:, first + 1 :].to(logits.device)
        target = target[:, first + 1 :].to(logits.device)
        log_probs = logits.float().log_softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2)
        totals = torch.where(target, log_probs, 0.0).sum(1)  # of each choice
        return torch.stack([entropy(choices) for choices in totals.split(counts)]).mean()

    def _batch(self, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
        """-> input_ids, attention_mask and the answers' places (bool), all [rows, longest row]"""
        width = max(row.length for row in rows)
        input_ids = torch.full((len(rows), width), self.pad)
        mask = torch.zeros_like(input_ids)
        target = torch.zeros_like(input_ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            input_ids[i, : row.length] = torch.tensor(row.prompt + row.answer)
            mask[i, : row.length] = 1
            target[i, len(row.prompt) : row.length] = True
        return input_ids, mask, target


@dataclass(frozen=True)
class Inputs:
    """One task's inputs for a classifier.

    Args:
        name: The task's.
        arguments: The name of an argument of the model -> its values [items, ...].

    Raises:
        ValueError: For labels among the arguments, and for different numbers of items.

    >>> import torch
    >>> from mosld.merging import Inputs
    >>> len(Inputs("digits", {"pixel_values": torch.randn(10, 3, 4, 4)}))
    10
    >>> Inputs("digits", {"pixel_values": torch.randn(10, 3, 4, 4), "labels": torch.arange(10)})
    Traceback (most recent call last):
    ValueError: unlabelled data of digits must have no labels, got labels
    """

    name: str
    arguments: Mapping[str, Tensor]

    def __post_init__(self):
        if labels := sorted(set(self.arguments) & {"labels", "label", "label_ids"}):
            raise ValueError(f"unlabelled data of {self.name} must have no labels, got {', '.join(labels)}")
        sizes = {key: len(value) for key, value in self.arguments.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"the inputs of {self.name} must be of one length, got {sizes}")

    def __len__(self) -> int:
        return len(next(iter(self.arguments.values())))

    def entropy(self, forward: Forward, chosen: Sequence[int]) -> Tensor:
        """-> mean entropy of `forward`'s predictions on the inputs `chosen`, in nats.

        >>> import torch
        >>> from mosld.merging import Inputs
        >>> inputs = Inputs("digits", {"pixel_values": torch.randn(10, 3, 4, 4)})
        >>> inputs.entropy(lambda pixel_values: torch.zeros(len(pixel_values), 2), chosen=[0, 7, 8])  # log 2
        tensor(0.6931)
        """
        logits = forward(**{name: value[list(chosen)] for name, value in self.arguments.items()})
        return entropy(logits.float()).mean()


def batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Places in batches for ever; each pass over all `count` has an order of its own, decided by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    # A last batch that would be smaller than the others is left out, so that each weighs the same.
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]


def without_labels(encoder: Encoder, task: Task, limit: int | None = None) -> Questions:
    """A task's questions without its answers.

    Args:
        encoder: Encodes prompts and choices.
        task: Its test examples are used, or its training examples where it has no others.
        limit: At most so many examples. None takes all.

    Returns:
        The examples that have choices, in the task's order.

    Raises:
        TaskFileError: For a task without multiple choices.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> from mosld.merging import without_labels
    >>> from mosld.tasks.encode import Encoder
    >>> from mosld.tasks.examples import Example, Task
    >>> words = Tokenizer(models.WordLevel({"<pad>": 0, "odd": 1, "even": 2, "3": 3, "4": 4, "is": 5}, "<pad>"))
    >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
    >>> encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"), max_length=8)
    >>> examples = [Example.multiple_choice(f"{n} is", ["odd", "even"], answer=1 - n % 2) for n in (3, 4)]
    >>> questions = without_labels(encoder, Task("parity", examples), limit=1)
    >>> len(questions), questions.questions[0].choices
    (1, (Encoded(prompt=[3, 5], answer=[1]), Encoded(prompt=[3, 5], answer=[2])))
    """
    questions = []
    for example in (task.test or task.train)[:limit]:
        if example.choices:
            choices = [encoder.pair(example.prompt, text) for text in example.choices]
            questions.append(Question(tuple(choices)))
    if not questions:
        raise TaskFileError(f"task {task.name} has no multiple choices, over which an entropy could be taken")
    return Questions(task.name, tuple(questions), encoder.pad)


def entropy(logits: Tensor) -> Tensor:
    """[..., n] -> [...], in nats"""
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def on_device(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """`values` with its tensors on `device`."""
    moved = dict(values)
    for name, value in values.items():
        if isinstance(value, Tensor):
            moved[name] = value.to(device)
    return moved
