"""One pass over dout: u = dout B stays in registers, and what leaves is dprojected = [dhidden | dlogits].

    dgates_e = scale * <u_e, hidden>        dhidden = scale * sum_e gates_e u_e
    dlogits  = gates * (dgates - sum_e gates_e dgates_e), plus what arrives for the logits

Where u [BLOCK_T, E, R] does not fit the registers, the same program goes over blocks of experts one after the other
and reads its rows of dout again for each: by then the arithmetic takes longer than the reading.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (kernels and their launches are written in Triton's language, whose types a Python checker does not know)

import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, on, padded, precision, tile_for


@triton.jit
def _expert_columns(first_expert, R: tl.constexpr, E: tl.constexpr, R_PAD: tl.constexpr, E_BLOCK: tl.constexpr):
    """-> columns [E_BLOCK * R_PAD] of a packed [., E * R] matrix that hold E_BLOCK experts, and which of them exist.

    Padding the rank inside each expert lets a tile [., E_BLOCK * R_PAD] be viewed as [., E_BLOCK, R_PAD].
    """
    c = tl.arange(0, E_BLOCK * R_PAD)
    if R == R_PAD:  # said apart, so that the compiler sees neighbours and loads them together
        columns = first_expert * R + c
        return columns, columns < E * R
    e, r = first_expert + c // R_PAD, c % R_PAD
    return e * R + r, (e < E) & (r < R)


@triton.jit
def _up_backward_kernel(
    dout_ptr, expert_b_ptr, hidden_ptr, gates_ptr, dlogits_ptr, dprojected_ptr,
    T, D_OUT, scale, R: tl.constexpr, E: tl.constexpr, R_PAD: tl.constexpr, E_BLOCK: tl.constexpr,
    E_BLOCKS: tl.constexpr, HAS_DLOGITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    first_t = tl.program_id(0).to(tl.int64) * BLOCK_T
    dt, do, r = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_O), tl.arange(0, R_PAD)
    t = first_t + dt
    mask_t, mask_r = t[:, None] < T, (t[:, None] < T) & (r[None, :] < R)
    hidden = tl.load(hidden_ptr + t[:, None] * R + r[None, :], mask=mask_r, other=0.0).to(tl.float32)
    dhidden = tl.zeros((BLOCK_T, R_PAD), tl.float32)
    block, in_block = tl.arange(0, E_BLOCKS)[:, None], tl.arange(0, E_BLOCK)[None, :]
    dgates = tl.zeros((BLOCK_T, E_BLOCKS, E_BLOCK), tl.float32)

    for b in range(E_BLOCKS):
        columns, exists = _expert_columns(b * E_BLOCK, R, E, R_PAD, E_BLOCK)
        dout_tile = dout_ptr + first_t * D_OUT + dt[:, None] * D_OUT + do[None, :]
        b_tile = expert_b_ptr + do[:, None] * (E * R) + columns[None, :]
        u = tl.zeros((BLOCK_T, E_BLOCK * R_PAD), tl.float32)
        for o in range(0, D_OUT, BLOCK_O):
            dout = tl.load(dout_tile, mask=mask_t & (o + do[None, :] < D_OUT), other=0.0)
            expert_b = tl.load(b_tile, mask=exists[None, :] & (o + do[:, None] < D_OUT), other=0.0)
            u = tl.dot(dout, expert_b, u, input_precision=PRECISION)
            dout_tile += BLOCK_O
            b_tile += BLOCK_O * (E * R)
        u = tl.reshape(u, (BLOCK_T, E_BLOCK, R_PAD))
        e = b * E_BLOCK + tl.arange(0, E_BLOCK)
        gates = tl.load(gates_ptr + t[:, None] * E + e[None, :], mask=mask_t & (e[None, :] < E), other=0.0)
        dhidden += tl.sum(u * (scale * gates)[:, :, None], axis=1)
        dgate = scale * tl.sum(u * hidden[:, None, :], axis=2)  # [BLOCK_T, E_BLOCK]
        dgates = tl.where((block == b)[None, :, :], dgate[:, None, :], dgates)

    e = block * E_BLOCK + in_block  # [E_BLOCKS, E_BLOCK]
    mask_e = (t[:, None, None] < T) & (e < E)[None, :, :]
    gates = tl.load(gates_ptr + t[:, None, None] * E + e[None, :, :], mask=mask_e, other=0.0)
    mean = tl.sum(tl.sum(gates * dgates, axis=2), axis=1)
    dlogits = gates * (dgates - mean[:, None, None])  # zero where the gate is zero: no index of the chosen is needed
    if HAS_DLOGITS:
        dlogits += tl.load(dlogits_ptr + t[:, None, None] * E + e[None, :, :], mask=mask_e, other=0.0)
    tl.store(dprojected_ptr + t[:, None] * (R + E) + r[None, :], dhidden, mask=mask_r)
    tl.store(dprojected_ptr + t[:, None, None] * (R + E) + R + e[None, :, :], dlogits, mask=mask_e)


def expert_block(rank: int, experts: int, columns: int) -> tuple[int, int, int]:
    """-> R_PAD, experts in one tile of `columns` columns, and how many such tiles cover all experts"""
    rank_padded = padded(rank, 16)
    block = min(padded(experts), max(1, columns // rank_padded))
    return rank_padded, block, cdiv(padded(experts), block)


def up_backward(
    dout: Tensor, expert_b: Tensor, hidden: Tensor, gates: Tensor, dlogits: Tensor | None, scale: float
) -> Tensor:
    """dout [T, D_out], expert_b [D_out, E * R], hidden [T, R], gates [T, E], dlogits [T, E] or None
    -> dprojected [T, R + E] = [dhidden | dlogits] in dout's dtype"""
    (tokens, d_out), rank, experts = dout.shape, hidden.shape[1], gates.shape[1]
    dprojected = dout.new_empty(tokens, rank + experts)
    tile = tile_for("up_backward", tokens, 0, d_out, experts * rank, dout)
    with on(dout):
        _up_backward_kernel[(cdiv(tokens, tile.tokens),)](
            dout, expert_b, hidden, gates, gates if dlogits is None else dlogits.contiguous(), dprojected,
            tokens, d_out, scale, rank, experts, *expert_block(rank, experts, tile.columns), dlogits is not None,
            tile.tokens, tile.features, precision(), **tile.options(),
        )  # fmt: skip
    return dprojected
