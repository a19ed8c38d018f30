"""The model says what its formulas say: pinned tables, the floor, and rows that add up."""

import json
import re
import sys

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.model import cpu as cpu_model
from benchmarks.model.kernels import Cuts, kernel_table, tensor_bytes
from benchmarks.model.methods import (
    DEVICES,
    METHODS,
    Problem,
    dense_limit,
    extension_limit_percent,
    floor,
    method_table,
)
from benchmarks.peers.known import FROZEN, OURS
from benchmarks.timing.shapes import LayerShape


def percents(device: str, method: str, *sizes) -> list[float]:
    """Forward, backward and both, of the frozen layer."""
    p = Problem(DEVICES[device], *sizes)
    forward, backward = METHODS[method](p)
    return [round(100 * us / p.base, 1) for us in (forward, backward, (forward + backward) / 2)]


def test_the_overheads_of_the_methods_on_an_h200():
    assert percents("H200", "ours") == [9.0, 17.9, 13.5]
    assert percents("H200", "ours", 8192, 4096, 14336) == [5.8, 11.5, 8.7]
    assert percents("H200", "ours", 8192, 4096, 4096, 16, 32) == [17.0, 34.0, 25.5]
    assert percents("H200", "floor") == [5.3, 9.8, 7.5]
    assert percents("H200", "inside an ideal base product") == [7.6, 14.2, 10.9]
    assert [round(value) for value in percents("H200", "PEFT LoRA, eager")] == [43, 52, 47]
    assert [round(value) for value in percents("H200", "loop over experts")] == [417, 543, 480]
    assert [round(value) for value in percents("H200", "packed torch, dropout on A")] == [18, 36, 27]
    assert percents("H200", "LoRAFusion, one LoRA")[2] == 13.8
    assert round(Problem(DEVICES["H200"]).base) == 348


def test_the_overheads_on_the_other_devices_and_the_limits():
    assert percents("H100", "ours")[2] == 17.1 and percents("A100", "ours")[2] == 11.3
    assert [round(dense_limit(DEVICES[name])) for name in DEVICES] == [184, 233, 154]
    assert round(extension_limit_percent(DEVICES["H200"], 14336), 1) == 1.3
    assert round(extension_limit_percent(DEVICES["A100"], 2048, passes_saved=2), 1) == 15.1


def test_without_dropout_only_methods_with_dropout_on_x_get_cheaper():
    dropped, kept = (method_table(Problem(DEVICES["H200"], dropout=dropout)) for dropout in (True, False))
    cheaper = {
        a["method"] for a, b in zip(dropped, kept, strict=True) if b["model_both_percent"] < a["model_both_percent"]
    }
    on_x = {"PEFT LoRA, eager", "PEFT LoRA, compiled", "loop over experts", "packed torch, dropout on x"}
    assert cheaper == on_x | {"LoRAFusion, one LoRA"}


def test_bytes_passes_and_flops_are_counted_by_method_and_direction():
    rows = {row["method"]: row for row in method_table(Problem(DEVICES["H200"]))}
    x = 2 * 8192 * 4096  # bytes of x, and of out
    ours = rows["ours"]
    assert ours["forward_bytes"] == pytest.approx(2 * x) and ours["backward_bytes"] == pytest.approx(4 * x)
    assert ours["forward_passes"] == pytest.approx(2) and ours["backward_passes"] == pytest.approx(4)
    lora = rows["PEFT LoRA, eager"]
    assert lora["forward_passes"] == pytest.approx(2.5 + 1 + 1 + 2 + 3)
    assert (
        lora["forward_flops"] == 2 * 8192 * 16 * (4096 + 4096) and lora["backward_flops"] == 2 * lora["forward_flops"]
    )
    assert ours["forward_flops"] == 2 * 8192 * 4096 * (16 + 8 + 8 * 16)
    assert rows["floor"]["forward_flops"] == 2 * 8192 * 4096 * (16 + 8 + 2 * 16)
    assert rows["loop over experts"]["forward_flops"] == 8 * lora["forward_flops"] + 2 * 8192 * 4096 * 8


