"""The weak-scaling calculation counts what a real LLaMA-2-7B has; docs/tutorials/several_processes.md shows it."""

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.__main__ import _parser
from benchmarks.model import processes
from mosld import MoSLDConfig

ROOT = Path(__file__).parents[3]
WRITTEN = json.loads((ROOT / "benchmarks/results/processes.json").read_text())


@pytest.mark.parametrize("targets", processes.TARGETS)
def test_parameters_are_those_of_the_adapted_model(targets):
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(intermediate_size=11008))  # the other defaults are LLaMA-2-7B's
        frozen = base.num_parameters()
        names = [f"{name}_proj" for name in processes.TARGETS[targets]]
        model = peft.get_peft_model(base, MoSLDConfig(r=8, num_experts=8, target_modules=names))
    row = processes.row(targets, "DDP", "100 Gb/s", processes=8, tokens=1, R=8, E=8, device="H100")
    assert row.adapter == model.get_nb_trainable_parameters()[0]
    norms = sum(p.numel() for name, p in base.named_parameters() if "norm" in name)
    assert processes.multiplied_weights(processes.LLAMA_2_7B) == frozen - norms - processes.LLAMA_2_7B.embedding


def test_bytes_and_times_of_one_row_by_hand():
    row = processes.row("q, v", "DDP", "25 Gb/s", processes=4, tokens=700, R=8, E=8, device="H100")
    assert row.adapter == 2 * 32 * (8 * 4096 + 64 * 4096 + 8 * 4096)
    assert row.sent_mb == pytest.approx(1.5 * 4 * row.adapter / 1e6)
    assert row.link_ms == pytest.approx(1.5 * 4 * row.adapter / 3.125e9 * 1e3)
    frozen = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    assert row.compute_ms == pytest.approx((4 * frozen + 6 * row.adapter) * 700 / 700e12 * 1e3)
    assert row.share == pytest.approx(row.compute_ms / (row.compute_ms + row.link_ms))
    assert row.share_overlapped == pytest.approx(row.compute_ms / (row.compute_ms / 2 + row.link_ms))


def test_the_page_has_the_table_of_the_committed_file_and_the_code_gives_it():
    rows = [processes.Row(**row) for row in WRITTEN["rows"]]
    assert "\n".join(processes.lines(rows)) in (ROOT / "docs/tutorials/several_processes.md").read_text()
    settings = WRITTEN["settings"]
    assert (settings["processes"], settings["tokens"], settings["rank"], settings["experts"]) == (8, 8192, 8, 8)
    assert rows == processes.table()


def test_the_command_writes_the_file_and_refuses_no_process(tmp_path):
    options = _parser().parse_args(["processes", "--out", str(tmp_path / "p.json")])
    assert options.run(options) == 0
    assert json.loads((tmp_path / "p.json").read_text()) == WRITTEN
    options.processes = 0
    with pytest.raises(ValueError, match="processes must be at least 1, got 0"):
        options.run(options)
