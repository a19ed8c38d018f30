"""One of two processes of torchrun is killed: the other ends too, and the same command goes on to the same result."""

import json
import time

import pytest

from mosld.training.checkpoints import last_whole_checkpoint
from tests.hardening.faults.fifty_kills import SAVING, compare_folders
from tests.helpers.cli_data import FAST, words, write_data
from tests.helpers.kills import processes
from tests.integration.processes.launch import torchrun

pytestmark = pytest.mark.slow
# Steps of 2 x 4 examples, as many as one process of 8 takes. Dropout draws in each process, so that its random numbers
# count.
MORE = [*FAST, *SAVING, "--max_steps", "6", "--per_device_train_batch_size", "4"]
AT_MOST_S = 120  # torchrun waits half a minute before it kills what does not end by itself


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "data"
    process = processes.Process(target=write_data, args=(folder,))
    process.start()
    process.join()
    return folder


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    torchrun("tests.hardening.faults.rank", *words(data, folder, *MORE))
    return folder


# The stage that is trained then, and its last checkpoint that every process has written whole.
@pytest.mark.parametrize(
    ("death", "last"),
    [("1:step:4", "checkpoint-2"), ("0:step:4", "checkpoint-2"), ("1:save:2", "checkpoint-2"), ("1:save:1", None)],
)
def test_a_lost_process_ends_the_run_and_it_goes_on_to_the_same_result(data, whole, tmp_path, death, last):
    own, start = words(data, tmp_path / "run", *MORE), time.monotonic()
    done = torchrun("tests.hardening.faults.rank", *own, DIE=death, fails=True)
    assert time.monotonic() - start < AT_MOST_S and "Signal 9 (SIGKILL)" in done.stderr + done.stdout
    found = last_whole_checkpoint(tmp_path / "run" / "checkpoints" / "lora-seed0")
    assert (found and found.rpartition("/")[2]) == last and not (tmp_path / "run" / "results.json").exists()
    if last is not None:
        assert (tmp_path / "run" / "checkpoints" / "lora-seed0" / last / "rng_state_1.pth").is_file()
    torchrun("tests.hardening.faults.rank", *own)
    assert compare_folders(whole, tmp_path / "run")[0] == []
    losses = json.loads((tmp_path / "run" / "results.json").read_text())["methods"]["mosld"]["loss"]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
