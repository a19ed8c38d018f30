"""What several verbs share: options of models and tasks, words for the Trainer, and what is refused."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..embedded.base_model import EMBEDDED
from ..experiments.inputs import RunInputs

QUICK_HELP = "the embedded tasks and model at the size of train --quick"
MODEL_HELP = "folder or hub name of a causal language model (default: the embedded one)"


class Refused(Exception):
    """What the user has given cannot be used, for the reason in the message."""


@contextmanager
def refusing(*errors: type[Exception]) -> Iterator[None]:
    """What raises one of `errors` in here is the user's to mend.

    Whatever a verb does after its checks is outside: a ValueError there is the program's own and keeps its traceback.
    """
    try:
        yield
    except errors as error:
        raise Refused(str(error)) from error


def add_data(parser: argparse.ArgumentParser, task_help: str, model_help: str = MODEL_HELP) -> None:
    """--model and --task, and how they are read."""
    parser.add_argument("--model", help=model_help)
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help=f"{task_help}; or {EMBEDDED}, all of the embedded tasks",
    )
    add_reading(parser)


def add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--split",
        choices=("block", "name"),
        default="block",
        help="of the embedded tasks: test other Unicode blocks and files than trained on (block), or other texts "
        "(name)",
    )
    parser.add_argument("--max-length", type=int, help="longest input in tokens (default: the model's, at most 2048)")
    parser.add_argument("--eval-batch-size", type=int, default=64, help="choices scored together (default: 64)")


def inputs_of(options: argparse.Namespace) -> RunInputs:
    """The model and tasks of a command; `--model embedded` is the default by its name."""
    return RunInputs(
        model=None if options.model == EMBEDDED else options.model,
        tasks=options.task,
        quick=options.quick,
        split=options.split,
        max_length=options.max_length,
        eval_batch_size=options.eval_batch_size,
    )


def output_of(options: argparse.Namespace) -> Path | None:
    return Path(options.output) if options.output else None


def check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def refuse_trainer_words(words: Sequence[str], instead: Mapping[str, str], program: str) -> None:
    """raises ValueError for a Trainer's argument that the program sets itself."""
    given = set()
    for word in words:
        # The Trainer takes --output-dir and --output_dir=x as well as --output_dir.
        name = word.partition("=")[0]
        given.add(name.replace("-", "_").replace("__", "--", 1))
    for word, better in instead.items():
        if word in given:
            raise ValueError(f"{word} is set by {program}: use {better}")
