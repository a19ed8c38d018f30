"""What the operator must return, written without it: once as loops, once with a bound on the rounding of every number.

    A~ = keep * A / (1 - p)     z = x A~^T     l = x Wr^T     g = softmax over the K largest l, ties to the lower index
    y  = x W0^T + b0 + s sum_e g_e B_e z (z_e where every expert has an A)

`loops` is differentiable and slow, one token and one expert at a time. `balls` has the derivatives by hand, and
`test_formula.py` compares the two. Gates are those of the logits that were returned, which are judged by themselves: so
which of two almost equal logits is the larger is not in doubt, and saturated gates are not excused by rounded logits.
"""

import torch
from torch import Tensor

from mosld_kernels import keep_mask
from mosld_kernels.autograd import Inputs, Settings
from mosld_kernels.precision import router_dtype
from tests.hardening.properties.balls import Ball, ball, exact, least, plus, product, rounded, times, total, unit

GRADIENTS = ("x", "weight", "bias", "shared_a", "expert_b", "router_weight")  # in the order of Inputs


def largest(logits: list[float], top_k: int) -> list[int]:
    return sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:top_k]


def loops(inputs: Inputs, settings: Settings, logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [T, D_in], all in float64 -> y [T, D_out], logits [T, E]; experts are chosen by `logits` where given"""
    x, weight, bias, shared_a, expert_b, router_weight, seed = inputs
    top_k, scale, p, _, mixing = settings
    experts, d_out = len(router_weight), len(expert_b)
    rank = expert_b.shape[1] // experts
    if p:
        keep = keep_mask(seed, shared_a.shape, p)
        shared_a = torch.stack(
            [torch.stack([a / (1 - p) if k else a * 0 for a, k in zip(*row, strict=True)])
             for row in zip(shared_a, keep, strict=True)]
        )  # fmt: skip
    outs, routed = [], []
    for token in x:
        own = torch.stack([row.dot(token) for row in router_weight])
        chosen = largest((own if logits is None else logits[len(outs)]).tolist(), top_k)
        powers = {e: (own[e] - own[chosen[0]]).exp() for e in chosen}
        y = token.new_zeros(d_out) if weight is None else torch.stack([row.dot(token) for row in weight])
        if bias is not None:
            y = y + bias
        for e in chosen:
            first = e * rank if mixing == "diagonal" else 0
            for r in range(rank):
                gate = powers[e] / sum(powers.values())
                y = y + scale * gate * shared_a[first + r].dot(token) * expert_b[:, e * rank + r]
        outs.append(y)
        routed.append(own)
    empty = x.sum() * 0
    return (torch.stack(outs) if outs else empty.expand(0, d_out)), (
        torch.stack(routed) if routed else empty.expand(0, experts)
    )


def balls(
    inputs: Inputs,
    settings: Settings,
    logits: Tensor,
    dout: Tensor | None,
    dlogits: Tensor | Ball | None,
    in_pieces: bool = False,
) -> dict[str, Ball]:
    """inputs as the operator got them, x flattened; logits [T, E] as it returned them; dout [T, D_out], None for zeros

    in_pieces: whether products are put together from products of parts, each rounded to x's dtype.
    -> y, logits and the gradients dx, dweight, ... as balls for what the operator computes in x's dtype
    """
    dtype, kept = inputs.x.dtype, inputs.shared_a.dtype
    routed = router_dtype(dtype)
    _, _, _, shared_a, expert_b, router_weight, seed = inputs
    top_k, scale, p, _, mixing = settings
    tokens, experts = logits.shape
    rank = expert_b.shape[1] // experts

    def stored(tensor: Tensor) -> Ball:
        return rounded(exact(tensor), dtype) if tensor.dtype != dtype else exact(tensor)

    def dropped(a: Ball, into: torch.dtype) -> Ball:
        """keep * a / (1 - p), a ball of exact zeros where an element is dropped"""
        if not p:
            return rounded(a, into)
        keep = keep_mask(seed, shared_a.shape, p).double()
        share = 1 - p if p < 1 else 1.0
        a = rounded(Ball(a.mid / share, a.rad / share), torch.promote_types(routed, into), times=2)
        return Ball(torch.where(keep > 0, a.mid, 0.0), torch.where(keep > 0, rounded(a, into).rad, 0.0))

    def multiplied(*factors: Ball, bias: Ball | None = None) -> Ball:
        return product(*factors, dtype=dtype, bias=bias, in_pieces=in_pieces)

    x, b, wr = stored(inputs.x), stored(expert_b), stored(router_weight)
    a = dropped(exact(shared_a), dtype) if p else stored(shared_a)
    z = multiplied(x, a.mT)  # [T, R or E * R]
    g = softmax(logits, top_k, routed)  # [T, E]
    s = ball(torch.tensor(float(scale), dtype=torch.float64), abs(scale) * unit(routed))
    sg = rounded(times(g, s), routed)
    by_expert = z.view(tokens, experts if mixing == "diagonal" else 1, rank)
    h = rounded(rounded(times(sg.view(tokens, experts, 1), by_expert), routed, times=2), dtype)
    h = h.view(tokens, experts * rank)
    base = () if inputs.weight is None else (x, exact(inputs.weight).mT)
    bias = None if inputs.bias is None else exact(inputs.bias)
    result = {"logits": multiplied(x, wr.mT), "y": multiplied(h, b.mT, *base, bias=bias)}

    dy = ball(torch.zeros(tokens, len(expert_b), dtype=torch.float64)) if dout is None else exact(dout)
    u = multiplied(dy, b).view(tokens, experts, rank)
    uz = rounded(times(u, by_expert), routed, times=2)
    dg = rounded(times(rounded(total(uz, 2, dtype), routed), s), routed)
    dz = rounded(times(u, sg.view(tokens, experts, 1)), routed, times=2)
    if mixing == "expand":
        dz = total(dz, 1, dtype)
    dz = rounded(dz, dtype, times=2).view(tokens, len(shared_a))
    dl = through_softmax(g, dg, top_k, routed)
    if dlogits is not None:
        dl = rounded(plus(dl, exact(dlogits) if isinstance(dlogits, Tensor) else dlogits), routed)
    dl = rounded(dl, dtype)
    base = () if inputs.weight is None else (dy, exact(inputs.weight))
    result["dx"] = multiplied(dz, a, dl, wr, *base)
    if inputs.weight is not None:
        result["dweight"] = multiplied(dy.mT, x)
    if inputs.bias is not None:
        result["dbias"] = rounded(total(dy, 0, dtype), dtype)
    result["dshared_a"] = dropped(multiplied(dz.mT, x), kept)
    result["dexpert_b"] = rounded(multiplied(dy.mT, h), kept)
    result["drouter_weight"] = rounded(multiplied(dl.mT, x), kept)
    return result


def softmax(logits: Tensor, top_k: int, dtype: torch.dtype) -> Ball:
    """logits [T, E] -> the softmax over the K largest of each token; exact zeros elsewhere, exact ones where K is 1"""
    mid, rad = torch.zeros(logits.shape, dtype=torch.float64), torch.zeros(logits.shape, dtype=torch.float64)
    for t, row in enumerate(logits.double().tolist()):
        if any(logit != logit or logit == float("inf") for logit in row):
            rad[t] = torch.inf
            continue
        chosen = largest(row, top_k)
        below = torch.tensor([row[e] - row[chosen[0]] for e in chosen], dtype=torch.float64)
        gates = below.exp() / below.exp().sum()
        mid[t, chosen] = gates
        # The difference to the largest, its exponential (within four units), the sum and the quotient.
        relative = (below.abs() + top_k + 6) * (unit(dtype) + unit(torch.float64))
        rad[t, chosen] = (gates * relative.nan_to_num(0.0) + least(dtype)) if top_k > 1 else 0.0
    return ball(mid, rad)


def through_softmax(g: Ball, dg: Ball, top_k: int, dtype: torch.dtype) -> Ball:
    """g * (dg - sum_j g_j dg_j), zero where only one expert is chosen"""
    mean = total(rounded(times(g, dg), dtype), 1, dtype).view(len(g.mid), 1)
    apart = rounded(plus(dg, Ball(-mean.mid, mean.rad)), dtype, times=2)
    if top_k == 1:
        return ball(torch.zeros_like(g.mid), torch.where(apart.known & g.known, 0.0, torch.inf))
    return rounded(times(g, apart), dtype)
