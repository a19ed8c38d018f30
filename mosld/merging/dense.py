"""Merges whose vectors are whole matrices: a model whose weights are theta_0 + sum_k lambda_k tau_k, differentiably.

Holds K updates of every changed weight, and while it runs one merged copy of them: what full-rank merging costs.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call

from .unlabelled import Forward, on_device


class DenseMerge:
    """The merged model as a function of the coefficients.

    model: frozen, left as it is. parts: weight's name -> updates [K, *shape] in float32, as `elementwise` yields them.
    """

    def __init__(self, model: nn.Module, parts: Iterable[tuple[str, Tensor]]):
        self.model = model.requires_grad_(False).eval()
        self.weights = dict(model.named_parameters())
        self.parts: dict[str, Tensor] = {}
        for name, taus in parts:
            self.parts[name] = taus.to(self.weights[name].device)

    @property
    def layers(self) -> list[str]:
        return list(self.parts)

    def updates(self, coefficients: Tensor, masks: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """coefficients [K], or [layers, K] in the order of `layers`; masks: weight's name -> [*shape], or none
        -> weight's name, sum_k lambda_k (m * tau_k) in float32"""
        for i, (name, taus) in enumerate(self.parts.items()):
            own = coefficients if coefficients.dim() == 1 else coefficients[i]
            update = torch.tensordot(own.to(taus.device), taus, dims=1)
            yield name, update if masks is None else masks[name] * update

    def __call__(self, coefficients: Tensor, masks: Mapping[str, Tensor] | None = None) -> Forward:
        """-> the merged model's forward, in the model's dtype"""
        merged: dict[str, Tensor] = {}
        for name, update in self.updates(coefficients, masks):
            weight = self.weights[name].detach()
            merged[name] = (weight.float() + update).to(weight.dtype)
        return forward_with(self.model, merged)


def forward_with(model: nn.Module, weights: Mapping[str, Tensor]) -> Callable[..., Tensor]:
    """The forward of `model` with other `weights`, from its arguments to its logits."""
    device = next(model.parameters()).device
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    has_keep = "logits_to_keep" in inspect.signature(plain.forward).parameters

    def forward(**arguments: Any) -> Tensor:
        # A model without the argument computes all logits, and the wanted ones are picked here.
        keep = None if has_keep else arguments.pop("logits_to_keep", None)
        logits = functional_call(model, dict(weights), kwargs=on_device(arguments, device)).logits
        return logits if keep is None else logits[:, keep.to(logits.device)]

    return forward


@torch.no_grad()
def write(model: nn.Module, updates: Iterable[tuple[str, Tensor]]) -> float:
    """Add the updates, in float32, to the weights of `model`, one at a time.

    -> |rounded - merged| / |update|, what the weights' dtype loses, as Frobenius norms over all
    """
    weights = dict(model.named_parameters())
    lost = size = 0.0
    for name, update in updates:
        weight = weights[name]
        merged = weight.float() + update.to(weight.device)
        weight.copy_(merged)
        lost += float((weight.float() - merged).double().square().sum())
        size += float(update.double().square().sum())
    return (lost / size) ** 0.5 if size else 0.0


@contextlib.contextmanager
def kept(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Restores the weights `names` of `model` at the end of the block."""
    own = dict(model.named_parameters())
    before = {name: own[name].detach().clone() for name in names}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                own[name].copy_(weight)
