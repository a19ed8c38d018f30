"""A training that is killed goes on from its last whole checkpoint to the same losses and adapter, bit for bit."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from mosld.cli.main import main
from mosld.files.adapter_folder import AdapterFileError, write_digest
from mosld.training.checkpoints import last_whole_checkpoint
from tests.files.test_adapter_folder import DIGEST, WEIGHTS, alter
from tests.helpers.cli_data import FAST, words, write_data
from tests.helpers.kills import killed_at
from tests.layers.test_invariances import train

# Where each process dies, and before it the checkpoint that the next one must go on from.
DEATHS = [
    (r"os.mkdir .*checkpoint-4$", 2, "in training, two steps after its checkpoint"),
    (r"open .*checkpoint-4/\.adapter_config", 2, "while a checkpoint is written: weights without configuration"),
    (r"opened .*checkpoint-4/trainer_state.json", 2, "while a checkpoint is written: the last file is there, empty"),
    (r"os.remove optimizer.pt", 4, "while the checkpoint before is removed"),
    (r"open .*checkpoint-8/trainer_state.json", 6, "while a later checkpoint is written"),
    (r"os.mkdir .*/\.adapter\.", 10, "before the adapter is saved"),
    (r"open .*/\.adapter\..*README.md", 10, "while the adapter is saved"),
    (r"open .*/stages/\.mosld-seed0", 10, "when the adapter is saved, before its stage is finished"),
    (r"os.remove optimizer.pt", ..., "when its stage is finished, while its checkpoints are removed"),
    (r"open .*/\.results.json", None, "before the results are written"),
]


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(tmp_path):
    data = write_data(tmp_path / "data")
    more = ["--no-lora", "--r", "2", *FAST, "--max_steps", "10", "--save_strategy", "steps", "--save_steps", "2"]
    assert main(words(data, tmp_path / "whole", *more)) == 0
    cut, never = tmp_path / "cut", None
    for death, last, _ in DEATHS:
        killed_at(death, main, words(data, cut, *more), never=never)
        checkpoint = last_whole_checkpoint(cut / "checkpoints" / "mosld-seed0")
        if last is ...:  # of a finished stage: whatever is left goes, and no more is made
            last = 10
        else:
            assert (checkpoint and re.search(r"\d+$", checkpoint)[0]) == (last and str(last)), death
        # Whoever goes on from there makes none of the checkpoints up to it.
        never = rf"os.mkdir .*checkpoint-({'|'.join(map(str, range(2, (last or 10) + 1, 2)))})$"
    assert not (cut / "results.json").exists()
    assert main(words(data, cut, *more)) == 0
    whole, cut_off = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "whole", cut))
    losses = whole["methods"]["mosld"]["loss"]
    assert [step for step, _ in losses] == list(range(1, 11)) and len({loss for _, loss in losses}) == 10
    assert cut_off["methods"]["mosld"]["loss"] == losses and cut_off["tasks"] == whole["tasks"]
    assert (cut / "adapter" / WEIGHTS).read_bytes() == (tmp_path / "whole" / "adapter" / WEIGHTS).read_bytes()
    assert any(tensor.any() for name, tensor in load_file(cut / "adapter" / WEIGHTS).items() if "expert_b" in name)
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (tmp_path / "whole", cut)]
    assert names[0] == names[1]  # nothing is left of the killed processes


def checkpoint(folder, step, state="{}"):
    """A checkpoint with an adapter and its checksum, as far as choosing among checkpoints looks."""
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / WEIGHTS).write_bytes(b"0123")
    write_digest(path)
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


@pytest.mark.parametrize("state", [None, "", '{"epoch": 1'], ids=["missing", "empty", "cut off"])
def test_a_checkpoint_cut_off_while_saving_is_passed_over(tmp_path, state):
    for step in (9, 20, "best"):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 30, state)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
    assert last_whole_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize("subfolder", ["", "second"])
def test_a_checkpoint_whose_weights_were_altered_is_passed_over_and_named(tmp_path, subfolder):
    checkpoint(tmp_path, 9)
    newest = checkpoint(tmp_path, 20) / subfolder
    if subfolder:
        newest.mkdir()
        (newest / WEIGHTS).write_bytes(b"4567")
        write_digest(newest)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
    alter(newest / WEIGHTS)
    with pytest.warns(UserWarning, match="checkpoint-20 is passed over: .* its numbers were altered") as caught:
        assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    assert str(newest / WEIGHTS) in str(caught[0].message)


def test_the_trainer_goes_on_from_the_newest_whole_checkpoint_and_refuses_an_altered_one(tmp_path):
    losses, weights = train(tmp_path / "whole", 6)
    train(tmp_path / "cut", 3)
    last = tmp_path / "cut" / "checkpoint-3"
    assert (last / DIGEST).is_file()
    shutil.copytree(last, tmp_path / "cut" / "checkpoint-5")
    (tmp_path / "cut" / "checkpoint-5" / "trainer_state.json").write_text("")
    resumed, same = train(tmp_path / "cut", 6, resume=True)
    assert resumed == losses[3:] and all(torch.equal(weight, same[name]) for name, weight in weights.items())
    alter(last / WEIGHTS)
    with pytest.raises(AdapterFileError, match="its numbers were altered") as caught:
        train(tmp_path / "cut", 6, resume=str(last))
    assert str(last / WEIGHTS) in str(caught.value)


def test_the_trainer_says_that_there_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=f"must hold a whole checkpoint to go on from, got {tmp_path}"):
        train(tmp_path, 6, resume=True)
    alter(checkpoint(tmp_path, 3) / WEIGHTS)
    with pytest.warns(UserWarning, match="numbers were altered"), pytest.raises(ValueError, match="a whole checkpoint"):
        train(tmp_path, 6, resume=True)
