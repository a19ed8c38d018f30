"""The benchmarks run at toy size, and their rivals compute what they say."""

import json

import pytest
import torch
from torch import nn

from benchmarks import calls, layer
from benchmarks.rivals import candidates
from mosld_kernels import reference


def test_the_layer_bench_writes_every_row(tmp_path, capsys):
    out = tmp_path / "layer.json"
    layer.run(["toy"], ["float32", "bfloat16"], rounds=2, out=out)
    written = json.loads(out.read_text())
    assert [entry["dtype"] for entry in written["layers"]] == ["float32", "bfloat16"]
    for entry in written["layers"]:
        rows = {row["name"]: row for row in entry["rows"]}
        assert rows["frozen linear"]["ratio"] == 1 and set(rows) > {"MoSLD", "PEFT LoRA", "loop over experts"}
        assert all(row["low_ms"] <= row["median_ms"] <= row["high_ms"] for row in rows.values())
    assert "PEFT LoRA" in capsys.readouterr().out
    assert {"processor", "torch", "commit", "threads"} <= set(written["machine"])


def test_unknown_shapes_and_dtypes_list_what_exists():
    with pytest.raises(ValueError, match="there is no huge; there are: cpu-1024"):
        layer.run(["huge"], ["float32"], 2, None)
    with pytest.raises(ValueError, match="there is no int8; there are: float32, bfloat16"):
        layer.run(["toy"], ["int8"], 2, None)


def test_the_rivals_work_on_the_same_weight_and_are_what_they_claim():
    linear = nn.Linear(12, 10).double().requires_grad_(False)
    modules = candidates(linear, r=3, num_experts=4, top_k=4, dropout=0.0)
    x = torch.randn(6, 12, dtype=torch.float64)
    # Without dropout and with every expert chosen, the loop is MoSLD's formula.
    ours = modules["MoSLD"](x)
    torch.testing.assert_close(modules["loop over experts"](x), ours)
    torch.testing.assert_close(modules["formula in plain torch"](x), ours)
    adapter = modules["MoSLD"].adapter
    tensors = (adapter.shared_a.weight, adapter.expert_b.weight, adapter.router.weight)
    torch.testing.assert_close(
        ours, reference.mosld_linear(x, linear.weight, linear.bias, *tensors, top_k=4, scale=2.0)[0]
    )
    lora = modules["PEFT LoRA"]
    update = lora.lora_B["default"](lora.lora_A["default"](x)) * lora.scaling["default"]
    torch.testing.assert_close(lora(x), linear(x) + update)
    assert update.norm() > 0


def test_a_step_gives_every_trainable_tensor_its_gradient():
    linear = nn.Linear(12, 10).requires_grad_(False)
    for name, module in candidates(linear, r=3, num_experts=4, top_k=2, dropout=0.1).items():
        x = torch.randn(6, 12, requires_grad=True)
        layer.step(module, x, torch.randn(6, 10))()
        assert x.grad is not None and all(p.grad is not None for p in module.parameters() if p.requires_grad), name


def test_the_two_ways_into_the_operator_are_timed(tmp_path):
    result = calls.run(2, tmp_path / "calls.json")
    assert json.loads((tmp_path / "calls.json").read_text()) == result
    assert len(result["calls"]) == 6 and all(row["low_us"] > 0 for row in result["calls"])
