"""Concrete subspaces (arXiv 2312.06173): a mask on the elements, shared by all tasks, that makes them interfere less.

m = sigma((log u / (1 - u) + phi) / T)  relaxed Bernoulli, T = 0.5        m <- m / mean(m), weight by weight
theta = theta_0 + sum_k lambda_k (m * tau_k)

task arithmetic   lambda = 0.3 stays; phi minimises the entropy of the predictions by Adam, lr 1e-3
AdaMerging        each step: lambda takes one step of size 1 from 0.3 with m held, then phi is trained with the new lambda
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .dense import DenseMerge
from .unlabelled import Question, Unlabelled, choice_entropy

Masks = Mapping[str, Tensor]


@dataclass(frozen=True)
class ConcreteSettings:
    """temperature: of the relaxed Bernoulli. start: every coefficient at first. inner_rate: of the step on the coefficients,
    None for task arithmetic, whose coefficients stay. discrete: whether the final mask is 0 or 1 instead of sigma(phi / T).
    """

    temperature: float = 0.5
    start: float = 0.3
    learning_rate: float = 1e-3
    steps: int = 2000
    batch_size: int = 16
    inner_rate: float | None = None
    discrete: bool = False
    seed: int = 0

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps and batch_size must be at least 1, got {self.steps} and {self.batch_size}")


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
    merge: DenseMerge, tasks: Sequence[Unlabelled], count: int, pad: int, settings: ConcreteSettings | None = None
) -> tuple[dict[str, Tensor], list[float]]:
    """-> mask logits, weight's name -> [*shape], and the loss of every step.

    count: K, the number of task vectors. raises ValueError without a task.
    """
    if not tasks:
        raise ValueError("Concrete masks need unlabelled data of at least one task, got none")
    settings = settings or ConcreteSettings()
    logits = {
        name: torch.zeros(taus.shape[1:], device=taus.device, requires_grad=True) for name, taus in merge.parts.items()
    }
    optimiser = torch.optim.Adam(logits.values(), lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(settings.seed)
    streams = [task.batches(settings.batch_size, settings.seed + i) for i, task in enumerate(tasks)]
    losses = []
    for _ in tqdm(range(settings.steps), desc="train the mask", unit="step", leave=False):
        masks = sampled(logits, settings.temperature, generator)
        coefficients = torch.full((count,), settings.start)
        batches = [next(stream) for stream in streams]
        if settings.inner_rate is not None:
            held = {name: mask.detach() for name, mask in masks.items()}
            coefficients = _inner_step(merge, held, coefficients, batches, pad, settings.inner_rate)
        optimiser.zero_grad()
        loss = sum_of_entropies(lambda: merge(coefficients, masks), batches, pad)  # noqa: B023  called at once
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return {name: phi.detach() for name, phi in logits.items()}, losses


def _inner_step(
    merge: DenseMerge, masks: Masks, start: Tensor, batches: Sequence[list[Question]], pad: int, rate: float
) -> Tensor:
    """One step of gradient descent on the coefficients; first order, so the mask's gradient does not go through it."""
    coefficients = start.clone().requires_grad_()
    loss = sum_of_entropies(lambda: merge(coefficients, masks), batches, pad)
    (grad,) = torch.autograd.grad(loss, coefficients)
    return (coefficients - rate * grad).detach()


def sum_of_entropies(
    merged: Callable[[], Callable[[Tensor, Tensor], Tensor]], batches: Sequence[list[Question]], pad: int
) -> Tensor:
    forward = merged()
    return torch.stack([choice_entropy(forward, batch, pad) for batch in batches]).sum()
