"""`mosld eval`: scores of a model, with or without an adapter."""

import argparse
import json
from collections.abc import Sequence

from ..experiments.evaluate import evaluate
from ..experiments.results import summaries, versions
from ..files.atomic import write_text_atomic
from .options import QUICK_HELP, add_data, check_at_least_one, inputs_of, output_of, refusing

HELP = "score a model, with or without an adapter"
EXAMPLES = """example:
  mosld eval --model meta-llama/Llama-3.2-1B --adapter runs/mine/adapter --task arc=arc_test.jsonl
"""
TRAINER_ARGUMENTS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser, "name=test.jsonl; once per task (with name=train.jsonl:test.jsonl the second file is scored)")
    parser.add_argument("--adapter", help="folder of a saved adapter")
    parser.add_argument("--output", help="also write the scores to this JSON file")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)


def run(options: argparse.Namespace, trainer_words: Sequence[str]) -> None:
    with refusing(ValueError):
        scores = _evaluate(options)
    print(json.dumps(scores, indent=2))


def _evaluate(options: argparse.Namespace) -> dict[str, dict]:
    """Task name -> score; raises ValueError, and nothing is written then."""
    check_at_least_one("eval-batch-size", options.eval_batch_size)
    output = output_of(options)
    if output and output.exists():
        raise ValueError(f"{output} exists: choose another --output")
    if output and not output.parent.is_dir():
        raise ValueError(f"{output} is in no folder: choose another --output")
    scores = summaries(evaluate(inputs_of(options), options.adapter))
    if output:
        write_text_atomic(output, json.dumps({"tasks": scores, "versions": versions()}, indent=2) + "\n")
    return scores
