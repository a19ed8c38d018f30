"""The steps (down, mix, up and their gradients) as torch products: the path for CPU and for whatever Triton cannot run.

T tokens, D_in and D_out features, R rank, E experts, K chosen, Z columns of `hidden`, one a row of A: Z is R with
mixing "expand" (one A for all experts) and E * R with "diagonal" (one for each). `down_weight` is A with its dropout
applied above the router's weight, [Z + E, D_in], so that one pass over x gives both projections. Products run in x's
dtype; routing and everything of size [T, E] or [T, R] runs in float32 (float64 where x is float64) and is rounded once.
On a CPU, mixtures with very many experts take the steps of `grouped` instead of a dense product with [T, E * R].
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import grouped
from .dropout import draw_keep, drop_elements
from .gating import gates_from_logits
from .packing import by_expert
from .precision import router_dtype
from .products import dense_up, grad_x, mm

__all__ = ["down", "down_backward", "grad_expert_b", "grad_x", "mix", "prepare", "up", "up_backward"]
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
    """shared_a [Z, D_in], router_weight [E, D_in], expert_b [D_out, E * R], seed int64 [1]
    -> down_weight [Z + E, D_in] where it is needed, expert_b [D_out, E * R], both in `dtype`;
    and what `down_backward` wants to know of the kept elements of A: here the mask itself"""
    keep = draw_keep(seed, shared_a.shape, p)
    down_weight = None
    if needs_down:
        down_weight = torch.cat((drop_elements(shared_a, keep, p, dtype), router_weight.to(dtype)))
    return down_weight, expert_b.to(dtype), keep


def down(
    x: Tensor, down_weight: Tensor, rows: int, top_k: int, scale: float, mixing: str = "expand"
) -> tuple[Tensor, Tensor, Tensor, Tensor | grouped.Rows]:
    """x [T, D_in], down_weight [Z + E, D_in], rows = Z -> hidden [T, Z], logits [T, E], gates [T, E],
    and what `up` takes: mixed [T, E * R], or its rows sorted by expert"""
    projected = mm(x, down_weight.t())
    hidden = projected[:, :rows].contiguous()
    logits = projected[:, rows:].to(router_dtype(x.dtype), copy=True, memory_format=torch.contiguous_format)
    gates = gates_from_logits(logits, top_k)
    return hidden, logits, gates, mix(hidden, gates, top_k, scale, mixing)


def mix(hidden: Tensor, gates: Tensor, top_k: int, scale: float, mixing: str) -> Tensor | grouped.Rows:
    """hidden [T, Z], gates [T, E] -> scale * gate * hidden, rounded once: [T, E * R], or its rows sorted by expert"""
    experts = gates.shape[1]
    if grouped.faster_than_dense(hidden, experts, top_k, mixing):
        return grouped.mix(hidden, gates, top_k, scale)
    return ((scale * gates).unsqueeze(2) * by_expert(hidden, experts, mixing)).flatten(1).to(hidden.dtype)


def up(x: Tensor, weight: Tensor | None, bias: Tensor | None, mixed: Tensor | grouped.Rows, expert_b: Tensor) -> Tensor:
    """x [T, D_in], weight [D_out, D_in], bias [D_out], mixed as `mix` returned it, expert_b [D_out, E * R]
    -> out [T, D_out]: the base product and the update, the update alone without a weight"""
    if isinstance(mixed, Tensor):
        return dense_up(x, weight, bias, mixed, expert_b)
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
    mixing: str = "expand",
) -> Tensor:
    """dout [T, D_out], expert_b [D_out, E * R], hidden [T, Z], gates [T, E], dlogits [T, E] or None
    -> dprojected [T, Z + E] = [dhidden | dlogits] in dout's dtype"""
    experts = gates.shape[1]
    if grouped.faster_than_dense(hidden, experts, top_k, mixing):
        dhidden, drouted = grouped.up_backward(dout, expert_b, hidden, gates, top_k, scale)
    else:
        u = mm(dout, expert_b).to(gates.dtype).view(*gates.shape, expert_b.shape[1] // experts)  # [T, E, R]
        if mixing == "diagonal":
            dgates = scale * (u * by_expert(hidden, experts, mixing)).sum(2)
            dhidden = u.mul_((scale * gates).unsqueeze(2)).flatten(1)
        else:
            # Batched products rather than sums of products: nothing more of size [T, E * R] is written and read.
            dgates = scale * torch.bmm(u, hidden.to(gates.dtype).unsqueeze(2)).squeeze(2)
            dhidden = torch.bmm((scale * gates).unsqueeze(1), u).squeeze(1)
        # Zero where the gate is zero, so the experts not chosen need no index.
        drouted = gates * (dgates - (gates * dgates).sum(1, keepdim=True))
    if dlogits is not None:
        drouted = drouted + dlogits
    return torch.cat((dhidden, drouted), dim=1).to(dout.dtype)


def grad_expert_b(
    dout: Tensor,
    hidden: Tensor,
    gates: Tensor,
    top_k: int,
    scale: float,
    dtype: torch.dtype,
    mixing: str = "expand",
) -> Tensor:
    """dout [T, D_out], hidden [T, Z], gates [T, E] -> dexpert_b [D_out, E * R] in `dtype`"""
    mixed = mix(hidden, gates, top_k, scale, mixing)
    if not isinstance(mixed, Tensor):
        return grouped.grad_expert_b(dout, mixed, gates.shape[1], dtype)
    if dout.shape[0] <= FEW_TOKENS:
        return mm(dout.t(), mixed).to(dtype)
    # mixed^T dout walks dout in memory order; dout^T mixed takes twice as long in float32.
    return mm(mixed.t(), dout).t().contiguous().to(dtype)


def down_backward(
    dprojected: Tensor, x: Tensor, keep: Tensor | None, p: float, rows: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dprojected [T, Z + E], x [T, D_in], keep as `prepare` returned it, rows = Z
    -> dshared_a [Z, D_in], drouter_weight [E, D_in], both in `dtype`"""
    ddown = mm(dprojected.t(), x)  # [Z + E, D_in]
    # Copies, so that the two gradients share no storage: an optimiser or a collective may work on each in place.
    da = ddown[:rows].clone() if keep is None else ddown[:rows]  # dropping copies by itself
    return drop_elements(da, keep, p, dtype), ddown[rows:].to(dtype, copy=True)
