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

from ..at_once import write_at_once
from .unlabelled import Unlabelled, batches


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

    @property
    def _files(self) -> tuple[Path, Path]:
        assert self.folder is not None
        return self.folder / "state.safetensors", self.folder / "log.json"

    def _fields(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self.settings).items() if key not in ("steps", "save_steps")}

    def _save(self) -> None:
        """The log goes last; what it has more than the state is forgotten."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"variable.{name}": value.detach() for name, value in self.variables.items()}
        tensors["generator"] = self.generator.get_state()
        for title, optimiser in self.optimisers.items():
            for i, state in optimiser.state_dict()["state"].items():
                tensors |= {f"{title}.{i}.{name}": value for name, value in state.items()}
        state, log = self._files
        # safetensors replaces files whole.
        save_file({k: v.contiguous() for k, v in tensors.items()}, state, metadata={"step": str(len(self.losses))})
        write_at_once(log, json.dumps({"settings": self._fields(), "losses": self.losses}) + "\n")

    def _resume(self) -> None:
        if self.folder is None or not all(path.is_file() for path in self._files):
            return
        state, log = self._files
        told, tensors = json.loads(log.read_text()), load_file(state)
        with safe_open(state, framework="pt") as file:
            step = int((file.metadata() or {}).get("step", 0))
        shapes = {name: tensors.get(f"variable.{name}", torch.empty(0)).shape for name in self.variables}
        fits = all(shapes[name] == value.shape for name, value in self.variables.items())
        if told["settings"] != self._fields() or not fits or not 0 < step <= len(told["losses"]):
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
        self.losses = told["losses"][:step]
