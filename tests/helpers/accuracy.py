"""The one rule by which numbers are judged: no further from float64 than 1.5 times plain torch in the same dtype."""

import torch
from torch import Tensor

FACTOR = 1.5


def error(actual: Tensor, truth: Tensor) -> float:
    """Relative error in the Frobenius norm; the absolute one where the truth is zero."""
    size = truth.norm().item()
    return (actual.double() - truth).norm().item() / (size or 1.0)


def assert_no_less_accurate(actual: Tensor, eager: Tensor, truth: Tensor, what: str) -> None:
    """actual and eager in one dtype, truth in float64."""
    assert actual.shape == truth.shape and actual.dtype == eager.dtype, what
    # With few elements eager can be exact by luck: one rounding of the result (half an eps) is always allowed.
    allowed = FACTOR * error(eager, truth) + torch.finfo(actual.dtype).eps / 2
    assert error(actual, truth) <= allowed, f"{what}: error {error(actual, truth):.3g} > {allowed:.3g}"