def test_a_row_counts_every_tensor_that_it_names():
    p = Problem(DEVICES["H200"], 8192, 4096, 14336, 16, 32, 2)
    cuts = Cuts(down_planes=2, up_planes=2, b_planes=4, adapter_planes=4, columns=128)
    sizes = tensor_bytes(p, cuts)
    assert sizes["x"] == 2 * 8192 * 4096 and sizes["gates"] == 4 * 8192 * 32 and sizes["mixed"] == 2 * 8192 * 512
    assert sizes["dout_again"] == 3 * 2 * 8192 * 14336  # 512 columns, 128 at a time
    assert sizes["expert_b_planes"] == 2 * 4 * 4 * 14336 * 512
    rows = kernel_table(p, cuts)
    for row in rows:
        assert row.moved_bytes == sum(sizes[name] for name in re.findall(r"\w+", row.moved)), row.kernel
        assert 0 <= row.fewest_bytes <= row.moved_bytes and set(row.model_us) == set(DEVICES)
    assert {name for row in rows for name in re.findall(r"\w+", row.moved)} == set(sizes)
    uncut = {row.kernel: row.moved_bytes for row in kernel_table(p)}
    assert all("planes" not in row.moved for row in kernel_table(p))
    cut = {"down", "up_backward", "grad_expert_b", "grad_down"}
    assert {row.kernel for row in rows if row.moved_bytes > uncut[row.kernel]} == cut


@pytest.mark.parametrize("device", DEVICES)
def test_the_kernels_add_up_to_the_method_and_their_fewest_bytes_to_the_floor(device):
    # At this size the small tensors, of T x (R + E) and E * R x D_out, are a few percent of one pass.
    p = Problem(DEVICES[device], 8192, 4096, 4096, 8, 8, 2)
    rows = kernel_table(p)
    total = sum(row.model_us[device] for row in rows) - 2 * p.base
    assert total == pytest.approx(sum(METHODS["ours"](p)), rel=0.05)
    frozen = 2 * 2 * (p.T * p.D_in + p.T * p.D_out + p.D_in * p.D_out)
    fewest = sum(row.fewest_bytes for row in rows) - frozen
    assert fewest == pytest.approx(3 * 2 * p.T * p.D_in, rel=0.05)
    passes = sum(floor(p)) - p.extension(16, p.D_in) - p.extension(16, p.D_out)
    assert passes == pytest.approx(3 * p.x)


def test_the_command_prints_both_tables_and_writes_them(tmp_path, capsys, monkeypatch):
    out = tmp_path / "sub" / "roofline.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks", "roofline", "--flops", "1e14", "--experts", "4", "--out", str(out)])
    assert command.main() == 0
    printed, written = capsys.readouterr().out, json.loads(out.read_text())
    assert "Model, not a measurement" in printed and "grad_expert_b" in printed and "100 TFLOP/s, 4.3 TB/s" in printed
    assert written["kind"] == "model, not a measurement" and written["problem"]["E"] == 4
    assert [row["method"] for row in written["methods"]] == list(METHODS)
    assert set(written["kernels"][0]["model_us"]) == {*DEVICES, "given"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--experts", "2", "--top-k", "3"], "top_k must be in [1, experts=2], got 3"),
        (["-T", "0"], "T must be positive, got 0"),
        (["--bandwidth", "0"], "bandwidth must be positive, got 0"),
    ],
)
def test_wrong_sizes_end_with_the_rule(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "roofline", *arguments])
    assert command.main() == 2
    assert message in capsys.readouterr().err


def test_the_model_of_the_cpu_prices_products_and_passes():
    rates = cpu_model.Rates(copy_bytes=10e9, matmul_flops=100e9)
    p = cpu_model.problem(LayerShape(1000, 500, 400, 8, 4, 2), rates, torch.float32)
    frozen = cpu_model.predict(FROZEN, p)
    assert frozen["forward"] == pytest.approx(1e3 * 2 * 1000 * 500 * 400 / 100e9)
    ours, bound = cpu_model.predict(OURS, p), cpu_model.limit(p)
    assert frozen["both"] < bound["both"] <= ours["both"] < cpu_model.predict("HydraLoRA loop", p)["both"]
    assert cpu_model.predict("PEFT Lily", p) is None
