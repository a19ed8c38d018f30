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
    """One task's multiple choices for a causal language model; `pad` is the token that fills rows up.

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
        if len({len(value) for value in self.arguments.values()}) != 1:
            sizes = {key: len(value) for key, value in self.arguments.items()}
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
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]


def without_labels(encoder: Encoder, task: Task, limit: int | None = None) -> Questions:
    """The questions of the task's test examples (of its training examples where it has no others), answers left out.

    raises TaskFileError for a task without multiple choices.

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
