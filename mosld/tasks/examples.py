"""What a task is: named training and test examples, and the reader of JSONL task files.

One line of a task file is one JSON object in one of two forms:

    {"prompt": "...", "choices": ["...", "..."], "answer": 1}     multiple choice; answer is an index into choices
    {"prompt": "...", "completion": "..."}                        free text

Every line of every file is checked before anything is trained, and all bad lines are reported at once.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

MAX_REPORTED = 20  # bad lines listed in one report; the rest is counted


class TaskFileError(ValueError):
    """A task specification or a task file that cannot be used; the message lists every fault found."""


@dataclass(frozen=True)
class Example:
    """One question and its answer.

    prompt: the text before the answer.
    choices: the answers to choose from, or () for free text.
    answer: the index of the right choice, or None for free text.
    completion: the right answer's text, whichever form the example has.
    """

    prompt: str
    completion: str
    choices: tuple[str, ...] = ()
    answer: int | None = None

    @classmethod
    def multiple_choice(cls, prompt: str, choices: list[str] | tuple[str, ...], answer: int) -> "Example":
        return cls(prompt=prompt, completion=choices[answer], choices=tuple(choices), answer=answer)


@dataclass(frozen=True)
class Task:
    """A named set of training and test examples; `test` may be empty."""

    name: str
    train: list[Example]
    test: list[Example] = field(default_factory=list)
