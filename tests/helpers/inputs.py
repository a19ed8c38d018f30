"""The problem sizes that the operator is tested on, and inputs for them."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """T tokens, D_in and D_out features, R rank, E experts, K chosen; mixing: one A for all experts, or one each."""

    T: int
    D_in: int
    D_out: int
    R: int
    E: int
    K: int
    mixing: str = "expand"

    @property
    def rows(self) -> int:
        """Of A: of the shared one, or of all together."""
        return self.E * self.R if self.mixing == "diagonal" else self.R

    def __str__(self) -> str:
        sizes = "-".join(f"{name}{size}" for name, size in zip(self._fields[:6], self, strict=False))
        return sizes if self.mixing == "expand" else f"{sizes}-{self.mixing}"


SHAPES = [
    Shape(64, 64, 128, 16, 8, 2),  # whole tiles
    Shape(65, 33, 129, 16, 3, 3),  # one past a tile, every expert chosen
    Shape(1, 32, 48, 16, 4, 1),  # one token, one chosen
    Shape(0, 16, 24, 4, 3, 2),  # no token
    Shape(100, 96, 80, 32, 1, 1),  # one expert: plain LoRA
    Shape(7, 5, 3, 1, 2, 1),  # rank one, smaller than any tile
    Shape(33, 17, 31, 3, 5, 2),  # everything odd
    Shape(128, 48, 16, 8, 8, 8),  # dense, K = E
    Shape(96, 128, 1, 4, 4, 2),  # one output feature
    Shape(50, 1, 40, 2, 3, 2),  # one input feature
    Shape(130, 40, 72, 5, 64, 2),  # many experts
    Shape(257, 64, 64, 8, 8, 2),  # many tokens
    Shape(40, 24, 56, 24, 2, 2),  # full rank
]
DIAGONAL_SHAPES = [shape._replace(mixing="diagonal") for shape in SHAPES]

# Where kernels differ from products: tiles that do not divide anything, sums in planes, experts in several blocks.
KERNEL_SHAPES = [
    *SHAPES,
    Shape(17, 20, 18, 40, 6, 3),  # u in several blocks of experts, rank not a power of two
    Shape(9, 20, 18, 40, 5, 2),  # the last block of experts not full
    Shape(20, 24, 40, 128, 3, 2),  # the largest rank
    Shape(5, 300, 33, 6, 7, 4),  # few tokens, long rows: sums in planes
    Shape(300, 18, 20, 2, 2, 1),  # many tokens, few features: gradients in planes
    Shape(33, 16, 16, 1, 64, 64),  # the most experts, all chosen
    *(
        shape._replace(mixing="diagonal")
        for shape in (
            *(shape for shape in SHAPES if shape.E * shape.R <= 128),
            Shape(20, 24, 40, 128, 1, 1),  # the most rows of A: of one expert,
            Shape(33, 16, 16, 4, 32, 32),  # of the most experts,
            Shape(17, 20, 18, 11, 7, 3),  # and of some, neither a power of two
            Shape(5, 300, 33, 6, 7, 4),  # few tokens, long rows: sums in planes
            Shape(300, 18, 20, 2, 2, 1),  # many tokens, few features: gradients in planes
        )
    ),
]


class Case(NamedTuple):
    """Inputs of one call: the arguments of `mosld_linear` in order, then incoming gradients for y and the logits."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    shared_a: Tensor
    expert_b: Tensor
    router_weight: Tensor
    dout: Tensor
    dlogits: Tensor

    def to(self, dtype: torch.dtype) -> "Case":
        return Case(*(tensor.to(dtype) for tensor in self))


def make_case(shape: Shape, dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
    """Values that `dtype` holds exactly, as float64, so that every dtype and the truth start from the same numbers.

    Expert choice is not in doubt: tokens whose K-th and next logit are closer than rounding in bfloat16 are redrawn,
    since two correct programs may choose differently there.
    """
    T, D_in, D_out, R, E, K, _ = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*sizes, generator=generator)).to(dtype).double()

    router_weight = draw(E, D_in, scale=3 * D_in**-0.5)
    tokens = []
    while len(tokens) < T:
        x = draw(D_in)
        ordered = (router_weight @ x).sort(descending=True).values
        if K == E or ordered[K - 1] - ordered[K] > 0.1:
            tokens.append(x)
    return Case(
        x=torch.stack(tokens) if tokens else torch.zeros(0, D_in, dtype=torch.float64),
        weight=draw(D_out, D_in, scale=D_in**-0.5),
        bias=draw(D_out),
        shared_a=draw(shape.rows, D_in, scale=D_in**-0.5),
        expert_b=draw(D_out, E * R, scale=R**-0.5),
        router_weight=router_weight,
        dout=draw(T, D_out),
        dlogits=draw(T, E),
    )


@functools.cache
def torch_spreads_nan(dtype: torch.dtype) -> bool:
    """Whether torch's own product gives a NaN in one row of x to the row before it.

    oneDNN does, with AMX, in bfloat16, where rows have an odd number of elements: it reads the next row's first beside
    the last and multiplies it by zero. Finite numbers do not show it.
    """
    x = torch.ones(17, 31, dtype=dtype)
    x[1, 0] = torch.nan
    return bool(torch.mm(x, torch.ones(31, 8, dtype=dtype))[0].isnan().any())
