"""python -m benchmarks VERB [options]; without a verb, or with --help, it lists them.

A verb is a module with `add_arguments(parser)` and `run(options)`; here stand only its name and one line about it.
"""

import argparse
import sys
from types import ModuleType
from typing import NamedTuple

from .compile import command as compile_command
from .cpu import calls, layer, memory, scaling, steps, training
from .gpu import run as gpu
from .long import curves, soak
from .model import processes, roofline
from .report import bench, page
from .sweep import run as sweep
from .tune import command as tune_command


class Verb(NamedTuple):
    name: str
    command: ModuleType
    help: str


VERBS = (
    Verb("kernels", steps, "the operator's steps one by one, beside the model of this CPU"),
    Verb("layer", layer, "one adapted layer, forward and backward, beside its peers"),
    Verb("training", training, "a small LLaMA: training step and generation, tokens per second"),
    Verb("memory", memory, "bytes kept for backward by every peer, exact on any machine"),
    Verb("scaling", scaling, "how cost grows with tokens, experts, rank, chosen experts, by dtype"),
    Verb("report", page, "result files into one document with charts"),
    Verb("bench", bench, "a short version of all that runs on a CPU, and the report; five minutes"),
    Verb("roofline", roofline, "a model of the cost on a GPU, by method and by kernel; needs no GPU"),
    Verb("processes", processes, "a calculation of what limits training on many processes"),
    Verb("calls", calls, "what a call costs beside its arithmetic, by the two ways into the operator"),
    Verb("compile", compile_command, "every Triton kernel to machine code, without a GPU, and its limits"),
    Verb("gpu", gpu, "every check and measurement that needs an NVIDIA GPU, in eight minutes"),
    Verb("tune", tune_command, "candidate tile sizes on the GPU at hand, and rows for the table of tiles"),
    Verb("soak", soak, "thousands of training steps, kills and adapter switches: no leak, no drift"),
    Verb("sweep", sweep, "every configuration type of transformers, shrunk: adapted, trained, saved and loaded"),
    Verb("curves", curves, "training curves in every dtype beside float64's, and how far seeds differ"),
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ratios over the frozen linear layer.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in VERBS:
        subparser = verbs.add_parser(verb.name, help=verb.help)
        verb.command.add_arguments(subparser)
        subparser.set_defaults(run=verb.command.run)
    return parser


def main() -> int:
    options = _parser().parse_args()
    try:
        return options.run(options)
    except ValueError as error:
        print(f"python -m benchmarks {options.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
