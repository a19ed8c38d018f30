"""AdaMerging (arXiv 2310.02575): the coefficients that make predictions on unlabelled data most certain.

theta(lambda) = theta_0 + sum_k lambda_k tau_k         lambda: one a task, or one a task and layer
minimise  sum over tasks of the mean entropy of the predictions,  by Adam, lr 1e-3, from 0.3
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..at_once import write_at_once
from .unlabelled import Unlabelled, choice_entropy

# coefficients [K] or [layers, K] -> (input_ids, attention_mask) -> logits, differentiable in the coefficients
Merged = Callable[[Tensor], Callable[[Tensor, Tensor], Tensor]]


@dataclass(frozen=True)
class AdaptiveSettings:
    """start: every coefficient at first. clamp: keep them in [0, 1], as the authors' code does. batch_size: questions of each
    task in a step. seed: of the order of the questions. save_steps: how often a run in a folder is saved.
    """

    start: float = 0.3
    learning_rate: float = 1e-3
    steps: int = 500
    batch_size: int = 16
    clamp: bool = False
    seed: int = 0
    save_steps: int = 50

    def __post_init__(self):
        for name in ("steps", "batch_size", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")


def minimise_entropy(
    merged: Merged,
    shape: Sequence[int],
    tasks: Sequence[Unlabelled],
    pad: int,
    settings: AdaptiveSettings | None = None,
    folder: Path | None = None,
    label: str = "merge",
) -> tuple[Tensor, list[float]]:
    """-> the coefficients of `shape`, and the loss of every step.

    folder: keeps the coefficients and Adam's state while it runs, so that the same call goes on where it was cut off.
    raises ValueError without a task.
    """
    if not tasks:
        raise ValueError("adaptive merging needs unlabelled data of at least one task, got none")
    settings = settings or AdaptiveSettings()
    coefficients = torch.full(tuple(shape), settings.start, requires_grad=True)
    optimiser = torch.optim.Adam([coefficients], lr=settings.learning_rate)
    losses = _resume(folder, settings, coefficients, optimiser)
    streams = [task.batches(settings.batch_size, settings.seed + i) for i, task in enumerate(tasks)]
    for stream in streams:  # the questions that a run before has seen
        for _ in losses:
            next(stream)
    with tqdm(total=settings.steps, initial=len(losses), desc=label, unit="step", leave=False) as progress:
        while len(losses) < settings.steps:
            optimiser.zero_grad()
            total = 0.0
            for stream in streams:  # a task at a time, so that one graph is in memory
                loss = choice_entropy(merged(coefficients), next(stream), pad)
                loss.backward()
                total += loss.item()
            optimiser.step()
            if settings.clamp:
                with torch.no_grad():
                    coefficients.clamp_(0, 1)
            losses.append(total)
            progress.update()
            progress.set_postfix(entropy=f"{total / len(tasks):.3f}")
            if folder is not None and (len(losses) % settings.save_steps == 0 or len(losses) == settings.steps):
                _save(folder, settings, coefficients, optimiser, losses)
    return coefficients.detach(), losses


STATE, LOG = "coefficients.safetensors", "coefficients.json"


def _save(folder: Path, settings: AdaptiveSettings, coefficients: Tensor, optimiser, losses: list[float]) -> None:
    """The log is written last and tells the step; a state of another step is not gone on with."""
    folder.mkdir(parents=True, exist_ok=True)
    state: Mapping[str, Tensor] = optimiser.state[coefficients]
    tensors = {"coefficients": coefficients.detach(), **{f"adam.{name}": value for name, value in state.items()}}
    save_file(tensors, folder / STATE, metadata={"step": str(len(losses))})  # safetensors replaces files whole
    write_at_once(folder / LOG, json.dumps({"settings": asdict(settings), "losses": losses}) + "\n")


def _resume(folder: Path | None, settings: AdaptiveSettings, coefficients: Tensor, optimiser) -> list[float]:
    """Take over what an unfinished run with these settings left; -> its losses, none where there is nothing to take over."""
    if folder is None or not (folder / LOG).is_file() or not (folder / STATE).is_file():
        return []
    log = json.loads((folder / LOG).read_text())
    before, now = ({**own, "steps": 0, "save_steps": 0} for own in (log["settings"], asdict(settings)))
    tensors = load_file(folder / STATE)
    step = int(tensors.get("adam.step", torch.tensor(-1)))
    if before != now or tensors["coefficients"].shape != coefficients.shape or not 0 < step <= len(log["losses"]):
        return []
    with torch.no_grad():
        coefficients.copy_(tensors["coefficients"])
    optimiser.state[coefficients] = {
        name.removeprefix("adam."): value for name, value in tensors.items() if name.startswith("adam.")
    }
    return log["losses"][:step]
