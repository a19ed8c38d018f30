"""A disk that becomes full: what is finished stays, the message says what to do, and with room the run goes on."""

import errno

import pytest

from mosld.cli.main import main
from mosld.files.errors import explain
from tests.hardening.faults.disk import full_at, small_disk
from tests.hardening.faults.fifty_kills import SAVING, TASKS, compare_folders
from tests.hardening.faults.moments import attempt
from tests.hardening.faults.test_kills import lora
from tests.helpers.cli_data import FAST, words, write_data

TRAIN = ["--no-lora", "--r", "2", *FAST, *SAVING, "--max_steps", "6"]
PLACES = {
    "claiming the folder": r"open .*/\.run\.json",
    "the adapter of a checkpoint, by safetensors": r"os.mkdir .*checkpoint-4$",
    "the optimiser of a checkpoint, by torch.save": r"os.rename .*checkpoint-4/\.adapter_model\.sha256",
    "the state of a checkpoint": r"open .*checkpoint-4/trainer_state.json",
    "the adapter": r"os.mkdir .*/\.adapter\.",
    "a finished stage": r"open .*/stages/\.mosld-seed0",
    "the results": r"open .*/\.results\.json",
}
MERGE_PLACES = {"the state": r"os.mkdir .*/\.state\.safetensors", "the merged LoRA": r"os.mkdir .*/\.adapter\."}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("faults") / "data")


@pytest.fixture
def disk(tmp_path):
    try:
        with small_disk(tmp_path / "disk") as folder:
            yield folder
    except PermissionError as error:
        pytest.skip(f"a file system of its own needs the right to mount one: {error}")


def check(place, own, whole, disk, tmp_path):
    """The command fails with the message, and goes on to what `whole` holds once there is room."""
    run = disk / "run"
    code, said = full_at(place, disk / "filler", [*own, "--output", str(run)], tmp_path / "printed.txt")
    assert code == 1, said
    message = said.strip().splitlines()[-1]
    assert f"the disk is full: {run}" in message and "run the same command again to go on" in message
    assert "Traceback" not in said
    assert not (run / "results.json").exists()
    (disk / "filler").unlink()
    done = attempt([*own, "--output", str(run)], tmp_path / "printed.txt")
    assert done.exit_code == 0, done.printed
    assert compare_folders(whole, run)[0] == []
    return done


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    whole = tmp_path_factory.mktemp("whole") / "run"
    assert attempt(words(data, whole, *TRAIN), whole.parent / "printed.txt").exit_code == 0
    return whole


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES.values(), ids=list(PLACES))
def test_training_on_a_disk_that_becomes_full_says_so_and_goes_on(place, data, trained, disk, tmp_path):
    own = words(data, disk, *TRAIN)
    cut = own.index("--output")
    done = check(place, own[:cut] + own[cut + 2 :], trained, disk, tmp_path)
    first = next((event.number for event in done.events if event.what == "step"), None)
    expected = {"claiming": 1, "checkpoint": 3}  # step 2 was kept
    wanted = next((step for word, step in expected.items() if word in {v: k for k, v in PLACES.items()}[place]), None)
    assert first == wanted


@pytest.fixture(scope="module")
def merging(data, tmp_path_factory):
    """The command line but for --output, and what it makes undisturbed."""
    tasks = [f"{task}={data / task}.jsonl:{data / task}.jsonl" for task in TASKS]
    own = ["merge", "--method", "adamerging_layer", "--base", str(data / "model"), lora(data, "a"), lora(data, "bb")]
    own += ["--tasks", *tasks, "--steps", "4", "--batch-size", "4"]
    whole = tmp_path_factory.mktemp("whole") / "merge"
    assert attempt([*own, "--output", str(whole)], whole.parent / "printed.txt").exit_code == 0
    return own, whole


@pytest.mark.slow
@pytest.mark.parametrize("place", MERGE_PLACES.values(), ids=list(MERGE_PLACES))
def test_merging_on_a_disk_that_becomes_full_says_so_and_goes_on(place, merging, disk, tmp_path):
    own, whole = merging
    check(place, own, whole, disk, tmp_path)


def test_a_full_disk_is_known_however_its_writer_says_it(tmp_path):
    """The texts are those of safetensors 0.8 and torch 2.13; the tests above make them on a real disk."""
    rust = type("SafetensorError", (Exception,), {})("I/O error: No space left on device (os error 28)")
    for error in (rust, OSError(errno.ENOSPC, "No space left on device", "x/y.json")):
        message = explain(error, "train", tmp_path / "run")
        assert message is not None and f"the disk is full: {tmp_path / 'run'}" in message
    assert "x/y.json" in message
    torch_save = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    message = explain(torch_save, "train", tmp_path / "run")
    assert message is not None and message.startswith("a file could not be written to its end")  # there is room here
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert "the disk quota is used up" in str(explain(wrapped, "merge", tmp_path))
    assert explain(RuntimeError("a bug"), "train", tmp_path) is None and explain(OSError("x"), "train", None) is None


@pytest.mark.slow
def test_without_a_disk_of_its_own_a_write_that_is_refused_ends_in_the_same_words(
    data, trained, tmp_path, monkeypatch, capsys
):
    """For machines that let nobody mount one: Python's own writes say that the disk is full."""
    own, real = words(data, tmp_path / "run", *TRAIN), type(tmp_path).write_text

    def full(path, *arguments, **options):
        if ".mosld-seed0" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "write_text", full)
        assert main(own) == 1
    said = capsys.readouterr().err
    assert f"the disk is full: {tmp_path / 'run'} (" in said and "Make room there. What is finished is kept" in said
    assert main(own) == 0
    assert compare_folders(trained, tmp_path / "run")[0] == []


def test_an_error_of_the_programs_own_keeps_its_traceback(data, tmp_path, monkeypatch):
    from mosld.cli import train as train_verb

    def fail(run):
        raise RuntimeError("a bug")

    monkeypatch.setattr(train_verb, "run_training", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(words(data, tmp_path / "run", *TRAIN))
