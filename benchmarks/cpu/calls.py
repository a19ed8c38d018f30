"""What a call costs beside its arithmetic: the operator through an autograd function, which eager mode uses, and
through the registered operator, which torch.compile sees. One token and eight features, so that the arithmetic is next
to nothing.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import mosld_kernels
from mosld_kernels import autograd

from ..timing.machine import machine
from ..timing.options import add_budget, add_out, budget_of
from ..timing.timers import interleaved

CALLS = 20  # in one timed run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks calls`."""
    add_budget(parser, rounds=200, seconds=60)
    add_out(parser)


def run(options: argparse.Namespace) -> int:
    measure_and_write(budget_of(options).rounds, options.out)
    return 0


def measure_and_write(rounds: int, out: Path | None) -> dict:
    """Print microseconds a call, forward alone and with backward, on the CPU; write them to `out` as JSON."""
    result = {"machine": machine(), "rounds": rounds, "calls": measure(rounds)}
    print(f"{'':42}{'us a call':>12}{'20 % to 80 %':>18}")
    for row in result["calls"]:
        spread = f"{row['low_us']:.0f} to {row['high_us']:.0f}"
        print(f"{row['name']:42}{row['median_us']:12.0f}{spread:>18}")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")
    return result


def measure(rounds: int) -> list[dict]:
    """-> rows with the median, 20th and 80th percentile in microseconds a call."""
    x, weight = torch.randn(1, 8, requires_grad=True), torch.randn(8, 8)
    shared_a = torch.randn(2, 8, requires_grad=True)
    expert_b = torch.randn(8, 4, requires_grad=True)
    router = torch.randn(2, 8, requires_grad=True)
    adapter = (shared_a, expert_b, router)
    inputs = (x, weight, None, *adapter, None)
    settings = autograd.Settings(top_k=1, scale=1.0, dropout_p=0.0, backend="eager")
    ways: dict[str, Callable[[], Tensor]] = {
        "autograd function": lambda: autograd.MoSLDFunction.apply(*inputs, *settings)[0],
        "registered operator": lambda: torch.ops.mosld.linear(*inputs, *settings)[0],
        "public function (checks, then the first)": lambda: mosld_kernels.mosld_linear(
            x, weight, None, *adapter, top_k=1, scale=1.0
        )[0],
    }
    runs = {}
    for name, forward in ways.items():
        runs[f"{name}, forward"] = _repeated(forward)
    for name, forward in ways.items():
        runs[f"{name}, both"] = _repeated(_with_backward(forward, [x, *adapter]))
    rows = []
    for name, timing in interleaved(runs, rounds, "calls").items():
        rows.append({
            "name": name,
            "median_us": 1e3 / CALLS * timing.median_ms,
            "low_us": 1e3 / CALLS * timing.low_ms,
            "high_us": 1e3 / CALLS * timing.high_ms,
        })  # fmt: skip
    return rows


def _with_backward(forward: Callable[[], Tensor], wanted: list[Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(forward().sum(), wanted)


def _repeated(call: Callable[[], object]) -> Callable[[], None]:
    def run_calls() -> None:
        for _ in range(CALLS):
            call()

    return run_calls
