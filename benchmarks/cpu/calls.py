"""What a call costs beside its arithmetic: the operator through an autograd function, which eager mode uses, and through
the registered operator, which torch.compile sees. One token and eight features, so that the arithmetic is next to nothing.
"""

import json
from pathlib import Path

import torch

import mosld_kernels
from mosld_kernels import autograd

from ..timing.timers import interleaved, machine

CALLS = 20  # in one timed run


def run(rounds: int, out: Path | None) -> dict:
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
    adapter = [torch.randn(size, requires_grad=True) for size in ((2, 8), (8, 4), (2, 8))]
    inputs = (x, weight, None, *adapter, None)
    settings = autograd.Settings(top_k=1, scale=1.0, dropout_p=0.0, backend="eager")
    ways = {
        "autograd function": lambda: autograd.MoSLDFunction.apply(*inputs, *settings)[0],
        "registered operator": lambda: torch.ops.mosld.linear(*inputs, *settings)[0],
        "public function (checks, then the first)": lambda: mosld_kernels.mosld_linear(
            x, weight, None, *adapter, top_k=1, scale=1.0
        )[0],
    }
    wanted = [x, *adapter]
    steps = {f"{name}, forward": call for name, call in ways.items()}
    steps |= {
        f"{name}, both": lambda call=call: torch.autograd.grad(call().sum(), wanted) for name, call in ways.items()
    }
    runs = {name: lambda step=step: [step() for _ in range(CALLS)] for name, step in steps.items()}
    times = interleaved(runs, rounds, "calls")
    micro = 1e3 / CALLS
    return [
        {"name": name, "median_us": micro * t.median_ms, "low_us": micro * t.low_ms, "high_us": micro * t.high_ms}
        for name, t in times.items()
    ]
