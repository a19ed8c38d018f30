"""Merges whose vectors are whole matrices: a model whose weights are theta_0 + sum_k lambda_k tau_k, differentiably.

Holds K updates of every changed weight, and while it runs one merged copy of them: what full-rank merging costs.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call


class DenseMerge:
    """The merged model as a function of the coefficients.

    model: frozen, left as it is. parts: weight's name -> updates [K, *shape] in float32, as `elementwise` yields them.
    """

    def __init__(self, model: nn.Module, parts: Iterable[tuple[str, Tensor]]):
        self.model = model.requires_grad_(False).eval()
        own = dict(model.named_parameters())
        self.parts = {name: taus.to(own[name].device) for name, taus in parts}
        self.base = {name: own[name].detach().float() for name in self.parts}

    @property
    def layers(self) -> list[str]:
        return list(self.parts)

    def weights(self, coefficients: Tensor, masks: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """coefficients [K], or [layers, K] in the order of `layers`; masks: weight's name -> [*shape], times every update
        -> the merged weights in the model's dtype"""
        merged = {}
        for i, (name, taus) in enumerate(self.parts.items()):
            own = coefficients if coefficients.dim() == 1 else coefficients[i]
            update = torch.tensordot(own.to(taus.device), taus, dims=1)
            update = update if masks is None else masks[name] * update
            merged[name] = (self.base[name] + update).to(dict(self.model.named_parameters())[name].dtype)
        return merged

    def __call__(
        self, coefficients: Tensor, masks: Mapping[str, Tensor] | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """-> (input_ids, attention_mask) -> logits"""
        weights = self.weights(coefficients, masks)
        device = next(self.model.parameters()).device

        def forward(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
            return functional_call(self.model, weights, kwargs=inputs).logits

        return forward

    @torch.no_grad()
    def write(self, coefficients: Tensor, masks: Mapping[str, Tensor] | None = None) -> float:
        """Put the merged weights into the model; -> |rounded - merged| / |update|, what its dtype loses."""
        own, lost, size = dict(self.model.named_parameters()), 0.0, 0.0
        for i, (name, taus) in enumerate(self.parts.items()):
            weight = coefficients if coefficients.dim() == 1 else coefficients[i]
            update = torch.tensordot(weight.detach().to(taus.device), taus, dims=1)
            update = update if masks is None else masks[name] * update
            merged = self.base[name] + update
            own[name].copy_(merged)
            lost += float((own[name].float() - merged).double().square().sum())
            size += float(update.double().square().sum())
        return (lost / size) ** 0.5 if size else 0.0
