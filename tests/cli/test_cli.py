"""The command line on a user's own model and data: results, resumption, export, and refusals before any work."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM

from mosld import MoSLDConfig
from mosld.cli import compare as compare_verb
from mosld.cli import train as train_verb
from mosld.cli.main import main
from mosld.experiments import compare, evaluate, train
from mosld.experiments.run_folder import RunFolderError, claim, release
from mosld.tasks.encode import Encoder
from mosld.tasks.examples import read_tasks
from tests.files.test_adapter_folder import alter
from tests.helpers.cli_data import FAST, words, write_data
from tests.tasks.test_scoring import byte_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("run") / "out"
    code = main(words(data, output, "--single", "--seeds", "2", "--r", "2", "--num-experts", "4", *FAST))
    assert code == 0
    return output


def test_results_hold_every_method_seed_and_setting(run):
    results = json.loads((run / "results.json").read_text())
    assert set(results["tasks"]) == {"even", "vowel"}
    for score in results["tasks"].values():
        assert {"accuracy", "accuracy_norm", "n", "chance", "majority"} <= set(score)
        assert score["chance"] == 0.5 and len(score["accuracy_per_seed"]) == 2
    assert list(results["methods"]) == ["base", "lora", "mosld", "mosld-single"]
    for label, method in results["methods"].items():
        assert (method["trainable_parameters"] > 0) == (label != "base")
        accuracies = [score["accuracy"] for score in method["tasks"].values()]
        assert method["average"] == pytest.approx(sum(accuracies) / 2)
    single, mixture = (results["methods"][label]["trainable_parameters"] for label in ("mosld-single", "mosld"))
    assert single == 2 * mixture
    assert results["seeds"] == [0, 1] and results["versions"]["torch"] == torch.__version__
    losses = [loss for _, loss in results["methods"]["mosld"]["loss"]]
    assert losses and losses[-1] < losses[0]
    experts = results["methods"]["mosld"]["experts"]
    assert set(experts) == {"even", "vowel"}
    assert all(sum(load) == pytest.approx(1) for layers in experts.values() for load in layers.values())


def test_pictures_are_drawn_and_checkpoints_are_gone(run):
    for name in ("accuracy.png", "loss.png", "experts.png"):
        assert (run / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list((run / "checkpoints").iterdir())
    assert {path.name for path in (run / "adapters").iterdir()} == {
        "lora-seed0", "lora-seed1", "mosld-seed1", "mosld-single-even-seed0", "mosld-single-vowel-seed0",
        "mosld-single-even-seed1", "mosld-single-vowel-seed1",
    }  # fmt: skip


def test_the_adapter_loads_in_the_printed_way_and_scores_the_same(run, data, capsys, tmp_path):
    model = peft.AutoPeftModelForCausalLM.from_pretrained(run / "adapter")
    assert isinstance(model.peft_config["default"], MoSLDConfig)
    capsys.readouterr()
    scores = tmp_path / "scores.json"
    assert main(words(data, scores, "--adapter", str(run / "adapter"), command="eval")) == 0
    printed = json.loads(capsys.readouterr().out)
    results = json.loads((run / "results.json").read_text())
    for task, score in printed.items():
        assert score["accuracy"] == results["tasks"][task]["accuracy_per_seed"][0]
    assert json.loads(scores.read_text())["tasks"] == printed


def test_the_adapters_card_tells_the_tasks_and_scores(run):
    results = json.loads((run / "results.json").read_text())
    card = (run / "adapter" / "README.md").read_text()
    for task, score in results["tasks"].items():
        assert f"| {task} | {score['n']} | {100 * score['accuracy_per_seed'][0]:.1f} | 50.0 |" in card
    assert "| vowel |" not in (run / "adapters" / "mosld-single-even-seed0" / "README.md").read_text()


def test_a_finished_run_is_not_overwritten_unasked(run, data, capsys):
    before = (run / "results.json").read_bytes()
    same = words(data, run, "--single", "--seeds", "2", "--r", "2", "--num-experts", "4", *FAST)
    assert main(same) == 2
    assert "holds a finished run: choose another --output, or --overwrite" in capsys.readouterr().err
    assert main(words(data, run, "--r", "3", *FAST)) == 2
    error = capsys.readouterr().err
    assert "holds a run with other settings (adapters, seeds, single)" in error
    assert (run / "results.json").read_bytes() == before


def test_a_run_that_began_before_runs_told_their_processes_goes_on_with_one(tmp_path):
    claim(tmp_path, {"model": "m", "processes": 1})
    release()
    told = json.loads((tmp_path / "run.json").read_text())
    del told["processes"]
    (tmp_path / "run.json").write_text(json.dumps(told))
    assert claim(tmp_path, {"model": "m", "processes": 1})
    release()
    (tmp_path / "run.json").write_text(json.dumps(told))
    with pytest.raises(RunFolderError, match=r"other settings \(processes\)"):
        claim(tmp_path, {"model": "m", "processes": 2})


@pytest.mark.parametrize(("verb", "module"), [(train_verb, train), (compare_verb, compare)], ids=["train", "compare"])
def test_a_run_goes_on_with_as_many_processes_as_it_began_with(data, tmp_path, monkeypatch, capsys, verb, module):
    """More of them take larger steps: another training."""

    class Two(PartialState):
        num_processes = property(lambda self: 2, lambda self, value: None)

    def broken(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_stage", broken)
    own = words(data, tmp_path / "run", *FAST, command=verb.__name__.rpartition(".")[2])
    assert main(own) == 130
    monkeypatch.setattr(verb, "PartialState", Two)
    assert main(own) == 2
    assert "other settings (processes)" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_left_alone(data, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert main(words(data, tmp_path, "--overwrite", *FAST)) == 2
    assert "is not empty and holds no run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_another_programs_run_json_protects_its_folder(data, tmp_path, capsys):
    for content in ('{"tool": "other"}', "[1]", "{"):
        (tmp_path / "run.json").write_text(content)
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        assert main(words(data, tmp_path, "--overwrite", *FAST)) == 2
        assert "holds no run" in capsys.readouterr().err and (tmp_path / "checkpoints").is_dir()


def test_two_runs_do_not_share_a_folder(tmp_path):
    claim(tmp_path / "o", {"a": 1})
    with pytest.raises(RunFolderError, match="another process is training in"):
        claim(tmp_path / "o", {"a": 1})
    release()
    assert claim(tmp_path / "o", {"a": 1}) is True
    release()


def test_overwriting_replaces_a_run(data, tmp_path):
    assert main(words(data, tmp_path / "o", "--no-lora", "--r", "2", *FAST)) == 0
    assert main(words(data, tmp_path / "o", "--method", "lora", "--r", "2", "--overwrite", *FAST)) == 0
    results = json.loads((tmp_path / "o" / "results.json").read_text())
    assert list(results["methods"]) == ["base", "lora"] and not (tmp_path / "o" / "experts.png").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--top-k", "9"], "top_k must be in [1, num_experts=8], got 9"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--dropout", "1.5"], "dropout must be in [0, 1], got 1.5"),
        (["--max-length", "1000"], "max-length must be in [2, 64], the model's longest input, got 1000"),
        (["--max-length", "3"], "does not fit max_length=3"),
        (["--proportions", "even=1"], "proportions must name every task once (even, vowel), got even"),
        (["--lerning_rate", "1"], "--lerning_rate"),
        (["--seed", "3"], "--seed is set by mosld train: use --seeds N"),
        (["--output-dir", "x"], "--output_dir is set by mosld train: use --output DIR"),
        (["--eval_strategy", "epoch"], "--eval_strategy and --load_best_model_at_end cannot be given"),
        (["--deepspeed", "c.json"], "keeps the whole model in every process: --fsdp and --deepspeed cannot be given"),
        (["--output_dir=x"], "--output_dir is set by mosld train: use --output DIR"),
        (["--learning_rate", "fast"], "not an argument of mosld train"),
        (["--model", "/no/such/model"], "the model '/no/such/model' cannot be loaded: give a folder"),
        (["--quick"], "--quick is for the embedded tasks"),
        (["--target-modules", "no_such_layer"], "no_such_layer"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_trained(data, tmp_path, capsys, more, message):
    assert main(words(data, tmp_path / "out", *FAST, *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter").exists() and not (tmp_path / "out" / "checkpoints").exists()


def test_bad_lines_are_all_reported(data, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(
        '{"prompt": "a", "completion": "b"}\nnonsense\n{"prompt": "a", "choices": ["x", "y"], "answer": 5}\n'
    )
    assert main(["train", "--model", str(data / "model"), "--task", f"t={bad}", "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"{bad}:2: not JSON" in error and f"{bad}:3:" in error and not (tmp_path / "out").exists()


def test_eval_refuses_what_is_no_adapter(data, tmp_path, capsys):
    assert main(words(data, tmp_path / "s.json", "--adapter", str(tmp_path), command="eval")) == 2
    assert "adapter_config.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "inspect", "export"])
def test_an_altered_adapter_is_refused_by_name(run, data, tmp_path, capsys, command):
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    alter(adapter / "adapter_model.safetensors")
    verbs = {
        "eval": words(data, tmp_path / "out", "--adapter", str(adapter), command="eval"),
        "inspect": ["inspect", str(adapter), "--output", str(tmp_path / "out")],
        "export": export_words(data, tmp_path, tmp_path / "out"),
    }
    assert main(verbs[command]) == 2
    error = capsys.readouterr().err
    assert f"mosld {command}: {adapter / 'adapter_model.safetensors'} is not what" in error
    assert not (tmp_path / "out").exists()


def test_eval_refuses_a_bad_batch_size_and_a_file_that_exists(data, tmp_path, capsys):
    assert main(words(data, tmp_path / "s.json", "--eval-batch-size", "-1", command="eval")) == 2
    assert "eval-batch-size must be at least 1, got -1" in capsys.readouterr().err
    (tmp_path / "s.json").write_text("precious")
    assert main(words(data, tmp_path / "s.json", command="eval")) == 2
    assert "exists: choose another --output" in capsys.readouterr().err
    assert (tmp_path / "s.json").read_text() == "precious"


@pytest.mark.parametrize(("verb", "module"), [("train", train_verb), ("compare", compare_verb), ("eval", evaluate)])
def test_the_embedded_model_may_be_named(verb, module, monkeypatch, tmp_path):
    """As `mosld inspect` and `mosld merge` have it."""
    asked = []

    def load(inputs):
        asked.append(inputs.model)
        raise ValueError("far enough")

    monkeypatch.setattr(module, "load_model", load)
    assert main([verb, "--model", "embedded", "--quick", "--output", str(tmp_path / "out")]) == 2
    assert asked == [None]


def test_a_model_without_tasks_is_refused(data, capsys):
    assert main(["train", "--model", str(data / "model")]) == 2
    assert "--model needs at least one --task" in capsys.readouterr().err


def test_training_with_own_data_leaves_the_base_weights_alone(run, data):
    base = AutoModelForCausalLM.from_pretrained(data / "model").state_dict()
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(run / "adapter").unload().state_dict()
    assert all(torch.equal(base[name], adapted[name]) for name in base)


def export_words(data: Path, run: Path, output: Path, *more: str) -> list[str]:
    return ["export", "--model", str(data / "model"), "--adapter", str(run / "adapter"), "--output", str(output), *more]


def test_export_writes_a_lora_that_eval_scores(run, data, tmp_path, capsys):
    tasks = [word for name in ("even", "vowel") for word in ("--task", f"{name}={data / f'{name}.jsonl'}")]
    calibrated = ["--gates", "calibrate", *tasks, "--eval-batch-size", "5", "--per-expert"]
    assert main(export_words(data, run, tmp_path / "lora", *calibrated)) == 0
    head, line, *rows = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "layer" and "gate variance" in head and set(line) == {"-"}
    layers = json.loads((tmp_path / "lora" / "export.json").read_text())["layers"]
    assert [row.split()[0] for row in rows[: len(layers)]] == list(layers) and len(layers) == 14
    encoder = Encoder(byte_tokenizer(), 64)
    texts = [task.train for task in read_tasks([word for word in tasks if word != "--task"])]
    tokens = sum(len(encoder.training_row(example)["input_ids"]) for task in texts for example in task)
    for row, layer in zip(rows, layers.values(), strict=False):
        assert layer["tokens"] == tokens and row.split()[1] == str(tokens)
        assert sum(layer["gates"]) == pytest.approx(1) and layer["update_error"] > 0
        assert row.split()[2:4] == [f"{sum(layer['gate_variance']):.4f}", f"{layer['update_error']:.4f}"]
    assert (tmp_path / "lora" / "expert_3" / "adapter_model.safetensors").is_file()
    assert type(peft.PeftConfig.from_pretrained(tmp_path / "lora")) is peft.LoraConfig
    assert main(words(data, tmp_path / "s.json", "--adapter", str(tmp_path / "lora"), command="eval")) == 0


def test_export_takes_weights_and_is_uniform_by_default(run, data, tmp_path, capsys):
    assert main(export_words(data, run, tmp_path / "a")) == 0
    assert main(export_words(data, run, tmp_path / "b", "--gates", "0.25,0.25,0.25,0.25")) == 0
    assert "variance" not in capsys.readouterr().out
    for name in ("adapter_model.safetensors", "adapter_config.json", "export.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert main(export_words(data, run, tmp_path / "a", "--overwrite")) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gates", "mean"], "gates must be uniform, calibrate or weights such as 0.5,0.5, got 'mean'"),
        (["--gates", "1,2"], "must be num_experts=4 weights, got 2"),
        (["--gates", "calibrate"], "--model needs at least one --task"),
        (["--task", "even=even.jsonl"], "--task is for --gates calibrate, got --gates uniform"),
        (["--eval-batch-size", "0"], "eval-batch-size must be at least 1, got 0"),
        (["--adapter", "/no/such/folder"], "/no/such/folder is not a saved adapter"),
    ],
)
def test_export_refuses_bad_arguments_and_writes_nothing(run, data, tmp_path, capsys, more, message):
    assert main(export_words(data, run, tmp_path / "lora", *more)) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_export_leaves_the_adapter_it_comes_from_alone(run, data, capsys):
    before = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert main(export_words(data, run, run / "adapter", "--overwrite")) == 2
    assert "holds something else than an export" in capsys.readouterr().err
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_interrupting_keeps_a_checkpoint_and_the_same_command_goes_on_to_the_same_end(data, tmp_path):
    many = ["--no-lora", "--r", "2", *FAST, "--max_steps", "300", "--logging_steps", "1"]
    assert main(words(data, tmp_path / "whole", *many)) == 0
    command = [sys.executable, "-m", "mosld", *words(data, tmp_path / "cut", *many)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        seen = ""
        while "loss=" not in seen:  # the training has begun
            piece = process.stderr.read(64)
            assert piece, seen
            seen += piece
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(60) == 130 and "Run the same command again to go on" in rest
    assert list((tmp_path / "cut" / "checkpoints" / "mosld-seed0").glob("checkpoint-*"))
    assert not (tmp_path / "cut" / "results.json").exists()
    assert main(words(data, tmp_path / "cut", *many)) == 0
    whole, cut = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "cut"))
    assert cut["methods"]["mosld"]["loss"] == whole["methods"]["mosld"]["loss"]
    assert cut["tasks"] == whole["tasks"]
