"""Timers on the device's clock without a device, and what a result says of its machine."""

import types

import pytest
import torch

from benchmarks.timing import machine, timers


def test_graph_times_leave_the_emptying_of_the_cache_out(monkeypatch):
    monkeypatch.setattr(timers, "cache_emptier", lambda: lambda: 30.0)
    monkeypatch.setattr(timers, "_captured", lambda empty, run, repeats: repeats * (empty() + (run() or 0.0)) + 5)
    monkeypatch.setattr(timers, "_replayed", lambda graph: graph)
    times = timers.with_graphs({"a": lambda: 2.0, "b": lambda: 7.0}, rounds=3)
    assert {name: t.median_ms for name, t in times.items()} == {"a": pytest.approx(2.0), "b": pytest.approx(7.0)}


def test_event_times_leave_the_emptying_of_the_cache_out(monkeypatch):
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):
            return end.at - self.at

    def takes(ms):
        return lambda: clock.__setitem__(0, clock[0] + ms)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timers, "cache_emptier", lambda: takes(30.0))
    times = timers.with_events({"a": takes(2.0), "b": takes(7.0)}, rounds=4)
    assert times["a"].median_ms == pytest.approx(2.0) and times["b"].high_ms == pytest.approx(7.0)


def test_the_machine_is_told_where_the_library_is_not_installed(monkeypatch):
    def missing(package):
        raise machine.PackageNotFoundError(package)

    monkeypatch.setattr(machine, "version", missing)
    assert machine.machine()["mosld"] == "not installed"


def test_the_gpu_is_described(monkeypatch):
    properties = types.SimpleNamespace(name="a GPU", multi_processor_count=132, total_memory=1, L2_cache_size=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    monkeypatch.setenv("PATH", "")
    told = machine.gpu()
    assert told["gpu"] == "a GPU" and told["driver"] == "unknown" and {"cuda", "triton"} <= set(told)
