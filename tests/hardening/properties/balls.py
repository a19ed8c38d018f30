"""Numbers with a bound on what rounding may do to them: a centre and a radius, both float64.

A program that computes the centre's formula in some dtype must end inside the ball. Radii follow from the standard
model of floating-point arithmetic, fl(a op b) = (a op b)(1 + d) with |d| at most half an eps, and from its sums of n
terms, n u / (1 - n u); nothing is measured. An infinite radius says that anything is right: where the formula itself
has no finite value, or where the dtype may overflow. A radius of zero demands the very number, so exact zeros stay
exact zeros.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mosld_kernels.precision import router_dtype


class Ball(NamedTuple):
    mid: Tensor
    rad: Tensor

    @property
    def most(self) -> Tensor:
        """The largest magnitude in it."""
        return self.mid.abs() + self.rad

    @property
    def known(self) -> Tensor:
        """bool, False where anything is right."""
        return self.rad.isfinite()

    @property
    def mT(self) -> "Ball":
        return Ball(self.mid.mT, self.rad.mT)

    def view(self, *shape: int) -> "Ball":
        return Ball(self.mid.reshape(shape), self.rad.reshape(shape))


def ball(mid: Tensor, rad: Tensor | float = 0.0) -> Ball:
    """Whatever is not a number, or infinite, becomes a ball in which anything is."""
    rad = torch.as_tensor(rad, dtype=torch.float64).expand(mid.shape)
    lost = ~(mid.isfinite() & rad.isfinite())
    return Ball(torch.where(lost, 0.0, mid), torch.where(lost, torch.inf, rad))


def exact(values: Tensor) -> Ball:
    return ball(values.detach().double())


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def least(dtype: torch.dtype) -> float:
    """What may be lost absolutely: numbers below the smallest normal one may be flushed to zero, but not in float16."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps if dtype == torch.float16 else info.tiny


def rounded(a: Ball, dtype: torch.dtype, times: int = 1) -> Ball:
    """Rounded to `dtype`, `times` times, and lost where that overflows."""
    rad = a.rad + times * (unit(dtype) * a.most + least(dtype) * _nonzero(a.most))
    return ball(a.mid, _fits(a.mid.abs() + rad, dtype, rad))


def times(a: Ball, b: Ball) -> Ball:
    return ball(a.mid * b.mid, a.mid.abs() * b.rad + a.rad * b.most)


def plus(a: Ball, b: Ball) -> Ball:
    return ball(a.mid + b.mid, a.rad + b.rad)


def total(a: Ball, dim: int, dtype: torch.dtype) -> Ball:
    """The sum over `dim`, added up at least in float32, in any order."""
    size = a.most.sum(dim)
    rad = a.rad.sum(dim) + _growth(a.mid.shape[dim], dtype) * size
    return ball(a.mid.sum(dim), _fits(size, router_dtype(dtype), rad))


def product(*factors: Ball, dtype: torch.dtype, bias: Ball | None = None, in_pieces: bool = False) -> Ball:
    """a [M, S] b [S, N] c [M, s] d [s, N] ..., bias [N] -> a b + c d + ... + bias [M, N], stored in `dtype`.

    Added up at least in float32, in any order. Between any two products, and with in_pieces after any few terms of one,
    what has come together so far may be stored in `dtype`.
    """
    wide = router_dtype(dtype)
    pairs = [(_flushed(a, wide), _flushed(b, wide)) for a, b in zip(factors[::2], factors[1::2], strict=True)]
    mid = sum(a.mid @ b.mid for a, b in pairs)
    size = sum(a.most @ b.most for a, b in pairs)
    rad = sum(a.mid.abs() @ b.rad + a.rad @ b.most for a, b in pairs)
    assert isinstance(mid, Tensor) and isinstance(size, Tensor)
    apart = sum((a.mid @ b.mid).abs() for a, b in pairs) + rad
    if bias is not None:
        mid, rad, size, apart = mid + bias.mid, rad + bias.rad, size + bias.most, apart + bias.most
    terms = sum(a.mid.shape[-1] for a, _ in pairs)
    rad = rad + _growth(terms, dtype) * size + terms * least(wide) * _nonzero(size)
    rad = _fits(size, wide, rad)
    if in_pieces or len(pairs) > 1 or bias is not None:
        stored = size if in_pieces else apart
        storages = max(1, len(pairs) - 1)
        rad = _fits(stored, dtype, rad + storages * (unit(dtype) * stored + least(dtype) * _nonzero(size)))
    return rounded(ball(mid, rad), dtype)


def _growth(terms: int, dtype: torch.dtype) -> float:
    """Of the sum's own rounding and that of the centre, which is computed in float64."""
    u = (terms + 1) * (unit(router_dtype(dtype)) + unit(torch.float64))
    return u / (1 - u)


def _nonzero(size: Tensor) -> Tensor:
    return (size > 0).double()  # a number times bool would be float32, and what float64 may lose zero there


def _fits(size: Tensor, dtype: torch.dtype, rad: Tensor) -> Tensor:
    """rad, infinite where a sum whose terms have these magnitudes may overflow on its way"""
    return torch.where(size > torch.finfo(dtype).max, torch.inf, rad)


def _flushed(a: Ball, dtype: torch.dtype) -> Ball:
    """Some instructions take a subnormal factor for zero."""
    tiny = torch.finfo(dtype).tiny
    return Ball(a.mid, torch.where((a.mid.abs() < tiny) & (a.mid != 0), a.rad + tiny, a.rad))


def outside(actual: Tensor, a: Ball) -> str | None:
    """The worst number that is not in its ball, in words; None where all are."""
    assert actual.shape == a.mid.shape, f"{list(actual.shape)} instead of {list(a.mid.shape)}"
    actual = actual.detach().double()
    wrong = a.known & ~((actual - a.mid).abs() <= a.rad)  # NaN is never at most anything
    if not wrong.any():
        return None
    excess = torch.where(wrong, ((actual - a.mid).abs() / (a.rad + 1e-300)).nan_to_num(nan=torch.inf), -1.0)
    place = excess.argmax()
    got, mid, rad = (t.flatten()[place].item() for t in (actual, a.mid, a.rad))
    where = [i.item() for i in torch.unravel_index(place, actual.shape)]
    return f"{int(wrong.sum())} of {wrong.numel()} numbers; at {where} {got!r}, not within {rad:.3g} of {mid!r}"
