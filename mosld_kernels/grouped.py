"""The experts' products over tokens sorted by expert, on a CPU: for mixtures whose dense product is mostly zeros.

Each pair of a token and an expert it chose has a row. The rows of one expert lie together, in blocks of `ROWS`, the
last of them padded; so every block has one expert, and T K / ROWS + E blocks are enough whatever was chosen.

    rows  = s g_e z of each pair, zeros in padding     [N, ROWS, R]
    h B^T = the sum over a token's K pairs of rows B_e^T
    u_e   = dout B_e of each pair                      dB_e = the sum over its blocks of dout^T rows

Nothing of size [T, K, D_out] is held: D_out is walked in slices whose rows stay in the cache.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .products import bmm

ROWS = 32  # of a block
SLICE_BYTES = 4 << 20  # of what is gathered for one slice of D_out
LEAST_SLICE = 64  # features
# What sorting, gathering and adding up cost for a row, as columns of a dense product; measured in
# docs/design/decisions.md.
ROW_COLUMNS = {torch.float64: 96, torch.float32: 96, torch.bfloat16: 112, torch.float16: 112}


class Plan(NamedTuple):
    """Which rows belong to whom, for N blocks."""

    gates: Tensor  # [T, K], of the chosen experts
    chosen: Tensor  # [T, K], the experts
    place: Tensor  # [T, K], the row of each pair
    token: Tensor  # [N * ROWS], the token of each row; padding says 0
    expert: Tensor  # [N], the expert of each block


class Rows(NamedTuple):
    """`mixed` without its zeros: what a dense path holds as [T, E * R]."""

    plan: Plan
    rows: Tensor  # [N, ROWS, R]


def faster_than_dense(hidden: Tensor, experts: int, top_k: int, mixing: str = "expand") -> bool:
    """Whether sorting beats a dense product for hidden [T, R]: decided by sizes, so it is the same in backward.

    Never with an A for each expert, whose dense products with A are as wide as those with B: not built.
    """
    tokens, rank = hidden.shape
    if mixing != "expand":
        return False
    if hidden.device.type != "cpu" or (hidden.dtype == torch.bfloat16 and _has_matrix_unit()):
        return False
    rows = tokens * top_k + ROWS * experts
    return tokens * experts * rank > rows * (rank + ROW_COLUMNS[hidden.dtype])


@functools.cache
def _has_matrix_unit() -> bool:
    """AMX multiplies bfloat16 so fast that memory is the cost, and zeros are free."""
    is_supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return is_supported is not None and is_supported()


def plan(gates: Tensor, top_k: int) -> Plan:
    """gates [T, E], at most K of a token's nonzero"""
    tokens, experts = gates.shape
    kept, chosen = gates.topk(top_k, dim=1, sorted=False)
    expert, pair = chosen.flatten().sort(stable=True)
    pairs = torch.zeros(experts, dtype=torch.int64, device=gates.device).scatter_add_(
        0, expert, torch.ones_like(expert)
    )
    # An expert's blocks begin where those of the expert before it end, so its rows move up by the padding so far.
    blocks = (pairs + ROWS - 1) // ROWS
    last = blocks.cumsum(0)
    shift = (last - blocks) * ROWS - (pairs.cumsum(0) - pairs)  # of an expert's rows against its sorted pairs
    row = torch.arange(len(expert), device=gates.device) + shift[expert]
    place = torch.empty_like(row).scatter_(0, pair, row)
    # As many blocks as any choice can need, so that no size depends on values; the last expert has those left over.
    count = -(-tokens * top_k // ROWS) + experts
    token = torch.zeros(count * ROWS, dtype=torch.int64, device=gates.device).scatter_(0, row, pair // top_k)
    of_block = torch.searchsorted(last, torch.arange(count, device=gates.device), right=True).clamp_(max=experts - 1)
    return Plan(kept, chosen, place.view(tokens, top_k), token, of_block)


def mix(hidden: Tensor, gates: Tensor, top_k: int, scale: float) -> Rows:
    """hidden [T, R], gates [T, E] -> the rows scale * gate * hidden, rounded once"""
    p = plan(gates, top_k)
    pairs = ((scale * p.gates).unsqueeze(2) * hidden.unsqueeze(1)).to(hidden.dtype).flatten(0, 1)  # [T * K, R]
    rows = hidden.new_zeros(len(p.token), hidden.shape[1])
    rows[p.place.flatten()] = pairs
    return Rows(p, rows.view(-1, ROWS, hidden.shape[1]))


def add_up(out: Tensor, mixed: Rows, expert_b: Tensor) -> Tensor:
    """out [T, D_out] += the experts' update; expert_b [D_out, E * R]"""
    p, rows = mixed
    for features, of_rows, of_experts in _slices(out.shape[1], p, rows.shape[2], out):
        b = _experts_of_blocks(expert_b[features], p, of_experts)
        products = bmm(rows, b.transpose(1, 2), out=of_rows).flatten(0, 1)  # [N * ROWS, features]
        out[:, features] += torch.nn.functional.embedding_bag(p.place, products, mode="sum")
    return out


def up_backward(
    dout: Tensor, expert_b: Tensor, hidden: Tensor, gates: Tensor, top_k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """dout [T, D_out], expert_b [D_out, E * R], hidden [T, R], gates [T, E]
    -> dhidden [T, R], drouted [T, E]: the gradient of the logits through the gates; both in gates' dtype"""
    p, rank = plan(gates, top_k), hidden.shape[1]
    u, part = gates.new_zeros(len(p.expert), rank, ROWS), dout.new_empty(len(p.expert), rank, ROWS)
    for features, of_rows, of_experts in _slices(dout.shape[1], p, rank, dout):
        b = _experts_of_blocks(expert_b[features], p, of_experts)
        u += bmm(b.transpose(1, 2), _rows_of(dout[:, features], p, of_rows).transpose(1, 2), out=part)
    of_pairs = u.transpose(1, 2).flatten(0, 1)[p.place]  # [T, K, R]
    dgates = scale * (of_pairs * hidden.unsqueeze(1)).sum(2)
    dhidden = scale * (of_pairs * p.gates.unsqueeze(2)).sum(1)
    drouted = p.gates * (dgates - (p.gates * dgates).sum(1, keepdim=True))
    return dhidden, torch.zeros_like(gates).scatter_(1, p.chosen, drouted)


def grad_expert_b(dout: Tensor, mixed: Rows, experts: int, dtype: torch.dtype) -> Tensor:
    """dout [T, D_out] -> dexpert_b [D_out, E * R] in `dtype`"""
    p, rows = mixed
    blocks, _, rank = rows.shape
    grad = dout.new_empty(dout.shape[1], experts, rank, dtype=dtype)
    turned, wide = rows.transpose(1, 2), torch.promote_types(dout.dtype, torch.float32)
    for features, of_rows, of_experts in _slices(dout.shape[1], p, rank, dout):
        products = bmm(turned, _rows_of(dout[:, features], p, of_rows), out=of_experts.view(blocks, rank, -1))
        sums = torch.zeros(experts, *products.shape[1:], dtype=wide, device=dout.device)
        grad[features] = sums.index_add_(0, p.expert, products.to(wide)).permute(2, 0, 1)
    return grad.view(dout.shape[1], experts * rank)


def _slices(features: int, p: Plan, rank: int, like: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of the features, each with memory for its rows [N, ROWS, features] and experts [N, features, R].

    In the dtype of `like`, and the same memory each time, since fresh memory costs more than the products.
    """
    blocks = len(p.expert)
    of_feature = blocks * (ROWS + rank)
    width = min(features, max(LEAST_SLICE, SLICE_BYTES // (of_feature * like.element_size()) // 32 * 32))
    rows, experts = like.new_empty(blocks * ROWS * width), like.new_empty(blocks * rank * width)
    for start in range(0, features, width):
        taken = min(width, features - start)
        of_rows = rows[: blocks * ROWS * taken].view(blocks, ROWS, taken)
        yield slice(start, start + taken), of_rows, experts[: blocks * rank * taken].view(blocks, taken, rank)


def _experts_of_blocks(expert_b: Tensor, p: Plan, out: Tensor) -> Tensor:
    """expert_b [features, E * R] -> out [N, features, R], each block's expert"""
    by_expert = expert_b.view(len(expert_b), -1, out.shape[2]).transpose(0, 1).contiguous()
    return torch.index_select(by_expert, 0, p.expert, out=out)


def _rows_of(dout: Tensor, p: Plan, out: Tensor) -> Tensor:
    """dout [T, features] -> out [N, ROWS, features]"""
    return torch.index_select(dout, 0, p.token, out=out.flatten(0, 1)).view_as(out)
