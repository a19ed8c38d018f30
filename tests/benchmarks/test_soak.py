"""`python -m benchmarks soak`: it runs at toy size, and what it is there to find it finds."""

import copy
import json
import mmap
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.long import soak
from benchmarks.long.memory import live_tensors, memory
from benchmarks.long.soak_work import Samples

ROOT = Path(__file__).parents[2]
MIB = 2**20


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["python -m benchmarks", "soak", *map(str, arguments)])
    return command.main()


@pytest.mark.slow
def test_a_toy_training_and_a_few_switches_neither_leak_nor_drift(monkeypatch, tmp_path, capsys):
    out = tmp_path / "soak.json"
    assert run(monkeypatch, "--toy", "--steps", 48, "--resumes", 2, "--switches", 60, "--out", out) == 0
    result = json.loads(out.read_text())
    assert all(result["checks"].values()) and "NO " not in capsys.readouterr().out
    resuming, switching = result["resuming"], result["switching"]
    assert resuming["killed_after"] == [16, 32] and resuming["resumed_from"] == [14, 30]
    assert resuming["losses_compared"] == 48 + 2 + 2 and resuming["adapter_tensors"] == 3 * 14
    assert resuming["loss_drift"] == resuming["adapter_drift"] == 0
    loss = result["memory"]["loss"]
    assert loss["last"] < loss["first"]
    assert [row["step"] for row in result["memory"]["samples"]] == list(range(1, 49))
    assert switching["forwards"] == 8 and switching["drift"] == 0 and switching["least_distance"] > 0.1
    assert "/" not in json.dumps(result["machine"])


def taken(mib: int) -> mmap.mmap:
    """Memory from the system and not from what the allocator kept."""
    block = mmap.mmap(-1, mib * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, mib * MIB, mmap.PAGESIZE):
        block[page] = 1
    return block


def settled() -> int:
    """As `live_tensors`, once earlier tests leave nothing more: one collection may free only what held the rest."""
    before = live_tensors()
    while (now := live_tensors()) != before:
        before = now
    return now


def test_memory_that_is_taken_and_tensors_that_are_kept_are_seen():
    tensors = settled()  # before the memory is read: it collects garbage, and its own list is large
    before = memory()
    block, kept = taken(64), [torch.ones(3) for _ in range(4)]
    after = memory()
    assert live_tensors() == tensors + 4
    for kind in ("resident", "anonymous"):
        assert 60 * MIB < getattr(after, kind) - getattr(before, kind) < 68 * MIB
    del kept
    block.close()
    assert live_tensors() == tensors and memory().resident < after.resident - 60 * MIB


def test_growth_is_that_after_the_warm_up():
    live_tensors()  # the list of a process with many objects takes memory that the allocator keeps
    samples, kept = Samples(12), []
    for step in range(1, 13):
        kept.append(torch.ones(1))
        if step in (1, 2, 8):
            kept.append(taken(32))
        samples.take(step)
    told = samples.summary()
    assert told["warm_up"] == 2 and [row["step"] for row in told["samples"]] == list(range(1, 13))
    for kind in ("resident", "anonymous"):
        grown = told[f"{kind}_growth"] * told[f"{kind}_warm"] / MIB
        assert grown == pytest.approx(32, abs=4)
        assert told[f"{kind}_end"] - told[f"{kind}_warm"] == pytest.approx(32 * MIB, abs=4 * MIB)
    assert told["tensors_end"] - told["tensors_warm"] == 10


def test_losses_that_differ_are_counted():
    whole = {1: 0.5, 2: 0.25, 3: 0.125, 4: 1.0}
    same = soak.compared(whole, [[(1, 0.5), (2, 0.25), (3, 0.125)], [(3, 0.125), (4, 1.0)]])
    assert same == {
        "losses_compared": 5, "steps_computed_twice": 1, "steps_missing": 0, "losses_that_differ": 0, "loss_drift": 0,
    }  # fmt: skip
    other = soak.compared(whole, [[(1, 0.5), (2, 0.25 + 2**-30)], [(4, 0.75)]])
    assert other["losses_that_differ"] == 2 and other["loss_drift"] == 0.25 and other["steps_missing"] == 1
    lost = soak.compared(whole, [[(1, float("nan")), (2, 5.0), (3, 0.125), (4, 1.0)]])
    assert lost["losses_that_differ"] == 2 and lost["loss_drift"] != lost["loss_drift"]


def test_adapters_that_differ_in_a_bit_are_told_from_equal_ones():
    adapter = {"a": torch.randn(3, 4), "b": torch.zeros(5)}
    other = {name: tensor.clone() for name, tensor in adapter.items()}
    assert soak.drift(adapter, other)["adapter_numbers_that_differ"] == 0
    other["a"][1, 2] += 0.5
    other["b"][0] = -0.0
    told = soak.drift(adapter, other)
    assert told["adapter_numbers"] == 17 and told["adapter_numbers_that_differ"] == 2
    assert told["adapter_drift"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"must have the same tensors, got \['b'\] in one alone"):
        soak.drift(adapter, {"a": adapter["a"]})


COMMITTED = json.loads((ROOT / soak.OUT).read_text())
FAULTS = {
    "training: memory in use grows by at most 2%": ("memory", "resident_growth", 0.021),
    "switching: memory in use grows by at most 2%": ("switching", "anonymous_growth", 0.021),
    "training: as many tensors at the end as after the warm-up": ("memory", "tensors_end", 1e6),
    "switching: as many tensors at the end as after the warm-up": ("switching", "tensors_end", 1e6),
    "resuming: every process went on from the last checkpoint before the kill": ("resuming", "resumed_from", [0] * 10),
    "resuming: every loss is that of the uninterrupted training, bit for bit": ("resuming", "losses_that_differ", 1),
    "resuming: the adapter is that of the uninterrupted training, bit for bit":
        ("resuming", "adapter_numbers_that_differ", 1),
    "switching: every output is the one before the first switch, bit for bit": ("switching", "forwards_that_differ", 1),
}  # fmt: skip


def test_what_was_committed_ran_to_the_end_and_held():
    settings = COMMITTED["settings"]
    assert (settings["steps"], settings["resumes"], settings["switches"]) == (3000, 10, 10_000)
    assert COMMITTED["checks"] == soak.checks(COMMITTED) == dict.fromkeys(FAULTS, True)


@pytest.mark.parametrize("check", FAULTS)
def test_a_fault_fails_its_check_alone(check):
    part, key, value = FAULTS[check]
    faulty = copy.deepcopy(COMMITTED)
    faulty[part][key] = value
    assert [name for name, holds in soak.checks(faulty).items() if not holds] == [check]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", 32], "steps must be at least 33, got 32"),
        (["--resumes", 0], "resumes must be at least 1, got 0"),
        (["--switches", 29], "switches must be at least 30, got 29"),
    ],
)
def test_sizes_that_show_nothing_are_refused(monkeypatch, capsys, arguments, message):
    assert run(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err
