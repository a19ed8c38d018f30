"""LoRAMoE's localised balance loss of the last forward, summed over layers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers.adapter import MoSLDAdapter
from ..layers.deferred_grads import KeptTensors, added
from ..layers.stats import last_routing
from ..layers.unbalanced import note_balanced
from ..mixture.gates import apply_gate


def localized_balance_loss(
    model: nn.Module,
    kinds: Tensor | Sequence[int],
    attention_mask: Tensor | None = None,
    *,
    delta: float = 0.1,
    groups: Sequence[int] | None = None,
    recomputed: bool | None = None,
) -> Tensor:
    """LoRAMoE's localised balance loss of the last forward: even within a group of experts, uneven between the groups.

    Z[b, e] = I[b, e] sum_t g[b, t, e], with I = 1 + delta where expert e is of row b's kind and 1 - delta elsewhere.
    The loss of a layer is var(Z) / mean(Z)^2 over all rows and experts, with the unbiased variance, as in the method's
    code. Layers with one expert are left out. Rows are compared as they are: a row with more tokens has larger Z.

    Args:
        model: The adapted model, or one layer.
        kinds: Integers [batch], the kind of task of each row (in the paper 0 and 1: world knowledge, and the others).
        attention_mask: [batch, sequence], nonzero at real tokens. Without it padding counts, as in the method's code.
        delta: In [0, 1); the code's blc_alpha.
        groups: One kind an expert. None makes the first half of each layer's experts 0 and the second half 1. (In the
            code the first half is that of task type 1. Names of kinds mean nothing.)
        recomputed: As in `balance_loss`.

    Returns:
        A scalar that carries gradients for the routers and their inputs, summed over layers.

    Raises:
        ValueError: For a wrong number of kinds or groups and for delta out of range, and as `balance_loss`.
        RuntimeError: As `balance_loss`.

    >>> import torch
    >>> from torch import nn
    >>> from mosld import MoSLDLinear, localized_balance_loss
    >>> layer = MoSLDLinear(6, 5, num_experts=2)
    >>> _ = nn.init.zeros_(layer.router.weight)  # Z is 1.1 for the expert of a row's kind, 0.9 for the other
    >>> _ = layer(torch.randn(2, 2, 6))
    >>> round(localized_balance_loss(layer, kinds=[0, 1]).item(), 4)
    0.0133
    """
    if not 0 <= delta < 1:
        raise ValueError(f"delta must be in [0, 1), got {delta}")
    kinds = torch.as_tensor(kinds)
    if kinds.dim() != 1 or kinds.is_floating_point():
        raise ValueError(f"kinds must be integers [batch], got {kinds.dtype} {list(kinds.shape)}")
    kept = KeptTensors(model, recomputed)
    losses = []
    for name, adapter, call, logits, mask in last_routing(model, attention_mask):
        if adapter.num_experts == 1:
            continue
        if logits.dim() < 2 or len(logits) != len(kinds):
            raise ValueError(f"kinds must be one a row: {name} saw {list(logits.shape[:-1])} tokens, got {len(kinds)}")
        of_expert = _groups(name, adapter.num_experts, groups)
        note_balanced(adapter)
        logits = kept.of(name, call, "router_logits", adapter.router.weight)
        own = kinds.to(logits.device).unsqueeze(1) == of_expert.to(logits.device)  # [batch, E]
        losses.append(_variation(adapter, logits, None if attention_mask is None else mask, own, delta))
    return added(losses, model)


def _groups(name: str, experts: int, groups: Sequence[int] | None) -> Tensor:
    if groups is None:
        return (torch.arange(experts) >= experts // 2).long()
    if len(groups) != experts:
        raise ValueError(f"groups must be one kind an expert: {name} has {experts} experts, got {len(groups)}")
    return torch.as_tensor(groups)


def _variation(adapter: MoSLDAdapter, logits: Tensor, mask: Tensor | None, own: Tensor, delta: float) -> Tensor:
    """logits [batch, ..., E], mask [batch, ...], own bool [batch, E] -> var(Z) / mean(Z)^2"""
    real = None if mask is None else (mask.to(logits.device) != 0).unsqueeze(-1)
    # Set to zero before and after, not multiplied: padding may be NaN.
    gates = apply_gate(adapter, logits if real is None else torch.where(real, logits, 0.0))
    if real is not None:
        gates = torch.where(real, gates, 0.0)
    weights = gates.new_full(own.shape, 1 - delta).masked_fill(own, 1 + delta)
    importance = weights * gates.reshape(len(gates), -1, gates.shape[-1]).sum(1)
    return importance.var() / (importance.mean().square() + torch.finfo(importance.dtype).tiny)  # no token: zero
