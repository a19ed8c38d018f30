"""Which mixtures Triton's kernels take: what one program can hold in registers, whatever the GPU. Imports no Triton.

Programs pad sizes to powers of two, because Triton's tensors come in no others. With an A for each expert, one holds
hidden and u [., E, R] side by side, where with a shared A it holds u alone, a block of experts at a time.
"""

MOST_RANK, MOST_EXPERTS = 128, 64
MOST_COLUMNS = 128  # of padded experts, where each has an A of its own


def padded(size: int, least: int = 1) -> int:
    """The power of two that holds `size`."""
    return max(least, 1 << (size - 1).bit_length())


def diagonal_columns(rank: int, experts: int) -> int:
    """Columns of all experts, each padded: hidden's and u's where every expert has an A."""
    # `tl.dot` takes no fewer than 16.
    return max(16, padded(rank, 4) * padded(experts))


def size_obstacle(rank: int, experts: int, mixing: str) -> str | None:
    """What is too large for the kernels, or None."""
    if mixing == "diagonal" and diagonal_columns(rank, experts) > MOST_COLUMNS:
        return (
            f"with mixing='diagonal' E * R must be at most {MOST_COLUMNS}, E rounded up to a power of two and R to one "
            f"from 4 on, got E={experts}, R={rank}"
        )
    if rank > MOST_RANK or experts > MOST_EXPERTS:
        return f"R must be at most {MOST_RANK} and E at most {MOST_EXPERTS}, got R={rank}, E={experts}"
    return None
