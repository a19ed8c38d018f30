"""The steps (down, mix, up and their gradients) as torch products: the path for CPU and for whatever Triton cannot run.

T tokens, D_in and D_out features, R rank, E experts, K chosen. `down_weight` is A with its dropout applied above the
router's weight, [R + E, D_in], so that one pass over x gives both projections. Products run in x's dtype; routing
and everything of size [T, E] or [T, R] runs in float32 (float64 where x is float64) and is rounded once. On a CPU,
mixtures with very many experts take the steps of `grouped` instead of a dense product with [T, E * R].
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import grouped
from .dropout import draw_keep, drop_elements
from .products import mm, mm_sum
from .reference import gates_from_logits, router_dtype

FEW_TOKENS = 512  # up to so many, turning dB around takes longer than the product


def prepare(
    shared_a: Tensor,
    router_weight: Tensor,
    expert_b: Tensor,
    seed: Tensor | None,
    p: float,
    dtype: torch.dtype,
    needs_down: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """shared_a [R, D_in], router_weight [E, D_in], expert_b [D_out, E * R], seed int64 [1]
    -> down_weight [R + E, D_in] where it is needed, expert_b [D_out, E * R], both in `dtype`;
    and what `down_backward` wants to know of the kept elements of A: here the mask itself"""
    keep = draw_keep(seed, shared_a.shape, p)
    down_weight = None
    if needs_down:
        down_weight = torch.cat((drop_elements(shared_a, keep, p, dtype), router_weight.to(dtype)))
    return down_weight, expert_b.to(dtype), keep


def down(
    x: Tensor, down_weight: Tensor, rank: int, top_k: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | grouped.Rows]:
    """x [T, D_in], down_weight [R + E, D_in]
    -> hidden [T, R], logits [T, E], gates [T, E], and what `up` takes: mixed [T, E * R], or its rows sorted by expert"""
    projected = mm(x, down_weight.t())
    hidden = projected[:, :rank].contiguous()
    logits = projected[:, rank:].to(router_dtype(x.dtype), copy=True, memory_format=torch.contiguous_format)
    gates = gates_from_logits(logits, top_k)
    return hidden, logits, gates, mix(hidden, gates, top_k, scale)


def mix(hidden: Tensor, gates: Tensor, top_k: int, scale: float) -> Tensor | grouped.Rows:
    """hidden [T, R], gates [T, E] -> scale * gate * hidden, rounded once: [T, E * R], or its rows sorted by expert"""
    if grouped.pays(hidden, gates.shape[1], top_k):
        return grouped.mix(hidden, gates, top_k, scale)
    return ((scale * gates).unsqueeze(2) * hidden.unsqueeze(1)).flatten(1).to(hidden.dtype)


def up(x: Tensor, weight: Tensor | None, bias: Tensor | None, mixed: Tensor | grouped.Rows, expert_b: Tensor) -> Tensor:
    """x [T, D_in], weight [D_out, D_in], bias [D_out], mixed as `mix` returned it, expert_b [D_out, E * R]
    -> out [T, D_out]: the base product and the update, the update alone without a weight"""
    if isinstance(mixed, Tensor):
        update = (mixed, expert_b.t())
        return mm(*update, bias) if weight is None else mm_sum((x, weight.t()), update, bias, as_frozen=True)
    out = x.new_zeros(len(x), len(expert_b)) if weight is None else F.linear(x, weight, bias)
    return grouped.add_up(out, mixed, expert_b)


def up_backward(
    dout: Tensor,
    expert_b: Tensor,
    hidden: Tensor,
    gates: Tensor,
    dlogits: Tensor | None,
    top_k: int,
    scale: float,
) -> Tensor:
    """dout [T, D_out], expert_b [D_out, E * R], hidden [T, R], gates [T, E], dlogits [T, E] or None
    -> dprojected [T, R + E] = [dhidden | dlogits] in dout's dtype"""
    if grouped.pays(hidden, gates.shape[1], top_k):
        dhidden, drouted = grouped.up_backward(dout, expert_b, hidden, gates, top_k, scale)
    else:
        u = mm(dout, expert_b).to(gates.dtype).view(*gates.shape, hidden.shape[1])  # [T, E, R]
        # Batched products rather than sums of products: nothing more of size [T, E * R] is written and read.
        dgates = scale * torch.bmm(u, hidden.to(gates.dtype).unsqueeze(2)).squeeze(2)
        dhidden = torch.bmm((scale * gates).unsqueeze(1), u).squeeze(1)
        # Zero where the gate is zero, so the experts not chosen need no index.
        drouted = gates * (dgates - (gates * dgates).sum(1, keepdim=True))
    if dlogits is not None:
        drouted = drouted + dlogits
    return torch.cat((dhidden, drouted), dim=1).to(dout.dtype)


def grad_expert_b(dout: Tensor, hidden: Tensor, gates: Tensor, top_k: int, scale: float, dtype: torch.dtype) -> Tensor:
    """dout [T, D_out], hidden [T, R], gates [T, E] -> dexpert_b [D_out, E * R] in `dtype`"""
    mixed = mix(hidden, gates, top_k, scale)
    if not isinstance(mixed, Tensor):
        return grouped.grad_expert_b(dout, mixed, gates.shape[1], dtype)
    if dout.shape[0] <= FEW_TOKENS:
        return mm(dout.t(), mixed).to(dtype)
    # mixed^T dout walks dout in memory order; dout^T mixed takes twice as long in float32.
    return mm(mixed.t(), dout).t().contiguous().to(dtype)


def down_backward(
    dprojected: Tensor, x: Tensor, keep: Tensor | None, p: float, rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dprojected [T, R + E], x [T, D_in], keep as `prepare` returned it
    -> dshared_a [R, D_in], drouter_weight [E, D_in], both in `dtype`"""
    ddown = mm(dprojected.t(), x)  # [R + E, D_in]
    # Copies, so that the two gradients share no storage: an optimiser or a collective may work on each in place.
    da = ddown[:rank].clone() if keep is None else ddown[:rank]  # dropping copies by itself
    return drop_elements(da, keep, p, dtype), ddown[rank:].to(dtype, copy=True)


def grad_x(dout: Tensor, weight: Tensor | None, dprojected: Tensor, down_weight: Tensor) -> Tensor:
    """dout [T, D_out], weight [D_out, D_in], dprojected [T, R + E], down_weight [R + E, D_in] -> dx [T, D_in]"""
    update = (dprojected, down_weight)
    return mm(*update) if weight is None else mm_sum((dout, weight), update)
