"""A cell of `mosld compare` that lacks memory costs that cell alone, and leaves the base model as it was."""

import json

import pytest
import torch
from peft.tuners.lora import LoraModel

from mosld.cli import compare as compare_verb
from mosld.cli.main import main
from mosld.experiments import compare
from mosld.experiments import stages as training
from mosld.experiments.plan import plan_comparison, plan_merges
from mosld.files.errors import LESS_MEMORY, explain, out_of_memory
from tests.experiments.test_compare import recorded_cells
from tests.hardening.faults.fifty_kills import COMPARE, compare_folders
from tests.helpers.cli_data import FAST, words, write_data

MORE = [*COMPARE[: COMPARE.index(FAST[0])], *FAST, "--save_strategy", "no", *COMPARE[COMPARE.index("--merge") :]]
SINGLE, MERGES = "lora-single-even-seed0", ("ties-merged-seed0", "adamerging_layer-merged-seed0")


def of_torch():
    torch.empty(1 << 58)


def of_cuda():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")


def of_python():
    raise MemoryError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("faults") / "data")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(words(data, folder, *MORE, command="compare")) == 0
    return folder


def cells():
    names = [stage.name for stage in plan_comparison(["lora", "mosld"], ["mixture", "single"], 1, ["even", "vowel"])]
    return [*names, *(stage.name for stage in plan_merges(["ties-merged", "adamerging_layer-merged"], 1))]


def finished(folder):
    return {path.stem for path in (folder / "stages").glob("*.json")} - {"base"}


def in_training(patch, fail):
    real = training._train

    def train(model, encoder, tasks, stage, *rest):
        if stage.name == SINGLE:
            real(model, encoder, tasks, stage, *rest)  # as far as it comes
            fail()
        return real(model, encoder, tasks, stage, *rest)

    patch.setattr(training, "_train", train)


def while_the_adapter_is_placed(patch, fail):
    """In some layers it is already."""
    place, train, seen = LoraModel._create_and_replace, compare.run_stage, []

    def one(model, *arguments, **options):
        seen.append(seen[0] if seen else None)
        if len(seen) == 4:
            fail()
        return place(model, *arguments, **options)

    def run_stage(base, encoder, tasks, stage, *rest):
        if stage.name != SINGLE:
            return train(base, encoder, tasks, stage, *rest)
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(LoraModel, "_create_and_replace", one)
            return train(base, encoder, tasks, stage, *rest)

    patch.setattr(compare, "run_stage", run_stage)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "fail"),
    [(in_training, of_torch), (in_training, of_cuda), (while_the_adapter_is_placed, of_python)],
    ids=["real, while it trains", "CUDA's, while it trains", "Python's, while it is placed"],
)
def test_the_other_cells_are_run_and_the_same_command_runs_what_is_missing(
    data, whole, tmp_path, monkeypatch, capsys, place, fail
):
    own = words(data, tmp_path / "run", *MORE, command="compare")
    with monkeypatch.context() as patch:
        place(patch, fail)
        assert main(own) == 1
    said = capsys.readouterr().err
    assert f"out of memory in 3 of {len(cells())} cells:" in said and f"\n  {SINGLE}: " in said
    assert all(f"\n  {name}: merges {SINGLE}" in said for name in MERGES)
    assert f"kept in {tmp_path / 'run'}" in said and "run the same command again" in said and "Traceback" not in said
    assert finished(tmp_path / "run") == set(cells()) - {SINGLE, *MERGES}
    assert not (tmp_path / "run" / "compare.json").exists()
    ran = recorded_cells(monkeypatch)
    assert main(own) == 0 and ran == [SINGLE]
    assert compare_folders(whole, tmp_path / "run")[0] == []


@pytest.mark.slow
def test_a_table_without_the_method_that_lacks_memory_can_be_had(data, tmp_path, monkeypatch):
    def command(*methods):
        own = ["--methods", ",".join(methods), "--seeds", "1", "--setting", "mixture", *FAST]
        return words(data, tmp_path / "run", *own, command="compare")

    with monkeypatch.context() as patch:
        real = training._train
        patch.setattr(training, "_train", lambda *own: of_cuda() if own[3].method == "lora" else real(*own))
        assert main(command("lora", "mosld")) == 1
    ran = recorded_cells(monkeypatch)
    assert main(command("mosld")) == 0 and ran == []
    assert [row["row"] for row in json.loads((tmp_path / "run" / "compare.json").read_text())["rows"]] == ["mosld"]


def test_other_errors_of_a_cell_end_the_comparison(data, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(compare, "run_stage", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(words(data, tmp_path / "run", *MORE, command="compare"))


def test_one_of_several_processes_does_not_go_on_alone(data, tmp_path, monkeypatch, capsys):
    """The others are in the middle of the cell and would wait for ever."""
    ran = []

    def fail(base, encoder, tasks, stage, *_):
        ran.append(stage.name)
        of_cuda()

    class Two:
        num_processes, is_main_process = 2, True

        def wait_for_everyone(self):
            pass

    monkeypatch.setattr(compare, "run_stage", fail)
    for module in (compare_verb, compare):
        monkeypatch.setattr(module, "PartialState", Two)
    assert main(words(data, tmp_path / "run", *MORE, command="compare")) == 1
    assert ran == ["lora-seed0"] and "\n  lora-seed0: CUDA out of memory. Tried" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "merge", "eval"])
def test_every_verb_says_what_needs_less_memory(verb, tmp_path):
    for fail in (of_torch, of_cuda, of_python):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            fail()
        message = explain(caught.value, verb, tmp_path)
        assert out_of_memory(caught.value) and message is not None and message.startswith("out of memory (")
        assert LESS_MEMORY.get(verb, "--eval-batch-size") in message and "\n" not in message
    assert not out_of_memory(RuntimeError("shapes differ")) and not out_of_memory(ValueError("out of memory"))
