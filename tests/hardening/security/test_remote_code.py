"""Python files in a model's folder are never run: no command has a switch for it, and none asks."""

import argparse
import io
import json
import sys

import pytest
import transformers
from transformers import AutoConfig, dynamic_module_utils

from mosld.cli.main import build_parser

CODE = """
import os
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
os.mkdir({marker!r})
class HostileConfig(LlamaConfig):
    model_type = "hostile"
class HostileModel(LlamaForCausalLM):
    config_class = HostileConfig
class HostileTokenizer(PreTrainedTokenizerFast):
    pass
"""
MAP = {"AutoConfig": "hostile.HostileConfig", "AutoModel": "hostile.HostileModel",
       "AutoModelForCausalLM": "hostile.HostileModel", "AutoTokenizer": [None, "hostile.HostileTokenizer"]}  # fmt: skip


@pytest.fixture
def hostile(data, tmp_path, monkeypatch):
    """model_type -> a model's folder with code of its own."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # transformers' question would be answered

    def make(model_type):
        folder = tmp_path / "model"
        folder.mkdir()
        for path in (data / "model").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        for name in ("config.json", "tokenizer_config.json"):
            fields = json.loads((folder / name).read_text())
            fields |= {"auto_map": MAP} | ({"model_type": model_type} if name == "config.json" else {})
            if model_type == "hostile":
                fields |= {"tokenizer_class": "HostileTokenizer", "architectures": ["HostileModel"]}
            (folder / name).write_text(json.dumps(fields))
        (folder / "hostile.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
        return folder

    return make


def test_the_code_runs_for_who_asks(hostile, tmp_path):
    AutoConfig.from_pretrained(hostile("hostile"), trust_remote_code=True)
    assert (tmp_path / "marker").is_dir()


@pytest.mark.parametrize("model_type", ["hostile", "llama"])
@pytest.mark.parametrize("verb", ["train", "eval", "inspect", "merge", "export"])
def test_no_command_runs_it(verb, model_type, hostile, data, say, tmp_path):
    folder = hostile(model_type)
    task = ["--task", f"even={data / 'even.jsonl'}"]
    words = {
        # A bad setting of the Trainer's would be reported first, and one of the targets' after the model is loaded.
        "train": ["--model", folder, *task, "--output", tmp_path / "out", "--target-modules", "nothing"],
        "eval": ["--model", folder, *task],
        "inspect": ["--model", folder, "--config", "mosld"],
        "merge": ["--method", "ties", "--base", folder, data / "lora", "--output", tmp_path / "out"],
        "export": ["--model", folder, "--adapter", data / "mosld", "--output", tmp_path / "out"],
    }[verb]
    status, said = say(verb, *words)
    assert status == (0 if model_type == "llama" and verb != "train" else 2), said
    assert not (tmp_path / "marker").exists()


def test_no_command_has_a_switch_for_it():
    parser = build_parser()
    (verbs,) = (own for own in parser._actions if isinstance(own, argparse._SubParsersAction))
    options = [option for verb in verbs.choices.values() for own in verb._actions for option in own.option_strings]
    assert "--model" in options
    assert [option for option in options if "trust" in option or "code" in option] == []


@pytest.mark.parametrize("name", ["pipeline", "is_torch_available", "utils", "LlamaConfig", 7])
def test_an_architecture_that_is_no_model_is_not_called(name, data, say, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(transformers, "is_torch_available", called.append)
    monkeypatch.setattr(transformers, "pipeline", called.append)
    fields = json.loads((data / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "architectures": [name]}))
    assert say("inspect", "--model", tmp_path, "--config", "mosld")[0] in (0, 2)
    assert called == []
