"""Triton kernels that only measurements use: what a design would gain or lose with them. Importing this imports Triton.

linear   out = x W^T by a persistent grid with tensor descriptors (TMA), against the library's product
philox   how many words of Philox-4x32 keep their element, and nothing stored: the arithmetic of a mask alone
stream   x read once by few programs: what a pass costs that leaves most of the chip to others
touch    one program, one number: a launch
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false, reportArgumentType=false
# (kernels and their launches are written in Triton's language, whose types a Python checker does not know)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from mosld_kernels.dropout import threshold


class LinearTile(NamedTuple):
    """One program's tile of the product, and how Triton compiles it."""

    tokens: int
    outputs: int
    features: int
    warps: int
    stages: int


LINEAR_TILES = (LinearTile(128, 256, 64, 8, 3), LinearTile(128, 128, 64, 4, 4))
# Blocks of tokens that go together: their rows of x stay in the L2 cache while W passes by.
GROUP = 8
PHILOX_BLOCK = 1024
STREAM_BLOCK = 8192
# Of 16 KiB each: one multiprocessor needs tens of KiB in flight to reach its bandwidth.
STREAM_STAGES = 5


@triton.jit
def _linear_kernel(
    x_desc, weight_desc, out_desc, T, D_IN, D_OUT, PROGRAMS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program i makes tiles i, i + PROGRAMS, ... of out, in the order of groups of GROUP blocks of tokens."""
    blocks_t, blocks_o = tl.cdiv(T, BLOCK_T), tl.cdiv(D_OUT, BLOCK_O)
    for tile in tl.range(tl.program_id(0), blocks_t * blocks_o, PROGRAMS, flatten=True):
        group = tile // (GROUP * blocks_o)
        group_size = min(blocks_t - group * GROUP, GROUP)
        in_group = tile % (GROUP * blocks_o)
        t, o = (group * GROUP + in_group % group_size) * BLOCK_T, (in_group // group_size) * BLOCK_O
        out = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
        for d in range(0, D_IN, BLOCK_D):
            out = tl.dot(x_desc.load([t, d]), weight_desc.load([o, d]).T, out)
        out_desc.store([t, o], out.to(out_desc.dtype))


@triton.jit
def _philox_kernel(
    seed_ptr, kept_ptr, N, limit, ROUNDS: tl.constexpr, FOUR_PER_CALL: tl.constexpr, BLOCK: tl.constexpr
):
    """Program i counts, of elements [i * BLOCK, (i + 1) * BLOCK) below N, those that are kept."""
    seed, first = tl.load(seed_ptr), tl.program_id(0) * BLOCK
    if FOUR_PER_CALL:
        call = first // 4 + tl.arange(0, BLOCK // 4)
        zero = (call * 0).to(tl.uint32)
        a, b, c, d = tl.philox(seed, call.to(tl.uint32), zero, zero, zero, n_rounds=ROUNDS)
        n = 4 * call
        kept = ((a.to(tl.int64) >= limit) & (n < N)).to(tl.int32)
        kept += ((b.to(tl.int64) >= limit) & (n + 1 < N)).to(tl.int32)
        kept += ((c.to(tl.int64) >= limit) & (n + 2 < N)).to(tl.int32)
        kept += ((d.to(tl.int64) >= limit) & (n + 3 < N)).to(tl.int32)
    else:
        n = first + tl.arange(0, BLOCK)
        zero = (n * 0).to(tl.uint32)
        a, b, c, d = tl.philox(seed, (n >> 2).to(tl.uint32), zero, zero, zero, n_rounds=ROUNDS)
        lane = n & 3
        word = tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))
        kept = ((word.to(tl.int64) >= limit) & (n < N)).to(tl.int32)
    tl.store(kept_ptr + tl.program_id(0), tl.sum(kept, axis=0))


@triton.jit
def _stream_kernel(x_ptr, sums_ptr, N, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Program i adds up blocks i, i + PROGRAMS, ... of x."""
    dn = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(N, BLOCK), PROGRAMS, num_stages=STAGES):
        n = block * BLOCK + dn
        total += tl.load(x_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _touch_kernel(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr) + 1.0)


def linear(x: Tensor, weight: Tensor, out: Tensor, tile: LinearTile, programs: int) -> Tensor:
    """x [T, D_in], weight [D_out, D_in] -> out [T, D_out], filled by `programs` programs; rows of 16-byte multiples."""
    (tokens, d_in), d_out = x.shape, len(weight)
    programs = min(programs, triton.cdiv(tokens, tile.tokens) * triton.cdiv(d_out, tile.outputs))
    _linear_kernel[(programs,)](
        x_desc=TensorDescriptor.from_tensor(x, [tile.tokens, tile.features]),
        weight_desc=TensorDescriptor.from_tensor(weight, [tile.outputs, tile.features]),
        out_desc=TensorDescriptor.from_tensor(out, [tile.tokens, tile.outputs]),
        T=tokens, D_IN=d_in, D_OUT=d_out, PROGRAMS=programs, GROUP=GROUP,
        BLOCK_T=tile.tokens, BLOCK_O=tile.outputs, BLOCK_D=tile.features,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def philox_kept(seed: Tensor, elements: int, p: float, rounds: int, four_per_call: bool) -> Tensor:
    """seed int64 [1] -> int32 [blocks of 1024 elements]: how many of `elements`, below 2^31, each block keeps"""
    kept = torch.empty(triton.cdiv(elements, PHILOX_BLOCK), dtype=torch.int32, device=seed.device)
    _philox_kernel[(len(kept),)](seed, kept, elements, threshold(p), rounds, four_per_call, PHILOX_BLOCK, num_warps=4)
    return kept


def stream(x: Tensor, sums: Tensor) -> Tensor:
    """x contiguous, below 2^31 elements; sums float32 [programs] -> sums, filled: together the sum of x"""
    _stream_kernel[(len(sums),)](x, sums, x.numel(), len(sums), STREAM_BLOCK, STREAM_STAGES, num_warps=16)
    return sums


def touch(x: Tensor) -> Tensor:
    """x float32 [1] -> x + 1 in place: a launch with next to no work"""
    _touch_kernel[(1,)](x, num_warps=1)
    return x
