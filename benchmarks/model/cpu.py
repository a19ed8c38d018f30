"""The roofline model for the CPU at hand: its two rates, measured at start, and what they predict for each peer."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple

import torch

from ..peers.known import FROZEN, LORA, OURS, Mixture, parameters_of
from ..timing.shapes import DROPOUT, DTYPES, LayerShape
from . import methods
from .methods import Device, Problem

COPIED_BYTES = 64 << 20
# Of the product that is timed: the small one serves where the large one would take too long.
SIDES = (512, 2048)
LONGEST_S = 0.5


class Rates(NamedTuple):
    """Per second: bytes read plus bytes written by a copy, FLOP of a square product in one dtype."""

    copy_bytes: float
    matmul_flops: float


def measure_rates(dtype: torch.dtype) -> Rates:
    """Medians of a few runs on the CPU."""
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    copy_bytes = 2 * COPIED_BYTES / _median_s(lambda: target.copy_(source))
    flops = 0.0
    for side in SIDES:
        if flops and 2 * side**3 / flops > LONGEST_S:
            break
        a, b = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
        flops = 2 * side**3 / _median_s(partial(torch.mm, a, b))
    return Rates(copy_bytes, flops)


def rates_of(dtypes: Iterable[str]) -> dict[str, Rates]:
    """Name of a dtype -> its rates, each measured once."""
    return {dtype: measure_rates(DTYPES[dtype]) for dtype in dict.fromkeys(dtypes)}


def as_json(rates: Mapping[str, Rates]) -> dict[str, dict[str, float]]:
    """As result files hold the rates."""
    return {dtype: rate._asdict() for dtype, rate in rates.items()}


def _median_s(run: Callable[[], object], runs: int = 7) -> float:
    times = []
    for number in range(runs + 2):
        start = time.perf_counter()
        run()
        if number >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def problem(shape: LayerShape, rates: Rates, dtype: torch.dtype) -> Problem:
    device = Device(rates.matmul_flops, rates.copy_bytes, float("inf"), 0, 0)
    return Problem(device, *shape, dropout=DROPOUT > 0, element_bytes=dtype.itemsize)


def _without_dropout(method: Callable[[Problem], tuple[float, float]]) -> Callable[[Problem], tuple[float, float]]:
    return lambda p: method(p._replace(dropout=False))


def _equal_parameters(p: Problem) -> tuple[float, float]:
    linear = torch.nn.Linear(p.D_in, p.D_out, device="meta")
    count = parameters_of(linear, Mixture(p.R, p.E, p.K, DROPOUT))
    return methods.peft_eager(p._replace(R=max(1, round(count / (p.D_in + p.D_out)))))


# The peers that the model knows; the others are only measured.
MODELS: dict[str, Callable[[Problem], tuple[float, float]]] = {
    FROZEN: lambda p: (0.0, 0.0),
    OURS: methods.ours,
    "MoSLD, compiled": methods.ours,
    LORA: methods.peft_eager,
    "PEFT LoRA, no dropout": _without_dropout(methods.peft_eager),
    "PEFT LoRA, equal parameters": _equal_parameters,
    "PEFT LoRA, equal parameters, no dropout": _without_dropout(_equal_parameters),
    "fused LoRA pattern, no dropout": methods.accumulate_after,
    "concatenated product": methods.packed_a_dropout,
    "HydraLoRA loop": methods.expert_loop,
}


def predict(name: str, p: Problem) -> dict[str, float] | None:
    """Step -> modelled ms of the frozen layer and what this peer adds to it; None for a peer without a model."""
    if name not in MODELS:
        return None
    return _with_frozen(MODELS[name](p), p)


def limit(p: Problem) -> dict[str, float]:
    """Step -> ms below which no mixture of these sizes can go by the model: the frozen layer and the floor's
    traffic."""
    return _with_frozen(methods.floor(p), p)


def _with_frozen(added: tuple[float, float], p: Problem) -> dict[str, float]:
    """added: us of forward and of backward -> step -> ms of the frozen layer and what is added to it."""
    forward_us = p.base + added[0]
    backward_us = p.base + added[1]
    return {"forward": forward_us / 1e3, "backward": backward_us / 1e3, "both": (forward_us + backward_us) / 1e3}


def add_predictions(rows: list[dict], p: Problem) -> None:
    """Put into every timed row: `model_ms` and `over_model` (measured / predicted) where there is a model, and
    `of_limit`, the share of the limit that is reached (limit / measured)."""
    bounds = limit(p)
    for row in rows:
        if "median_ms" not in row:
            continue
        predicted = predict(row["name"], p)
        row["of_limit"] = bounds[row["step"]] / row["median_ms"]
        if predicted:
            row["model_ms"] = predicted[row["step"]]
            row["over_model"] = row["median_ms"] / row["model_ms"]
