"""The steps (down, mix, up and their gradients) as torch products: the CPU path.

T tokens, D_in and D_out features, R rank, E experts, K chosen. `down_weight` is A with its dropout applied above the
router's weight, [R + E, D_in], so that one pass over x gives both projections. Products run in x's dtype; routing
and everything of size [T, E] or [T, R] runs in float32 (float64 where x is float64) and is rounded once.
"""

import torch
from torch import Tensor

from .reference import gates_from_logits, router_dtype


def stack_down(dropped_a: Tensor, router_weight: Tensor) -> Tensor:
    """dropped_a [R, D_in], router_weight [E, D_in] -> down_weight [R + E, D_in] in dropped_a's dtype"""
    return torch.cat((dropped_a, router_weight.to(dropped_a.dtype)))


def down(x: Tensor, down_weight: Tensor, rank: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, D_in], down_weight [R + E, D_in] -> hidden [T, R], logits [T, E], gates [T, E]"""
    projected = torch.mm(x, down_weight.t())
    hidden = projected[:, :rank].contiguous()
    logits = projected[:, rank:].to(router_dtype(x.dtype), copy=True, memory_format=torch.contiguous_format)
    return hidden, logits, gates_from_logits(logits, top_k)


def mix(hidden: Tensor, gates: Tensor, scale: float) -> Tensor:
    """hidden [T, R], gates [T, E] -> mixed [T, E * R]: scale * gate * hidden, rounded once"""
    return ((scale * gates).unsqueeze(2) * hidden.unsqueeze(1)).flatten(1).to(hidden.dtype)


def up(mixed: Tensor, expert_b: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """mixed [T, E * R], expert_b [D_out, E * R] -> out [T, D_out], with the base product where there is a weight"""
    expert_b = expert_b.to(mixed.dtype)
    out = torch.mm(mixed, expert_b.t()) if bias is None else torch.addmm(bias, mixed, expert_b.t())
    # The base product accumulates onto the stored update: adding the update afterwards costs two more passes over out.
    return out if weight is None else out.addmm_(x, weight.t())


def mix_backward(dmixed: Tensor, hidden: Tensor, gates: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """dmixed [T, E * R], hidden [T, R], gates [T, E] -> dhidden [T, R], dlogits [T, E]"""
    dmixed = dmixed.to(gates.dtype).view(*gates.shape, hidden.shape[1])  # [T, E, R]
    # Batched products rather than sums of products: nothing more of size [T, E * R] is written and read.
    dgates = scale * torch.bmm(dmixed, hidden.to(gates.dtype).unsqueeze(2)).squeeze(2)
    dhidden = torch.bmm((scale * gates).unsqueeze(1), dmixed).squeeze(1)
    # Zero where the gate is zero, so the experts not chosen need no index.
    dlogits = gates * (dgates - (gates * dgates).sum(1, keepdim=True))
    return dhidden, dlogits


def grad_expert_b(dout: Tensor, mixed: Tensor) -> Tensor:
    """dout [T, D_out], mixed [T, E * R] -> dexpert_b [D_out, E * R]"""
    # mixed^T dout walks dout in memory order; dout^T mixed takes twice as long in float32.
    return torch.mm(mixed.t(), dout).t().contiguous()


def down_backward(dhidden: Tensor, dlogits: Tensor, dtype: torch.dtype) -> Tensor:
    """dhidden [T, R], dlogits [T, E] -> dprojected [T, R + E] in `dtype`"""
    return torch.cat((dhidden, dlogits), dim=1).to(dtype)


def grad_x(dprojected: Tensor, down_weight: Tensor, dout: Tensor, weight: Tensor | None) -> Tensor:
    """dprojected [T, R + E], down_weight [R + E, D_in], dout [T, D_out], weight [D_out, D_in] -> dx [T, D_in]"""
    dx = torch.mm(dprojected, down_weight)
    return dx if weight is None else dx.addmm_(dout, weight)
