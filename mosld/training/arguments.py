"""Command-line words as transformers' TrainingArguments."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from transformers import (
    HfArgumentParser,
    TrainingArguments,
)


def training_arguments(arguments: Sequence[str], output_dir: Path, program: str = "mosld train") -> TrainingArguments:
    """Command-line words -> TrainingArguments.

    program: who takes the words, for messages.
    raises ValueError for a word that the Trainer does not know, and for those that ask for shards or for evaluations.
    """

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"not an argument of {program} or of transformers' TrainingArguments: {message}")

    names = {word.partition("=")[0] for word in arguments}
    if names & {"--fsdp", "--deepspeed"}:
        raise ValueError(
            f"{program} keeps the whole model in every process: --fsdp and --deepspeed cannot be given; "
            "docs/tutorials/several_processes.md tells how to shard in a script of your own"
        )
    parser = HfArgumentParser(cast(Any, TrainingArguments), allow_abbrev=False)
    parser.error = refuse
    words = ["--report_to", "none", "--save_total_limit", "1", "--ddp_find_unused_parameters", "false"]
    if not torch.accelerator.is_available():
        # Without it, accelerate takes processes without an accelerator for strangers, each of which trains by itself.
        words += ["--use_cpu", "true"]
    words += [*arguments, "--output_dir", str(output_dir)]
    parsed, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        refuse(f"{' '.join(unknown)} ({program} --help lists the first, the transformers documentation the second)")
    if parsed.eval_strategy != "no" or parsed.load_best_model_at_end:
        raise ValueError(
            f"{program} scores the test files when the training has ended: --eval_strategy and "
            "--load_best_model_at_end cannot be given"
        )
    return parsed
