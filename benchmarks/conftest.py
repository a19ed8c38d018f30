"""Fixtures of the pytest-benchmark suites: `pytest benchmarks --benchmark-autosave` times them at a real size,
`--benchmark-disable` runs each once at toy size."""

import pytest

from .timing.shapes import LAYERS, LayerShape


@pytest.fixture
def shape(request) -> LayerShape:
    return LAYERS["toy" if request.config.getoption("benchmark_disable") else "cpu-1024"]
