"""No name in a task, an adapter or a model's files leads out of the folder that was named, to read or to write."""

import json
import os

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from mosld import MoSLDConfig, export_lora
from mosld.experiments.run_folder import MERGE, OWN, RunFolderError, check_free, claim, release
from mosld.files.adapter_folder import AdapterFileError, read_json
from mosld.files.model_folder import INDEX, ModelFileError, check_model_folder, files_of
from mosld.merging.read import read_task_vectors
from mosld.merging.vectors import MergeError
from mosld.tasks.examples import TaskFileError, parse_task
from mosld.tuner.weights import AdapterWeights
from tests.hardening.security.conftest import seen
from tests.helpers.models import tiny_llama

ESCAPES = [
    "../../x",
    "/tmp/x",
    "..",
    ".",
    "a/b",
    "a\\b",
    "..\\..\\x",
    "C:x",
    "\\\\host\\x",
    "a\0b",
    "x\n",
    "",
    " ",
    "~",
    "\x1b[2J",
]
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("name", [*ESCAPES, ".hidden", "\u202ex", "a:b"])
def test_a_task_has_no_such_name(name):
    with pytest.raises(TaskFileError, match="a task"):
        parse_task(f"{name}=file")


def test_a_task_file_has_no_nul_in_its_name():
    with pytest.raises(TaskFileError, match="no NUL"):
        parse_task("a=b\0c")


@pytest.mark.parametrize("verb", ["train", "compare", "merge", "eval", "inspect"])
def test_a_command_given_one_writes_nothing(verb, data, say, tmp_path):
    before = seen(data)
    more = {"merge": ["--method", "ties", data / "lora"], "inspect": [data / "mosld"], "compare": ["--methods", "lora"]}
    base = ["--base" if verb == "merge" else "--model", data / "model"]
    task = ["--task", f"../../x={data / 'even.jsonl'}"]
    status, said = say(verb, *more.get(verb, []), *base, *task, "--output", tmp_path / "out")
    assert status == 2 and "a task's name has letters" in said, said
    assert list(tmp_path.iterdir()) == [] and seen(data) == before


FOLDERS = ("~", "x\n", "\x1b[2J", *(() if os.name == "nt" else ("C:x",)))  # which a folder here may be called


@pytest.mark.parametrize("name", [name for name in ESCAPES if name.strip() and name not in FOLDERS])
def test_an_adapter_has_no_such_name(name, tmp_path):
    model = tiny_llama()
    with pytest.raises(ValueError, match="an adapter's name becomes that of its folder"):
        peft.get_peft_model(model, MoSLDConfig(target_modules=["q_proj"]), adapter_name=name)
    assert not any("mosld" in own for own, _ in model.named_parameters())


@pytest.fixture
def sharded(data, tmp_path):
    """file name -> a checkpoint's folder whose index has one tensor in that file, beside a folder `elsewhere`."""

    def make(file):
        folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
        folder.mkdir()
        elsewhere.mkdir()
        for path in (data / "model").glob("*.json"):
            (folder / path.name).write_bytes(path.read_bytes())
        tensors = load_file(data / "model" / "model.safetensors")
        for own in (folder / "part.safetensors", elsewhere / "secret.safetensors", folder / "part.bin"):
            save_file(tensors, own, metadata={"format": "pt"})
        names = dict.fromkeys(tensors, "part.safetensors")
        names[next(iter(names))] = file
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
        return folder

    return make


OUTSIDE = [
    "../elsewhere/secret.safetensors", "{tmp}/elsewhere/secret.safetensors", "./part.safetensors",
    "..\\part.safetensors", "part.bin", "C:part.safetensors", "a\0.safetensors", "\x1b.safetensors", "..", "", 7, None,
    ["part.safetensors"],
]  # fmt: skip


@pytest.mark.parametrize("file", OUTSIDE)
def test_an_index_names_files_of_its_own_folder_alone(file, sharded, say, data, tmp_path):
    folder = sharded(file.format(tmp=tmp_path) if isinstance(file, str) else file)
    for read in (files_of, check_model_folder, lambda folder: read_task_vectors([folder])):
        with pytest.raises(ModelFileError, match=f"{INDEX} has .* no safetensors file of the folder"):
            read(folder)
    task = ["--task", f"even={data / 'even.jsonl'}"]
    merge = ["merge", "--method", "ties", "--base", data / "model", folder, "--output", tmp_path / "out"]
    for words in (merge, ["eval", "--model", folder, *task]):
        status, said = say(*words)
        assert status == 2 and INDEX in said and "no safetensors file of the folder" in said and "\x1b" not in said
    assert not (tmp_path / "out").exists()


