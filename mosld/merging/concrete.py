"""Concrete subspaces (arXiv 2312.06173): a mask on the elements, shared by all tasks, that makes them interfere less.

m = sigma((log u / (1 - u) + phi) / T)  relaxed Bernoulli, T = 0.5        m <- m / mean(m), weight by weight
theta = theta_0 + sum_k lambda_k (m * tau_k)

task arithmetic   lambda = 0.3 stays; phi minimises the entropy of the predictions by Adam, lr 1e-3
AdaMerging        each step: lambda takes one step of size 1 from 0.3 with m held, then phi is trained with the new lambda,
                  on other inputs

The authors' code takes the inner step by an Adam whose moments last from step to step; the paper tells of a step of gradient
descent. Both are here.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """temperature: of the relaxed Bernoulli. start: every coefficient at first. inner_rate: of the step on the coefficients,
    None for task arithmetic, whose coefficients stay; inner: "adam" as in the authors' code, or "sgd". by_layer: whether these
    are one a task and weight. discrete: whether the final mask is 0 or 1 instead of sigma(phi / T).

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
    by_layer: bool = False
    discrete: bool = False
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


def sampled(logits: Masks, temperature: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Relaxed Bernoulli masks, rescaled to a mean of 1; differentiable in the logits."""
    masks = {}
    for name, phi in logits.items():
        u = torch.rand(phi.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(phi.device)
        masks[name] = rescaled(torch.sigmoid((u.logit() + phi) / temperature))
    return masks


def final(logits: Masks, temperature: float, discrete: bool = False) -> dict[str, Tensor]:
    """The masks without noise, rescaled: sigma(phi / T), or 1 where phi > 0 and 0 elsewhere."""
    return {
        name: rescaled((phi > 0).to(phi.dtype) if discrete else torch.sigmoid(phi / temperature))
        for name, phi in logits.items()
    }


def rescaled(mask: Tensor) -> Tensor:
    """mask / mean(mask), so that the update keeps its size on average; zeros stay zeros"""
    return mask / mask.mean().clamp(min=torch.finfo(mask.dtype).tiny)


def train_masks(
    merge: DenseMerge, tasks: Sequence[Unlabelled], count: int, settings: ConcreteSettings | None = None,
    folder: Path | None = None,
) -> tuple[dict[str, Tensor], list[float]]:  # fmt: skip
    """-> mask logits, weight's name -> [*shape], and the loss of every step.

    count: K, the number of task vectors. folder: keeps the state, as in `minimise_entropy`. raises ValueError without a task.
    """
    if not tasks:
        raise ValueError("Concrete masks need unlabelled data of at least one task, got none")
    settings = settings or ConcreteSettings()
    logits = {
        name: torch.zeros(taus.shape[1:], device=taus.device, requires_grad=True) for name, taus in merge.parts.items()
    }
    bilevel = settings.inner_rate is not None
    shape = (len(logits), count) if settings.by_layer else (count,)
    coefficients = torch.full(shape, settings.start, requires_grad=bilevel)
    steps = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[settings.inner]
    inner = steps([coefficients], lr=settings.inner_rate) if settings.inner_rate is not None else None
    moments = {"inner": inner} if isinstance(inner, torch.optim.Adam) else {}
    descent = Descent("train the mask", logits, settings, folder, moments)
    streams = descent.streams([*tasks], rounds=2 if bilevel else 1)
    for _ in descent.steps():
        masks = sampled(logits, settings.temperature, descent.generator)
        if inner is not None:
            held = {name: mask.detach() for name, mask in masks.items()}
            inner_step(merge, held, coefficients, inner, tasks, streams, settings.start)
        descent.optimiser.zero_grad()
        now = coefficients.detach()
        loss = sum_of_entropies(lambda: merge(now, masks), tasks, streams)  # noqa: B023  called at once
        loss.backward()
        descent.done(loss.item())
    return {name: phi.detach() for name, phi in logits.items()}, descent.losses


def inner_step(
    merge: DenseMerge, masks: Masks, coefficients: Tensor, optimiser: torch.optim.Optimizer,
    tasks: Sequence[Unlabelled], streams: Sequence[Iterator[list[int]]], start: float,
) -> None:  # fmt: skip
    """The coefficients from `start` one step down, in place; first order, so the mask's gradient does not go through it."""
    with torch.no_grad():
        coefficients.fill_(start)
    optimiser.zero_grad()
    sum_of_entropies(lambda: merge(coefficients, masks), tasks, streams).backward()
    optimiser.step()


def sum_of_entropies(
    merged: Callable[[], Forward], tasks: Sequence[Unlabelled], streams: Sequence[Iterator[list[int]]]
) -> Tensor:
    forward = merged()
    return torch.stack([task.entropy(forward, next(own)) for task, own in zip(tasks, streams, strict=True)]).sum()
