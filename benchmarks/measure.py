"""Timing, in one place: candidates run interleaved in one process, medians of many runs, never of one after the other.

Two noisy cores drift by tens of percent within a minute; interleaving gives every candidate the same share of it.
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version

import torch
from tqdm.auto import tqdm

WARM_UP = 3  # rounds that are run and not counted


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate: median, 20th and 80th percentile of its runs."""

    median_ms: float
    low_ms: float
    high_ms: float


def interleaved(candidates: Mapping[str, Callable[[], object]], rounds: int, label: str = "") -> dict[str, Timing]:
    """Run every candidate once per round, `rounds` times, and time each run."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in tqdm(range(rounds + WARM_UP), desc=label, unit="round", leave=False):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if number >= WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: _summary(runs) for name, runs in times.items()}


def _summary(runs: list[float]) -> Timing:
    fifths = statistics.quantiles(runs, n=5)
    return Timing(statistics.median(runs), fifths[0], fifths[-1])


def machine() -> dict[str, object]:
    """What a result depends on beside the code."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA", "not set"),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "peft", "transformers", "mosld")},
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
    """The commit that is measured, marked when the tree differs from it."""
    try:
        short = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(short, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
