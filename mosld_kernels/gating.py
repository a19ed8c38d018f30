"""From router logits to gates. All act on the last dimension, differentiably, with static shapes.

`gates_from_logits`, the softmax over the K largest logits, is the fused operator's and tuned for long batches on a CPU;
`reference` has the same in plain words, and tests compare the two.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_MAXIMA = 4  # K up to which K maxima beat a sort
FEWEST_LOGITS = 2048  # below, the number of calls is the cost, and a sort is one call


def top_k_mask(logits: Tensor, top_k: int) -> Tensor:
    """logits [..., E] -> bool [..., E], True at the K largest of each token; equal logits go to the lower index.

    >>> import torch
    >>> from mosld_kernels.gating import top_k_mask
    >>> top_k_mask(torch.tensor([1.0, 3.0, 3.0, 3.0]), top_k=2)
    tensor([False,  True,  True, False])
    """
    # torch.topk leaves the order of equal values open, a stable sort does not.
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order[..., :top_k], True)


def gates_from_logits(logits: Tensor, top_k: int) -> Tensor:
    """logits [..., E] -> gates [..., E]: the softmax over the K largest, exact zeros elsewhere.

    >>> import torch
    >>> from mosld_kernels.gating import gates_from_logits
    >>> gates_from_logits(torch.tensor([1.0, 3.0, 0.0, 3.0]), top_k=2)
    tensor([0.0000, 0.5000, 0.0000, 0.5000])
    """
    if top_k == logits.shape[-1]:
        return _softmax(logits).contiguous()
    values, chosen = largest(logits, top_k)
    # Added, not stored: a token with K - 1 finite logits may have an index twice, the second time with gate zero.
    # In place, because on CPU fresh memory costs more than what is done with it.
    return torch.zeros_like(logits, memory_format=torch.contiguous_format).scatter_add_(-1, chosen, _softmax(values))


def _softmax(logits: Tensor) -> Tensor:
    """Over the last dimension, run along the tokens: on CPU ten times faster than along a handful of experts."""
    if logits.numel() < FEWEST_LOGITS:
        return logits.softmax(dim=-1)
    return logits.movedim(-1, 0).softmax(dim=0).movedim(0, -1)


def largest(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """logits [..., E] -> the K largest [..., K] and their indices; equal logits go to the lower index.

    >>> import torch
    >>> from mosld_kernels.gating import largest
    >>> largest(torch.tensor([1.0, 3.0, 2.0, 3.0]), top_k=3)
    (tensor([3., 3., 2.]), tensor([1, 3, 2]))
    """
    if torch.onnx.is_in_onnx_export():  # which has no stable sort, and whose TopK gives equal values to the lower index
        return logits.topk(top_k, dim=-1)
    if top_k > MOST_MAXIMA or logits.numel() < FEWEST_LOGITS:
        values, chosen = logits.sort(dim=-1, descending=True, stable=True)
        return values[..., :top_k], chosen[..., :top_k]
    # torch.max promises the first of equal values. K maxima take a third of a sort's time at E = 8, a sixth at 64.
    left, values, chosen = logits, [], []
    for place in range(top_k):
        if place:
            left = left.scatter(-1, chosen[-1], float("-inf"))
        value, index = left.max(dim=-1, keepdim=True)
        values.append(value)
        chosen.append(index)
    return torch.cat(values, dim=-1), torch.cat(chosen, dim=-1)


def top_p_gates(logits: Tensor, p: float, renormalise: bool = True) -> Tensor:
    """logits [..., E] -> gates [..., E]: the fewest experts whose probabilities reach p, renormalised; 0 < p <= 1.

    The most probable expert is always chosen; equal ones go to the lower index.
    renormalise: False leaves their probabilities as they are, and takes the fewest that exceed p: MixLoRA's code.
    """
    probability = logits.softmax(-1)
    ordered, index = probability.sort(dim=-1, descending=True, stable=True)
    reached = ordered.cumsum(-1)
    # What the more probable ones have reached; in the code's order of rounding where it is to be the code's.
    before = reached - ordered if renormalise else F.pad(reached[..., :-1], (1, 0))
    wanted = before < p if renormalise else before <= p
    chosen = torch.zeros_like(probability, dtype=torch.bool).scatter(-1, index, wanted)
    kept = torch.where(chosen, probability, 0.0)
    return kept / kept.sum(-1, keepdim=True) if renormalise else kept


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
