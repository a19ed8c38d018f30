"""Saving over an adapter, an export or a run, killed at any point: what is there afterwards is the old or the new."""

import functools
import json
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel

from mosld import MoSLDConfig, export_lora
from mosld.analysis.saved_adapters import inspect_adapter
from mosld.cli.main import main
from mosld.experiments.run_folder import check_free, claim, release
from mosld.experiments.stages import save_adapter
from mosld.files import atomic
from mosld.files.adapter_folder import AdapterFileError
from mosld.files.atomic import atomic_folder, is_leftover, remove_leftovers
from tests.helpers.kills import killed_at_every_change
from tests.helpers.models import perturb, tiny_llama, token_ids

TARGETS = ["q_proj", "v_proj"]
OLD, NEW = dict(alpha=4, top_k=1), dict(alpha=64, top_k=3)  # which the sizes of the tensors do not tell apart


def model(seed: int, **settings) -> PeftModel:
    adapted = peft.get_peft_model(tiny_llama(), MoSLDConfig(r=2, num_experts=4, target_modules=TARGETS, **settings))
    torch.manual_seed(seed)
    perturb(adapted)
    return adapted.eval()


def save_new(folder: Path) -> None:
    model(2, **NEW).save_pretrained(str(folder))


def save_new_at_once(folder: Path) -> None:
    save_adapter(model(2, **NEW), folder)


@torch.no_grad()
def logits(adapted: PeftModel) -> torch.Tensor:
    return adapted.eval()(token_ids()).logits


@functools.cache
def expected() -> dict[str, torch.Tensor]:
    return {"old": logits(model(1, **OLD)), "new": logits(model(2, **NEW))}


@pytest.fixture
def old(tmp_path) -> Path:
    model(1, **OLD).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def contents(folder: Path) -> dict[str, bytes]:
    """Path in `folder` -> what is in it, without what killed processes leave."""
    files = [path for path in folder.rglob("*") if path.is_file() and not is_leftover(path)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def which(folder: Path) -> str:
    """ "old", "new" or "refused"; fails for anything else that can be loaded."""
    try:
        seen = logits(PeftModel.from_pretrained(tiny_llama(), str(folder)))
    except AdapterFileError as error:
        assert str(folder / "adapter_model.safetensors") in str(error) and "was cut off" in str(error)
        with pytest.raises(AdapterFileError, match="was cut off"):
            inspect_adapter(folder)
        return "refused"
    names = [name for name, known in expected().items() if torch.equal(seen, known)]
    assert len(names) == 1, "what is loaded is neither the old nor the new adapter"
    return names[0]


@pytest.mark.slow
def test_pefts_save_that_is_killed_leaves_the_old_adapter_or_the_new_or_is_refused(old):
    seen, known = [], []
    for _ in killed_at_every_change(save_new, old):
        if contents(old) in known:
            continue
        known.append(contents(old))
        seen.append(which(old))
        save_new(old)  # whatever was left, saving once more mends it
        assert which(old) == "new"
    # Between PEFT's weights and our configuration nothing here runs. What is left then must not pass for an adapter.
    assert seen == sorted(seen, key=["old", "refused", "new"].index) and set(seen) == {"old", "refused", "new"}


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_saves_its_adapter_leaves_the_old_or_the_new(old):
    seen, known = [], {}
    for number in killed_at_every_change(save_new_at_once, old):
        key = tuple(sorted(contents(old).items()))
        known[key] = known.get(key) or which(old)
        seen.append(known[key])
        others = [path for path in old.parent.iterdir() if path.name != "adapter"]
        assert all(is_leftover(path) for path in others) and (number or not others)
        remove_leftovers(old.parent)
        assert [path.name for path in old.parent.iterdir()] == ["adapter"]
    assert seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}


def write_without_exchange(folder: Path) -> None:
    atomic._exchange = lambda one, other: False  # this process ends soon
    with atomic_folder(folder / "a") as aside:
        for name in ("one", "two"):
            (aside / name).write_text("new")


