"""One pass over dout: u = dout B stays in registers, and what leaves is dprojected = [dhidden | dlogits].

    dgates_e = scale * <u_e, hidden>        dhidden = scale * sum_e gates_e u_e
    dlogits  = gates * (dgates - sum_e gates_e dgates_e), plus what arrives for the logits

With an A for each expert (DIAGONAL) hidden and dhidden are [T, E * R], dgates_e = scale * <u_e, hidden_e>, dhidden_e =
scale * gates_e u_e: nothing is summed over experts, and dhidden is stored as soon as its block of experts is done.

Where u [BLOCK_T, E, R] does not fit the registers, the same program goes over blocks of experts one after the other
and reads its rows of dout again for each: by then the arithmetic takes longer than the reading. dhidden and dgates are
linear in u, so that with few tokens D_out is split into planes of these two, added in order by a second kernel.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (kernels and their launches are written in Triton's language, whose types a Python checker does not know)

import triton
import triton.language as tl
from torch import Tensor, float32

from ..limits import padded
from ..packing import expert_rank
from ..products import dense_up as up  # a product of torch's library here as well
from .experts import expert_blocks, expert_columns, held_columns
from .launch import cdiv, on, precision, split_k_for, tile_for

__all__ = ["up", "up_backward"]


@triton.jit
def _finish(
    dhidden, dgates, e, t, T, gates_ptr, dlogits_ptr, dprojected_ptr, Z: tl.constexpr, E: tl.constexpr,
    Z_PAD: tl.constexpr, HAS_DHIDDEN: tl.constexpr, HAS_DLOGITS: tl.constexpr,
):  # fmt: skip
    """dhidden [BLOCK_T, Z_PAD], dgates [BLOCK_T, I, J] for experts e [I, J], t int64 [BLOCK_T] -> stores dprojected"""
    z = tl.arange(0, Z_PAD)
    mask_e = (t[:, None, None] < T) & (e < E)[None, :, :]
    gates = tl.load(gates_ptr + t[:, None, None] * E + e[None, :, :], mask=mask_e, other=0.0)
    mean = tl.sum(tl.sum(gates * dgates, axis=2), axis=1)
    dlogits = gates * (dgates - mean[:, None, None])  # zero where the gate is zero: no index of the chosen is needed
    if HAS_DLOGITS:
        dlogits += tl.load(dlogits_ptr + t[:, None, None] * E + e[None, :, :], mask=mask_e, other=0.0)
    row = dprojected_ptr + t[:, None] * (Z + E)
    if HAS_DHIDDEN:
        tl.store(row + z[None, :], dhidden, mask=(t[:, None] < T) & (z[None, :] < Z))
    tl.store(row[:, :, None] + Z + e[None, :, :], dlogits, mask=mask_e)


@triton.jit(do_not_specialize=["T"])
def _up_backward_kernel(
    dout_ptr, expert_b_ptr, hidden_ptr, gates_ptr, dlogits_ptr, dprojected_ptr, planes_ptr,
    T, D_OUT, scale, span, PLANES: tl.constexpr, R: tl.constexpr, E: tl.constexpr, R_PAD: tl.constexpr,
    E_BLOCK: tl.constexpr, E_BLOCKS: tl.constexpr, E_BLOCKS_PAD: tl.constexpr,
    DIAGONAL: tl.constexpr, HAS_DLOGITS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, plane) sums over `span` output features for BLOCK_T tokens."""
    Z: tl.constexpr = E * R if DIAGONAL else R
    first_t, first_o = tl.program_id(0).to(tl.int64) * BLOCK_T, tl.program_id(1) * span
    dt, do, r = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_O), tl.arange(0, R_PAD)
    t = first_t + dt
    mask_t, mask_r = t[:, None] < T, (t[:, None] < T) & (r[None, :] < R)
    if not DIAGONAL:
        hidden = tl.load(hidden_ptr + t[:, None] * R + r[None, :], mask=mask_r, other=0.0).to(tl.float32)
    dhidden = tl.zeros((BLOCK_T, R_PAD), tl.float32)
    block, in_block = tl.arange(0, E_BLOCKS_PAD)[:, None], tl.arange(0, E_BLOCK)[None, :]
    dgates = tl.zeros((BLOCK_T, E_BLOCKS_PAD, E_BLOCK), tl.float32)

    for b in range(E_BLOCKS):
        columns, exists = expert_columns(b * E_BLOCK, R, E, R_PAD, E_BLOCK)
        dout_tile = dout_ptr + first_t * D_OUT + first_o + dt[:, None] * D_OUT + do[None, :]
        b_tile = expert_b_ptr + (first_o + do)[:, None] * (E * R) + columns[None, :]
        u = tl.zeros((BLOCK_T, E_BLOCK * R_PAD), tl.float32)
        for o in range(first_o, min(first_o + span, D_OUT), BLOCK_O):
            dout = tl.load(dout_tile, mask=mask_t & (o + do[None, :] < D_OUT), other=0.0)
            expert_b = tl.load(b_tile, mask=exists[None, :] & (o + do[:, None] < D_OUT), other=0.0)
            u = tl.dot(dout, expert_b, u, input_precision=PRECISION)
            dout_tile += BLOCK_O
            b_tile += BLOCK_O * (E * R)
        u = tl.reshape(u, (BLOCK_T, E_BLOCK, R_PAD))
        e = b * E_BLOCK + tl.arange(0, E_BLOCK)
        gates = tl.load(gates_ptr + t[:, None] * E + e[None, :], mask=mask_t & (e[None, :] < E), other=0.0)
        if DIAGONAL:
            mask_c = mask_t & exists[None, :]
            hidden = tl.load(hidden_ptr + t[:, None] * Z + columns[None, :], mask=mask_c, other=0.0)
            dgate = scale * tl.sum(u * tl.reshape(hidden, (BLOCK_T, E_BLOCK, R_PAD)).to(tl.float32), axis=2)
            u = tl.reshape(u * (scale * gates)[:, :, None], (BLOCK_T, E_BLOCK * R_PAD))
            if PLANES == 1:
                row = dprojected_ptr + t[:, None] * (Z + E)
            else:
                row = planes_ptr + (tl.program_id(1).to(tl.int64) * T + t[:, None]) * (Z + E)
            tl.store(row + columns[None, :], u, mask=mask_c)
        else:
            dhidden += tl.sum(u * (scale * gates)[:, :, None], axis=1)
            dgate = scale * tl.sum(u * hidden[:, None, :], axis=2)  # [BLOCK_T, E_BLOCK]
        dgates = tl.where((block == b)[None, :, :], dgate[:, None, :], dgates)

    e = block * E_BLOCK + in_block  # [E_BLOCKS_PAD, E_BLOCK]
    if PLANES == 1:
        _finish(
            dhidden, dgates, e, t, T, gates_ptr, dlogits_ptr, dprojected_ptr, Z, E, R_PAD, not DIAGONAL, HAS_DLOGITS
        )
    else:
        row = planes_ptr + (tl.program_id(1).to(tl.int64) * T + t[:, None]) * (Z + E)
        if not DIAGONAL:
            tl.store(row + r[None, :], dhidden, mask=mask_r)
        tl.store(row[:, :, None] + Z + e[None, :, :], dgates, mask=(t[:, None, None] < T) & (e < E)[None, :, :])


