"""What a call would launch on a GPU, recorded on tensors without data: no GPU is needed.

Needs a process without TRITON_INTERPRET, where the kernels are the compiler's and not the interpreter's.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from mosld_kernels import autograd
from mosld_kernels.triton import launch as launches_of
from mosld_kernels.triton import tiles

from ..timing.shapes import DTYPES, LayerShape

PROCESSORS = {80: 108, 90: 132, 100: 148}  # of A100, H100 and H200, B200
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}


class Problem(NamedTuple):
    """One layer in one dtype, adapters in another, for one architecture. precision: "ieee", or "tf32" for float32.
    mixing: "expand", or "diagonal" for an A for each expert."""

    shape: LayerShape
    dtype: str
    adapter_dtype: str
    arch: int
    precision: str = "ieee"
    mixing: str = "expand"


class Launch(NamedTuple):
    """What the compiler gets: sizes that Triton specialises on are constants or divisible by 16 as they are in use."""

    kernel: str  # module and function
    arch: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    warps: int
    stages: int
    most_registers: int | None
    row: tiles.Row | None


@contextlib.contextmanager
def recording(problem: Problem) -> Iterator[list[Launch]]:
    """Launches inside are recorded, not carried out, as if on a GPU of `problem.arch`."""
    recorded: list[Launch] = []
    rows: list[tiles.Row] = []
    pick = tiles.pick

    def remember(*sizes):
        rows.append(pick(*sizes))
        return rows[-1]

    def record(function: JITFunction, *args, grid, warmup, num_warps=4, num_stages=3, maxnreg=None, **constants):
        row = rows.pop() if rows else None
        recorded.append(_launch(function, args, constants, problem.arch, (num_warps, num_stages, maxnreg), row))

    with (
        mock.patch.object(tiles, "pick", remember),
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(launches_of, "properties", lambda device: (problem.arch, PROCESSORS[problem.arch])),
    ):
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = problem.precision
        try:
            yield recorded
        finally:
            torch.backends.cuda.matmul.fp32_precision = before


def _launch(function, args, constants, arch, options: tuple[int, int, int | None], row) -> Launch:
    values = {**dict(zip(function.arg_names, args, strict=False)), **constants}
    signature, constant, divisible = [], [], []
    for i, parameter in enumerate(function.params):
        value = values[parameter.name]
        kind = _kind(value)
        special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or (special and value == 1):
            kind = "constexpr"
            constant.append((parameter.name, value))
        elif isinstance(value, torch.Tensor) or (special and value % 16 == 0):
            divisible.append(i)
        signature.append((parameter.name, kind))
    name = f"{function.fn.__module__}:{function.fn.__name__}"
    return Launch(name, arch, tuple(signature), tuple(constant), tuple(divisible), *options, row)


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{NAMES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if isinstance(value, int) and -(2**31) <= value < 2**31 else "i64"


def launches(problem: Problem) -> tuple[list[Launch], list[Launch]]:
    """The launches of the library's own kernels in forward and in backward, with dropout, every gradient wanted."""
    T, D_in, D_out, R, E, K = problem.shape
    dtype, adapter_dtype = DTYPES[problem.dtype], DTYPES[problem.adapter_dtype]
    empty = functools.partial(torch.empty, device="meta")
    rows = E * R if problem.mixing == "diagonal" else R
    a = empty(rows, D_in, dtype=adapter_dtype)
    b = empty(D_out, E * R, dtype=adapter_dtype)
    router = empty(E, D_in, dtype=adapter_dtype)
    x, weight, bias = empty(T, D_in, dtype=dtype), empty(D_out, D_in, dtype=dtype), empty(D_out, dtype=dtype)
    inputs = autograd.Inputs(x, weight, bias, a, b, router, empty(1, dtype=torch.int64))
    settings = autograd.Settings(K, 2.0, 0.1, "triton", problem.mixing)
    with recording(problem) as forward:
        out, logits, hidden, gates = autograd.forward(inputs, settings)
    with recording(problem) as backward:
        needs = (True, False, False, True, True, True)
        autograd.backward(empty(out.shape, dtype=dtype), logits, hidden, gates, inputs, settings, needs)
    return forward, backward
