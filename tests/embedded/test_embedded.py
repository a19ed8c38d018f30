"""Facts about the embedded tasks and their base model; accuracies depend on the Python version and are not pinned."""

import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mosld.embedded import base_model, pretraining, python_text
from mosld.embedded import tasks as embedded
from mosld.embedded.base_model import Settings, load_base
from mosld.embedded.tasks import embedded_tasks

SPLITS = ("block", "name")
TINY = Settings(hidden=16, layers=1, vocabulary=400, steps=2, records=100, share=0.02)
FINGERPRINT = """
import hashlib
from mosld.embedded.tasks import embedded_tasks
from mosld.embedded.pretraining import pretraining_text
facts = repr([embedded_tasks(60, 20, split) for split in ("block", "name")] + [pretraining_text(50)])
print(hashlib.sha256(facts.encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def tasks() -> dict:
    return {split: embedded_tasks(split=split) for split in SPLITS}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return pretraining.pretraining_text()


def texts(examples: list) -> list[str]:
    return [example.prompt.rsplit("\n", 1)[0] for example in examples]


def homes(task) -> tuple[set[str], set[str]]:
    """The blocks, or the source files, of a task's training and test texts."""
    home = {character.name: character.block for character in python_text.characters()}
    home |= {item.text: item.group for item in embedded.docstring_items()}
    return {home[text] for text in texts(task.train)}, {home[text] for text in texts(task.test)}


@pytest.mark.slow
def test_two_processes_with_different_hash_seeds_build_the_same_tasks_and_text():
    path = os.pathsep.join([str(Path(embedded.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    running = [
        subprocess.Popen(
            [sys.executable, "-c", FINGERPRINT],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    outputs = [process.communicate()[0] for process in running]
    assert outputs[0] == outputs[1] and len(outputs[0]) == 65


@pytest.mark.parametrize("split", SPLITS)
def test_no_text_is_in_both_splits_of_any_tasks_or_twice_in_one(tasks, split):
    trained = {text for task in tasks[split] for text in texts(task.train)}
    for task in tasks[split]:
        assert trained.isdisjoint(texts(task.test)), task.name
        for side in (task.train, task.test):
            assert len(set(texts(side))) == len(side), task.name


def test_block_split_shares_no_block_and_no_file(tasks):
    for task in tasks["block"]:
        trained, tested = homes(task)
        assert trained and tested and trained.isdisjoint(tested), task.name


def test_characters_are_in_their_blocks():
    block = {character.name: character.block for character in python_text.characters()}
    assert block["LATIN SMALL LETTER A"] == "0000" and block["GREEK SMALL LETTER ALPHA"] == "0370"
    assert block["MATHEMATICAL BOLD CAPITAL A"] == block["MATHEMATICAL ITALIC CAPITAL A"] == "1D400"


@pytest.mark.parametrize("split", SPLITS)
def test_every_example_has_four_distinct_choices_that_end_in_a_full_stop(tasks, split):
    for task in tasks[split]:
        for example in task.train + task.test:
            assert len(set(example.choices)) == 4
            assert example.answer in range(4) and example.completion == example.choices[example.answer]
            assert all(choice.endswith(".") and choice == choice.strip() for choice in example.choices)


@pytest.mark.parametrize("split", SPLITS)
def test_labels_are_the_same_on_both_sides_and_none_dominates(tasks, split):
    """No label takes more than 45 % of a side, and no position of the right answer more than 35 %."""
    assert [task.name for task in tasks[split]] == [
        "category",
        "bidi",
        "width",
        "decomposition",
        "numeric",
        "kind",
    ]
    for task in tasks[split]:
        assert {example.completion for example in task.train} == {example.completion for example in task.test}
        for side in (task.train, task.test):
            assert len(side) >= 100
            labels = Counter(example.completion for example in side)
            assert len(labels) >= 4 and max(labels.values()) <= 0.45 * len(side), (task.name, labels)
            assert max(Counter(example.answer for example in side).values()) <= 0.35 * len(side), task.name


def test_fewer_items_than_asked_for_are_given_where_data_is_short():
    short = embedded_tasks(train=10**6, test=10**6)
    assert all(100 <= len(task.test) < len(task.train) < 10**5 for task in short)


def test_unknown_split_and_missing_sources_are_named(monkeypatch):
    with pytest.raises(ValueError, match='"block" or "name"'):
        embedded_tasks(split="random")
    monkeypatch.setattr(embedded, "docstrings", lambda: [])
    with pytest.raises(RuntimeError, match="'kind'.*library sources"):
        embedded_tasks(10, 10)


def test_pretraining_text_quotes_no_test_docstring_and_no_label(tasks, documents):
    text = " ".join(" ".join(documents).split())
    follows = {f"{a}\n{b.split(':')[0]}:" for part in documents for a, b in pairwise(part.split("\n"))}
    for split in SPLITS:
        assert follows.isdisjoint(example.prompt for task in tasks[split] for example in task.train + task.test)
        kind = next(task for task in tasks[split] if task.name == "kind")
        assert not [sentence for sentence in texts(kind.test) if f" {sentence} " in text]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A cache that holds one trained base."""
    folder = tmp_path_factory.mktemp("cache")
    load_base(cache_dir=folder, settings=TINY)
    return folder


def test_training_leaves_threads_and_random_state_as_found(tmp_path):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    load_base(cache_dir=tmp_path, settings=TINY)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads


def test_second_load_is_read_from_the_cache_frozen_and_equal(cache, monkeypatch):
    monkeypatch.setattr(base_model, "train_base", lambda settings: pytest.fail("trained again"))
    (first, _), (second, _) = (load_base(cache_dir=cache, settings=TINY) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not second.training and not any(p.requires_grad for p in second.parameters())
    assert {p.dtype for p in second.parameters()} == {torch.float32}


def test_tokenizer_pads_on_the_right_with_a_token_of_its_own_and_adds_none(cache):
    _, tokenizer = load_base(cache_dir=cache, settings=TINY)
    ids = tokenizer("LATIN SMALL LETTER A")["input_ids"]
    assert tokenizer.decode(ids) == "LATIN SMALL LETTER A" and tokenizer.bos_token_id is None
    assert tokenizer.padding_side == "right" and tokenizer.pad_token_id != tokenizer.eos_token_id
    assert not {tokenizer.pad_token_id, tokenizer.eos_token_id}.intersection(ids)


@pytest.mark.parametrize("damaged", ["model.safetensors", "tokenizer.json"])
def test_damaged_cache_is_rebuilt_with_a_warning(cache, tmp_path, damaged):
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    (folder,) = tmp_path.iterdir()
    file = folder / damaged
    file.write_bytes(file.read_bytes()[:20])
    with pytest.warns(UserWarning, match="trained again"):
        load_base(cache_dir=tmp_path, settings=TINY)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_base(cache_dir=tmp_path, settings=TINY)
    assert [entry.name for entry in tmp_path.iterdir()] == [folder.name]


def test_interrupted_training_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(base_model.LlamaForCausalLM, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_base(cache_dir=tmp_path, settings=TINY)
    assert not list(tmp_path.iterdir())
