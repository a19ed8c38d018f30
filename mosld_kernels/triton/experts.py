"""How kernels walk a packed [., E * R] matrix: a block of experts at a time, each expert's rank padded."""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (kernels are written in Triton's language, whose types a Python checker does not know)

from typing import NamedTuple

import triton
import triton.language as tl

from ..limits import diagonal_columns, padded
from .launch import cdiv


@triton.jit
def expert_columns(first_expert, R: tl.constexpr, E: tl.constexpr, R_PAD: tl.constexpr, E_BLOCK: tl.constexpr):
    """-> columns [E_BLOCK * R_PAD] of a packed [., E * R] matrix that hold E_BLOCK experts, and which of them exist.

    Padding the rank inside each expert lets a tile [., E_BLOCK * R_PAD] be viewed as [., E_BLOCK, R_PAD].
    """
    c = tl.arange(0, E_BLOCK * R_PAD)
    if R == R_PAD:  # a case of its own, so that the compiler sees neighbours and loads them together
        columns = first_expert * R + c
        return columns, columns < E * R
    e, r = first_expert + c // R_PAD, c % R_PAD
    return e * R + r, (e < E) & (r < R)


class ExpertBlocks(NamedTuple):
    """How a launch goes over the experts."""

    rank_padded: int  # R_PAD
    experts: int  # in one tile
    blocks: int  # tiles that together hold all experts


def expert_blocks(rank: int, experts: int, columns: int, diagonal: bool) -> ExpertBlocks:
    """The blocks of experts that tiles of at most `columns` columns hold."""
    rank_padded = padded(rank, 4 if diagonal else 16)
    # At least 16 columns: `tl.dot` takes no fewer.
    block = max(min(padded(experts), columns // rank_padded), 16 // rank_padded, 1)
    return ExpertBlocks(rank_padded, block, cdiv(experts, block))


def held_columns(rank: int, experts: int, diagonal: bool) -> int:
    """What decides on the tile of a step with E * R columns: with an A for each expert it holds as many of hidden."""
    return 2 * diagonal_columns(rank, experts) if diagonal else experts * rank
