"""One pass over x: z = x A~^T and l = x Wr^T together, then top-k, softmax and mix while both are in registers.

    hidden [T, Z]    logits [T, E]    gates [T, E]    mixed[t, e * R + r] = scale * gates[t, e] * hidden[t, r]

Z, the rows of A, is R; with an A for each expert (DIAGONAL) it is E * R, and hidden[t, e * R + r] stands in the last
formula. With few tokens there are too few programs to fill the chip: then D_in is split into planes, each program
writes its partial sums to its own plane in float32, and a second kernel adds the planes in order and finishes.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (kernels and their launches are written in Triton's language, whose types a Python checker does not know)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..limits import diagonal_columns, padded
from .launch import cdiv, on, precision, split_k_for, tile_for


@triton.jit
def _route(
    hidden, logits, t, T, hidden_ptr, logits_ptr, gates_ptr, mixed_ptr, scale,
    Z: tl.constexpr, E: tl.constexpr, DIAGONAL: tl.constexpr, TOP_K: tl.constexpr,
    Z_PAD: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    """hidden [BLOCK_T, Z_PAD], logits [BLOCK_T, E_PAD], t int64 [BLOCK_T] -> stores all four results"""
    z, e = tl.arange(0, Z_PAD), tl.arange(0, E_PAD)
    mask_t, mask_e = t[:, None] < T, (t[:, None] < T) & (e[None, :] < E)
    tl.store(logits_ptr + t[:, None] * E + e[None, :], logits, mask=mask_e)

    logits = tl.where(e[None, :] < E, logits, float("-inf"))
    if TOP_K < E:
        left = logits
        for _ in range(TOP_K):
            best = tl.argmax(left, axis=1, tie_break_left=True)  # equal logits go to the lower index
            left = tl.where(e[None, :] == best[:, None], float("-inf"), left)
        logits = tl.where(left == logits, float("-inf"), logits)  # what was not taken; NaN stays, as it should
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    gates = weights / tl.sum(weights, axis=1)[:, None]
    tl.store(gates_ptr + t[:, None] * E + e[None, :], gates, mask=mask_e)

    # From here on z is what is saved for backward, so that mixed can be made again bit for bit.
    hidden = hidden.to(hidden_ptr.dtype.element_ty)
    mask_z = mask_t & (z[None, :] < Z)
    tl.store(hidden_ptr + t[:, None] * Z + z[None, :], hidden, mask=mask_z)
    if DIAGONAL:
        spread = tl.zeros(hidden.shape, tl.float32)  # each column's gate
        for expert in range(E):
            gate = scale * tl.sum(tl.where(e[None, :] == expert, gates, 0.0), axis=1)
            spread = tl.where(z[None, :] // (Z // E) == expert, gate[:, None], spread)
        tl.store(mixed_ptr + t[:, None] * Z + z[None, :], spread * hidden.to(tl.float32), mask=mask_z)
    else:
        for expert in range(E):
            gate = scale * tl.sum(tl.where(e[None, :] == expert, gates, 0.0), axis=1)
            columns = expert * Z + z[None, :]
            tl.store(mixed_ptr + t[:, None] * (E * Z) + columns, gate[:, None] * hidden.to(tl.float32), mask=mask_z)


@triton.jit(do_not_specialize=["T"])
def _down_kernel(
    x_ptr, down_weight_ptr, hidden_ptr, logits_ptr, gates_ptr, mixed_ptr, planes_ptr,
    T, D_IN, stride_x_t, stride_x_d, scale, span, PLANES: tl.constexpr,
    Z: tl.constexpr, E: tl.constexpr, DIAGONAL: tl.constexpr, TOP_K: tl.constexpr,
    Z_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (i, plane) projects BLOCK_T tokens over `span` input features."""
    first_t, first_d = tl.program_id(0).to(tl.int64) * BLOCK_T, tl.program_id(1) * span
    dt, dd = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    z, e = tl.arange(0, Z_PAD), tl.arange(0, E_PAD)
    # 64-bit offsets: T * D_in may pass 2^31, and so may one tile's share of a view whose rows lie far apart.
    x_tile = x_ptr + (first_t + dt)[:, None] * stride_x_t + (first_d + dd)[None, :].to(tl.int64) * stride_x_d
    a_tile = down_weight_ptr + first_d + z[None, :] * D_IN + dd[:, None]
    router_tile = down_weight_ptr + Z * D_IN + first_d + e[None, :] * D_IN + dd[:, None]
    mask_t, mask_z, mask_e = first_t + dt[:, None] < T, z[None, :] < Z, e[None, :] < E

    hidden = tl.zeros((BLOCK_T, Z_PAD), tl.float32)
    logits = tl.zeros((BLOCK_T, E_PAD), tl.float32)
    for d in range(first_d, min(first_d + span, D_IN), BLOCK_D):
        x = tl.load(x_tile, mask=mask_t & (d + dd[None, :] < D_IN), other=0.0)
        a = tl.load(a_tile, mask=mask_z & (d + dd[:, None] < D_IN), other=0.0)
        router = tl.load(router_tile, mask=mask_e & (d + dd[:, None] < D_IN), other=0.0)
        hidden = tl.dot(x, a, hidden, input_precision=PRECISION)
        logits = tl.dot(x, router, logits, input_precision=PRECISION)
        x_tile += tl.cast(stride_x_d, tl.int64) * BLOCK_D
        a_tile += BLOCK_D
        router_tile += BLOCK_D

    t = first_t + dt
    if PLANES == 1:
        _route(
            hidden, logits, t, T, hidden_ptr, logits_ptr, gates_ptr, mixed_ptr, scale,
            Z, E, DIAGONAL, TOP_K, Z_PAD, E_PAD,
        )  # fmt: skip
    else:
        row = planes_ptr + (tl.program_id(1).to(tl.int64) * T + t[:, None]) * (Z + E)
        tl.store(row + z[None, :], hidden, mask=mask_t & mask_z)
        tl.store(row + Z + e[None, :], logits, mask=mask_t & mask_e)


