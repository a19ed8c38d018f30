"""Checks of arguments that several operators have in common: each raises ValueError with the rule and the value."""

import torch
from torch import Tensor

from .precision import FLOATS

MIXINGS = ("expand", "diagonal")  # one A for all experts, or one for each


def check_mixing(mixing: object) -> None:
    """raises ValueError for a mixing that the operator does not have.

    >>> from mosld_kernels.checks import check_mixing
    >>> check_mixing("core")
    Traceback (most recent call last):
    ValueError: mixing must be one of expand, diagonal, got 'core'
    """
    if mixing not in MIXINGS:
        raise ValueError(f"mixing must be one of {', '.join(MIXINGS)}, got {mixing!r}")


def check_input(x: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] == 0 or x.dtype not in FLOATS:
        got = f"{x.dtype} {list(x.shape)}"
        raise ValueError(f"x must be a floating-point [..., D_in] with D_in at least 1, got {got}")


def check_seed(seed: Tensor, device: torch.device | None = None) -> None:
    """device: where x is, and the seed must be."""
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.shape != (1,):
        got = f"{seed.dtype} {list(seed.shape)}" if isinstance(seed, Tensor) else repr(seed)
        raise ValueError(f"seed must be an int64 tensor of shape [1], got {got}")
    if device is not None and seed.device != device:
        raise ValueError(f"seed must be on x's device {device}, got {seed.device}")


def check_dropout(p: float, seed: Tensor | None) -> None:
    """p: the probability of dropping an element of A. Without dropout nobody looks at the seed."""
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    if p > 0:
        if seed is None:
            raise ValueError(f"dropout_p={p} needs a seed: an int64 tensor of shape [1]")
        check_seed(seed)
