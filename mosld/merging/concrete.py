"""Concrete subspaces (arXiv 2312.06173): a mask on the elements, shared by all tasks, that makes them interfere less.

m = sigma((log u / (1 - u) + phi) / T)  relaxed Bernoulli, T = 0.5        m <- m / mean(m), weight by weight
theta = theta_0 + sum_k lambda_k (m * tau_k)

task arithmetic   lambda = 0.3 stays; phi minimises the entropy of the predictions by Adam, lr 1e-3
AdaMerging        each step: lambda takes one step of size 1 from 0.3 with m held, then phi is trained with the new
                  lambda, on other inputs

The authors' code takes the inner step by an Adam whose moments last from step to step; in the paper it is a step of
gradient descent. Their code merges before it sets lambda back: the gradient of the inner step is that at the lambda
where the last step ended, and it moves 0.3. It draws another mask for the step of phi, merges with lambda clamped to
[0, 1], and ends with a last draw of the mask instead of the mask without noise. All of these are here as settings:
inner_at="previous", clamp=True and drawn=True are the code.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .dense import DenseMerge
from .descent import Descent
from .unlabelled import Forward, Unlabelled

Masks = Mapping[str, Tensor]


@dataclass(frozen=True)
class ConcreteSettings:
    """How a mask is trained.

    Args:
        temperature: T, of the relaxed Bernoulli.
        start: The value of every coefficient before the first step.
        learning_rate: Adam's, for the mask.
        steps: Of Adam, for the mask.
        batch_size: Inputs of each task in a step.
        inner_rate: The size of the step on the coefficients. None for task arithmetic, whose coefficients stay.
        inner: What takes that step: "adam" as in the authors' code, or "sgd".
        inner_at: Where its gradient is taken: at the "start", as in the paper, or where the "previous" step ended, as
            in the authors' code, which also draws a mask of its own for each of the two steps.
        clamp: Whether the model is merged with the coefficients clamped to [0, 1], through which no gradient comes back
            from outside, as in the authors' code.
        by_layer: Whether there is a coefficient for each task and weight, instead of each task.
        discrete: Whether the final mask is 0 or 1 instead of sigma(phi / T).
        drawn: Whether the final mask is a draw, as in the authors' code, instead of sigma(phi / T).
        seed: Decides the noise and the order of the inputs.
        save_steps: A run in a folder is saved after every so many steps.

    Raises:
        ValueError: For a number that is not positive, another `inner` or `inner_at`, and a mask that would be both
            discrete and drawn.

    >>> from mosld.merging import ConcreteSettings, MergeSettings
    >>> MergeSettings("concrete_task_arithmetic", concrete=ConcreteSettings(discrete=True)).concrete.temperature
    0.5
    >>> ConcreteSettings(inner="rmsprop")
    Traceback (most recent call last):
    ValueError: inner must be adam or sgd, got 'rmsprop'
    """

    temperature: float = 0.5
    start: float = 0.3
    learning_rate: float = 1e-3
    steps: int = 2000
    batch_size: int = 16
    inner_rate: float | None = None
    inner: str = "adam"
    inner_at: str = "start"
    clamp: bool = False
    by_layer: bool = False
    discrete: bool = False
    drawn: bool = False
    seed: int = 0
    save_steps: int = 50

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        for name in ("steps", "batch_size", "save_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.inner not in ("adam", "sgd"):
            raise ValueError(f"inner must be adam or sgd, got {self.inner!r}")
        if self.inner_at not in ("start", "previous"):
            raise ValueError(f"inner_at must be start or previous, got {self.inner_at!r}")
        if self.discrete and self.drawn:
            raise ValueError("discrete=True contradicts drawn=True: the final mask is one of them")


def sampled(logits: Masks, temperature: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Relaxed Bernoulli masks, rescaled to a mean of 1; differentiable in the logits."""
    masks = {}
    for name, phi in logits.items():
        u = torch.rand(phi.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(phi.device)
        masks[name] = rescaled(torch.sigmoid((u.logit() + phi) / temperature))
    return masks


def final(logits: Masks, temperature: float, discrete: bool = False) -> dict[str, Tensor]:
    """The masks without noise, rescaled: sigma(phi / T), or 1 where phi > 0 and 0 elsewhere."""
    masks = {}
    for name, phi in logits.items():
        mask = (phi > 0).to(phi.dtype) if discrete else torch.sigmoid(phi / temperature)
        masks[name] = rescaled(mask)
    return masks


def final_masks(logits: Masks, settings: ConcreteSettings) -> dict[str, Tensor]:
    """The masks that the merge ends with, as `discrete` and `drawn` say."""
    if settings.drawn:
        # Not the seed itself, with which the first step has drawn.
        return sampled(logits, settings.temperature, torch.Generator().manual_seed(settings.seed + 1))
    return final(logits, settings.temperature, settings.discrete)


def rescaled(mask: Tensor) -> Tensor:
    """mask / mean(mask), so that the update keeps its size on average; zeros stay zeros"""
    return mask / mask.mean().clamp(min=torch.finfo(mask.dtype).tiny)


def train_masks(
    merge: DenseMerge, tasks: Sequence[Unlabelled], count: int, settings: ConcreteSettings | None = None,
    folder: Path | None = None,
) -> tuple[dict[str, Tensor], list[float]]:  # fmt: skip
    """-> mask logits, weight's name -> [*shape], and the loss of every step.

    count: K, the number of task vectors. folder: keeps the state, as in `minimise_entropy`.
    raises ValueError without a task.
    """
    if not tasks:
        raise ValueError("Concrete masks need unlabelled data of at least one task, got none")
    settings = settings or ConcreteSettings()
    logits: dict[str, Tensor] = {}
    for name, taus in merge.parts.items():
        logits[name] = torch.zeros(taus.shape[1:], device=taus.device, requires_grad=True)
    bilevel = settings.inner_rate is not None
    shape = (len(logits), count) if settings.by_layer else (count,)
    coefficients = torch.full(shape, settings.start, requires_grad=bilevel)
    inner = inner_optimiser(coefficients, settings)
    # Adam's moments are part of the state that a run goes on from; gradient descent has none.
    others = {"inner": inner} if isinstance(inner, torch.optim.Adam) else {}
    # So are the coefficients, where the next step begins from them.
    kept = {"inner coefficients": coefficients} if bilevel and settings.inner_at == "previous" else {}
    descent = Descent("train the mask", logits, settings, folder, others, kept)
    streams = descent.streams([*tasks], rounds=2 if bilevel else 1)
    for _ in descent.steps():
        masks = sampled(logits, settings.temperature, descent.generator)
        if inner is not None:
            where = {"start": settings.start, "at": settings.inner_at, "clamp": settings.clamp}
            inner_step(merge, detached(masks), coefficients, inner, tasks, streams, **where)
            if settings.inner_at == "previous":
                masks = sampled(logits, settings.temperature, descent.generator)
        descent.optimiser.zero_grad()
        loss = sum_of_entropies(merge(_used(coefficients.detach(), settings.clamp), masks), tasks, streams)
        loss.backward()
        descent.done(loss.item())
    return detached(logits), descent.losses


def inner_optimiser(coefficients: Tensor, settings: ConcreteSettings) -> torch.optim.Optimizer | None:
    """What takes the step on the coefficients; None where they stay."""
    if settings.inner_rate is None:
        return None
    optimiser = torch.optim.Adam if settings.inner == "adam" else torch.optim.SGD
    return optimiser([coefficients], lr=settings.inner_rate)


def detached(tensors: Masks) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def inner_step(
    merge: DenseMerge, masks: Masks, coefficients: Tensor, optimiser: torch.optim.Optimizer,
    tasks: Sequence[Unlabelled], streams: Sequence[Iterator[list[int]]], start: float, at: str = "start",
    clamp: bool = False,
) -> None:  # fmt: skip
    """Set the coefficients to `start` and take one step, in place; of first order, without a gradient for the masks.

    at: "start", or "previous" for the gradient at the coefficients as they come. clamp: as in ConcreteSettings.
    """
    if at == "start":
        _fill(coefficients, start)
    optimiser.zero_grad()
    sum_of_entropies(merge(_used(coefficients, clamp), masks), tasks, streams).backward()
    _fill(coefficients, start)
    optimiser.step()


def _fill(coefficients: Tensor, start: float) -> None:
    with torch.no_grad():
        coefficients.fill_(start)


def _used(coefficients: Tensor, clamp: bool) -> Tensor:
    """The coefficients with which the model is merged."""
    return coefficients.clamp(0, 1) if clamp else coefficients


def sum_of_entropies(forward: Forward, tasks: Sequence[Unlabelled], streams: Sequence[Iterator[list[int]]]) -> Tensor:
    """Of the predictions on the next batch of every task."""
    entropies = []
    for task, stream in zip(tasks, streams, strict=True):
        entropies.append(task.entropy(forward, next(stream)))
    return torch.stack(entropies).sum()
