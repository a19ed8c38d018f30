"""The README tells nothing that is not so: its tables are those of the committed files, its code runs."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import bench, report
from mosld.cli import build_parser
from mosld.results import table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SELF_CONTAINED = [block for block in BLOCKS if block.startswith("import torch\n")]


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
    ratios = {
        (entry["shape"]["T"], entry["dtype"]): next(r["ratio"] for r in entry["rows"] if r["name"] == "MoSLD")
        for entry in json.loads((ROOT / "benchmarks/results/layer_amx.json").read_text())["layers"]
    }
    for tokens in (4096, 2048):
        told = f"{ratios[tokens, 'float32']:.2f} in float32 and {ratios[tokens, 'bfloat16']:.2f} in bfloat16"
        assert told in re.sub(r"\s+", " ", README)


def test_the_report_is_that_of_the_committed_results(tmp_path):
    files = [ROOT / f"benchmarks/results/{name}.json" for name in bench.FILES]
    report.run(files, tmp_path / "performance.md")
    assert (tmp_path / "performance.md").read_text() == (ROOT / "docs/performance.md").read_text()


def test_every_file_it_points_to_exists():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), flags=re.MULTILINE)
            assert anchor in {head.lower().replace(" ", "-") for head in heads}, target


@pytest.mark.parametrize("block", SELF_CONTAINED, ids=lambda block: block.split("\n")[2][:30])
def test_its_self_contained_code_runs(block):
    names: dict = {}
    exec(block, names)
    assert names["y"].isfinite().all()


def test_the_code_for_ones_own_model_runs_on_one(tmp_path, monkeypatch):
    from tests.models import tiny_llama, token_ids

    names: dict = {"model": tiny_llama()}
    through_peft, own_loop, serving = (block for block in BLOCKS if block not in SELF_CONTAINED)
    exec(through_peft, names)
    ids = token_ids()
    names |= {"out": names["model"](ids, labels=ids), "attention_mask": ids > 0}
    exec(own_loop, names)
    names["loss"].backward()
    monkeypatch.chdir(tmp_path)
    exec(serving, names | {"ids": ids})
    assert {path.name for path in (tmp_path / "served").iterdir()} > {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert len(SELF_CONTAINED) == 2


def test_its_commands_are_understood():
    lines = re.findall(r"^\.venv/bin/mosld (.*)$", README, flags=re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        assert not build_parser().parse_known_args(line.split())[1]
    ours = [_help(name) for name in ("train", "compare", "eval", "inspect", "export")]
    known = (*ours, _help("layer", benchmarks._parser()), "--learning_rate", "--help")
    for flag in re.findall(r"`(--[a-z-]+)", README):
        if "_" not in flag and not flag.startswith("--benchmark-"):  # pytest-benchmark's
            assert any(flag in text for text in known), flag


def _help(command: str, parser=None) -> str:
    subparsers = (parser or build_parser())._subparsers._group_actions[0]
    return subparsers.choices[command].format_help()


def test_its_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)|`make (\w+)`", README, flags=re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, flags=re.MULTILINE), target
