"""The formula in plain differentiable torch: the truth for tests (in float64) and the baseline for benchmarks.

    A~ = keep(seed) * A / (1 - p)             [R, D_in]    dropout on the elements of A
    z  = x A~^T                               [T, R]       down
    l  = x Wr^T                               [T, E]       router logits
    g  = softmax over the K largest l         [T, E]       zero elsewhere; ties go to the lower index
    h  = s * g (x) z                          [T, E * R]   mix: h[t, e * R + r] = s * g[t, e] * z[t, r]
    y  = x W0^T + b0 + h B^T                  [T, D_out]   up

With mixing "diagonal" every expert has an A of its own, and only their gates mix them (MoLA, LoRAMoE, MoELoRA):

    A~ and its mask  [E * R, D_in]      z  [T, E * R]      h[t, e * R + r] = s * g[t, e] * z[t, e * R + r]

The first is Eq. 1 to 3 of MoSLD (arXiv 2412.08946) with the down-projection shared: softmax, top-k and renormalisation
together equal the softmax over the K largest logits. `shared_a` is A in both; `.view(E, R, D_in)[e]` is expert e's.

>>> import torch
>>> from mosld_kernels import reference
>>> x, a, b, router = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 3.0]]), torch.zeros(2, 2)
>>> reference.mosld_linear(x, torch.zeros(1, 2), None, a, b, router, top_k=2, scale=1.0)[0]  # (1 + 3) / 2 * (1 + 2)
tensor([[6.]])
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .dropout import draw_keep, drop_elements

MIXINGS = ("expand", "diagonal")  # one A for all experts, or one for each
MOST_MAXIMA = 4  # K up to which K maxima beat a sort
FEWEST_LOGITS = 2048  # below, the number of calls is the cost, and a sort is one call


def top_k_mask(logits: Tensor, top_k: int) -> Tensor:
    """logits [..., E] -> bool [..., E], True at the K largest of each token; equal logits go to the lower index.

    >>> import torch
    >>> from mosld_kernels.reference import top_k_mask
    >>> top_k_mask(torch.tensor([1.0, 3.0, 3.0, 3.0]), top_k=2)
    tensor([False,  True,  True, False])
    """
    # torch.topk leaves the order of equal values open, a stable sort does not.
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order[..., :top_k], True)


def gates_from_logits(logits: Tensor, top_k: int) -> Tensor:
    """logits [..., E] -> gates [..., E]: the softmax over the K largest, exact zeros elsewhere.

    >>> import torch
    >>> from mosld_kernels.reference import gates_from_logits
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
    >>> from mosld_kernels.reference import largest
    >>> largest(torch.tensor([1.0, 3.0, 2.0, 3.0]), top_k=3)
    (tensor([3., 3., 2.]), tensor([1, 3, 2]))
    """
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


def router_dtype(dtype: torch.dtype) -> torch.dtype:
    """Routing is done in float32, or in float64 where x is float64.

    >>> import torch
    >>> from mosld_kernels.reference import router_dtype
    >>> router_dtype(torch.bfloat16), router_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def check_mixing(mixing: object) -> None:
    """raises ValueError for a mixing that the operator does not have.

    >>> from mosld_kernels.reference import check_mixing
    >>> check_mixing("core")
    Traceback (most recent call last):
    ValueError: mixing must be one of expand, diagonal, got 'core'
    """
    if mixing not in MIXINGS:
        raise ValueError(f"mixing must be one of {', '.join(MIXINGS)}, got {mixing!r}")


def expert_rank(rows: int, experts: int, mixing: str) -> int:
    """R, the rank of one expert, where A has `rows` rows: R of them, or E * R with an A for each expert.

    >>> from mosld_kernels.reference import expert_rank
    >>> expert_rank(8, experts=4, mixing="expand"), expert_rank(8, experts=4, mixing="diagonal")
    (8, 2)
    """
    return rows // experts if mixing == "diagonal" else rows


def by_expert(hidden: Tensor, experts: int, mixing: str) -> Tensor:
    """hidden [..., R] -> [..., 1, R], the same for all experts; or hidden [..., E * R] -> [..., E, R], each expert's

    >>> import torch
    >>> from mosld_kernels.reference import by_expert
    >>> hidden = torch.arange(4)
    >>> by_expert(hidden, experts=2, mixing="expand"), by_expert(hidden, experts=2, mixing="diagonal")
    (tensor([[0, 1, 2, 3]]), tensor([[0, 1],
            [2, 3]]))
    """
    if mixing == "diagonal":
        return hidden.unflatten(-1, (experts, expert_rank(hidden.shape[-1], experts, mixing)))
    return hidden.unsqueeze(-2)


def mosld_delta(
    x: Tensor,
    shared_a: Tensor,
    expert_b: Tensor,
    router_weight: Tensor,
    *,
    top_k: int,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    mixing: str = "expand",
) -> tuple[Tensor, Tensor]:
    """The update alone, h B^T, and the router logits. Arguments and shapes as in `mosld_kernels.mosld_delta`.

    >>> import torch
    >>> from mosld_kernels.reference import mosld_delta
    >>> x, shared_a, expert_b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 10.0]])
    >>> router_weight = torch.tensor([[0.0, 0.0], [1.0, 0.0]])  # expert 1 has the larger logit
    >>> mosld_delta(x, shared_a, expert_b, router_weight, top_k=1, scale=2.0)  # 2 * 10 * (1 + 2)
    (tensor([[60.]]), tensor([[0., 1.]]))
    """
    check_mixing(mixing)
    keep = draw_keep(seed, shared_a.shape, dropout_p)
    hidden = F.linear(x, drop_elements(shared_a, keep, dropout_p, x.dtype))
    logits = F.linear(x, router_weight.to(x.dtype)).to(router_dtype(x.dtype))
    gates = gates_from_logits(logits, top_k).to(x.dtype)
    mixed = scale * (gates.unsqueeze(-1) * by_expert(hidden, gates.shape[-1], mixing)).flatten(-2)
    return F.linear(mixed, expert_b.to(x.dtype)), logits


def mosld_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shared_a: Tensor,
    expert_b: Tensor,
    router_weight: Tensor,
    *,
    top_k: int,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "reference",
    mixing: str = "expand",
) -> tuple[Tensor, Tensor]:
    """y and the router logits. Arguments and shapes as in `mosld_kernels.mosld_linear`; `backend` is ignored.

    >>> import torch
    >>> from mosld_kernels.reference import mosld_linear
    >>> x, weight, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([5.0])
    >>> shared_a, expert_b, router_weight = torch.ones(1, 2), torch.tensor([[1.0, 3.0]]), torch.zeros(2, 2)
    >>> mosld_linear(x, weight, bias, shared_a, expert_b, router_weight, top_k=2, scale=1.0)  # 1 + 5 + (1 + 3) / 2 * (1 + 2)
    (tensor([[12.]]), tensor([[0., 0.]]))
    """
    delta, logits = mosld_delta(
        x, shared_a, expert_b, router_weight, top_k=top_k, scale=scale, dropout_p=dropout_p, seed=seed, mixing=mixing
    )
    return F.linear(x, weight, bias) + delta, logits