def test_where_folders_cannot_be_swapped_the_old_one_is_found_again(tmp_path):
    folder = tmp_path / "run"
    (folder / "a").mkdir(parents=True)
    for name in ("one", "two", "three"):
        (folder / "a" / name).write_text("old")
    old, seen = contents(folder / "a"), []
    for number in killed_at_every_change(write_without_exchange, folder):
        missing = not (folder / "a").exists()
        remove_leftovers(folder)
        assert [path.name for path in folder.iterdir()] == ["a"]
        found = contents(folder / "a")
        assert found in (old, {"one": b"new", "two": b"new"}) and (number or found != old)
        seen.append("put back" if missing else "old" if found == old else "new")
    assert set(seen) == {"old", "put back", "new"}


def export_again(folder: Path) -> None:
    export_lora(model(2, **NEW), folder / "lora", [0, 1, 0, 0], per_expert=True, overwrite=True)


@pytest.mark.slow
def test_an_export_over_another_that_is_killed_leaves_the_old_or_the_new(tmp_path):
    folder = tmp_path / "served"
    export_lora(model(1, **OLD), folder / "lora", "uniform")
    states = [contents(folder / "lora")]
    seen = []
    for number in killed_at_every_change(export_again, folder):
        found = contents(folder / "lora")
        if not number:
            states.append(found)
        seen.append(found)
        assert all(is_leftover(path) for path in folder.iterdir() if path.name != "lora")
    order = [states.index(found) for found in seen]  # raises for one that is neither
    assert order == sorted(order) and set(order) == {0, 1} and states[0] != states[1]


def inspect_it(folder: Path) -> None:
    assert main(["inspect", str(folder / "adapter"), "--output", str(folder / "report")]) == 0


def test_an_inspection_that_is_killed_leaves_no_half_of_its_file(old):
    report = old.parent / "report" / "inspect.json"
    seen = []
    for _ in killed_at_every_change(inspect_it, old.parent):
        seen.append(report.exists() and json.loads(report.read_text())["layers"].keys())
    assert len(set(map(bool, seen))) == 2 and all(keys == seen[-1] for keys in seen if keys)


def claim_it(folder: Path) -> None:
    claim(folder, {"r": 2})


def claim_anew(folder: Path) -> None:
    claim(folder, {"r": 3}, overwrite=True)


def test_claiming_a_folder_that_is_killed_leaves_one_that_can_be_claimed(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for _ in killed_at_every_change(claim_it, folder):
        going_on = (folder / "run.json").is_file()
        assert claim(folder, {"r": 2}) == going_on
        release()
        assert {path.name for path in folder.iterdir()} == {"run.json", "lock"}
    for number in killed_at_every_change(claim_it, folder):  # again, to go on with the run
        assert check_free(folder, {"r": 2}) == "unfinished", number


def test_overwriting_a_run_that_is_killed_can_be_done_again_and_never_passes_for_a_finished_run(tmp_path):
    folder = tmp_path / "run"
    (folder / "stages").mkdir(parents=True)
    (folder / "adapter").mkdir()
    (folder / "run.json").write_text(json.dumps({"program": "mosld train", "r": 2}))
    for name in ("results.json", "stages/a.json", "stages/b.json", "adapter/a.safetensors", "loss.png"):
        (folder / name).write_text("{}")
    whole = contents(folder)
    for number in killed_at_every_change(claim_anew, folder):
        found = contents(folder)
        if found.get("run.json") == whole["run.json"] and not found.items() >= whole.items():
            assert check_free(folder, {"r": 2}) == "unfinished"
            # A stage that passes for finished has its adapter still.
            assert "adapter/a.safetensors" in found or not any(name.startswith("stages/") for name in found)
        claim(folder, {"r": 3}, overwrite=True)
        release()
        assert {path.name for path in folder.iterdir()} == {"run.json", "lock"}, number
