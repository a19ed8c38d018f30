"""Command-line words as transformers' TrainingArguments."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    HfArgumentParser,
    TrainingArguments,
)


def training_arguments(arguments: Sequence[str], output_dir: Path) -> TrainingArguments:
    """Command-line words -> TrainingArguments; raises ValueError for a word that the Trainer does not know."""
    if {word.partition("=")[0] for word in arguments} & {"--fsdp", "--deepspeed"}:
        raise ValueError(
            "mosld train keeps the whole model in every process: --fsdp and --deepspeed cannot be given; docs/tutorials/several_processes.md "
            "tells how to shard in a script of your own"
        )
    parser = HfArgumentParser(cast(Any, TrainingArguments), allow_abbrev=False)
    parser.error = _raise_value_error
    # Unless told so, accelerate takes processes without an accelerator for strangers, each of which trains by itself.
    device = [] if torch.accelerator.is_available() else ["--use_cpu", "true"]
    words = ["--report_to", "none", "--save_total_limit", "1", "--ddp_find_unused_parameters", "false", *device]
    words += [*arguments, "--output_dir", str(output_dir)]
    parsed, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        _raise_value_error(
            f"{' '.join(unknown)} (mosld train --help lists the first, the transformers documentation the second)"
        )
    if parsed.eval_strategy != "no" or parsed.load_best_model_at_end:
        raise ValueError(
            "mosld train scores the test files when the training has ended: --eval_strategy and --load_best_model_at_end "
            "cannot be given"
        )
    return parsed


def _raise_value_error(message: str):
    raise ValueError(f"not an argument of mosld train or of transformers' TrainingArguments: {message}")
