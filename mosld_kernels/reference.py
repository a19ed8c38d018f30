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
Nothing here is shared with what it judges but the checks of arguments, which compute nothing: the mask is drawn from a
Philox of its own, and top-k is a plain sort.

>>> import torch
>>> from mosld_kernels import reference
>>> x, a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 3.0]])
>>> weight, router = torch.zeros(1, 2), torch.zeros(2, 2)
>>> reference.mosld_linear(x, weight, None, a, b, router, top_k=2, scale=1.0)[0]  # (1 + 3) / 2 * (1 + 2)
tensor([[6.]])
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_dropout, check_mixing

WORD = 0xFFFFFFFF  # the low 32 bits


def _words(seed: Tensor, count: int) -> Tensor:
    """int64 [count, 4]: Philox-4x32-10 (Salmon et al., 2011) of the key `seed` and the counters (n, 0, 0, 0)"""
    first_key, second_key = seed & WORD, (seed >> 32) & WORD
    a = torch.arange(count, device=seed.device)
    b, c, d = torch.zeros_like(a), torch.zeros_like(a), torch.zeros_like(a)
    for _ in range(10):
        # Products of two 32-bit words wrap around in int64; shifted and cut to 32 bits, their halves are right anyway.
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = ((right >> 32) & WORD) ^ b ^ first_key, right & WORD
        c, d = ((left >> 32) & WORD) ^ d ^ second_key, left & WORD
        first_key, second_key = (first_key + 0x9E3779B9) & WORD, (second_key + 0xBB67AE85) & WORD
    return torch.stack((a, b, c, d), dim=1)


def _dropped(shared_a: Tensor, seed: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """A~ in `dtype`: element n, row after row, is kept where word n of the stream is at least p * 2^32."""
    words = _words(seed, -(-shared_a.numel() // 4)).flatten()[: shared_a.numel()]
    keep = words.view_as(shared_a) >= round(p * 2**32)
    wide = shared_a.to(torch.promote_types(shared_a.dtype, dtype))
    share = 1 - p if p < 1 else 1.0  # p = 1 keeps nothing
    return (torch.where(keep, wide, 0.0) / share).to(dtype)


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
    check_dropout(dropout_p, seed)
    a = shared_a.to(x.dtype) if seed is None or dropout_p == 0 else _dropped(shared_a, seed, dropout_p, x.dtype)
    z = F.linear(x, a)
    # Routing runs in float32 at least: experts that are close must not tie.
    logits = F.linear(x, router_weight.to(x.dtype)).to(torch.promote_types(x.dtype, torch.float32))
    ordered, experts = logits.sort(dim=-1, descending=True, stable=True)  # stable: ties go to the lower index
    gates = torch.zeros_like(logits).scatter(-1, experts[..., :top_k], ordered[..., :top_k].softmax(-1)).to(x.dtype)
    num_experts, rank = len(router_weight), expert_b.shape[1] // len(router_weight)
    z = z.unflatten(-1, (num_experts, rank)) if mixing == "diagonal" else z.unsqueeze(-2)  # [..., E or 1, R]
    h = scale * (gates.unsqueeze(-1) * z).flatten(-2)
    return F.linear(h, expert_b.to(x.dtype)), logits


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
    """The formula: y = x W0^T + b0 + h B^T. Differentiable in every tensor, in any floating-point dtype.

    Args:
        x: [..., D_in].
        weight: [D_out, D_in], the base layer, in x's dtype.
        bias: [D_out] or None.
        shared_a: [R, D_in], or [E * R, D_in] with mixing "diagonal".
        expert_b: [D_out, E * R].
        router_weight: [E, D_in].
        top_k: experts chosen per token, K in [1, E].
        scale: s = alpha / R.
        dropout_p: probability of dropping an element of A.
        seed: int64 [1], which decides the mask; needed when dropout_p > 0.
        backend: ignored. It is here so that the formula can stand wherever `mosld_kernels.mosld_linear` does.
        mixing: "expand" or "diagonal".

    Returns:
        y [..., D_out] in x's dtype, and the router logits [..., E] in float32 (float64 for float64 x).

    Raises:
        ValueError: for a mixing that does not exist, dropout_p outside [0, 1], or dropout without a valid seed.

    >>> import torch
    >>> from mosld_kernels.reference import mosld_linear
    >>> x, weight, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([5.0])
    >>> shared_a, expert_b, router_weight = torch.ones(1, 2), torch.tensor([[1.0, 3.0]]), torch.zeros(2, 2)
    >>> adapter = shared_a, expert_b, router_weight
    >>> mosld_linear(x, weight, bias, *adapter, top_k=2, scale=1.0)  # 1 + 5 + (1 + 3) / 2 * (1 + 2)
    (tensor([[12.]]), tensor([[0., 0.]]))
    """
    delta, logits = mosld_delta(
        x, shared_a, expert_b, router_weight, top_k=top_k, scale=scale, dropout_p=dropout_p, seed=seed, mixing=mixing
    )
    return F.linear(x, weight, bias) + delta, logits