def test_an_index_of_another_name_is_looked_at_too(sharded):
    folder = sharded("../elsewhere/secret.safetensors")
    (folder / INDEX).rename(folder / "own.safetensors.index.json")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "transformers_weights": "own.safetensors.index.json"}))
    with pytest.raises(ModelFileError, match="own.safetensors.index.json has"):
        check_model_folder(folder)


def test_a_good_index_is_read_and_a_bad_one_is_named(sharded, say, data):
    folder = sharded("part.safetensors")
    assert say("eval", "--model", folder, "--task", f"even={data / 'even.jsonl'}")[0] == 0
    assert set(files_of(folder).values()) == {folder / "part.safetensors"}
    for text, said in {
        "{}": "has no weight_map", "[]": "must hold an object", "{": "is not JSON", "[" * 99_999: "is not JSON",
        '{"weight_map": {"a": "b.safetensors"}}': "b.safetensors, which is missing",
        '{"weight_map": []}': "has no weight_map",
    }.items():  # fmt: skip
        (folder / INDEX).write_text(text)
        with pytest.raises(ModelFileError, match=said):
            check_model_folder(folder)


def test_a_base_model_that_an_adapter_names_is_not_followed(adapter, data, say, tmp_path, offline):
    folder = adapter("mosld", base_model_name_or_path="../elsewhere/model", revision="../../x")
    before, out = seen(tmp_path), tmp_path / "out"
    task = ["--task", f"even={data / 'even.jsonl'}"]
    for number, words in enumerate((
        ["inspect", folder, "--model", data / "model", *task],
        ["eval", "--model", data / "model", "--adapter", folder, *task],
        ["export", "--model", data / "model", "--adapter", folder],
    )):  # fmt: skip
        assert say(*words, "--output", out / str(number) if words[0] != "eval" else tmp_path / "out.json")[0] == 0, (
            words[0]
        )
    (tmp_path / "out.json").unlink()
    assert {path: own for path, own in seen(tmp_path, without=out).items() if path != str(out)} == before


def test_an_adapters_folder_is_no_model(adapter, data, say):
    status, said = say("eval", "--model", adapter("lora"), "--task", f"even={data / 'even.jsonl'}")
    assert status == 2 and "it is an adapter's, and the model is its base" in said


@pytest.mark.parametrize(
    "fields", [{"peft_type": "XLORA", "adapters": {"0": "../x"}}, {"prompt_tuning_init_state_dict_path": "/x"}]
)
def test_an_adapter_that_names_other_files_is_refused(fields, adapter, data, say):
    words = ["--model", data / "model", "--task", f"even={data / 'even.jsonl'}", "--adapter", adapter("lora", **fields)]
    status, said = say("eval", *words)
    assert status == 2 and f"its {list(fields)[-1]}," in said and "other folders' files" in said


