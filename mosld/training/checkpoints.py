"""Which of the Trainer's checkpoints training can go on from after the process was killed."""

import json
import warnings
from pathlib import Path
from typing import Any, cast

from ..files.adapter_folder import PICKLES, WEIGHTS, AdapterFileError, check_digest, check_weights

STATE = "trainer_state.json"  # which the Trainer writes last
# Weights of a whole model, which the Trainer prefers to an adapter's wherever both lie in a checkpoint.
PREFERRED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors", "model.safetensors.index.json")


class WholeCheckpointsMixin:
    """For any Trainer: `trainer_state.json` comes after the files of every process, not of the first alone."""

    def _save_rng_state(self, output_dir: str) -> None:
        cast(Any, super())._save_rng_state(output_dir)
        cast(Any, self).accelerator.wait_for_everyone()


def last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in `folder` that was written to its end and whose adapters are as they were saved.

    warns of one whose weights were altered, and passes it over like one that was cut off.
    """
    numbered = {}
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdecimal() and _ends(path / STATE):
            numbered[int(step)] = path
    for _, path in sorted(numbered.items(), reverse=True):
        try:
            check_adapters(path)
        except AdapterFileError as error:
            warnings.warn(f"{path} is passed over: {error}", stacklevel=2)
        else:
            return str(path)
    return None


def check_adapters(checkpoint: Path) -> None:
    """raises AdapterFileError where an adapter in `checkpoint` cannot be trusted; the Trainer itself does not look.

    Such are one that was altered since it was saved, one that is a pickle now, which the Trainer would open, and one
    beside weights that the Trainer would load in its place.
    """
    folders = [checkpoint]
    for name in PICKLES:
        folders += [path.parent for path in checkpoint.glob(f"*/{name}")]
    for folder in folders:
        check_weights(folder, only_pickles=True)
    # The first adapter lies in the checkpoint itself, every other one in a folder of its own.
    adapters = [path for path in (checkpoint / WEIGHTS, *checkpoint.glob(f"*/{WEIGHTS}")) if path.is_file()]
    for weights in adapters:
        check_digest(weights)
    if not adapters:
        return
    for name in PREFERRED:
        if (checkpoint / name).is_file():
            raise AdapterFileError(
                f"{checkpoint / name} would be loaded in the place of {adapters[0].name}, and no checkpoint of an "
                "adapter has it"
            )


def _ends(state: Path) -> bool:
    """A process killed before or while it writes leaves no file, an empty one, or one that is cut off."""
    try:
        json.loads(state.read_text())
    except (OSError, ValueError):
        return False
    return True
