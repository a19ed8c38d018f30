"""pytest-benchmark suite: every step of the operator on the CPU, against its own past.

pytest benchmarks --benchmark-autosave           time, and keep the result under .benchmarks/
pytest benchmarks --benchmark-compare            time, and show beside the last one kept
pytest benchmarks --benchmark-compare --benchmark-compare-fail=median:20%
"""

import pytest
import torch

from ..timing.shapes import LAYERS, LayerShape
from .steps import Step, steps


def named_steps(shape: LayerShape) -> dict[str, Step]:
    """Direction and name, without the indentation of parts -> step."""
    return {f"{step.direction} {step.name.strip()}": step for step in steps(shape, torch.float32)}


@pytest.mark.parametrize("name", named_steps(LAYERS["toy"]))
def test_step(benchmark, shape, name):
    step = named_steps(shape)[name]
    benchmark.group = step.direction
    assert benchmark(step.run) is not None
