"""The steps of MoSLD's operator on the CPU, one by one beside the frozen layer's products and what the model says.

On a GPU the steps are Triton kernels, which `python -m benchmarks gpu` times.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from mosld_kernels import eager
from mosld_kernels.gating import gates_from_logits

from ..model import cpu as cpu_model
from ..peers.compare import inputs_of, timing_row
from ..timing.files import Writer
from ..timing.machine import machine
from ..timing.names import require_known
from ..timing.options import add_budget, add_out, budget_of
from ..timing.shapes import DROPOUT, DTYPES, LAYERS, LayerShape, named
from ..timing.timers import Budget, interleaved
from .layer import LONGEST_STEP_S

SCALE = 2.0


class Step(NamedTuple):
    """One timed call: FLOP and elements moved to and from memory, counted by its sizes."""

    name: str
    direction: str
    run: Callable[[], object]
    flops: int
    elements: int

    @property
    def label(self) -> str:
        """Its direction and name, which tell it from all others."""
        return f"{self.direction} {self.name}"


def steps(shape: LayerShape, dtype: torch.dtype) -> list[Step]:
    """The operator's steps in their order; `frozen layer` rows are what they are measured against."""
    T, D_in, D_out, R, E, K = shape
    linear, x, dout = inputs_of(shape, dtype, torch.device("cpu"))
    x, weight, bias = x.detach(), linear.weight.detach(), linear.bias.detach()
    shared_a = torch.randn(R, D_in).to(dtype)
    expert_b = torch.randn(D_out, E * R).to(dtype)
    router = torch.randn(E, D_in).to(dtype)
    # Every run draws a new mask, as in training.
    seeds = itertools.count()

    def prepare():
        return eager.prepare(shared_a, router, expert_b, torch.tensor([next(seeds)]), DROPOUT, dtype)

    down_weight, _, keep = prepare()
    assert down_weight is not None
    hidden, logits, gates, mixed = eager.down(x, down_weight, R, K, SCALE)
    dprojected = eager.up_backward(dout, expert_b, hidden, gates, None, K, SCALE)
    base_flops = 2 * T * D_in * D_out
    base_elements = T * D_in + T * D_out + D_in * D_out
    down_flops = 2 * T * D_in * (R + E)
    up_flops = 2 * T * D_out * E * R
    mixed_elements = T * E * R
    routing_elements = T * (R + 2 * E)  # hidden, logits and gates

    forward = [
        Step("frozen layer", "forward", lambda: F.linear(x, weight, bias), base_flops, base_elements),
        Step("prepare", "forward", prepare, 0, 3 * (R + E) * D_in),
        Step(
            "down, routing and mix", "forward", lambda: eager.down(x, down_weight, R, K, SCALE),
            down_flops, T * D_in + mixed_elements + routing_elements,
        ),
        Step("  routing alone", "forward", lambda: gates_from_logits(logits, K), 0, 2 * T * E),
        Step(
            "  mix alone", "forward", lambda: eager.mix(hidden, gates, K, SCALE, "expand"),
            0, mixed_elements + routing_elements,
        ),
        Step("up", "forward", lambda: eager.up(x, None, None, mixed, expert_b), up_flops, T * D_out + mixed_elements),
    ]  # fmt: skip
    backward = [
        Step("frozen layer", "backward", lambda: torch.mm(dout, weight), base_flops, base_elements),
        Step(
            "grad_expert_b", "backward", lambda: eager.grad_expert_b(dout, hidden, gates, K, SCALE, dtype),
            up_flops, T * D_out + D_out * E * R,
        ),
        Step(
            "up_backward", "backward", lambda: eager.up_backward(dout, expert_b, hidden, gates, None, K, SCALE),
            up_flops, T * D_out + mixed_elements,
        ),
        Step(
            "down_backward", "backward", lambda: eager.down_backward(dprojected, x, keep, DROPOUT, R, dtype),
            down_flops, T * D_in + routing_elements,
        ),
        Step(
            "dx", "backward", lambda: eager.grad_x(dout, None, dprojected, down_weight),
            down_flops, T * D_in + routing_elements,
        ),
    ]  # fmt: skip
    return forward + backward


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks kernels`."""
    parser.add_argument("--shape", nargs="+", default=["cpu-1024"], help=f"of {', '.join(LAYERS)} (default: cpu-1024)")
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="of float32, bfloat16, float16")
    add_budget(parser, rounds=60, seconds=60)
    add_out(parser)


def run(options: argparse.Namespace) -> int:
    """raises ValueError for a shape or dtype that does not exist, listing those that do."""
    measure_shapes(options.shape, options.dtype, budget_of(options), options.out)
    return 0


def measure_shapes(names: Sequence[str], dtypes: Sequence[str], budget: Budget, out: Path | None) -> dict:
    """One table a shape and dtype, written to `out` after each.

    raises ValueError for a shape or dtype that does not exist, listing those that do.
    """
    require_known("", dtypes, DTYPES)
    rates = cpu_model.rates_of(dtypes)
    head = {"verb": "kernels", "machine": machine(), "settings": {"dropout": DROPOUT, "rounds": budget.rounds}}
    writer = Writer({**head, "rates": cpu_model.as_json(rates), "tables": []}, out)
    for name, shape in named(LAYERS, names).items():
        for dtype in dtypes:
            entry = {"name": name, "shape": shape._asdict(), "dtype": dtype}
            step_s = 2 * cpu_model.problem(shape, rates[dtype], DTYPES[dtype]).base / 1e6
            if step_s > LONGEST_STEP_S:
                entry["left_out"] = f"{dtype} products are slow here: the frozen layer would take {step_s:.0f} s a step"
                print(f"\n{name}, {dtype}: left out: {entry['left_out']}")
            else:
                entry["rows"] = measure(shape, dtype, rates[dtype], budget, f"{name} {dtype}")
                print(f"\n{shape}, {dtype}: the operator's steps\n{text(entry['rows'])}")
            writer.add(entry)
    return writer.result


def measure(shape: LayerShape, dtype: str, rates: cpu_model.Rates, budget: Budget, label: str) -> list[dict]:
    """-> one row a step: its times, `ratio` over the frozen layer's step of its direction, `share` of both, `flops`,
    `bytes`, `model_ms` and `over_model` (measured / predicted)."""
    timed = steps(shape, DTYPES[dtype])
    times = interleaved({step.label: step.run for step in timed}, budget.rounds, label)
    whole_ms = times["forward frozen layer"].median_ms + times["backward frozen layer"].median_ms
    rows = []
    for step in timed:
        timing = times[step.label]
        moved = step.elements * DTYPES[dtype].itemsize
        model_ms = 1e3 * max(step.flops / rates.matmul_flops, moved / rates.copy_bytes)
        rows.append({
            **timing_row(step.name, timing, times[f"{step.direction} frozen layer"]),
            "direction": step.direction, "share": timing.median_ms / whole_ms, "flops": step.flops, "bytes": moved,
            "model_ms": model_ms, "over_model": timing.median_ms / model_ms,
        })  # fmt: skip
    return rows


def text(rows: Sequence[dict]) -> str:
    lines = [f"{'':34}{'median ms':>11}{'share of frozen':>17}{'model ms':>10}{'over model':>12}"]
    for row in rows:
        measured = f"{row['median_ms']:11.3f}{100 * row['share']:15.2f} %"
        modelled = f"{row['model_ms']:10.3f}{row['over_model']:12.2f}"
        lines.append(f"{row['direction']:10}{row['name']:24}{measured}{modelled}")
    return "\n".join(lines)
