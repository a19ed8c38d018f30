"""AdaMerging (arXiv 2310.02575): the coefficients that make predictions on unlabelled data most certain.

theta(lambda) = theta_0 + sum_k lambda_k tau_k         lambda: one a task, or one a task and layer
minimise  sum over tasks of the mean entropy of the predictions,  by Adam, lr 1e-3, from 0.3

The authors' code merges with lambda clamped to [0, 1], while Adam goes on from what is not: clamp="use".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .descent import Descent
from .unlabelled import Forward, Unlabelled

# Coefficients [K] or [layers, K] -> a forward that is differentiable in them.
MergedForward = Callable[[Tensor], Forward]


@dataclass(frozen=True)
class AdaptiveSettings:
    """How coefficients are trained.

    Args:
        start: The value of every coefficient before the first step.
        learning_rate: Adam's.
        steps: Of Adam.
        batch_size: Inputs of each task in a step.
        clamp: False leaves the coefficients as they are. "use" is the authors' code: the model is merged with them
            clamped to [0, 1], through which no gradient comes back from outside, while Adam moves the unclamped ones.
            True puts them back into [0, 1] after every step.
        seed: Decides the order of the inputs.
        save_steps: A run in a folder is saved after every so many steps.

    Raises:
        ValueError: For a number that is not positive, and another `clamp`.

    >>> from mosld.merging import AdaptiveSettings, MergeSettings
    >>> MergeSettings("adamerging_layer", adaptive=AdaptiveSettings(steps=100, clamp=True)).adaptive.steps
    100
    >>> AdaptiveSettings(batch_size=0)
    Traceback (most recent call last):
    ValueError: batch_size must be at least 1, got 0
    """

    start: float = 0.3
    learning_rate: float = 1e-3
    steps: int = 500
    batch_size: int = 16
    clamp: bool | str = False
    seed: int = 0
    save_steps: int = 50

    def __post_init__(self):
        for name in ("steps", "batch_size", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.clamp not in (False, True, "use"):
            raise ValueError(f"clamp must be False, True or 'use', got {self.clamp!r}")


def minimise_entropy(
    merged: MergedForward,
    shape: Sequence[int],
    tasks: Sequence[Unlabelled],
    settings: AdaptiveSettings | None = None,
    folder: Path | None = None,
    label: str = "merge",
) -> tuple[Tensor, list[float]]:
    """-> the coefficients of `shape`, and the loss of every step.

    folder: keeps the coefficients and Adam's state, so that the same call goes on where it was cut off.
    raises ValueError without a task.
    """
    if not tasks:
        raise ValueError("adaptive merging needs unlabelled data of at least one task, got none")
    settings = settings or AdaptiveSettings()
    coefficients = torch.full(tuple(shape), settings.start, requires_grad=True)
    # The descent finds an earlier state in the folder, if there is one, and sets the coefficients to it.
    descent = Descent(label, {"coefficients": coefficients}, settings, folder)
    streams = descent.streams([*tasks])
    for _ in descent.steps():
        descent.optimiser.zero_grad()
        total = 0.0
        # A backward pass for each task, so that no two graphs are in memory at once.
        for task, stream in zip(tasks, streams, strict=True):
            loss = task.entropy(merged(_used(coefficients, settings)), next(stream))
            loss.backward()
            total += loss.item()
        descent.done(total)
        if settings.clamp is True:
            with torch.no_grad():
                coefficients.clamp_(0, 1)
    return _used(coefficients, settings).detach(), descent.losses


def _used(coefficients: Tensor, settings: AdaptiveSettings) -> Tensor:
    """The coefficients with which the model is merged."""
    return coefficients.clamp(0, 1) if settings.clamp == "use" else coefficients
