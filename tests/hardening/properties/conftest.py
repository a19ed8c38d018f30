"""Two profiles: the same few cases every time, or with MOSLD_FUZZ=1 many new ones.

MOSLD_FUZZ_TIMES: how many times as many, 20 by default. MOSLD_FUZZ_SEED: where they start, to see a failure again.
MOSLD_FUZZ_REPORT: a file to which the number of cases is written as JSON.
"""

import json
import os
import time
from pathlib import Path

import pytest

from benchmarks.timing.machine import installed, machine

from .profile import FUZZ, SEED, TIMES, tried

START = time.monotonic()


def pytest_report_header():
    return f"fuzzing: MOSLD_FUZZ_SEED={SEED} MOSLD_FUZZ_TIMES={TIMES}" if FUZZ else None


def pytest_terminal_summary(terminalreporter):
    if FUZZ:
        terminalreporter.write_line(f"{sum(tried.values())} cases; the same again: MOSLD_FUZZ_SEED={SEED} make fuzz")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """A process of pytest-xdist reports how many cases it tried."""
    tried.update(getattr(node, "workeroutput", {}).get("mosld_cases", {}))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    path, in_worker = os.environ.get("MOSLD_FUZZ_REPORT"), hasattr(session.config, "workerinput")
    if in_worker:
        session.config.workeroutput["mosld_cases"] = dict(tried)
    elif path:
        report = {
            "verb": "fuzz",
            "machine": {**machine(), "hypothesis": installed("hypothesis")},
            "cases": sum(tried.values()),
            "per_test": dict(sorted(tried.items())),
            "seconds": round(time.monotonic() - START, 1),
            "seed": SEED if FUZZ else None,
            "passed": exitstatus == 0,
        }
        Path(path).write_text(json.dumps(report, indent=1) + "\n")