@triton.jit(do_not_specialize=["T"])
def _down_sum_kernel(
    planes_ptr, hidden_ptr, logits_ptr, gates_ptr, mixed_ptr, T, scale, PLANES: tl.constexpr,
    Z: tl.constexpr, E: tl.constexpr, DIAGONAL: tl.constexpr, TOP_K: tl.constexpr,
    Z_PAD: tl.constexpr, E_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Adds the planes in order, then routes."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    z, e = tl.arange(0, Z_PAD), tl.arange(0, E_PAD)
    hidden = tl.zeros((BLOCK_T, Z_PAD), tl.float32)
    logits = tl.zeros((BLOCK_T, E_PAD), tl.float32)
    for plane in range(PLANES):
        row = planes_ptr + (tl.cast(plane, tl.int64) * T + t[:, None]) * (Z + E)
        hidden += tl.load(row + z[None, :], mask=(t[:, None] < T) & (z[None, :] < Z), other=0.0)
        logits += tl.load(row + Z + e[None, :], mask=(t[:, None] < T) & (e[None, :] < E), other=0.0)
    _route(
        hidden, logits, t, T, hidden_ptr, logits_ptr, gates_ptr, mixed_ptr, scale, Z, E, DIAGONAL, TOP_K, Z_PAD, E_PAD
    )


def down(
    x: Tensor, down_weight: Tensor, rows: int, top_k: int, scale: float, mixing: str = "expand"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, D_in], down_weight [Z + E, D_in], rows = Z
    -> hidden [T, Z], logits [T, E], gates [T, E], mixed [T, E * R]"""
    (tokens, d_in), experts, diagonal = x.shape, len(down_weight) - rows, mixing == "diagonal"
    hidden = x.new_empty(tokens, rows)
    logits = x.new_empty(tokens, experts, dtype=torch.float32)
    gates = torch.empty_like(logits)
    mixed = x.new_empty(tokens, rows if diagonal else experts * rows)
    held = (diagonal_columns(rows // experts, experts) if diagonal else rows) + experts
    tile = tile_for("down", tokens, d_in, 0, held, x)
    steps = cdiv(d_in, tile.features)
    split_k = split_k_for(tile.blocks(tokens), steps, x)
    partial = x.new_empty(split_k, tokens, rows + experts, dtype=torch.float32) if split_k > 1 else logits
    stride_x_t, stride_x_d = x.stride()
    # What both kernels are given alike.
    shared = dict(
        hidden_ptr=hidden, logits_ptr=logits, gates_ptr=gates, mixed_ptr=mixed, planes_ptr=partial,
        T=tokens, scale=scale, PLANES=split_k, Z=rows, E=experts, DIAGONAL=diagonal, TOP_K=top_k,
        Z_PAD=padded(rows, 16), E_PAD=padded(experts, 16),
    )  # fmt: skip
    with on(x):
        _down_kernel[(cdiv(tokens, tile.tokens), split_k)](
            x_ptr=x, down_weight_ptr=down_weight, D_IN=d_in, stride_x_t=stride_x_t, stride_x_d=stride_x_d,
            span=cdiv(steps, split_k) * tile.features, BLOCK_T=tile.tokens, BLOCK_D=tile.features,
            PRECISION=precision(), **shared, **tile.options(),
        )  # fmt: skip
        if split_k > 1:
            block_t = 16
            _down_sum_kernel[(cdiv(tokens, block_t),)](BLOCK_T=block_t, num_warps=4, **shared)
    return hidden, logits, gates, mixed
