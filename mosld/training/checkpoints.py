"""Which of the Trainer's checkpoints training can go on from after the process was killed."""

import json
import warnings
from pathlib import Path
from typing import Any, cast

from torch import nn

from ..files.adapter_folder import PICKLES, WEIGHTS, AdapterFileError, check_digest, check_weights
from ..tuner.config import MoSLDConfig
from ..tuner.guards import load_into

STATE = "trainer_state.json"  # which the Trainer writes last
# Weights of a whole model, which the Trainer prefers to an adapter's wherever both lie in a checkpoint.
PREFERRED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.safetensors", "model.safetensors.index.json")


class WholeCheckpointsMixin:
    """For any Trainer: `trainer_state.json` comes after the files of every process, not of the first alone; and
    adapters are loaded from where they lie, whatever they are called and whoever added them.
    """

    def _load_best_model(self) -> None:
        # The Trainer looks in the checkpoint itself, where PEFT saves no adapter but "default".
        if not self._load_adapters(Path(cast(Any, self).state.best_model_checkpoint)):
            cast(Any, super())._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_adapters(Path(resume_from_checkpoint), model):
            cast(Any, super())._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_adapters(self, checkpoint: Path, model: nn.Module | None = None) -> bool:
        """Load the active adapters of MoSLD; False where that is left to the Trainer."""
        trainer: Any = self
        model = trainer.model if model is None else model
        configs = getattr(model, "peft_config", None)
        if not configs or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            return False
        active: Any = getattr(model, "active_adapters", None)  # a method in transformers, a property in PEFT
        names: list[str] = list(cast(Any, active() if callable(active) else active or []))
        if not all(isinstance(configs[name], MoSLDConfig) for name in names):
            return False
        folders = {}
        for name in names:
            own = checkpoint / name
            # transformers saves the active adapter in the checkpoint itself, whatever its name.
            folders[name] = own if (own / WEIGHTS).is_file() else checkpoint
        if not folders or not all((folder / WEIGHTS).is_file() for folder in folders.values()):
            return False
        for name, folder in folders.items():
            load_into(cast(nn.Module, model), name, folder)
        return True

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
