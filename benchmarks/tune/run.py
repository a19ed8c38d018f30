"""Tile sizes measured on the GPU at hand: candidates for each kernel and layer, beside the row that is taken today.

The compiler rules candidates out first; each of the rest is held to the default's result, then all are timed in one
interleaved run with a cold L2 cache. Printed are rows for tiles.py, and written is a file for MOSLD_TILES.
"""

import argparse
import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mosld_kernels.gating import gates_from_logits
from mosld_kernels.triton import down, down_backward, grad_expert_b, tiles, up_backward
from mosld_kernels.triton.launch import properties
from mosld_kernels.triton.tiles import KERNELS, Row, Tile

from ..gpu.device import context_is_lost
from ..timing.files import write
from ..timing.names import require_known
from ..timing.shapes import DROPOUT, DTYPES, LAYERS
from ..timing.timers import Timer, with_graphs
from .candidates import Case, candidates, faults, forced
from .choice import Measurement, choose, file_rows, summary, times_text

TIMER = partial(with_graphs, rounds=15)
SCALE = 2.0
# Two roundings to bfloat16 differ by 0.002 of the norm, two orders of a float32 sum by 1e-6; one token of 8192 that is
# wrong is 0.011 of it.
TOLERANCES = {2: 0.008, 4: 1e-4}
Launch = Callable[[], tuple[Tensor, ...]]


def cases(kernels: Sequence[str], names: Sequence[str], dtypes: Sequence[str], arch: int) -> list[Case]:
    """Shape by shape, so that an interruption leaves whole shapes; raises ValueError for what does not exist."""
    require_known("kernel", kernels, KERNELS)
    require_known("shape", names, LAYERS)
    require_known("dtype", dtypes, DTYPES)
    wanted = []
    for name, dtype, kernel in itertools.product(names, dtypes, kernels):
        wanted.append(Case(kernel, name, LAYERS[name], dtype, arch))
    # A name given twice is measured once.
    return list(dict.fromkeys(wanted))


def launch_of(case: Case, device: torch.device) -> tuple[Launch, Tensor]:
    """-> the launch on tensors of its own, and its large operand"""
    (T, D_in, D_out, R, E, K), dtype = case.shape, DTYPES[case.dtype]
    random = partial(torch.randn, device=device)
    if case.kernel == "down":
        # Eighths: their products and sums are exact in any order, so that no tile decides which of two experts is next.
        x = ((8 * random(T, D_in)).round() / 8).to(dtype)
        router = (8 * random(E, D_in)).round() / 8
        down_weight = torch.cat((random(R, D_in), router / 64)).to(dtype)
        return lambda: down(x, down_weight, R, K, SCALE), x
    if case.kernel == "grad_down":
        x, dprojected = random(T, D_in).to(dtype), random(T, R + E).to(dtype)
        seed = torch.tensor([1234567], device=device)
        return lambda: down_backward(dprojected, x, seed, DROPOUT, R, torch.float32), x
    dout, hidden = random(T, D_out).to(dtype), random(T, R).to(dtype)
    gates = gates_from_logits(random(T, E), K)
    if case.kernel == "grad_expert_b":
        return lambda: (grad_expert_b(dout, hidden, gates, K, SCALE, torch.float32),), dout
    expert_b, dlogits = random(D_out, E * R).to(dtype), random(T, E)
    return lambda: (up_backward(dout, expert_b, hidden, gates, dlogits, K, SCALE),), dout


def measure(case: Case, chosen: Sequence[Tile], device: torch.device, timer: Timer) -> Measurement:
    """Check every tile against the default, the first of `chosen`, and time those that are right.

    raises RuntimeError where the default itself gives no finite result or takes no time that can be measured.
    """
    torch.manual_seed(0)
    (launch, operand), default = launch_of(case, device), case.default()
    runs = {tile: partial(_run, case.row(tile), launch) for tile in chosen}
    dropped = wrong(runs, default.tile, TOLERANCES[case.element_bytes()])
    right = {str(tile): run for tile, run in runs.items() if tile not in dropped}
    timings = timer(right)
    times = {}
    for tile in runs:
        if tile in dropped:
            continue
        timing = timings[str(tile)]
        if timing.median_ms > 0:
            times[tile] = timing
        else:
            dropped[tile] = "no time measured"
    if default.tile in dropped:
        raise RuntimeError(f"the default {default.tile}: {dropped[default.tile]}")
    return Measurement(case, default, times, dropped, operand.numel() * operand.element_size())


