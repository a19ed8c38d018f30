"""Sums over tokens, left^T right, for the adapter's gradients; one kernel serves both.

    dB            = dout^T mixed            [D_out, E * R]    mixed is made again from hidden and gates, in registers
    [dA~ | dWr]^T = x^T dprojected          [D_in, Z + E]     dA = keep * dA~ / (1 - p), drawn again from the seed

Z, the rows of A and the columns of hidden, is R, or with an A for each expert (DIAGONAL) E * R.

The features of `left` are the rows of a program's tile, so that the tensor cores get a tall operand however small the
rank is. When the features alone give too few programs, the tokens are split into planes: each program writes its
partial sums to its own plane in float32, and a second kernel adds the planes in order and finishes.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (kernels and their launches are written in Triton's language, whose types a Python checker does not know)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout import threshold, triton_keep
from ..limits import padded
from ..packing import expert_rank
from .experts import expert_blocks, expert_columns, held_columns
from .launch import cdiv, on, precision, split_k_for, tile_for

keep_elements = triton_keep()


@triton.jit
def _store(
    grad, f, columns, exists, F, C: tl.constexpr, b_or_a_ptr, router_ptr, seed_ptr, limit, kept_share,
    Z: tl.constexpr, EXPANDS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    """grad [BLOCK_F, BLOCK_C], f [BLOCK_F] -> stores dB [F, C], or dA [Z, F] with its dropout and drouter [C - Z, F]"""
    mask = (f[:, None] < F) & exists[None, :]
    if EXPANDS:
        tl.store(b_or_a_ptr + f[:, None].to(tl.int64) * C + columns[None, :], grad, mask=mask)
    else:
        n = columns[None, :].to(tl.int64) * F + f[:, None]
        in_a = columns[None, :] < Z
        tl.store(router_ptr + n - Z * F, grad, mask=mask & (columns[None, :] >= Z))
        if DROPS:
            grad = tl.where(keep_elements(tl.load(seed_ptr), n, limit), tl.div_rn(grad, kept_share), 0.0)
        tl.store(b_or_a_ptr + n, grad, mask=mask & in_a)


@triton.jit(do_not_specialize=["T", "span", "limit"])
def _gram_kernel(
    left_ptr, right_ptr, gates_ptr, b_or_a_ptr, router_ptr, planes_ptr, seed_ptr,
    T, F, stride_left_t, stride_left_f, scale, span, limit, kept_share, PLANES: tl.constexpr,
    R: tl.constexpr, E: tl.constexpr, R_PAD: tl.constexpr, E_BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
    EXPANDS: tl.constexpr, DIAGONAL: tl.constexpr, DROPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (j, i, plane) sums over `span` tokens for BLOCK_F features of left and BLOCK_C columns of right.

    Columns come first: programs that read the same tiles of left run side by side and share them in the L2 cache.
    """
    Z: tl.constexpr = E * R if DIAGONAL else R
    C: tl.constexpr = E * R if EXPANDS else Z + E
    first_f, first_t = tl.program_id(1) * BLOCK_F, tl.program_id(2).to(tl.int64) * span
    df, dt = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_T)
    if EXPANDS:
        first_expert = tl.program_id(0) * E_BLOCK
        columns, exists = expert_columns(first_expert, R, E, R_PAD, E_BLOCK)
        e, r = first_expert + tl.arange(0, E_BLOCK), tl.arange(0, R_PAD)
    else:
        columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
        exists = columns < C
    left_tile = left_ptr + (first_f + df)[:, None].to(tl.int64) * stride_left_f  # 64-bit offsets, as in down
    left_tile += (first_t + dt)[None, :] * stride_left_t
    mask_f = first_f + df[:, None] < F

    grad = tl.zeros((BLOCK_F, BLOCK_C), tl.float32)
    last_t = min(first_t + span, T)
    for start in range(first_t, last_t, BLOCK_T):
        t = start + dt
        left = tl.load(left_tile, mask=mask_f & (t[None, :] < last_t), other=0.0)  # [BLOCK_F, BLOCK_T]
        if EXPANDS:
            mask_t = t[:, None] < last_t
            if DIAGONAL:
                offsets = t[:, None] * Z + columns[None, :]
                hidden = tl.load(right_ptr + offsets, mask=mask_t & exists[None, :], other=0.0)
            else:
                hidden = tl.load(right_ptr + t[:, None] * R + r[None, :], mask=mask_t & (r[None, :] < R), other=0.0)
            gates = tl.load(gates_ptr + t[:, None] * E + e[None, :], mask=mask_t & (e[None, :] < E), other=0.0)
            if DIAGONAL:
                mixed = (scale * gates)[:, :, None] * tl.reshape(hidden, (BLOCK_T, E_BLOCK, R_PAD)).to(tl.float32)
            else:
                mixed = (scale * gates)[:, :, None] * hidden.to(tl.float32)[:, None, :]
            right = tl.reshape(mixed.to(left.dtype), (BLOCK_T, BLOCK_C))
        else:
            offsets = t[:, None] * C + columns[None, :]
            right = tl.load(right_ptr + offsets, mask=(t[:, None] < last_t) & exists[None, :], other=0.0)
        grad = tl.dot(left, right, grad, input_precision=PRECISION)
        left_tile += tl.cast(stride_left_t, tl.int64) * BLOCK_T

    f = first_f + df
    if PLANES == 1:
        _store(grad, f, columns, exists, F, C, b_or_a_ptr, router_ptr, seed_ptr, limit, kept_share, Z, EXPANDS, DROPS)
    else:
        row = (tl.program_id(2) * F + f[:, None]).to(tl.int64) * C
        tl.store(planes_ptr + row + columns[None, :], grad, mask=mask_f & exists[None, :])


