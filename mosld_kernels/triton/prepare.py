"""The adapter in the products' dtype, written once so that no product redraws or recasts it.

    down_weight = [keep * A / (1 - p) ; router_weight]     [R + E, D_in]
    expert_b    = expert_b                                 [D_out, E * R], written only where its dtype differs

One Philox call an element here costs less than one per program of the pass over x, which would read the mask as often
as there are tiles of tokens; and the product that gives dx reads down_weight anyway.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout import threshold, triton_keep
from .launch import on

keep_elements = triton_keep()
BLOCK = 1024


@triton.jit
def _prepare_kernel(
    shared_a_ptr, router_ptr, expert_b_ptr, seed_ptr, down_weight_ptr, cast_b_ptr,
    A_SIZE, ROUTER_SIZE, B_SIZE, limit, kept_share, DROPS: tl.constexpr, CASTS_B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # over A, then the router, then B
    in_a = n < A_SIZE
    a = tl.load(shared_a_ptr + n, mask=in_a, other=0.0).to(tl.float32)
    if DROPS:
        a = tl.where(keep_elements(tl.load(seed_ptr), n, limit), tl.div_rn(a, kept_share), 0.0)
    tl.store(down_weight_ptr + n, a, mask=in_a)
    m = n - A_SIZE
    in_router = (m >= 0) & (m < ROUTER_SIZE)
    tl.store(down_weight_ptr + n, tl.load(router_ptr + m, mask=in_router, other=0.0).to(tl.float32), mask=in_router)
    if CASTS_B:
        m -= ROUTER_SIZE
        in_b = (m >= 0) & (m < B_SIZE)
        tl.store(cast_b_ptr + m, tl.load(expert_b_ptr + m, mask=in_b, other=0.0).to(tl.float32), mask=in_b)


def prepare(
    shared_a: Tensor, router_weight: Tensor, expert_b: Tensor | None, seed: Tensor | None, p: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """shared_a [R, D_in], router_weight [E, D_in], expert_b [D_out, E * R] or None, seed int64 [1]
    -> down_weight [R + E, D_in], expert_b [D_out, E * R], both in `dtype`"""
    casts = expert_b is not None and expert_b.dtype != dtype
    down_weight = shared_a.new_empty(len(shared_a) + len(router_weight), shared_a.shape[1], dtype=dtype)
    cast_b = torch.empty_like(expert_b, dtype=dtype, memory_format=torch.contiguous_format) if casts else expert_b
    sizes = shared_a.numel(), router_weight.numel(), expert_b.numel() if casts else 0
    with on(shared_a):
        _prepare_kernel[(triton.cdiv(sum(sizes), BLOCK),)](
            shared_a.contiguous(), router_weight.contiguous(), expert_b.contiguous() if casts else shared_a,
            seed if p else shared_a, down_weight, cast_b if casts else down_weight,
            *sizes, threshold(p), 1 - p if p < 1 else 1.0, DROPS=p > 0, CASTS_B=casts, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return down_weight, cast_b