def _run(row: Row, launch: Launch) -> tuple[Tensor, ...]:
    with forced(row):
        return launch()


def wrong(runs: Mapping[Tile, Launch], default: Tile, tolerance: float) -> dict[Tile, str]:
    """Why a tile may not win: it does not run, or its result is not the default's."""
    reasons: dict[Tile, str] = {}
    with unwritten_memory_is_nan():
        truth = [tensor.float() for tensor in runs[default]()]
        for tile, run in runs.items():
            try:
                error = max(_error(*pair) for pair in zip(run(), truth, strict=True))
            except Exception as problem:  # more shared memory than there is, or whatever the driver says
                reasons[tile] = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
                continue
            if not error <= tolerance:
                reasons[tile] = f"relative error {error:.2g} to the default's result"
    return reasons


def _error(result: Tensor, truth: Tensor) -> float:
    """Relative to the norm; NaN where either has one, which `max` might pass over, made infinite."""
    error = ((result.float() - truth).norm() / truth.norm().clamp_min(1e-30)).item()
    return error if error == error else float("inf")


@contextlib.contextmanager
def unwritten_memory_is_nan() -> Iterator[None]:
    """New tensors are filled: what a tile leaves out would else be the last tile's result, still in memory."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def survivors(wanted: Sequence[Case]) -> dict[Case, list[Tile]]:
    """The candidates that the compiler has nothing against, and the default in any event; prints how many fell."""
    tried = {case: candidates(case) for case in wanted}
    found = faults(tried)
    dropped = sum(bool(reasons) for reasons in found.values())
    print(f"{len(found)} launches compiled: {dropped} candidates dropped before they run")
    left: dict[Case, list[Tile]] = {}
    for case, (default, *others) in tried.items():
        left[case] = [default]
        for tile in others:
            if not found[case, tile]:
                left[case].append(tile)
    return left


def measure_all(
    chosen: Mapping[Case, Sequence[Tile]],
    device: torch.device,
    timer: Timer,
    ends_at: float,
    out: Path | None = None,
    lost: Callable[[], bool] = lambda: False,
) -> list[Measurement]:
    """Measure case by case and write the rows so far to `out` after each; what was decided is printed at the end,
    also at an interruption. A case that fails is reported and the rest goes on, unless the GPU is `lost`.

    ends_at: by time.monotonic(); no case is started later.
    """
    measured: list[Measurement] = []
    try:
        for case in tqdm(chosen, desc="tune", unit="case"):
            if time.monotonic() >= ends_at:
                tqdm.write("the budget is used: no further case is measured")
                break
            try:
                measured.append(measure(case, chosen[case], device, timer))
            except Exception as error:  # one case is no reason to lose the others
                tqdm.write(f"{case} failed: {type(error).__name__}: {error}")
                if lost():
                    break
                continue
            tqdm.write(times_text(measured[-1]))
            if out:
                write([as_json(row) for row in rows(measured)], out)
    finally:
        if measured:
            print(summary(choose(measured)))
    return measured


def rows(measured: Sequence[Measurement]) -> list[Row]:
    """What a file for MOSLD_TILES holds after these measurements; those of one GPU."""
    arch = measured[0].case.arch
    return file_rows(choose(measured), tiles.rows_for(arch, os.environ.get("MOSLD_TILES")), arch)


def as_json(row: Row) -> dict:
    """What `tiles.read_rows` reads."""
    return {**row._asdict(), "tile": row.tile._asdict()}


def tune(options: argparse.Namespace, device: torch.device) -> int:
    """-> 0 where every case was measured, 1 where one failed or was left out; raises ValueError for unknown names."""
    ends_at = time.monotonic() + options.budget
    wanted = cases(options.kernel or KERNELS, options.shape, options.dtype, properties(device)[0])
    chosen = survivors(wanted)
    # Captures may not be on the default stream.
    with torch.cuda.stream(torch.cuda.Stream(device)):
        measured = measure_all(chosen, device, TIMER, ends_at, options.out, context_is_lost)
    print(f"{len(measured)} of {len(wanted)} cases measured on {torch.cuda.get_device_name(device)}")
    return 0 if len(measured) == len(wanted) else 1
