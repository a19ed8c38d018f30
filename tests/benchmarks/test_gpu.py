"""What the GPU benchmark can show without a GPU: its parts at toy size, its kernels interpreted and compiled."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks.gpu import charts, checks, layers, measurements, profile
from benchmarks.gpu import run as gpu
from benchmarks.gpu.run import Part
from benchmarks.model.methods import DEVICES, METHODS
from benchmarks.peers import compare
from benchmarks.timing.shapes import LAYERS
from benchmarks.timing.timers import interleaved

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TOY = measurements.Setting(CPU, partial(interleaved, rounds=2), torch.float32)
SIZES = (40, 24, 16)


def program(name: str, **environment: str) -> subprocess.CompletedProcess:
    """tests/benchmarks/<name>.py in a process of its own: Triton decides at its import whether it interprets."""
    settings = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    settings = {**settings, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    path = ROOT / "tests" / "benchmarks" / f"{name}.py"
    return subprocess.run([sys.executable, str(path)], capture_output=True, text=True, cwd=ROOT, env=settings)


def test_without_a_gpu_the_command_says_so_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", "--out", str(tmp_path / "out")])
    assert command.main() == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_part_that_fails_is_recorded_and_the_rest_goes_on(tmp_path):
    path, seen = tmp_path / "gpu.json", []

    def fails(left, done):
        seen.append(json.loads(path.read_text())["parts"][0]["state"])  # written before the next part starts
        raise ValueError("no luck")

    last = Part("last", lambda left, done: [{"of": list(done), "left": left}])
    known = [Part("first", lambda left, done: [{"a": 1}]), Part("second", fails), last]
    result = {"parts": []}
    gpu.run_parts(known, result, path, 100.0, lost=lambda: False)
    assert json.loads(path.read_text()) == result and seen == ["done"]
    first, second, third = result["parts"]
    assert first["rows"] == [{"a": 1}] and second["error"] == "ValueError: no luck" and "raise" in second["line"]
    assert third["rows"][0]["of"] == ["first", "second"] and 0 < third["rows"][0]["left"] <= 100
    assert [part["state"] for part in result["parts"]] == ["done", "failed", "done"]


def test_a_used_budget_and_a_lost_gpu_leave_the_rest_out(tmp_path):
    parts = [Part("one", lambda left, done: 1 / 0), Part("two", lambda left, done: [])]  # type: ignore[arg-type]
    result = {"parts": []}
    gpu.run_parts(parts, result, tmp_path / "a.json", 100.0, lost=lambda: True)
    assert [part["state"] for part in result["parts"]] == ["failed", "left out"]
    assert "since 'one' failed" in result["parts"][1]["error"]
    result = {"parts": []}
    gpu.run_parts(parts, result, tmp_path / "a.json", 0.0, lost=lambda: False)
    assert {part["error"] for part in result["parts"]} == {"the budget of 0 s is used"}


def test_parts_are_chosen_by_name_and_unknown_ones_list_what_exists():
    known = gpu.parts(CPU, gpu.Scale())
    assert [part.name for part in gpu.choose(known, None)] == [part.name for part in known]
    assert [part.name for part in gpu.choose(known, ["layer gpu-4096", "rates"])] == [
        "rates", "layer gpu-4096 bfloat16", "layer gpu-4096 float16", "layer gpu-4096 float32"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="there is no part 'ratse'; there are: tests, sanitizer"):
        gpu.choose(known, ["ratse"])


def test_the_measurements_without_triton_run_at_toy_size():
    rows = measurements.rates(TOY, copied_bytes=4096, side=16)
    assert [row["name"] for row in rows] == ["copy", "product"] and rows[0]["gb_per_s"] > 0
    rows = measurements.accumulate(TOY, [SIZES, (8, 16, 24)])
    assert len(rows) == 8 and all(row["over_mm"] == 1 for row in rows if row["name"] == "mm")
    assert measurements.skinny(TOY, SIZES)[0]["tflop_per_s"] > 0
    assert [row["columns"] for row in measurements.tall(TOY, SIZES, R=4, E=2)] == [8, 8, 6, 6]


def test_the_carve_out_is_taken_back_and_missing_ones_are_told(monkeypatch):
    with measurements.sm_carve_out(0) as exists, pytest.raises(ZeroDivisionError):
        assert exists == hasattr(torch._C, "_set_sm_carveout_experimental")
        with measurements.sm_carve_out(4):
            assert not exists or torch._C._get_sm_carveout_experimental() == 4
            _ = 1 / 0
    assert not exists or torch._C._get_sm_carveout_experimental() is None
    monkeypatch.delattr(torch._C, "_set_sm_carveout_experimental", raising=False)
    with measurements.sm_carve_out(4) as exists:
        assert exists is False


def test_the_layer_comparison_goes_on_past_a_candidate_that_raises():
    timers = {"eager": partial(interleaved, rounds=2)}
    rows = layers.compare(CPU, timers, LAYERS["toy"], torch.float32, {"MoSLD triton": "for a reason"})
    assert rows[0] == {"name": "MoSLD triton", "error": "RuntimeError: for a reason"}
    both = {row["name"]: row for row in rows if row.get("step") == "both"}
    assert set(both) > {"frozen linear", "MoSLD eager", "PEFT LoRA", "HydraLoRA loop", "formula in plain torch"}
    assert both["frozen linear"]["ratio"] == 1 and both["frozen linear"]["saved_bytes"] == 0
    assert both["HydraLoRA loop"]["saved_bytes"] > both["PEFT LoRA"]["saved_bytes"] > 0
    assert {row.get("step") for row in rows[1:]} == {"forward", "backward", "both"}


def test_saved_bytes_are_what_the_operator_keeps():
    shape = LAYERS["toy"]
    layer = layers.modules_for(shape, torch.float32, CPU)["MoSLD eager"]
    x = torch.randn(shape.T, shape.D_in, requires_grad=True)
    saved = compare.memory_of(layer, x, torch.randn(shape.T, shape.D_out))["saved_bytes"]
    assert saved == 4 * shape.T * (shape.R + shape.E) + 8  # hidden, gates and the seed


def test_a_failed_capture_drops_one_candidate_and_not_its_rivals():
    def timer(candidates, *, rounds=2):
        for name in candidates:
            if candidates[name]() == "cannot":
                raise RuntimeError("capture\nlost")
        return interleaved(candidates, rounds)

    ready = {name: dict.fromkeys(layers.STEPS, lambda s=s: s) for name, s in (("frozen linear", 0), ("b", "cannot"))}
    rows = layers._timed("graph", timer, ready, {"frozen linear": {}, "b": {}})
    assert [(row["name"], row.get("error")) for row in rows[:2]] == [
        ("b", "RuntimeError: capture"), ("frozen linear", None)
    ]  # fmt: skip
    assert len(rows) == 6


def test_kernels_are_told_by_position_or_else_by_name():
    rows = profile.by_position([("a", 1.0), ("b", 5.0), ("a", 3.0)] * 3, rounds=3)
    assert [(row["position"], row["kernel"], row["median_us"]) for row in rows] == [
        (0, "a", 1.0), (1, "b", 5.0), (2, "a", 3.0)
    ]  # fmt: skip
    rows = profile.by_position([("a", 1.0), ("b", 5.0), ("b", 7.0), ("a", 3.0)], rounds=2)
    assert rows == [{"kernel": "a", "calls": 2, "median_us": 2.0}, {"kernel": "b", "calls": 2, "median_us": 6.0}]
    assert profile.by_position([], rounds=2) == []


def test_the_suite_for_gpus_is_told_as_absent_counted_or_failed(tmp_path):
    assert checks.tests(5, tmp_path / "nothing") == [{"name": "tests", "state": "absent"}]
    marked = "import pytest\npytestmark = pytest.mark.gpu\n"
    (tmp_path / "test_good.py").write_text(marked + "def test_good(): pass\ndef test_skips(): pytest.skip('no need')\n")
    rows = checks.tests(60, tmp_path)
    assert rows[0]["tests"] == 2 and rows[0]["skipped"] == 1 and rows[0]["exit_status"] == 0
    (tmp_path / "test_bad.py").write_text(marked + "def test_bad(): assert 1 == 2\n")
    with pytest.raises(checks.CheckFailed, match="test_bad") as failed:
        checks.tests(60, tmp_path)
    assert failed.value.rows[0]["failures"] == 1


@pytest.mark.slow
def test_the_sanitizer_is_told_as_absent_clean_or_failed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checks.sanitizer(5)[0]["state"] == "absent"
    tool = tmp_path / "compute-sanitizer"
    # A stand-in that prints its summary and runs the program as it is.
    tool.write_text('#!/bin/bash\nshift 4\necho "========= ERROR SUMMARY: 0 errors"\nexec "$@"\n')
    tool.chmod(0o755)
    rows = checks.sanitizer(120, device="cpu", backend="eager")
    assert [(row["name"], row["state"]) for row in rows] == [("memcheck", "clean"), ("racecheck", "clean")]
    assert rows[0]["summary"] == ["ERROR SUMMARY: 0 errors"]
    tool.write_text('#!/bin/bash\necho "RACECHECK SUMMARY: 1 hazard"\nexit 66\n')
    with pytest.raises(checks.CheckFailed, match="memcheck: failed; racecheck: failed"):
        checks.sanitizer(120)


def test_a_trial_tells_each_size_and_a_process_ends_at_its_limit():
    sizes = [(LAYERS["toy"], "float32"), (LAYERS["toy"]._replace(K=9), "float32")]
    with pytest.raises(checks.CheckFailed, match="1 of 2 sizes: ValueError: top_k must be in") as failed:
        checks.trial(60, sizes, device="cpu", backend="eager")
    assert [row["state"] for row in failed.value.rows] == ["ran", "failed"]
    broken = checks.failures(failed.value.rows)
    assert list(broken) == [checks.size_name(*sizes[1])]
    status, text = checks.run_process([sys.executable, "-uc", "import time; print('on'); time.sleep(60)"], 1.5)
    assert status is None and text in ("on\n", "")


def test_pictures_are_drawn_from_the_rows(tmp_path):
    names = ("frozen linear", "MoSLD triton", "PEFT LoRA", "HydraLoRA loop")
    rows = [{"name": n, "way": "graph", "step": "both", "ratio": 1.0 + 0.2 * i} for i, n in enumerate(names)]
    part = {"name": "layer gpu-4096 bfloat16", "rows": rows}
    assert charts.draw({"parts": [part, {"name": "rates"}]}, tmp_path) == ["overhead.png", "modelled.png"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("overhead.png", "modelled.png"))
    assert charts.draw({"parts": [{"name": "layer gpu-4096 bfloat16", "rows": []}]}, tmp_path) == []
    assert set(charts.MODELLED.values()) <= set(METHODS)
    shape = LAYERS["gpu-4096"]
    assert round(charts.modelled_percent("MoSLD triton", shape, DEVICES["H200"]), 1) == 13.5


@pytest.mark.slow
def test_the_whole_run_rehearsed_at_toy_size_in_the_interpreter():
    result = program("gpu_rehearsal", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr[-3000:]
    parts = {part["name"]: part for part in json.loads(result.stdout.splitlines()[-1])}
    failed = {name: part["error"] for name, part in parts.items() if part["state"] != "done"}
    assert not failed
    assert {row["left_free"] for row in parts["overlap"]["rows"] if row["name"] == "pair"} == {0, 4, 8, 12, 16}
    assert {row["name"] for row in parts["own_product"]["rows"]} > {"mm"} and len(parts["philox"]["rows"]) == 4
    layer = parts["layer toy float32"]["rows"]
    assert not [row for row in layer if "error" in row] and any(row["name"] == "MoSLD triton" for row in layer)
    assert parts["trial"]["rows"][0]["state"] == "ran"


@pytest.mark.slow
def test_the_kernels_are_right_in_the_interpreter():
    result = program("gpu_kernels_interpreted", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
def test_the_kernels_compile_for_sm_90_within_its_limits():
    result = program("gpu_kernels_compiled")
    assert result.returncode == 0, result.stderr[-3000:]
    compiled = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(compiled) == 8
    for kernel in compiled:
        assert kernel["shared"] <= 227 * 1024 and kernel["stack"] == 0, kernel  # where spilled registers go
        if kernel["name"] == "_linear_kernel":
            assert kernel["wgmma"] > 0 and kernel["tma"] > 0, kernel


def test_steps_give_gradients_of_x_and_of_what_is_trained():
    linear = nn.Linear(4, 3).requires_grad_(False)
    x = torch.randn(2, 4, requires_grad=True)
    steps = layers.steps_of(linear, x, torch.ones(2, 3))
    (forward,) = (steps["forward"](),)
    torch.testing.assert_close(forward, linear(x))
    for step in ("backward", "both"):
        for _ in range(2):  # the kept forward serves many backwards
            torch.testing.assert_close(steps[step]()[0], linear.weight.sum(0).expand(2, 4))
