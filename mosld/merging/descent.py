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

    variables: name -> leaf tensor that is trained, in place. settings: a dataclass with learning_rate, steps, seed and
        save_steps; a state of other settings (but for the number of steps and how often they are saved) is not gone on with.
    others: further optimisers whose state belongs to the run, by name. folder: where the state is kept, or nowhere.
    """

    def __init__(
        self,
        label: str,
        variables: Mapping[str, Tensor],
        settings: Any,
        folder: Path | None = None,
        others: Mapping[str, torch.optim.Adam] | None = None,
    ):
        self.label, self.variables, self.settings, self.folder = label, variables, settings, folder
        self.optimiser = torch.optim.Adam(list(variables.values()), lr=settings.learning_rate)
        self.optimisers = {"adam": self.optimiser, **(others or {})}
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.losses: list[float] = []
        self._resume()

    def steps(self) -> Iterator[int]:
        """The places of the steps that are left, with a progress bar; `done` ends each."""
        total = self.settings.steps
        with tqdm(total=total, initial=len(self.losses), desc=self.label, unit="step", leave=False) as progress:
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
        """Each task's batches, those that steps before have seen left out; `rounds` batches of a task belong to a step."""
        own = [batches(len(task), self.settings.batch_size, self.settings.seed + i) for i, task in enumerate(tasks)]
        for stream in own:
            for _ in range(rounds * len(self.losses)):
                next(stream)
        return own

    def _fields(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self.settings).items() if key not in ("steps", "save_steps")}

    def _save(self) -> None:
        """All in one file, so that a killed process leaves the state before or this one, each with its own losses."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"variable.{name}": value.detach() for name, value in self.variables.items()}
        tensors |= {"generator": self.generator.get_state(), "losses": torch.tensor(self.losses, dtype=torch.float64)}
        for title, optimiser in self.optimisers.items():
            for i, state in optimiser.state_dict()["state"].items():
                tensors |= {f"{title}.{i}.{name}": value for name, value in state.items()}
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with folder_beside(self.folder / STATE) as aside:  # safetensors' own leftovers have no name to know them by
            save_file(whole, aside / STATE, metadata={"settings": json.dumps(self._fields())})
            (aside / STATE).replace(self.folder / STATE)

    def _resume(self) -> None:
        if self.folder is None or not (self.folder / STATE).is_file():
            return
        tensors = load_file(self.folder / STATE)
        with safe_open(self.folder / STATE, framework="pt") as file:
            settings = json.loads((file.metadata() or {}).get("settings", "null"))
        shapes = {name: tensors.get(f"variable.{name}", torch.empty(0)).shape for name in self.variables}
        fits = all(shapes[name] == value.shape for name, value in self.variables.items())
        if settings != json.loads(json.dumps(self._fields())) or not fits:
            return
        with torch.no_grad():
            for name, value in self.variables.items():
                value.copy_(tensors[f"variable.{name}"])
        self.generator.set_state(tensors["generator"])
        for title, optimiser in self.optimisers.items():
            own: dict[int, dict[str, Tensor]] = {}
            for key, value in tensors.items():
                if key.startswith(f"{title}."):
                    _, i, name = key.split(".", 2)
                    own.setdefault(int(i), {})[name] = value
            optimiser.load_state_dict({**optimiser.state_dict(), "state": own})
        self.losses = tensors["losses"].tolist()
