"""bfloat16 in Triton's interpreter, which keeps it as raw 16-bit integers: its products and float32 -> bfloat16 casts
are silently wrong. Two private functions of the interpreter are replaced; `check` fails loudly when that stops working.
"""

import contextlib
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

_create_dot, _convert_float = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float


def _as_float32(bits):
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _as_bfloat16(values):
    """Rounds to nearest, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _dot(self, a, b, *rest):
    if a.dtype.scalar == tl.bfloat16:
        a, b = (interpreter.TensorHandle(_as_float32(operand.data), tl.float32) for operand in (a, b))
    return _create_dot(self, a, b, *rest)


def _convert(values, from_type, to_type, rounding):
    if from_type == tl.float32 and to_type == tl.bfloat16:
        values = np.asarray(values)
        return _as_bfloat16(values if values.dtype == np.float32 else values.view(np.float32))
    return _convert_float(values, from_type, to_type, rounding)


@contextlib.contextmanager
def exact_bfloat16():
    with (
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", _dot),
        mock.patch.object(interpreter, "_convert_float", _convert),
    ):
        yield


@triton.jit
def _product_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a, b = tl.load(a_ptr + i * N + j), tl.load(b_ptr + i * N + j)
    tl.store(out_ptr + i * N + j, tl.dot(a, b) + a.to(tl.float32))


def check() -> None:
    """A product, a cast on load and one on store, against torch's own rounding; NaN and infinity included."""
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    a[3, 4], a[5, 6] = float("nan"), float("inf")
    out = torch.empty(16, 16, dtype=torch.bfloat16)
    with exact_bfloat16():
        _product_kernel[(1,)](a, b, out, 16)
    torch.testing.assert_close(out, (a.float() @ b.float() + a.float()).bfloat16(), equal_nan=True)
