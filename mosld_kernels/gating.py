"""From router logits to gates. All act on the last dimension, differentiably, with static shapes.

The softmax over the K largest logits, which the fused operator computes, is `reference.gates_from_logits`.
"""

import torch
from torch import Tensor


def top_p_gates(logits: Tensor, p: float) -> Tensor:
    """logits [..., E] -> gates [..., E]: the fewest experts whose probabilities reach p, renormalised; 0 < p <= 1.

    The most probable expert is always chosen; equal ones go to the lower index.
    """
    probability = logits.softmax(-1)
    ordered, index = probability.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # what the more probable ones have reached
    chosen = torch.zeros_like(probability, dtype=torch.bool).scatter(-1, index, before < p)
    kept = torch.where(chosen, probability, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def grouped_softmax(logits: Tensor, groups: int) -> Tensor:
    """logits [..., G * E] -> gates [..., G, E]: a softmax over each group's E neighbours"""
    return logits.unflatten(-1, (groups, -1)).softmax(-1)


def selection(logits: Tensor, count: int, straight_through: bool) -> Tensor:
    """logits [..., E] -> [..., count, E]: row q is 1 at the q-th largest logit and 0 elsewhere.

    straight_through: backward treats each row as the softmax over all logits; without it no gradient goes through.
    """
    index = logits.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    # Not one_hot, which looks for the largest index on the host.
    hard = torch.zeros(*index.shape, logits.shape[-1], dtype=logits.dtype, device=logits.device)
    hard = hard.scatter(-1, index.unsqueeze(-1), 1.0)
    if not straight_through:
        return hard
    soft = logits.softmax(-1).unsqueeze(-2)
    return hard + (soft - soft.detach())
