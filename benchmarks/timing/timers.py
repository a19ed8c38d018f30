"""Timing, in one place: candidates run interleaved in one process, medians of many runs, never of one after the other.

Two noisy cores drift by tens of percent within a minute, and a GPU's clock with its temperature; interleaving gives
every candidate the same share of it. The ways to time, from name -> callable to name -> `Timing`:

    interleaved_phases  as the next one, with forward and backward of one run timed apart
    interleaved   the host's clock around each run                                       CPU, and launches
    with_events   the device's clock around each run: what a user waits for, host included where it is slower
    with_graphs   the device's clock around replays of a CUDA graph: the kernels alone, nothing of the host
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from tqdm.auto import tqdm

WARM_UP = 3  # rounds that are run and not counted


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate: median, 20th and 80th percentile of its runs, and the runs, one a round."""

    median_ms: float
    low_ms: float
    high_ms: float
    runs_ms: tuple[float, ...] = ()

    def over(self, other: "Timing") -> float:
        """The median over rounds of this candidate's time over `other`'s in the same round, which drift leaves alone."""
        return statistics.median(own / its for own, its in zip(self.runs_ms, other.runs_ms, strict=True))


Steps = dict[str, Timing]
Candidates = Mapping[str, Callable[[], object]]


class Timer(Protocol):
    """Any of the three functions below, with its rounds and label bound."""

    def __call__(self, candidates: Candidates, *, rounds: int = ...) -> dict[str, Timing]: ...


def interleaved(candidates: Candidates, rounds: int, label: str = "") -> dict[str, Timing]:
    """Run every candidate once per round, `rounds` times, and time each run."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in tqdm(range(rounds + WARM_UP), desc=label, unit="round", leave=False):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if number >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: _summary(runs) for name, runs in times.items()}


class Budget(NamedTuple):
    """Rounds end after `rounds`, or after `seconds` once there are `least`."""

    rounds: int = 60
    seconds: float = float("inf")
    least: int = 5


Phases = tuple[Callable[[], Any], Callable[[Any], object]]  # forward, and backward of what it returned


def interleaved_phases(candidates: Mapping[str, Phases], budget: Budget, label: str = "") -> dict[str, Steps]:
    """Name -> "forward", "backward" and "both" -> Timing, every candidate once per round."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
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
            del out  # freed outside every other candidate's time
            if number >= WARM_UP:
                times[name].append((1e3 * (middle - start), 1e3 * (end - middle)))
    return {name: _steps(runs) for name, runs in times.items()}


def _steps(runs: list[tuple[float, float]]) -> Steps:
    forward, backward = (list(phase) for phase in zip(*runs, strict=True))
    both = [sum(phases) for phases in runs]
    return {"forward": _summary(forward), "backward": _summary(backward), "both": _summary(both)}


def _summary(runs: list[float]) -> Timing:
    fifths = statistics.quantiles(runs, n=5, method="inclusive")  # never beyond what was measured
    return Timing(statistics.median(runs), fifths[0], fifths[-1], tuple(runs))


def with_events(candidates: Candidates, rounds: int, label: str = "") -> dict[str, Timing]:
    """As `interleaved`, by CUDA events, with the L2 cache emptied before each run."""
    empty = cache_emptier()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in candidates}
    for number in tqdm(range(rounds + WARM_UP), desc=label, unit="round", leave=False):
        for name, run in candidates.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            empty()
            start.record()
            run()
            end.record()
            if number >= WARM_UP:
                events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: _summary([start.elapsed_time(end) for start, end in pairs]) for name, pairs in events.items()}


def with_graphs(candidates: Candidates, rounds: int, label: str = "", repeats: int = 10) -> dict[str, Timing]:
    """As `interleaved`, each run `repeats` times in one CUDA graph with a cold L2 cache before each.

    The time of a graph that only empties the cache, replayed in the same round, is taken off. The current stream must
    not be the default one, and a candidate must be allowed inside a capture: no waiting, no copy from the host.
    """
    empty = cache_emptier()
    graphs = {name: _captured(empty, run, repeats) for name, run in {"": lambda: None, **candidates}.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in tqdm(range(rounds + WARM_UP), desc=label, unit="round", leave=False):
        elapsed = {name: _replayed(graph) for name, graph in graphs.items()}
        if number >= WARM_UP:
            for name in candidates:
                times[name].append((elapsed[name] - elapsed[""]) / repeats)
    return {name: _summary(runs) for name, runs in times.items()}


def _captured(empty: Callable[[], object], run: Callable[[], object], repeats: int) -> torch.cuda.CUDAGraph:
    for _ in range(WARM_UP):  # compiles, chooses algorithms and allocates workspaces before the capture
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
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def cache_emptier() -> Callable[[], object]:
    """-> a function that reads twice the L2 cache of the current GPU.

    It reads because lines that it had written would wait to be stored, at the expense of the run that comes next.
    """
    l2_bytes = getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0) or 64 << 20
    filler, total = torch.zeros(l2_bytes // 2, device="cuda"), torch.zeros((), device="cuda")  # four bytes each
    return lambda: torch.sum(filler, dim=0, out=total)


def gpu() -> dict[str, object]:
    """What a GPU's result depends on beside the code and the host."""
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "triton": installed("triton"),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def installed(package: str) -> str:
    """The package's version, also where the library runs from its folder without an installation."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, object]:
    """What a result depends on beside the code."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA", "not set"),
        "python": platform.python_version(),
        **{package: installed(package) for package in ("torch", "peft", "transformers", "mosld")},
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        flags = " with AMX" if torch.cpu._is_amx_tile_supported() else ""
        return f"{names[0]}, {len(names)} logical cores{flags}"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit that is measured, marked when the code differs from it; results and documents may differ."""
    git = ["git", "-C", str(Path(__file__).parents[2])]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        code = ["mosld", "mosld_kernels", ":(glob)benchmarks/**/*.py"]
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code], capture_output=True).returncode
        return commit.stdout.strip() + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
