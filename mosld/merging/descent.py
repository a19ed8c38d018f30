"""Adam on what a merge trains, kept in a folder, so that the same call goes on where it was cut off."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..files.atomic import folder_beside
from .unlabelled import Unlabelled, batches

STATE = "state.safetensors"


class Descent:
    """One descent: its variables, Adam's state, a generator of its own, and the loss of every step.

    variables: name -> leaf tensor that is trained, in place. folder: where the state is kept; None keeps none.
    settings: a dataclass with learning_rate, steps, seed and save_steps. A saved state of other settings, but for steps
        and save_steps, is not used.
    others: further optimisers whose state belongs to the run, by name. kept: further tensors that do.
    """

    def __init__(
        self,
        label: str,
        variables: Mapping[str, Tensor],
        settings: Any,
        folder: Path | None = None,
        others: Mapping[str, torch.optim.Adam] | None = None,
        kept: Mapping[str, Tensor] | None = None,
    ):
        self.label, self.variables, self.settings, self.folder = label, variables, settings, folder
        self.lasting = {**variables, **(kept or {})}
        self.optimiser = torch.optim.Adam(list(variables.values()), lr=settings.learning_rate)
        self.optimisers = {"adam": self.optimiser, **(others or {})}
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.losses: list[float] = []
        self._resume()

    def steps(self) -> Iterator[int]:
        """The places of the steps that are left, with a progress bar; `done` ends each."""
        total = self.settings.steps
        begun = len(self.losses)
        with tqdm(total=total, initial=begun, desc=self.label, unit="step", leave=False, disable=None) as progress:
            while len(self.losses) < total:
                before = len(self.losses)
                yield before
                assert len(self.losses) == before + 1
                progress.update()
                progress.set_postfix(loss=f"{self.losses[-1]:.3f}")
                if len(self.losses) % self.settings.save_steps == 0 or len(self.losses) == total:
                    self._save()

    def done(self, loss: float) -> None:
        """Take Adam's step with the gradients that are there; raises ArithmeticError for a loss that is not finite."""
        if not torch.isfinite(torch.tensor(loss)):
            raise ArithmeticError(
                f"{self.label}: the loss is {loss} at step {len(self.losses)}; lower the learning rate"
            )
        self.optimiser.step()
        self.losses.append(loss)

    def streams(self, tasks: list[Unlabelled], rounds: int = 1) -> list[Iterator[list[int]]]:
        """Each task's batches from the next step on; `rounds` batches of a task belong to a step."""
        streams = []
        for i, task in enumerate(tasks):
            stream = batches(len(task), self.settings.batch_size, self.settings.seed + i)
            # A run that goes on does not see again what its earlier steps have seen.
            for _ in range(rounds * len(self.losses)):
                next(stream)
            streams.append(stream)
        return streams

    def _deciding_settings(self) -> dict[str, Any]:
        """What a saved state must agree with, as JSON gives it back."""
        fields = asdict(self.settings)
        del fields["steps"], fields["save_steps"]
        return json.loads(json.dumps(fields))

    def _save(self) -> None:
        """All in one file, so that a killed process leaves the state before or this one, each with its own losses."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {"generator": self.generator.get_state(), "losses": torch.tensor(self.losses, dtype=torch.float64)}
        for name, value in self.lasting.items():
            tensors[f"variable.{name}"] = value.detach().contiguous()
        for title, optimiser in self.optimisers.items():
            for i, state in optimiser.state_dict()["state"].items():
                for name, value in state.items():
                    tensors[f"{title}.{i}.{name}"] = value.contiguous()
        # Written in a folder of its own: a file that safetensors leaves unfinished has no name by which to find it.
        with folder_beside(self.folder / STATE) as aside:
            save_file(tensors, aside / STATE, metadata={"settings": json.dumps(self._deciding_settings())})
            (aside / STATE).replace(self.folder / STATE)

    def _resume(self) -> None:
        if self.folder is None or not (self.folder / STATE).is_file():
            return
        tensors = load_file(self.folder / STATE)
        with safe_open(self.folder / STATE, framework="pt") as file:
            settings = json.loads((file.metadata() or {}).get("settings", "null"))
        if settings != self._deciding_settings() or not self._fits(tensors):
            return
        with torch.no_grad():
            for name, value in self.lasting.items():
                value.copy_(tensors[f"variable.{name}"])
        self.generator.set_state(tensors["generator"])
        for title, optimiser in self.optimisers.items():
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"{title}."):
                    _, i, name = key.split(".", 2)
                    state.setdefault(int(i), {})[name] = value
            optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
        self.losses = tensors["losses"].tolist()

    def _fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a saved state has every variable in its shape."""
        for name, value in self.lasting.items():
            saved = tensors.get(f"variable.{name}")
            if saved is None or saved.shape != value.shape:
                return False
        return True
