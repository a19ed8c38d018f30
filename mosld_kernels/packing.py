"""How the experts lie in A and in hidden: with mixing "expand" they share R rows, with "diagonal" each has its own R.

A [R, D_in], hidden [T, R]      or      A [E * R, D_in], hidden [T, E * R], expert e at rows e * R to e * R + R - 1
"""

from torch import Tensor


def expert_rank(rows: int, experts: int, mixing: str) -> int:
    """R, the rank of one expert, where A has `rows` rows: R of them, or E * R with an A for each expert.

    >>> from mosld_kernels.packing import expert_rank
    >>> expert_rank(8, experts=4, mixing="expand"), expert_rank(8, experts=4, mixing="diagonal")
    (8, 2)
    """
    return rows // experts if mixing == "diagonal" else rows


def by_expert(hidden: Tensor, experts: int, mixing: str) -> Tensor:
    """hidden [..., R] -> [..., 1, R], the same for all experts; or hidden [..., E * R] -> [..., E, R], each expert's

    >>> import torch
    >>> from mosld_kernels.packing import by_expert
    >>> hidden = torch.arange(4)
    >>> by_expert(hidden, experts=2, mixing="expand"), by_expert(hidden, experts=2, mixing="diagonal")
    (tensor([[0, 1, 2, 3]]), tensor([[0, 1],
            [2, 3]]))
    """
    if mixing == "diagonal":
        return hidden.unflatten(-1, (experts, expert_rank(hidden.shape[-1], experts, mixing)))
    return hidden.unsqueeze(-2)
