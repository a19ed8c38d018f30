"""A pickle in an adapter's or a model's folder is named and left alone, whichever way leads to it."""

import os
import shutil

import peft
import pytest
import torch

from mosld import MoSLDConfig, import_lora
from mosld.files.adapter_folder import AdapterFileError
from mosld.training.checkpoints import PREFERRED, check_adapters, last_whole_checkpoint
from tests.helpers.models import tiny_llama

PICKLE = "adapter_model.bin"


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


@pytest.fixture
def opened(monkeypatch):
    """The files that torch is asked to open; all that PEFT and transformers unpickle goes through it."""
    files, load = [], torch.load

    def record(file, *args, **kwargs):
        files.append(file)
        return load(file, *args, **kwargs)

    monkeypatch.setattr(torch, "load", record)
    return files


@pytest.fixture
def planted(adapter, marker):
    """method -> a folder with its configuration and, instead of weights, a pickle."""

    def plant(method):
        folder = adapter(method, weights=False)
        torch.save({"weight": Payload(marker)}, folder / PICKLE)
        return folder

    return plant


def base():
    return tiny_llama(vocab_size=258)


def test_the_payload_works_where_it_is_opened(planted, marker, opened):
    torch.load(planted("mosld") / PICKLE, weights_only=False)
    assert marker.is_dir() and len(opened) == 1


@pytest.mark.parametrize("method", ["mosld", "lora"])
@pytest.mark.parametrize("verb", ["eval", "export", "merge"])
def test_a_command_names_it(verb, method, planted, marker, opened, data, say, tmp_path):
    folder, out = planted(method), tmp_path / "out"
    words = {
        "eval": [
            "--model",
            data / "model",
            "--adapter",
            folder,
            "--task",
            f"even={data / 'even.jsonl'}",
            "--output",
            out,
        ],
        "export": ["--model", data / "model", "--adapter", folder, "--output", out],
        "merge": ["--method", "ties", "--base", data / "model", folder, "--output", out],
    }[verb]
    status, said = say(verb, *words)
    assert status == 2 and PICKLE in said and "a pickle, is not opened" in said
    assert not out.exists() and not marker.exists() and opened == []


def test_inspect_names_it(planted, marker, opened, say):
    status, said = say("inspect", planted("mosld"))
    assert status == 2 and f"{PICKLE}, a pickle, is not opened" in said
    assert not marker.exists() and opened == []


@pytest.mark.parametrize("load", ["from_pretrained", "load_adapter", "config", "import_lora"])
def test_a_function_names_it(load, planted, marker, opened):
    folder = str(planted("lora" if load == "import_lora" else "mosld"))
    ways = {
        "from_pretrained": lambda: peft.PeftModel.from_pretrained(base(), folder),
        "load_adapter": lambda: peft.get_peft_model(base(), MoSLDConfig(target_modules=["q_proj"])).load_adapter(
            folder, "second"
        ),
        "config": lambda: MoSLDConfig.from_pretrained(folder),
        "import_lora": lambda: import_lora(base(), folder, num_experts=2),
    }
    with pytest.raises(AdapterFileError, match=f"{PICKLE}, a pickle, is not opened"):
        ways[load]()
    assert not marker.exists() and opened == []


@pytest.mark.parametrize("inside", ["", "second"])
def test_a_checkpoint_of_the_trainer_is_passed_over(inside, planted, marker, opened, tmp_path):
    folder = tmp_path / "run" / "checkpoint-3" / inside
    folder.parent.mkdir(parents=True)
    planted("mosld").rename(folder)
    (tmp_path / "run" / "checkpoint-3" / "trainer_state.json").write_text("{}")
    with pytest.raises(AdapterFileError, match="a pickle, is not opened"):
        check_adapters(tmp_path / "run" / "checkpoint-3")
    with pytest.warns(UserWarning, match="is passed over: .* a pickle, is not opened"):
        assert last_whole_checkpoint(tmp_path / "run") is None
    assert not marker.exists() and opened == []


@pytest.mark.parametrize("name", PREFERRED)
@pytest.mark.parametrize("inside", ["", "second"])
def test_weights_that_the_trainer_would_take_in_an_adapters_place_are_refused(name, inside, adapter, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoint-3"
    shutil.copytree(adapter("mosld"), checkpoint / inside)
    (checkpoint / "trainer_state.json").write_text("{}")
    check_adapters(checkpoint)
    (checkpoint / name).write_bytes(b"")
    with pytest.raises(
        AdapterFileError, match=f"checkpoint-3/{name} would be loaded in the place of adapter_model.safetensors"
    ):
        check_adapters(checkpoint)
    with pytest.warns(UserWarning, match="is passed over: .* would be loaded in the place"):
        assert last_whole_checkpoint(tmp_path / "run") is None


def test_beside_the_safetensors_file_it_is_passed_over(adapter, marker, opened, say):
    folder = adapter("mosld")
    torch.save({"weight": Payload(marker)}, folder / PICKLE)
    peft.PeftModel.from_pretrained(base(), str(folder))
    assert say("inspect", folder)[0] == 0
    check_adapters(folder)
    assert not marker.exists() and opened == []


@pytest.mark.parametrize("verb", ["eval", "merge"])
def test_a_model_that_is_a_pickle_is_not_opened(verb, data, marker, opened, say, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (data / "model").glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    torch.save({"weight": Payload(marker)}, folder / "pytorch_model.bin")
    words = {
        "eval": ["--model", folder, "--task", f"even={data / 'even.jsonl'}"],
        "merge": ["--method", "ties", "--base", data / "model", folder, "--output", tmp_path / "out"],
    }[verb]
    status, said = say(verb, *words)
    assert status == 2 and "safetensors" in said and str(folder) in said
    assert verb == "eval" or "pytorch_model.bin, a pickle, is not opened" in said
    assert not marker.exists() and opened == []
