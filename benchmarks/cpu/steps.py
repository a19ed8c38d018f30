"""The steps of MoSLD's operator on the CPU, one by one beside the frozen layer's products and what the model says.

On a GPU the steps are Triton kernels, which `python -m benchmarks gpu` times.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from mosld_kernels import eager
from mosld_kernels.reference import gates_from_logits

from ..model import cpu as cpu_model
from ..peers.compare import DROPOUT, inputs_of, timing_row
from ..timing.files import Writer
from ..timing.shapes import LAYERS, LayerShape, named
from ..timing.timers import Budget, interleaved, machine
from .layer import DTYPES, LONGEST_STEP_S

SCALE = 2.0


class Step(NamedTuple):
    """One timed call: FLOP and elements moved to and from memory, counted by its sizes."""

    name: str
    direction: str
    run: Callable[[], object]
    flops: int
    elements: int


def steps(shape: LayerShape, dtype: torch.dtype) -> list[Step]:
    """The operator's steps in their order; `frozen layer` rows are what they are measured against."""
    T, D_in, D_out, R, E, K = shape
    linear, x, dout = inputs_of(shape, dtype, torch.device("cpu"))
    x, weight, bias = x.detach(), linear.weight.detach(), linear.bias.detach()
    shared_a, expert_b, router = (torch.randn(size).to(dtype) for size in ((R, D_in), (D_out, E * R), (E, D_in)))
    seeds = iter(range(10**9))  # a new mask every time, as in training

    def prepare():
        return eager.prepare(shared_a, router, expert_b, torch.tensor([next(seeds)]), DROPOUT, dtype)

    down_weight, _, keep = prepare()
    assert down_weight is not None
    hidden, logits, gates, mixed = eager.down(x, down_weight, R, K, SCALE)
    dprojected = eager.up_backward(dout, expert_b, hidden, gates, None, K, SCALE)
    projected, columns = R + E, E * R
    big_in, big_out, small = T * D_in, T * D_out, T * (R + 2 * E)
    return [
        Step("frozen layer", "forward", lambda: F.linear(x, weight, bias), 2 * T * D_in * D_out,
             big_in + big_out + D_in * D_out),
        Step("prepare", "forward", prepare, 0, 3 * projected * D_in),
        Step("down, routing and mix", "forward", lambda: eager.down(x, down_weight, R, K, SCALE),
             2 * T * D_in * projected, big_in + T * columns + small),
        Step("  routing alone", "forward", lambda: gates_from_logits(logits, K), 0, 2 * T * E),
        Step("  mix alone", "forward", lambda: eager.mix(hidden, gates, K, SCALE, "expand"), 0, T * columns + small),
        Step("up", "forward", lambda: eager.up(x, None, None, mixed, expert_b), 2 * T * D_out * columns,
             big_out + T * columns),
        Step("frozen layer", "backward", lambda: torch.mm(dout, weight), 2 * T * D_in * D_out,
             big_in + big_out + D_in * D_out),
        Step("grad_expert_b", "backward", lambda: eager.grad_expert_b(dout, hidden, gates, K, SCALE, dtype),
             2 * T * D_out * columns, big_out + D_out * columns),
        Step("up_backward", "backward", lambda: eager.up_backward(dout, expert_b, hidden, gates, None, K, SCALE),
             2 * T * D_out * columns, big_out + T * columns),
        Step("down_backward", "backward", lambda: eager.down_backward(dprojected, x, keep, DROPOUT, R, dtype),
             2 * T * D_in * projected, big_in + small),
        Step("dx", "backward", lambda: eager.grad_x(dout, None, dprojected, down_weight), 2 * T * D_in * projected, big_in + small),
    ]  # fmt: skip


def run(names: Sequence[str], dtypes: Sequence[str], budget: Budget, out: Path | None) -> dict:
    """One table a shape and dtype, written to `out` after each.

    raises ValueError for a shape or dtype that does not exist, listing those that do.
    """
    unknown = [dtype for dtype in dtypes if dtype not in DTYPES]
    if unknown:
        raise ValueError(f"there is no {', '.join(unknown)}; there are: {', '.join(DTYPES)}")
    rates = {dtype: cpu_model.measure_rates(DTYPES[dtype]) for dtype in dtypes}
    head = {"verb": "kernels", "machine": machine(), "settings": {"dropout": DROPOUT, "rounds": budget.rounds}}
    writer = Writer({**head, "rates": {name: rate._asdict() for name, rate in rates.items()}, "tables": []}, out)
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
    times = interleaved({f"{s.direction} {s.name}": s.run for s in timed}, budget.rounds, label)
    whole = sum(times[f"{direction} frozen layer"].median_ms for direction in ("forward", "backward"))
    rows = []
    for step in timed:
        timing = times[f"{step.direction} {step.name}"]
        row = timing_row(step.name, timing, times[f"{step.direction} frozen layer"])
        moved = step.elements * DTYPES[dtype].itemsize
        model_ms = 1e3 * max(step.flops / rates.matmul_flops, moved / rates.copy_bytes)
        row |= {"direction": step.direction, "share": timing.median_ms / whole, "flops": step.flops, "bytes": moved}
        rows.append({**row, "model_ms": model_ms, "over_model": timing.median_ms / model_ms})
    return rows


def text(rows: Sequence[dict]) -> str:
    lines = [f"{'':34}{'median ms':>11}{'share of frozen':>17}{'model ms':>10}{'over model':>12}"]
    for row in rows:
        numbers = (
            f"{row['median_ms']:11.3f}{100 * row['share']:15.2f} %{row['model_ms']:10.3f}{row['over_model']:12.2f}"
        )
        lines.append(f"{row['direction']:10}{row['name']:24}{numbers}")
    return "\n".join(lines)
