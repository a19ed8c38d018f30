"""Runs that are killed, at random moments and at those where they once went wrong, end as those that were not."""

import json

import pytest
import torch

from mosld.merging import descent
from mosld.merging.adaptive import AdaptiveSettings
from tests.hardening.faults.fifty_kills import SAVING, TASKS, Kept, campaign, compare_folders, gather
from tests.hardening.faults.moments import PHASES, Event, Moment, attempt, save_often
from tests.helpers.cli_data import FAST, words, write_data
from tests.helpers.kills import killed_at, processes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("faults") / "data")


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_as_those_that_were_not(tmp_path):
    wanted = {"train": 4, "compare": 4, "merge": 4}
    report = gather(list(campaign(tmp_path, wanted, seed=1)), seed=1)
    assert report["faults"] == []
    assert report["kills_by_verb"] == wanted and sum(report["kills_by_phase"].values()) == 12
    assert report["restarts"] == 12 - report["killed_after_the_results"]  # such a run has ended
    assert (
        report["compared"]["losses"] > 0 and report["compared"]["items"] > 0 and report["compared"]["coefficients"] > 0
    )
    assert report["compared"]["weight_files"] >= 9


@pytest.mark.slow
def test_a_process_dies_at_its_moment(tmp_path):
    process = processes.Process(target=write_data, args=(tmp_path / "data",))
    process.start()
    process.join()
    for phase in ("start", "checkpointing"):
        made = attempt(
            words(tmp_path / "data", tmp_path / phase, *FAST, *SAVING, "--no-lora"),
            tmp_path / "printed.txt",
            Moment(phase, 1, 0.0),
        )
        assert made.killed_in == phase and {event.phase for event in made.events} <= set(PHASES)
        assert not (tmp_path / phase / "results.json").exists()


def event(what, name, number=0):
    return Event("training", what, name, number, 0.0)


def test_finished_work_that_is_run_again_or_lost_is_told(tmp_path):
    kept, stages = Kept(), tmp_path / "stages"
    stages.mkdir()
    (stages / "a.json").write_text("1")
    kept.add([event("step", "b", 1), event("step", "b", 2), event("kept", "b", 2), event("finished", "a")], tmp_path)
    kept.add([event("step", "b", 3), event("step", "b", 4)], tmp_path)
    kept.add([event("step", "b", 3)], tmp_path)
    assert kept.faults == [] and kept.again == 1
    kept.add([event("cell", "a"), event("step", "b", 2)], tmp_path)
    (stages / "a.json").write_text("2")
    kept.add([], tmp_path)
    assert [fault.split(":")[0].split()[0] for fault in kept.faults] == ["a", "b", "what"]


def test_folders_differ_by_names_bytes_and_numbers_but_not_by_times(tmp_path):
    for name, loss, weight in (("one", 1.0, b"a"), ("other", 2.0, b"b"), ("same", 1.0, b"a")):
        (tmp_path / name).mkdir()
        loss_of = {"loss": [[1, loss]], "train_seconds": ord(name[-1])}
        (tmp_path / name / "results.json").write_text(json.dumps(loss_of))
        (tmp_path / name / "a.safetensors").write_bytes(weight)
    (tmp_path / "other" / ".tmp1").touch()
    found, _ = compare_folders(tmp_path / "one", tmp_path / "other")
    assert found == ["left over: .tmp1", "a.safetensors differs", "results.json differs"]
    found, compared = compare_folders(tmp_path / "one", tmp_path / "same")
    assert found == [] and compared == {"names": 2, "files": 2, "weight_files": 1, "losses": 1}


@pytest.mark.slow
def test_a_run_killed_after_its_last_step_takes_no_further_step(data, tmp_path):
    """The last step is in the middle of an epoch, where the Trainer itself would take another, at any learning rate."""
    steps = ["--max_steps", "8", "--lr_scheduler_type", "constant"]
    more = ["--no-lora", "--r", "2", *FAST, *SAVING, *steps]
    assert attempt(words(data, tmp_path / "whole", *more), tmp_path / "printed.txt").exit_code == 0
    for death in (r"os.mkdir .*/\.adapter\.", r"open .*/stages/\.mosld-seed0"):
        killed_at(death, _main, words(data, tmp_path / "cut", *more))
    assert attempt(words(data, tmp_path / "cut", *more), tmp_path / "printed.txt").exit_code == 0
    assert compare_folders(tmp_path / "whole", tmp_path / "cut")[0] == []


def _main(own):
    from mosld.cli.main import main

    save_often()
    main(own)


def lora(folder, name):
    """A LoRA with numbers in it."""
    import peft
    from transformers import AutoModelForCausalLM

    from tests.helpers.models import perturb

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    torch.manual_seed(len(name))
    perturb(model)
    model.save_pretrained(str(folder / name))
    return str(folder / name)


@pytest.mark.slow
def test_a_merge_killed_when_its_lora_is_there_and_its_results_are_not_goes_on(data, tmp_path):
    tasks = [f"{task}={data / task}.jsonl:{data / task}.jsonl" for task in TASKS]
    own = ["merge", "--method", "task_arithmetic", "--base", str(data / "model"), lora(data, "a"), lora(data, "bb")]
    own += ["--tasks", *tasks, "--output"]
    assert attempt([*own, str(tmp_path / "whole")], tmp_path / "printed.txt").exit_code == 0
    killed_at(r"open .*/\.results.json", _main, [*own, str(tmp_path / "cut")])
    assert (tmp_path / "cut" / "adapter").exists()
    done = attempt([*own, str(tmp_path / "cut")], tmp_path / "printed.txt")
    assert done.exit_code == 0, done.printed
    assert compare_folders(tmp_path / "whole", tmp_path / "cut")[0] == []


def run_descent(folder, until=6):
    """Six of Adam's steps on a square, saved at every second; -> the steps that this call took, and all losses."""
    variable = torch.ones(3, requires_grad=True)
    own = descent.Descent("d", {"x": variable}, AdaptiveSettings(steps=6, save_steps=2, learning_rate=0.1), folder)
    steps = []
    for step in own.steps():
        if step == until:
            raise KeyboardInterrupt
        own.optimiser.zero_grad()
        loss = variable.square().sum()
        loss.backward()
        own.done(loss.item())
        steps.append(step)
    return steps, own.losses


def test_a_merge_cut_off_between_the_files_of_its_state_goes_on_from_the_state_before(tmp_path, monkeypatch):
    _, losses = run_descent(None)
    with pytest.raises(KeyboardInterrupt):
        run_descent(tmp_path / "state", until=3)  # saved at step 2

    def cut(path, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(descent.Path, "replace", cut)  # the last of what saving step 4 does
        run_descent(tmp_path / "state")
    assert run_descent(tmp_path / "state") == ([2, 3, 4, 5], losses)


def test_nothing_is_left_of_a_state_that_could_not_be_written(tmp_path, monkeypatch):
    """safetensors writes beside its place under a name that nobody knows, and a full disk leaves it there."""
    with pytest.raises(KeyboardInterrupt):
        run_descent(tmp_path / "state", until=3)
    before = [path.name for path in (tmp_path / "state").iterdir()]

    def cut(tensors, path, metadata):
        path.with_name(".tmpAbCdEf").touch()
        raise OSError

    monkeypatch.setattr(descent, "save_file", cut)
    with pytest.raises(OSError):
        run_descent(tmp_path / "state")
    assert [path.name for path in (tmp_path / "state").iterdir()] == before
