"""The adapter in the products' dtype, written once so that no product redraws or recasts it.

    down_weight = [keep * A / (1 - p) ; router_weight]     [Z + E, D_in]
    expert_b    = expert_b                                 [D_out, E * R], written only where its dtype differs

Z, the rows of A, is R; with an A for each expert it is E * R.

One Philox call an element here costs less than one per program of the pass over x, which would read the mask as often
as there are tiles of tokens; and the product that gives dx reads down_weight anyway.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (kernels and their launches are written in Triton's language, whose types a Python checker does not know)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout import threshold, triton_keep
from . import tiles
from .launch import cdiv, on

keep_elements = triton_keep()
BLOCK = 1024


@triton.jit(do_not_specialize=["limit"])
def _prepare_kernel(
    shared_a_ptr, router_ptr, expert_b_ptr, seed_ptr, down_weight_ptr, cast_b_ptr,
    A_SIZE, ROUTER_SIZE, B_SIZE, limit, kept_share, DROPS: tl.constexpr, CASTS_B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # over A, then the router, then B
    if tl.program_id(0) * BLOCK < A_SIZE:  # no other program has elements of A, or draws
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
    and what `down_backward` wants to know of the kept elements of A: here the seed, to draw them again"""
    tiles.check_file()  # here, because this is the first launch of a call
    shared_a, router_weight, expert_b = shared_a.contiguous(), router_weight.contiguous(), expert_b.contiguous()
    casts_b = expert_b.dtype != dtype
    rows, d_in = len(shared_a) + len(router_weight), shared_a.shape[1]
    down_weight = shared_a.new_empty(rows, d_in, dtype=dtype) if needs_down else None
    cast_b = torch.empty_like(expert_b, dtype=dtype) if casts_b else expert_b
    # What is not to be written has size 0 in the launch, and any tensor stands in for it.
    a_size, router_size = (shared_a.numel(), router_weight.numel()) if needs_down else (0, 0)
    b_size = expert_b.numel() if casts_b else 0
    size = a_size + router_size + b_size
    if size:
        with on(shared_a):
            _prepare_kernel[(cdiv(size, BLOCK),)](
                shared_a_ptr=shared_a, router_ptr=router_weight, expert_b_ptr=expert_b,
                seed_ptr=seed if p else shared_a, down_weight_ptr=cast_b if down_weight is None else down_weight,
                cast_b_ptr=cast_b, A_SIZE=a_size, ROUTER_SIZE=router_size, B_SIZE=b_size, limit=threshold(p),
                kept_share=1 - p if p < 1 else 1.0, DROPS=p > 0, CASTS_B=casts_b, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return down_weight, cast_b, seed
