"""pytest-benchmark suite: every step of the operator on the CPU, against its own past.

pytest benchmarks --benchmark-autosave           time, and keep the result under .benchmarks/
pytest benchmarks --benchmark-compare            time, and show beside the last one kept
pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:20%
"""

import pytest
import torch

from ..timing.shapes import LAYERS
from .steps import steps

NAMES = [f"{step.direction} {step.name.strip()}" for step in steps(LAYERS["toy"], torch.float32)]


@pytest.mark.parametrize("name", NAMES)
def test_step(benchmark, shape, name):
    step = next(s for s in steps(shape, torch.float32) if f"{s.direction} {s.name.strip()}" == name)
    benchmark.group = step.direction
    assert benchmark(step.run) is not None
