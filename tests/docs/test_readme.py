"""The README tells nothing that is not so: its tables are those of the committed files, its options exist."""

import json
import re
from pathlib import Path

from benchmarks import __main__ as benchmarks
from benchmarks.report import bench
from benchmarks.report import page as report
from mosld import MoSLDConfig
from mosld.cli.main import build_parser
from mosld.experiments.results import table

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text()
WORDS = " ".join(README.split())


def both_steps(table: dict) -> dict[str, dict]:
    """The rows of forward and backward together: name -> row."""
    rows = {}
    for row in table["rows"]:
        if row.get("step") == "both":
            rows[row["name"]] = row
    return rows


def test_the_result_table_is_that_of_the_committed_run():
    assert table(json.loads((ROOT / "docs/results/demo/block.json").read_text())["methods"]) in README


def test_the_averages_of_the_easier_split_are_those_of_the_committed_run():
    methods = json.loads((ROOT / "docs/results/demo/name.json").read_text())["methods"]
    base, lora, mosld = (100 * methods[name]["average"] for name in ("base", "lora", "mosld"))
    assert f"{base:.1f} % frozen, {lora:.1f} % LoRA, {mosld:.1f} % MoSLD" in WORDS


def test_the_speed_table_is_that_of_the_committed_run():
    tables = json.loads((ROOT / "benchmarks/results/layer.json").read_text())["tables"]
    assert "\n".join(report.headline(tables)) in README


def test_the_loops_cost_what_the_committed_run_says():
    rows = both_steps(json.loads((ROOT / "benchmarks/results/peers.json").read_text())["tables"][0])
    hydralora, mola = rows["HydraLoRA loop"]["ratio"], rows["MoLA loop"]["ratio"]
    assert f"HydraLoRA's loop takes {hydralora:.1f} times the frozen layer, MoLA's {mola:.1f}" in WORDS


def test_the_figures_of_a_matrix_unit_are_those_of_the_committed_run():
    rows = {}
    for measured in json.loads((ROOT / "benchmarks/results/layer_amx.json").read_text())["tables"]:
        for name, row in both_steps(measured).items():
            rows[measured["shape"]["T"], measured["dtype"], name] = row

    def ratios(tokens: int, name: str) -> list[str]:
        return [f"{rows[tokens, dtype, name]['ratio']:.2f}" for dtype in ("float32", "bfloat16")]

    for tokens in (4096, 2048):
        assert "{} in float32 and {} in bfloat16".format(*ratios(tokens, "MoSLD")) in WORDS
    assert "PEFT's LoRA {} and {} with dropout".format(*ratios(4096, "PEFT LoRA")) in WORDS
    assert "with dropout, {} and {} without".format(*ratios(4096, "PEFT LoRA, no dropout")) in WORDS
    slow, fast = (rows[4096, dtype, "frozen linear"]["median_ms"] for dtype in ("float32", "bfloat16"))
    assert round(slow / fast) == 7 and "bfloat16 is seven times as fast" in WORDS


def test_the_report_is_that_of_the_committed_results(tmp_path):
    files = [ROOT / f"benchmarks/results/{name}.json" for name in bench.FILES]
    report.write_page(files, tmp_path / "performance.md")
    assert (tmp_path / "performance.md").read_text() == (ROOT / "docs/results/performance.md").read_text()


def test_its_pattern_of_experts_matches_layers():
    (pattern,) = re.findall(r"num_experts_pattern=(\{.*?\})", README)
    config = MoSLDConfig(num_experts_pattern=eval(pattern))
    experts = [config.experts_of(f"model.layers.{i}.self_attn.q_proj") for i in range(20)]
    assert experts == [4] * 8 + [8] * 12


def test_the_options_that_it_names_are_known():
    ours = [_help(name) for name in ("train", "compare", "merge", "eval", "inspect", "export")]
    known = (*ours, _help("layer", benchmarks._parser()), "--learning_rate", "--help")
    for flag in re.findall(r"`(--[a-z-]+)", README):
        if "_" not in flag and not flag.startswith("--benchmark-"):  # pytest-benchmark's
            assert any(flag in text for text in known), flag


def _help(command: str, parser=None) -> str:
    subparsers = (parser or build_parser())._subparsers._group_actions[0]
    return subparsers.choices[command].format_help()
