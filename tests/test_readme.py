"""The README tells nothing that is not so: its tables are those of the committed files, its code runs."""

import functools
import importlib.util
import json
import re
from pathlib import Path

import pytest
from peft import get_peft_model

from benchmarks import __main__ as benchmarks
from benchmarks import bench, report
from mosld import MoSLDConfig
from mosld.cli import build_parser
from mosld.results import table
from mosld.tasks.encode import Encoder
from mosld.tasks.examples import Example, Task
from mosld.tasks.scoring import score_tasks
from tests.models import perturb, tiny_llama, token_ids
from tests.tasks.test_scoring import byte_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SELF_CONTAINED = [block for block in BLOCKS if block.startswith("import torch\n")]
OPTIONAL = {name: block for name in ("lm_eval", "trl") for block in BLOCKS if f"from {name} import" in block}


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
    names: dict = {"model": tiny_llama()}
    through_peft, own_loop, serving = (
        block for block in BLOCKS if block not in SELF_CONTAINED and block not in OPTIONAL.values()
    )
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


def test_its_pattern_of_experts_matches_layers():
    (pattern,) = re.findall(r"num_experts_pattern=(\{.*?\})", README)
    config = MoSLDConfig(num_experts_pattern=eval(pattern))
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(20)]
    assert [config.experts_of(name) for name in names] == [4] * 8 + [8] * 12


needs = {
    name: pytest.mark.skipif(not importlib.util.find_spec(name), reason=f"{name} is not installed: extra `{extra}`")
    for name, extra in (("lm_eval", "eval"), ("trl", "trl"))
}


def adapted_llama():
    tokenizer = byte_tokenizer()
    model = get_peft_model(tiny_llama(vocab_size=len(tokenizer)), MoSLDConfig(target_modules=["q_proj", "v_proj"]))
    perturb(model)
    return model, tokenizer


@needs["lm_eval"]
def test_its_code_for_lm_evaluation_harness_counts_what_mosld_eval_counts(tmp_path, monkeypatch, offline):
    import datasets
    from lm_eval import evaluator

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # The harness's own tasks take seven seconds to list.
    monkeypatch.setattr(evaluator, "TaskManager", functools.partial(evaluator.TaskManager, include_defaults=False))
    quiz = [{"prompt": f"{i}?", "choices": ["a", "b", "c"], "answer": i % 3} for i in range(24)]
    Path("quiz_test.jsonl").write_text("".join(json.dumps(item) + "\n" for item in quiz))
    model, tokenizer = adapted_llama()
    *statements, counted = OPTIONAL["lm_eval"].rstrip().split("\n")
    names = {"model": model, "tokenizer": tokenizer}
    exec("\n".join(statements), names)
    task = Task("quiz", [], [Example.multiple_choice(**item) for item in quiz])
    expected = score_tasks(model, Encoder(tokenizer, 64), [task])["quiz"].accuracy
    assert eval(counted, names) == expected and 0 < expected < 1


@needs["trl"]
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL sets it
def test_its_code_for_trl_trains(tmp_path, monkeypatch, offline):
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    tokenizer = byte_tokenizer()
    names: dict = {
        "model": tiny_llama(vocab_size=len(tokenizer)), "tokenizer": tokenizer,
        "dataset": Dataset.from_dict({"text": ["to be or not to be"] * 8}),
    }  # fmt: skip
    exec(OPTIONAL["trl"].replace("max_steps=10", "max_steps=10, use_cpu=True"), names)
    log = names["trainer"].state.log_history[0]
    assert names["trainer"].state.global_step == 10 and log["balance_loss"] > 0
    assert any(parameter.any() for name, parameter in names["trainer"].model.named_parameters() if "expert_b" in name)


def test_its_commands_are_understood():
    lines = re.findall(r"^\.venv/bin/mosld (.*)$", README, flags=re.MULTILINE)
    assert len(lines) == 8
    for line in lines:
        assert not build_parser().parse_known_args(line.split())[1]
    ours = [_help(name) for name in ("train", "compare", "merge", "eval", "inspect", "export")]
    known = (*ours, _help("layer", benchmarks._parser()), "--learning_rate", "--help")
    for flag in re.findall(r"`(--[a-z-]+)", README):
        if "_" not in flag and not flag.startswith("--benchmark-"):  # pytest-benchmark's
            assert any(flag in text for text in known), flag


def _help(command: str, parser=None) -> str:
    subparsers = (parser or build_parser())._subparsers._group_actions[0]
    return subparsers.choices[command].format_help()


def test_its_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", README, flags=re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, flags=re.MULTILINE), target
