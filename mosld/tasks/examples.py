"""What a task is: named training and test examples, and the reader of JSONL task files.

One line of a task file is one JSON object in one of two forms:

    {"prompt": "...", "choices": ["...", "..."], "answer": 1}     multiple choice; answer is an index into choices
    {"prompt": "...", "completion": "..."}                        free text

Every line of every file is checked before anything is trained, and all bad lines are reported at once. A line has these
fields and no other: a misspelt one would be passed over.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .jsonl import MAX_FAULTS, LineError, decode, read_lines

FIELDS = ("prompt", "choices", "answer", "completion")
# Bad lines that one message lists; the others are counted.
MAX_REPORTED = 20
MAX_CHOICES = 1000
# Bytes of a task's name, which becomes part of files' names.
MAX_NAME = 100
# A NUL and half a surrogate pair, which no tokenizer takes.
NO_CHARACTER = re.compile(r"[\x00\ud800-\udfff]")


class TaskFileError(ValueError):
    """A task specification or a task file that cannot be used; the message lists the first MAX_REPORTED faults.

    faults: all of them, in order, each with its file and line number.
    """

    def __init__(self, message: str, faults: Iterable[str] | None = None):
        super().__init__(message)
        self.faults = (message,) if faults is None else tuple(faults)


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


def parse_task(spec: str) -> tuple[str, Path, Path | None]:
    """`name=train.jsonl[:test.jsonl]` -> name, training file, test file or None. raises TaskFileError."""
    name, equals, files = spec.partition("=")
    train, colon, test = files.partition(":")
    if not (equals and name and train) or (colon and not test):
        raise TaskFileError(f"a task is name=train.jsonl or name=train.jsonl:test.jsonl, got {spec!r}")
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise TaskFileError(f"a task's name has letters, digits, '.', '_' and '-' alone, got {name!r}")
    if len(name.encode()) > MAX_NAME:
        raise TaskFileError(f"a task's name has at most {MAX_NAME} bytes, got {len(name.encode())}")
    if "\0" in files:
        raise TaskFileError(f"a file's name holds no NUL character, got {files!r}")
    return name, Path(train), Path(test) if test else None


def read_tasks(specs: list[str]) -> list[Task]:
    """Read every file of every task.

    Args:
        specs: For each task `name=train.jsonl` or `name=train.jsonl:test.jsonl`.

    Returns:
        The tasks, in the order of `specs`.

    Raises:
        TaskFileError: With all faults of all files, each as file, line number and what is wrong. Of a file with more
            than MAX_FAULTS bad lines these come first, and the file is not read on.
    """
    parsed, faults = [], []
    for spec in specs:
        try:
            parsed.append(parse_task(spec))
        except TaskFileError as error:
            faults.append(str(error))
    counts = Counter(name for name, _, _ in parsed)
    for name in sorted(counts):
        if counts[name] > 1:
            faults.append(f"task name {name!r} is given {counts[name]} times")
    tasks = []
    for name, train, test in parsed:
        train_examples = read_examples(train, faults)
        test_examples = read_examples(test, faults) if test else []
        tasks.append(Task(name, train_examples, test_examples))
    if faults:
        shown = faults[:MAX_REPORTED]
        more = [f"... and {len(faults) - len(shown)} more"] if len(faults) > len(shown) else []
        raise TaskFileError("\n".join(["the task files cannot be used:", *shown, *more]), faults)
    return tasks


def read_examples(path: Path, faults: list[str]) -> list[Example]:
    """The examples of one JSONL file, blank lines passed over.

    Args:
        path: The file.
        faults: What is wrong with the file is added here; nothing is raised.

    Returns:
        The examples of its good lines.
    """
    examples, before = [], len(faults)
    try:
        for number, line in read_lines(path):
            try:
                examples.append(parse_example(decode(line)))
            except (LineError, TaskFileError) as error:
                faults.append(f"{path}:{number}: {error}")
            except RecursionError:  # from reading the line, or from writing its value into a message
                faults.append(f"{path}:{number}: nested too deeply")
            if len(faults) - before == MAX_FAULTS:
                faults.append(f"{path}: not read beyond line {number}, the last of {MAX_FAULTS} bad ones")
                break
    except (OSError, LineError) as error:
        faults.append(f"{path}: {error.strerror if isinstance(error, OSError) else error}")
    if not examples and len(faults) == before:
        faults.append(f"{path}: no examples")
    return examples


def parse_example(record: object) -> Example:
    """One decoded line -> Example.

    Args:
        record: The JSON value of the line.

    Returns:
        A multiple choice or free text.

    Raises:
        TaskFileError: Saying which field is wrong.
    """
    if not isinstance(record, dict):
        raise TaskFileError(f"a line must be a JSON object, got {type(record).__name__}")
    if unknown := [name for name in record if name not in FIELDS]:
        raise TaskFileError(
            f"there is no field {unknown[0]!r:.60}: a line has {', '.join(FIELDS[:3])}, or prompt, completion"
        )
    prompt = _text(record, "prompt")
    if "completion" in record:
        if "choices" in record or "answer" in record:
            raise TaskFileError('a line has either "completion" or "choices" and "answer", not both')
        return Example(prompt, _text(record, "completion", empty_allowed=False))
    if "choices" not in record:
        raise TaskFileError('a line needs "completion", or "choices" and "answer"')
    choices, answer = _choices(record), record.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise TaskFileError(f'"answer" must be an index into the {len(choices)} choices, got {answer!r:.60}')
    return Example.multiple_choice(prompt, choices, answer)


def _choices(record: dict) -> list[str]:
    choices = record["choices"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise TaskFileError('"choices" must be a list of at least two texts')
    if len(choices) > MAX_CHOICES:
        raise TaskFileError(f'"choices" must be at most {MAX_CHOICES}, got {len(choices)}')
    for choice in choices:
        _check_characters("choices", choice)
    if len(set(choices)) < len(choices):
        raise TaskFileError('"choices" must differ from each other')
    return choices


def _text(record: dict, key: str, empty_allowed: bool = True) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not (empty_allowed or value.strip()):
        raise TaskFileError(f'"{key}" must be {"a" if empty_allowed else "a non-empty"} text, got {value!r:.60}')
    _check_characters(key, value)
    return value


def _check_characters(key: str, text: str) -> None:
    """raises TaskFileError for a text with NO_CHARACTER in it"""
    if wrong := NO_CHARACTER.search(text):
        raise TaskFileError(f'"{key}" holds {wrong[0]!r}, which is no character of a text')
