"""The command line: `mosld VERB ...`, also as `python -m mosld VERB ...`. Each verb is a file of this folder."""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging

from ..experiments.run_folder import release
from ..files.errors import escape_control_chars, explain
from ..files.version import __version__
from . import compare, evaluate, export, inspect, merge, train
from .options import Refused


class Verb(Protocol):
    """What the file of a verb has."""

    @property
    def HELP(self) -> str: ...

    @property
    def EXAMPLES(self) -> str: ...

    @property
    def TRAINER_ARGUMENTS(self) -> bool:
        """Whether words that the parser does not know are for transformers' TrainingArguments."""
        ...

    def add_arguments(self, parser: argparse.ArgumentParser, /) -> None: ...

    def run(self, options: argparse.Namespace, trainer_words: Sequence[str], /) -> int | None:
        """The exit code, 0 unless it is another; raises Refused for what the user has to mend.

        A verb that chooses its folder itself leaves it in `options.output`, where an error of the disk is explained.
        """
        ...


VERBS: dict[str, Verb] = {
    "train": train,
    "compare": compare,
    "merge": merge,
    "eval": evaluate,
    "inspect": inspect,
    "export": export,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mosld", description="Mixtures of LoRA experts that share one down-projection."
    )
    parser.add_argument("--version", action="version", version=f"mosld {__version__}")
    verbs = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(VERBS)}}}")
    for name, verb in VERBS.items():
        own = verbs.add_parser(
            name,
            help=verb.HELP,
            epilog=verb.EXAMPLES,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_arguments(own)
    return parser


@contextlib.contextmanager
def bars_on_terminals_alone() -> Iterator[None]:
    """Around a command: transformers and the hub draw their bars into files too, a line for every change."""
    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    hub_has_none = are_progress_bars_disabled()  # by the user, and the hub warns of whoever gives it bars then
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if not hub_has_none:
            logging.enable_progress_bar()


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    # Not parse_args: some verbs pass on to the Trainer what the parser does not know.
    options, rest = parser.parse_known_args(argv)
    verb = VERBS[options.command]
    if rest and not verb.TRAINER_ARGUMENTS:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        with bars_on_terminals_alone():
            return verb.run(options, rest) or 0
    except Refused as error:
        print(escape_control_chars(f"mosld {options.command}: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # stages.Interrupted as well, after a checkpoint
        print("\nstopped; what is finished is kept. Run the same command again to go on.", file=sys.stderr)
        return 130
    except Exception as error:
        folder = Path(options.output) if options.output else None
        explanation = explain(error, options.command, folder)
        if explanation is None:
            raise
        print(f"\nmosld {options.command}: {explanation}", file=sys.stderr)
        return 1
    finally:
        release()
