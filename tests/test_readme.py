"""The README tells nothing that is not so: its tables are those of the committed files, its links and options exist."""

import json
import re
from pathlib import Path

from benchmarks import __main__ as benchmarks
from benchmarks.report import bench
from benchmarks.report import page as report
from mosld import MoSLDConfig
from mosld.cli import build_parser
from mosld.results import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_result_table_is_that_of_the_committed_run():
    assert table(json.loads((ROOT / "docs/demo/block.json").read_text())["methods"]) in README


def test_the_averages_of_the_easier_split_are_those_of_the_committed_run():
    methods = json.loads((ROOT / "docs/demo/name.json").read_text())["methods"]
    shares = {name: f"{100 * methods[name]['average']:.1f} %" for name in ("base", "lora", "mosld")}
    assert f"{shares['base']} frozen, {shares['lora']} LoRA, {shares['mosld']} MoSLD" in README


def test_the_speed_table_is_that_of_the_committed_run():
    tables = json.loads((ROOT / "benchmarks/results/layer.json").read_text())["tables"]
    assert "\n".join(report.headline(tables)) in README


def test_the_loops_cost_what_the_committed_run_says():
    rows = json.loads((ROOT / "benchmarks/results/peers.json").read_text())["tables"][0]["rows"]
    both = {row["name"]: row["ratio"] for row in rows if row.get("step") == "both"}
    told = f"HydraLoRA's loop takes {both['HydraLoRA loop']:.1f} times the frozen layer, MoLA's {both['MoLA loop']:.1f}"
    assert told in re.sub(r"\s+", " ", README)


def test_the_figures_of_a_matrix_unit_are_those_of_the_committed_run():
    rows = {
        (table["shape"]["T"], table["dtype"], row["name"]): row
        for table in json.loads((ROOT / "benchmarks/results/layer_amx.json").read_text())["tables"]
        for row in table["rows"]
        if row.get("step") == "both"
    }

    def both(tokens: int, name: str) -> list[str]:
        return [f"{rows[tokens, dtype, name]['ratio']:.2f}" for dtype in ("float32", "bfloat16")]

    readme = re.sub(r"\s+", " ", README)
    for tokens in (4096, 2048):
        assert "{} in float32 and {} in bfloat16".format(*both(tokens, "MoSLD")) in readme
    assert "PEFT's LoRA {} and {} with dropout".format(*both(4096, "PEFT LoRA")) in readme
    assert "with dropout, {} and {} without".format(*both(4096, "PEFT LoRA, no dropout")) in readme
    times = [rows[4096, dtype, "frozen linear"]["median_ms"] for dtype in ("float32", "bfloat16")]
    assert round(times[0] / times[1]) == 7 and "bfloat16 is seven times as fast" in readme


def test_the_report_is_that_of_the_committed_results(tmp_path):
    files = [ROOT / f"benchmarks/results/{name}.json" for name in bench.FILES]
    report.write_page(files, tmp_path / "performance.md")
    assert (tmp_path / "performance.md").read_text() == (ROOT / "docs/performance.md").read_text()


def test_every_file_it_points_to_exists():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), flags=re.MULTILINE)
            assert anchor in {head.lower().replace(" ", "-") for head in heads}, target


def test_its_pattern_of_experts_matches_layers():
    (pattern,) = re.findall(r"num_experts_pattern=(\{.*?\})", README)
    config = MoSLDConfig(num_experts_pattern=eval(pattern))
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(20)]
    assert [config.experts_of(name) for name in names] == [4] * 8 + [8] * 12


def test_the_options_that_it_names_are_known():
    ours = [_help(name) for name in ("train", "compare", "merge", "eval", "inspect", "export")]
    known = (*ours, _help("layer", benchmarks._parser()), "--learning_rate", "--help")
    for flag in re.findall(r"`(--[a-z-]+)", README):
        if "_" not in flag and not flag.startswith("--benchmark-"):  # pytest-benchmark's
            assert any(flag in text for text in known), flag


def _help(command: str, parser=None) -> str:
    subparsers = (parser or build_parser())._subparsers._group_actions[0]
    return subparsers.choices[command].format_help()
