"""Timing, in one place: candidates run interleaved in one process, medians of many runs, never of one after the other.

Two noisy cores drift by tens of percent within a minute, and a GPU's clock with its temperature; interleaving gives
every candidate the same share of it. The ways to time, from name -> callable to name -> `Timing`:

    interleaved_phases  as the next one, with forward and backward of one run timed apart
    interleaved   the host's clock around each run                                       CPU, and launches
    with_events   the device's clock around each run: what a user waits for, host included where it is slower
    with_graphs   the device's clock around replays of a CUDA graph: the kernels alone, nothing of the host
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from tqdm.auto import tqdm

# Rounds that are run and not counted: compilation, allocation and caches belong to no candidate.
WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate: median, 20th and 80th percentile of its runs, and the runs, one a round."""

    median_ms: float
    low_ms: float
    high_ms: float
    runs_ms: tuple[float, ...] = ()

    def over(self, other: "Timing") -> float:
        """The median over rounds of this time over `other`'s in the same round, which drift leaves alone."""
        return statistics.median(own / its for own, its in zip(self.runs_ms, other.runs_ms, strict=True))


Steps = dict[str, Timing]
Candidates = Mapping[str, Callable[[], object]]


class Timer(Protocol):
    """Any of the three functions below, with its rounds and label bound."""

    def __call__(self, candidates: Candidates, *, rounds: int = ...) -> dict[str, Timing]: ...


def interleaved(candidates: Candidates, rounds: int, label: str = "") -> dict[str, Timing]:
    """Run every candidate once per round, `rounds` times, and time each run."""
    times: dict[str, list[float]] = defaultdict(list)
    for number in tqdm(range(rounds + WARM_UP), desc=label, unit="round", leave=False):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if number >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - start))
    return _summaries(times)


class Budget(NamedTuple):
    """Rounds end after `rounds`, or after `seconds` once there are `least`."""

    rounds: int = 60
    seconds: float = float("inf")
    least: int = 5


Phases = tuple[Callable[[], Any], Callable[[Any], object]]  # forward, and backward of what it returned


def interleaved_phases(candidates: Mapping[str, Phases], budget: Budget, label: str = "") -> dict[str, Steps]:
    """Name -> "forward", "backward" and "both" -> Timing, every candidate once per round."""
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    begin = time.perf_counter()
    for number in tqdm(range(budget.rounds + WARM_UP), desc=label, unit="round", leave=False):
        if number >= budget.least + WARM_UP and time.perf_counter() - begin > budget.seconds:
            break
        for name, (forward, backward) in candidates.items():
            start = time.perf_counter()
            out = forward()
            middle = time.perf_counter()
            backward(out)
            end = time.perf_counter()
            # What forward returned is freed outside every other candidate's time.
            del out
            if number >= WARM_UP:
                times[name].append((1e3 * (middle - start), 1e3 * (end - middle)))
    return {name: _steps(runs) for name, runs in times.items()}


def _steps(runs: list[tuple[float, float]]) -> Steps:
    forward, backward = zip(*runs, strict=True)
    both = list(map(sum, runs))
    return {"forward": _summary(forward), "backward": _summary(backward), "both": _summary(both)}


def _summaries(times: Mapping[str, Sequence[float]]) -> dict[str, Timing]:
    return {name: _summary(runs) for name, runs in times.items()}


def _summary(runs: Sequence[float]) -> Timing:
    # The inclusive method never goes beyond what was measured.
    fifths = statistics.quantiles(runs, n=5, method="inclusive")
    return Timing(statistics.median(runs), fifths[0], fifths[-1], tuple(runs))


def with_events(candidates: Candidates, rounds: int, label: str = "") -> dict[str, Timing]:
    """As `interleaved`, by CUDA events, with the L2 cache emptied before each run."""
    empty = cache_emptier()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = defaultdict(list)
    for number in tqdm(range(rounds + WARM_UP), desc=label, unit="round", leave=False):
        for name, run in candidates.items():
            start, end = _event(), _event()
            empty()
            start.record()
            run()
            end.record()
            if number >= WARM_UP:
                events[name].append((start, end))
    torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for name, pairs in events.items():
        for start, end in pairs:
            times[name].append(start.elapsed_time(end))
    return _summaries(times)


def with_graphs(candidates: Candidates, rounds: int, label: str = "", repeats: int = 10) -> dict[str, Timing]:
    """As `interleaved`, each run `repeats` times in one CUDA graph with a cold L2 cache before each.

    The time of a graph that only empties the cache, replayed in the same round, is taken off. The current stream must
    not be the default one, and a candidate must be allowed inside a capture: no waiting, no copy from the host.
    """
    empty = cache_emptier()
    only_empties = _captured(empty, lambda: None, repeats)
    graphs = {name: _captured(empty, run, repeats) for name, run in candidates.items()}
    times: dict[str, list[float]] = defaultdict(list)
    for number in tqdm(range(rounds + WARM_UP), desc=label, unit="round", leave=False):
        emptying_ms = _replayed(only_empties)
        for name, graph in graphs.items():
            elapsed_ms = _replayed(graph)
            if number >= WARM_UP:
                times[name].append((elapsed_ms - emptying_ms) / repeats)
    return _summaries(times)


def _captured(empty: Callable[[], object], run: Callable[[], object], repeats: int) -> torch.cuda.CUDAGraph:
    # Kernels compile, choose algorithms and allocate workspaces before the capture.
    for _ in range(WARM_UP):
        empty()
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(repeats):
            empty()
            run()
    return graph


def _replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of one replay."""
    start, end = _event(), _event()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def cache_emptier() -> Callable[[], object]:
    """-> a function that reads twice the L2 cache of the current GPU.

    It reads because lines that it had written would wait to be stored, at the expense of the run that comes next.
    """
    l2_bytes = getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0) or 64 << 20
    # Numbers of four bytes, so twice the cache.
    filler = torch.zeros(l2_bytes // 2, device="cuda")
    total = torch.zeros((), device="cuda")
    return lambda: torch.sum(filler, dim=0, out=total)
