"""A soak test: thousands of training steps, kills and adapter switches, after which nothing has leaked or drifted.

    memory      one training, uninterrupted: memory in use after the warm-up
    resuming    the same training killed again and again, each time resumed from its last checkpoint in a fresh process:
                its losses and its adapter are those of the uninterrupted one, bit for bit
    switching   `set_adapter` thousands of times: outputs of each adapter, memory in use

Every part runs in processes of its own, forked from a server where everything is imported and nothing has run.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from mosld.files.adapter_folder import WEIGHTS

from ..timing import files
from ..timing.machine import machine
from . import soak_work
from .models import MODELS

MOST_GROWTH = 0.02
OUT = Path("benchmarks/results/soak.json")

_processes = multiprocessing.get_context("forkserver")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks soak`."""
    parser.add_argument("--steps", type=int, default=3000, help="of training (default: 3000)")
    parser.add_argument("--resumes", type=int, default=10, help="kills of the second training (default: 10)")
    parser.add_argument("--switches", type=int, default=10_000, help="of adapters (default: 10000)")
    parser.add_argument("--toy", action="store_true", help="with a tiny model, to see that it runs")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the JSON file with the figures (default: {OUT})")


def run(options: argparse.Namespace) -> int:
    """Print the figures, write them to `options.out`, and return 1 where a check failed. raises ValueError for sizes
    that are too small."""
    least = {"steps": 3 * (options.resumes + 1), "resumes": 1, "switches": 3 * soak_work.CHECKED}
    for name, bound in least.items():
        value = getattr(options, name)
        if value < bound:
            raise ValueError(f"{name} must be at least {bound}, got {value}")
    model = "toy" if options.toy else "small"
    size = MODELS[model]
    settings = {
        "steps": options.steps,
        "resumes": options.resumes,
        "switches": options.switches,
        "model": {**vars(size), "mixture": vars(size.mixture)},
        "most_growth": MOST_GROWTH,
    }
    result = {"verb": "soak", "machine": machine(), "settings": settings}
    _processes.set_forkserver_preload([soak_work.__name__])
    with tempfile.TemporaryDirectory() as folder:
        result |= training(Path(folder), model, options.steps, options.resumes)
        result["switching"] = switching(Path(folder), model, options.switches)
    result["checks"] = checks(result)
    print("\n".join(lines(result)))
    if options.out:
        files.write(result, options.out)
    return 0 if all(result["checks"].values()) else 1