@triton.jit(do_not_specialize=["limit"])
def _gram_sum_kernel(
    planes_ptr, b_or_a_ptr, router_ptr, seed_ptr, F, limit, kept_share, PLANES: tl.constexpr,
    C: tl.constexpr, Z: tl.constexpr, EXPANDS: tl.constexpr, DROPS: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds the planes in order, then stores."""
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = columns < C
    grad = tl.zeros((BLOCK_F, BLOCK_C), tl.float32)
    for plane in range(PLANES):
        row = (plane * F + f[:, None]).to(tl.int64) * C
        grad += tl.load(planes_ptr + row + columns[None, :], mask=(f[:, None] < F) & exists[None, :], other=0.0)
    _store(grad, f, columns, exists, F, C, b_or_a_ptr, router_ptr, seed_ptr, limit, kept_share, Z, EXPANDS, DROPS)


def _gram(
    left: Tensor,
    right: Tensor,
    gates: Tensor | None,
    grads: tuple[Tensor, Tensor],
    rank: int,
    experts: int,
    *,
    diagonal: bool = False,
    scale: float = 1.0,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> None:
    """left [T, F]; right is hidden [T, Z] beside gates [T, E], or dprojected [T, Z + E]; fills `grads`."""
    (tokens, features), expands = left.shape, gates is not None
    rows = experts * rank if diagonal else rank
    columns = experts * rank if expands else rows + experts
    if expands:
        tile = tile_for("grad_expert_b", tokens, 0, features, held_columns(rank, experts, diagonal), left)
        rank_padded, e_block, column_blocks = expert_blocks(rank, experts, tile.columns, diagonal)
        block_c = rank_padded * e_block
    else:
        tile = tile_for("grad_down", tokens, features, 0, columns, left)
        rank_padded, e_block, block_c = 1, 1, min(padded(columns, 16), tile.columns)
        column_blocks = cdiv(columns, block_c)
    feature_blocks, steps = cdiv(features, tile.features), cdiv(tokens, tile.tokens)
    split_k = split_k_for(feature_blocks * column_blocks, tile.blocks(tokens), left)
    partial = left.new_empty(split_k, features, columns, dtype=torch.float32) if split_k > 1 else left
    stride_left_t, stride_left_f = left.stride()
    b_or_a, router = grads
    # What both kernels are given alike. Where nothing is dropped, `left` stands in for the seed.
    shared = dict(
        b_or_a_ptr=b_or_a, router_ptr=router, planes_ptr=partial, seed_ptr=seed if p and seed is not None else left,
        F=features, limit=threshold(p), kept_share=1 - p if p < 1 else 1.0, PLANES=split_k,
        EXPANDS=expands, DROPS=p > 0,
    )  # fmt: skip
    with on(left):
        _gram_kernel[(column_blocks, feature_blocks, split_k)](
            left_ptr=left, right_ptr=right, gates_ptr=gates if expands else right,
            T=tokens, stride_left_t=stride_left_t, stride_left_f=stride_left_f, scale=scale,
            span=cdiv(steps, split_k) * tile.tokens, R=rank, E=experts, R_PAD=rank_padded, E_BLOCK=e_block,
            BLOCK_C=block_c, DIAGONAL=diagonal, BLOCK_T=tile.tokens, BLOCK_F=tile.features, PRECISION=precision(),
            **shared, **tile.options(),
        )  # fmt: skip
        if split_k > 1:
            block_f, block_c = 64, 16
            _gram_sum_kernel[(cdiv(features, block_f), cdiv(columns, block_c))](
                C=columns, Z=rows, BLOCK_F=block_f, BLOCK_C=block_c, num_warps=4, **shared
            )


def grad_expert_b(
    dout: Tensor,
    hidden: Tensor,
    gates: Tensor,
    top_k: int,
    scale: float,
    dtype: torch.dtype,
    mixing: str = "expand",
) -> Tensor:
    """dout [T, D_out], hidden [T, Z], gates [T, E] -> dexpert_b [D_out, E * R] in `dtype`. Dense, whatever top_k is."""
    experts = gates.shape[1]
    rank = expert_rank(hidden.shape[1], experts, mixing)
    grad = dout.new_empty(dout.shape[1], experts * rank, dtype=dtype)
    _gram(dout, hidden, gates, (grad, grad), rank, experts, diagonal=mixing == "diagonal", scale=scale)
    return grad


def down_backward(
    dprojected: Tensor, x: Tensor, keep: Tensor | None, p: float, rows: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dprojected [T, Z + E], x [T, D_in], keep as `prepare` returned it, rows = Z
    -> dshared_a [Z, D_in], drouter_weight [E, D_in], both in `dtype`"""
    features, experts = x.shape[1], dprojected.shape[1] - rows
    dshared_a = x.new_empty(rows, features, dtype=dtype)
    drouter = x.new_empty(experts, features, dtype=dtype)
    _gram(x, dprojected, None, (dshared_a, drouter), rows, experts, seed=keep, p=p)  # to the sum a row of A is a row
    return dshared_a, drouter