@pytest.mark.parametrize("layer", ["../../x", "/tmp/x", "..", "a\\b"])
def test_a_layers_name_is_no_path(layer, adapter, data, say, tmp_path):
    """It is reported, and names no file."""
    folder, out = adapter("mosld"), tmp_path / "out"
    tensors = load_file(folder / WEIGHTS)
    tensors = {key.replace("model.layers.0.self_attn.q_proj", layer): tensor for key, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    before = seen(tmp_path)
    assert say("inspect", folder, "--output", out / "seen")[0] == 0
    assert [path.name for path in (out / "seen").iterdir()] == ["inspect.json"]
    model = ["--model", data / "model", "--adapter", folder]
    for words in (
        ["eval", *model, "--task", f"even={data / 'even.jsonl'}", "--output", out / "eval.json"],
        ["export", *model, "--output", out / "export"],
        ["merge", "--method", "ties", "--base", data / "model", folder, "--output", out / "merge"],
    ):
        assert say(*words)[0] == 2
    assert [path.name for path in out.iterdir()] == ["seen"]
    assert {path: own for path, own in seen(tmp_path, without=out).items() if path != str(out)} == before


@pytest.mark.parametrize("name", ["\x1b[2J", "a\nb", "x" * 300, "\u202e"])
def test_a_tensor_whose_name_commands_the_terminal_is_refused(name, tmp_path):
    path = tmp_path / WEIGHTS
    save_file({f"base_model.model.{name}.mosld_shared_a.weight": torch.ones(2, 3)}, path)
    with pytest.raises(AdapterFileError, match="which is no name of a tensor") as raised:
        AdapterWeights(path, lambda layer: pytest.fail("it was used"))
    assert str(raised.value).isprintable()


def test_a_field_whose_name_commands_the_terminal_is_warned_of_in_plain_letters(adapter, data):
    """PEFT reads the configuration by itself, in Python's own calls."""
    with pytest.warns(UserWarning, match="fields that this version of mosld does not know") as warned:
        MoSLDConfig.from_pretrained(str(adapter("mosld", **{"\x1b]0;owned\x07": 1})))
    assert all(str(one.message).isprintable() for one in warned)


def test_texts_of_other_lands_and_lines_are_no_commands(adapter):
    folder = adapter("lora", base_model_name_or_path="modèles\u3000de\u00a0base", revision="a\nb")
    assert read_json(folder / "adapter_config.json")["revision"] == "a\nb"


@pytest.mark.parametrize("fields", [{"base_model_name_or_path": "\x1b[2J"}, {"\x1b[2Jr": 1}])
@pytest.mark.parametrize("method", ["mosld", "lora"])
def test_nothing_that_commands_a_terminal_is_printed(method, fields, adapter, say, data, tmp_path):
    folder = adapter(method, **fields)
    merge = ["merge", "--method", "ties", "--base", data / "model", folder, "--output", tmp_path / "out"]
    for words in (merge, ["inspect", folder]):
        status, said = say(*words)
        assert status == 2 and "\x1b" not in said and "adapter_config.json" in said


def test_a_lora_whose_layer_commands_the_terminal_is_told_in_plain_letters(adapter, say, data, tmp_path):
    folder = adapter("lora")
    tensors = load_file(folder / WEIGHTS)
    save_file({key.replace("layers.0", "\x1b[2J"): tensor for key, tensor in tensors.items()}, folder / WEIGHTS)
    status, said = say("merge", "--method", "ties", "--base", data / "model", folder, "--output", tmp_path / "out")
    assert status == 2 and "\x1b" not in said and "\\x1b[2J" in said


@pytest.fixture
def run(tmp_path):
    """An unfinished run, whose settings are {}, with a folder `elsewhere` beside it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("kept")
    claim(tmp_path / "run", {}, program=MERGE)
    release()
    return tmp_path / "run"


@pytest.mark.parametrize("name", [*OWN, "lock", "stages/base.json", "checkpoints/a/checkpoint-1"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_with_a_link_in_it_is_refused(name, overwrite, run):
    link = run / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(run.parent / "elsewhere")
    before = seen(run.parent)
    for use in (check_free, claim):
        with pytest.raises(RunFolderError, match=f"{link} is a symbolic link"):
            use(run, {}, overwrite, MERGE)
    assert seen(run.parent) == before


def test_an_output_folder_may_be_a_link_itself(run):
    (run.parent / "link").symlink_to(run)
    assert claim(run.parent / "link", {}, program=MERGE)
    release()


def test_an_export_over_one_with_a_link_in_it_leaves_what_the_link_is_to(run):
    model = peft.get_peft_model(tiny_llama(), MoSLDConfig(r=2, num_experts=2, target_modules=["q_proj"]))
    folder, before = run.parent / "export", seen(run.parent / "elsewhere")
    export_lora(model, folder)
    (folder / "expert_0").symlink_to(run.parent / "elsewhere")
    export_lora(model, folder, per_expert=True, overwrite=True)
    assert seen(run.parent / "elsewhere") == before
    assert (folder / "expert_0").is_dir() and not (folder / "expert_0").is_symlink()


def test_a_missing_folder_is_a_merge_error(tmp_path):
    with pytest.raises(MergeError, match="it is no adapter and no checkpoint"):
        read_task_vectors([tmp_path / "missing"])