def training(folder: Path, model: str, steps: int, resumes: int) -> dict:
    """-> "memory" of an uninterrupted training, and "resuming": what a killed one has in common with it"""
    # Often enough that there is a checkpoint before the first kill.
    save_every = max(2, steps // max(30, 2 * (resumes + 1)))
    whole, cut = folder / "whole", folder / "cut"
    whole.mkdir()
    cut.mkdir()
    _run(0, soak_work.train, whole, "0", model, steps, save_every)
    start = time.perf_counter()
    kills = [steps * number // (resumes + 1) for number in range(1, resumes + 1)]
    for number, kill in enumerate(kills):
        _run(-signal.SIGKILL, soak_work.train, cut, str(number), model, steps, save_every, kill)
    _run(0, soak_work.train, cut, str(resumes), model, steps, save_every)
    seconds = time.perf_counter() - start
    memory = json.loads((whole / "0.json").read_text())
    losses = dict(_losses(whole / "0.losses"))
    legs = [_losses(cut / f"{number}.losses") for number in range(resumes + 1)]
    undisturbed, resumed = load_file(whole / "adapter" / WEIGHTS), load_file(cut / "adapter" / WEIGHTS)
    resuming = {
        "steps": steps,
        "save_every": save_every,
        "killed_after": kills,
        "processes": len(legs),
        "seconds": seconds,
        "resumed_from": [_first_step(leg) - 1 for leg in legs[1:]],
        **compared(losses, legs),
        **drift(undisturbed, resumed),
    }
    ends = {"first": losses[1], "last": losses[steps]}
    return {"memory": {"steps": steps, "loss": ends, **memory}, "resuming": resuming}


def _first_step(leg: list[tuple[int, float]]) -> int:
    step, _ = leg[0]
    return step


def _run(ends_with: int, work: Callable[..., None], *arguments: object) -> None:
    process = _processes.Process(target=work, args=arguments)
    process.start()
    process.join()
    if process.exitcode != ends_with:
        raise RuntimeError(f"{work.__name__} had to end with exit code {ends_with}, got {process.exitcode}")


def _losses(path: Path) -> list[tuple[int, float]]:
    losses = []
    for line in path.read_text().splitlines():
        step, loss = json.loads(line)
        losses.append((step, loss))
    return losses


def compared(losses: dict[int, float], legs: list[list[tuple[int, float]]]) -> dict:
    """Losses by step of the uninterrupted training, and of each process of the other: steps after the last checkpoint
    before a kill were computed twice, and count twice."""
    apart = []
    seen = set()
    different = 0
    for step, loss in itertools.chain(*legs):
        seen.add(step)
        apart.append(abs(loss - losses[step]))
        different += apart[-1] != 0
    return {
        "losses_compared": len(apart),
        "steps_computed_twice": len(apart) - len(seen),
        "steps_missing": len(losses.keys() - seen),
        "losses_that_differ": different,
        # A gap that is not a number counts as the largest.
        "loss_drift": max(apart, key=lambda gap: (math.isnan(gap), gap)),
    }


def drift(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict:
    """Of two adapters in float32: how many of their numbers differ in any bit, and by how much at most.

    raises ValueError where they have not the same tensors.
    """
    if one.keys() != other.keys():
        alone = sorted(one.keys() ^ other.keys())
        raise ValueError(f"the adapters must have the same tensors, got {alone} in one alone")
    numbers, different, gaps = 0, 0, []
    for name, tensor in one.items():
        numbers += tensor.numel()
        different += int((tensor.view(torch.int32) != other[name].view(torch.int32)).sum())
        gaps.append((tensor - other[name]).abs().max().item())
    return {
        "adapter_tensors": len(one),
        "adapter_numbers": numbers,
        "adapter_numbers_that_differ": different,
        "adapter_drift": max(gaps),
    }


def switching(folder: Path, model: str, switches: int) -> dict:
    _run(0, soak_work.switch, folder, "switching", model, switches)
    return json.loads((folder / "switching.json").read_text())


def checks(result: dict) -> dict[str, bool]:
    """What must hold, by name."""
    memory, resuming, switching = result["memory"], result["resuming"], result["switching"]
    every = resuming["save_every"]
    last_checkpoints = [(kill - 1) // every * every for kill in resuming["killed_after"]]
    return {
        f"training: memory in use grows by at most {MOST_GROWTH:.0%}": _growth(memory) <= MOST_GROWTH,
        f"switching: memory in use grows by at most {MOST_GROWTH:.0%}": _growth(switching) <= MOST_GROWTH,
        "training: as many tensors at the end as after the warm-up": memory["tensors_end"] == memory["tensors_warm"],
        "switching: as many tensors at the end as after the warm-up":
            switching["tensors_end"] == switching["tensors_warm"],
        "resuming: every process went on from the last checkpoint before the kill":
            resuming["resumed_from"] == last_checkpoints,
        "resuming: every loss is that of the uninterrupted training, bit for bit":
            resuming["losses_that_differ"] == resuming["steps_missing"] == 0,
        "resuming: the adapter is that of the uninterrupted training, bit for bit":
            resuming["adapter_numbers_that_differ"] == 0,
        "switching: every output is the one before the first switch, bit for bit":
            switching["forwards_that_differ"] == 0 < switching["least_distance"],
    }  # fmt: skip


def _growth(part: dict) -> float:
    return max(part["resident_growth"], part["anonymous_growth"])


def lines(result: dict) -> list[str]:
    memory, resuming, switching = result["memory"], result["resuming"], result["switching"]
    text = [
        f"{memory['steps']:,} steps in {_memory_in_words(memory)}",
        f"{switching['switches']:,} switches in {_memory_in_words(switching)}",
        f"killed and resumed {len(resuming['killed_after'])} times: loss drift {resuming['loss_drift']:g} in "
        f"{resuming['losses_compared']:,} losses, adapter drift {resuming['adapter_drift']:g} in "
        f"{resuming['adapter_numbers']:,} numbers",
        f"{switching['forwards']:,} forwards after switches: drift {switching['drift']:g}",
    ]
    for check, holds in result["checks"].items():
        text.append(f"{'yes' if holds else 'NO '}  {check}")
    return text


def _memory_in_words(part: dict) -> str:
    warm, end = part["resident_warm"] / 2**20, part["resident_end"] / 2**20
    return (
        f"{part['seconds']:.0f} s: {warm:.1f} to {end:.1f} MiB resident from {part['warm_up']:,} on, at most "
        f"{part['resident_growth']:+.2%} ({part['anonymous_growth']:+.2%} without mapped files)"
    )
