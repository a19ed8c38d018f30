"""What is measured on the CPU, at toy size: a failing peer, an interruption and a slow machine lose nothing else."""

import json

import torch

from benchmarks.cpu import calls, layer, memory, scaling, steps, training
from benchmarks.model import cpu as cpu_model
from benchmarks.peers.known import FROZEN, LORA, OURS, PEERS, choose
from benchmarks.report import page
from benchmarks.timing.shapes import LAYERS
from benchmarks.timing.timers import Budget

from .commands import run

TWICE = Budget(2, 60.0, 2)
TOY = LAYERS["toy"]
FEW = choose((OURS, LORA))


def test_a_failing_peer_is_told_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    def broken(linear, mixture):
        raise RuntimeError("no luck\nat all")

    monkeypatch.setitem(PEERS, "broken", broken)
    out = tmp_path / "layer.json"
    layer.measure_tables(layer.layers(["toy"], ["float32"]), choose((OURS, "broken")), TWICE, out)
    rows = json.loads(out.read_text())["tables"][0]["rows"]
    assert {"name": "broken", "failure": "RuntimeError: no luck"} in rows
    assert {row["name"] for row in rows} == {FROZEN, OURS, "broken"}
    assert "no luck" in capsys.readouterr().out
    memory.measure_shapes(["toy"], "float32", choose((OURS, "broken")), out)
    assert {"name": "broken", "failure": "RuntimeError: no luck"} in json.loads(out.read_text())["tables"][0]["rows"]


def test_an_interruption_keeps_what_was_measured(monkeypatch, tmp_path):
    measured = layer.compare
    seen = []

    def interrupted(*args, **kwargs):
        if seen:
            raise KeyboardInterrupt
        seen.append(1)
        return measured(*args, **kwargs)

    monkeypatch.setattr(layer, "compare", interrupted)
    out = tmp_path / "layer.json"
    code = run(monkeypatch, "layer", "--shape", "toy", "--peers", OURS, "--rounds", 2, "--out", out)
    assert code == 130
    tables = json.loads(out.read_text())["tables"]
    assert len(tables) == 1 and tables[0]["rows"]


def test_sweeps_vary_one_size_and_keep_k_within_e():
    shapes = [table.shape for table in scaling.tables(["E", "T", "R", "K"])]
    assert {s.E for s in shapes} == {1, 2, 4, 8, 16, 32, 64} and {s.R for s in shapes} == {4, 8, 16, 32, 64, 128}
    assert {s.T for s in shapes} == {1, 16, 256, 1024, 4096, 16384, 65536} and {s.K for s in shapes} == {1, 2, 4, 8}
    assert all(s.K <= s.E for s in shapes)
    assert [table.dtype for table in scaling.tables(["dtype"])] == ["float32", "bfloat16", "float16"]


def test_what_is_too_slow_here_is_left_out_with_the_reason(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(layer, "LONGEST_STEP_S", 0.0)
    layer.measure_tables(layer.layers(["toy"], ["float32"]), FEW, TWICE, tmp_path / "layer.json")
    entry = json.loads((tmp_path / "layer.json").read_text())["tables"][0]
    assert "float32 products run at" in entry["left_out"] and "rows" not in entry
    assert "left out" in capsys.readouterr().out
    page.write_page([tmp_path / "layer.json"], tmp_path / "page.md")
    assert "Left out: float32 products run at" in (tmp_path / "page.md").read_text()


def test_every_step_of_the_operator_is_timed_beside_its_model():
    rates = cpu_model.Rates(copy_bytes=10e9, matmul_flops=100e9)
    rows = steps.measure(TOY, "float32", rates, TWICE, "toy")
    names = {row["name"].strip() for row in rows}
    assert {"down, routing and mix", "up", "grad_expert_b", "up_backward", "down_backward", "dx"} <= names
    assert all(row["model_ms"] > 0 and row["over_model"] > 0 for row in rows if row["bytes"])


def test_every_targeted_linear_of_the_small_model_is_adapted_and_the_base_is_shared():
    size = training.SIZES["toy"]
    base = training.base_model(size)
    for which, count in (("all", 7), ("qv", 2)):
        model = training.adapted(base, OURS, which, size.mixture)
        assert sum(type(m).__name__ == "MoSLDLinear" for m in model.modules()) == count * size.layers
        shared = {p.data_ptr() for p in base.parameters()}
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert {p.data_ptr() for p in frozen} == shared
        ids = torch.randint(size.vocabulary, (2, 8))
        forward, backward = training.step_of(model, ids)
        backward(forward())
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_two_ways_into_the_operator_are_timed(tmp_path):
    result = calls.measure_and_write(2, tmp_path / "calls.json")
    assert json.loads((tmp_path / "calls.json").read_text()) == result
    assert len(result["calls"]) == 6 and all(row["low_us"] > 0 for row in result["calls"])