@triton.jit(do_not_specialize=["T"])
def _up_backward_sum_kernel(
    planes_ptr, gates_ptr, dlogits_ptr, dprojected_ptr, T, PLANES: tl.constexpr, Z: tl.constexpr, E: tl.constexpr,
    Z_PAD: tl.constexpr, E_PAD: tl.constexpr, HAS_DLOGITS: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Adds the planes in order, then finishes."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    z, e = tl.arange(0, Z_PAD), tl.arange(0, E_PAD)
    dhidden = tl.zeros((BLOCK_T, Z_PAD), tl.float32)
    dgates = tl.zeros((BLOCK_T, E_PAD), tl.float32)
    for plane in range(PLANES):
        row = planes_ptr + (tl.cast(plane, tl.int64) * T + t[:, None]) * (Z + E)
        dhidden += tl.load(row + z[None, :], mask=(t[:, None] < T) & (z[None, :] < Z), other=0.0)
        dgates += tl.load(row + Z + e[None, :], mask=(t[:, None] < T) & (e[None, :] < E), other=0.0)
    _finish(
        dhidden, dgates[:, None, :], e[None, :], t, T, gates_ptr, dlogits_ptr, dprojected_ptr,
        Z, E, Z_PAD, True, HAS_DLOGITS,
    )  # fmt: skip


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
    -> dprojected [T, Z + E] = [dhidden | dlogits] in dout's dtype. Dense over the experts, whatever top_k is."""
    (tokens, d_out), rows, experts = dout.shape, hidden.shape[1], gates.shape[1]
    rank, diagonal = expert_rank(rows, experts, mixing), mixing == "diagonal"
    dprojected = dout.new_empty(tokens, rows + experts)
    tile = tile_for("up_backward", tokens, 0, d_out, held_columns(rank, experts, diagonal), dout)
    columns = expert_blocks(rank, experts, tile.columns, diagonal)
    steps = cdiv(d_out, tile.features)
    split_k = split_k_for(tile.blocks(tokens), steps, dout)
    partial = dout.new_empty(split_k, tokens, rows + experts, dtype=float32) if split_k > 1 else gates
    # A kernel that does not look at a tensor still wants one in its place: gates stand in.
    has_dlogits = dlogits is not None
    dlogits = gates if dlogits is None else dlogits.contiguous()
    with on(dout):
        _up_backward_kernel[(cdiv(tokens, tile.tokens), split_k)](
            dout_ptr=dout, expert_b_ptr=expert_b, hidden_ptr=hidden, gates_ptr=gates, dlogits_ptr=dlogits,
            dprojected_ptr=dprojected, planes_ptr=partial,
            T=tokens, D_OUT=d_out, scale=scale, span=cdiv(steps, split_k) * tile.features, PLANES=split_k,
            R=rank, E=experts, R_PAD=columns.rank_padded,
            E_BLOCK=columns.experts, E_BLOCKS=columns.blocks, E_BLOCKS_PAD=padded(columns.blocks),
            DIAGONAL=diagonal, HAS_DLOGITS=has_dlogits,
            BLOCK_T=tile.tokens, BLOCK_O=tile.features, PRECISION=precision(), **tile.options(),
        )  # fmt: skip
        if split_k > 1:
            block_t = 16
            _up_backward_sum_kernel[(cdiv(tokens, block_t),)](
                planes_ptr=partial, gates_ptr=gates, dlogits_ptr=dlogits, dprojected_ptr=dprojected,
                T=tokens, PLANES=split_k, Z=rows, E=experts, Z_PAD=padded(rows, 16), E_PAD=padded(experts, 16),
                HAS_DLOGITS=has_dlogits, BLOCK_T=block_t, num_warps=4, maxnreg=128,
            )  # fmt: skip
    return dprojected
