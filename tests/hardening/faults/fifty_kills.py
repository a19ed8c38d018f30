"""SIGKILL at random moments of `mosld train`, `compare` and `merge`, each begun again until it ends.

python -m tests.hardening.faults.fifty_kills --output benchmarks/results/kills.json

Every run is killed several times: in the phase that was killed least, at a random entry, after a random part of the
time that the phase took in an undisturbed run (`tests.hardening.faults.moments`; the seed decides, the machine's load
moves a kill by a little). At the end its folder is compared with the undisturbed run's, file by file, and what each
process did with what was finished before it.
"""

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mosld.experiments.results import versions
from mosld.files.atomic import write_text_atomic
from tests.hardening.faults.moments import PHASES, SAVE_STEPS, Attempt, Event, Moment, attempt
from tests.helpers.cli_data import FAST, words, write_data
from tests.helpers.kills import processes

KILLS = {"train": 18, "compare": 20, "merge": 16}
PER_RUN = 7  # kills at most; then the run may end
METHODS = ("adamerging_layer", "concrete_adamerging")  # of `mosld merge`, in turn
SAVING = ["--save_strategy", "steps", "--save_steps", "2"]
TRAIN = ["--r", "2", *FAST, "--max_steps", "8", *SAVING]
COMPARE = ["--methods", "lora,mosld", "--seeds", "1", *FAST, *SAVING,
           "--merge", "ties,adamerging_layer", "--merge-options", "steps=6,batch_size=4"]  # fmt: skip
MERGE = ["--steps", "8", "--batch-size", "4", "--learning-rate", "0.05"]
TASKS = ("even", "vowel")
# What no two runs have in common: times, in files and in the column of compare.md.
TIMES = re.compile(r"seconds$")


@dataclass
class Case:
    """A command, and what its undisturbed run left in `whole`. lengths_s: phase -> how long each entry took."""

    verb: str
    words: list[str]
    whole: Path
    lengths_s: dict[str, list[float]]


@dataclass
class Kept:
    """What processes have reported as finished, and what later ones did with it."""

    steps: dict[str, int] = field(default_factory=dict)
    stages: dict[str, bytes] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    again: int = 0  # steps after the last kept one, which are trained again
    furthest: dict[str, int] = field(default_factory=dict)

    def add(self, events: list[Event], folder: Path) -> None:
        before = set(self.stages)
        for event in events:
            name, number = event.name, event.number
            if event.what == "step":
                if number <= self.steps.get(name, 0):
                    self.faults.append(f"{name}: step {number} was run again, {self.steps[name]} were kept")
                self.again += number <= self.furthest.get(name, 0)
                self.furthest[name] = max(number, self.furthest.get(name, 0))
            elif event.what == "kept":
                self.steps[name] = max(number, self.steps.get(name, 0))
            elif event.what == "cell" and name in before:
                self.faults.append(f"{name} was finished and is run again")
            elif event.what == "finished":
                self.stages.setdefault(name, (folder / "stages" / f"{name}.json").read_bytes())
        for name, saved in self.stages.items():
            file = folder / "stages" / f"{name}.json"
            if not file.is_file() or file.read_bytes() != saved:
                self.faults.append(f"what was kept of {name} is lost or changed")


def cases(folder: Path) -> list[Case]:
    """Undisturbed runs of every command, on a tiny model and two tasks."""
    data, whole = folder / "data", folder / "whole"
    maker = processes.Process(target=write_data, args=(data,))
    maker.start()
    maker.join()
    runs = [case("train", words(data, whole / "train", *TRAIN), whole / "train")]
    runs.append(case("compare", words(data, whole / "compare", *COMPARE, command="compare"), whole / "compare"))
    adapters = [str(whole / "compare" / "adapters" / f"lora-single-{task}-seed0") for task in TASKS]
    tasks = [f"{task}={data / task}.jsonl:{data / task}.jsonl" for task in TASKS]
    for method in METHODS:
        own = ["merge", "--method", method, "--base", str(data / "model"), *adapters, "--tasks", *tasks, *MERGE]
        runs.append(case("merge", [*own, "--output", str(whole / method)], whole / method))
    return runs


def case(verb: str, own: list[str], folder: Path) -> Case:
    done = attempt(own, folder.parent.parent / "printed.txt")
    assert done.exit_code == 0, done.printed
    lengths: dict[str, list[float]] = {phase: [] for phase in PHASES}
    for event, after in zip(done.events, done.events[1:], strict=False):
        if event.what == "begin":
            lengths[event.phase].append(after.at_s - event.at_s)
    return Case(verb, own, folder, lengths)


def killed_run(case: Case, folder: Path, generator: random.Random, seen: Counter, kills: int) -> dict[str, Any]:
    """The command of `case` in `folder`, killed `kills` times and begun again until it ends; -> what happened.

    seen: kills by phase, of this verb, so far; the next goes where fewest were.
    """
    own = [
        *case.words[: case.words.index("--output")],
        "--output",
        str(folder),
        *case.words[case.words.index("--output") + 2 :],
    ]
    kept, done, at = Kept(), [], time.monotonic()
    # One killed when its results are written has ended; the same command would say so.
    while not done or (done[-1]["killed_in"] is not None and not (folder / "results.json").is_file()):
        moment = _next(case, generator, seen) if len(done) < kills else None
        made = attempt(own, folder.parent / "printed.txt", moment)
        kept.add(made.events, folder)
        done.append({"moment": moment and asdict(moment), "killed_in": made.killed_in})
        if made.killed_in is not None:
            seen[made.killed_in] += 1
        elif made.exit_code != 0:
            kept.faults.append(f"ended with exit status {made.exit_code}: {_last_line(made)}")
    differences, compared = compare_folders(case.whole, folder)
    return {
        "verb": case.verb,
        "kills": [own for own in done if own["killed_in"] is not None],
        "processes": len(done),
        "steps_trained_again_since_last_checkpoint": kept.again,
        "stages_kept": len(kept.stages),
        "faults": [*kept.faults, *differences],
        "compared": compared,
        "seconds": round(time.monotonic() - at, 1),
    }  # fmt: skip


def _last_line(made: Attempt) -> str:
    return next(iter(reversed(made.printed.strip().splitlines())), "")


def _next(case: Case, generator: random.Random, seen: Counter) -> Moment:
    fewest = min(seen[phase] for phase in PHASES)
    phase = generator.choice([phase for phase in PHASES if seen[phase] == fewest])
    lengths = case.lengths_s[phase]
    entry = generator.randint(1, min(3, len(lengths)))
    return Moment(phase, entry, generator.random() * generator.choice(lengths))


def compare_folders(whole: Path, cut: Path) -> tuple[list[str], Counter]:
    """What differs between the two runs, but for times; and how many things of each kind were compared."""
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (whole, cut)]
    differences = [f"only in the undisturbed run: {name}" for name in sorted(names[0] - names[1])]
    differences += [f"left over: {name}" for name in sorted(names[1] - names[0])]
    compared: Counter = Counter(names=len(names[0]))
    for name in sorted(names[0] & names[1]):
        pair = [folder / name for folder in (whole, cut)]
        if not pair[0].is_file():
            continue
        if name.endswith(".json"):
            one, other = (_without_times(json.loads(path.read_text())) for path in pair)
            _count(one, compared)
        elif name == "compare.md":
            one, other = (_without_last_column(path.read_text()) for path in pair)
        else:
            one, other = (path.read_bytes() for path in pair)
        compared["files"] += 1
        compared["weight_files"] += name.endswith(".safetensors")
        if one != other:
            differences.append(f"{name} differs")
    return differences, compared


def _without_times(report: Any) -> Any:
    """And without the order of what PEFT keeps as a set, which a new interpreter writes in another."""
    if isinstance(report, dict):
        own = {name: _without_times(value) for name, value in report.items() if not TIMES.search(name)}
        if isinstance(own.get("target_modules"), list):
            own["target_modules"] = sorted(own["target_modules"])
        return own
    return [_without_times(value) for value in report] if isinstance(report, list) else report


def _without_last_column(page: str) -> list[str]:
    return [
        line.rpartition(" | ")[0] if "trained parameters" in page and line.count("|") > 3 else line
        for line in page.splitlines()
    ]


def _count(report: Any, compared: Counter) -> None:
    """losses: logged in training. coefficients: of merges. items: right or wrong."""
    for name, value in report.items() if isinstance(report, dict) else ():
        if name in ("loss", "losses"):
            compared["losses"] += len(value)
        elif name == "coefficients":
            compared["coefficients"] += sum(len(row) if isinstance(row, list) else 1 for row in value)
        elif name == "items" and all(isinstance(own, str) for own in value.values()):
            compared["items"] += sum(map(len, value.values()))
        else:
            _count(value, compared)
    for value in report if isinstance(report, list) else ():
        _count(value, compared)


def campaign(folder: Path, kills: dict[str, int], seed: int, per_run: int = PER_RUN) -> Iterator[dict[str, Any]]:
    """Runs of every verb until each was killed so many times."""
    own = cases(folder)
    for verb, wanted in kills.items():
        generator, seen, number = random.Random(f"{seed}/{verb}"), Counter(), 0
        while (left := wanted - sum(seen.values())) > 0:
            chosen = [case for case in own if case.verb == verb]
            yield killed_run(
                chosen[number % len(chosen)], folder / f"{verb}-{number}", generator, seen, min(left, per_run)
            )
            number += 1


def gather(runs: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """kills.json: the sums, and every run with its kills."""
    by_phase = {verb: {phase: 0 for phase in PHASES} for verb in KILLS}
    for run in runs:
        for kill in run["kills"]:
            by_phase[run["verb"]][kill["killed_in"]] += 1
    compared = sum((Counter(run["compared"]) for run in runs), Counter())
    return {
        "seed": seed,
        "kills": sum(len(run["kills"]) for run in runs),
        "kills_by_verb": {verb: sum(phases.values()) for verb, phases in by_phase.items()},
        "kills_by_phase": {phase: sum(own[phase] for own in by_phase.values()) for phase in PHASES},
        "kills_by_verb_and_phase": by_phase,
        "runs": len(runs),
        "restarts": sum(run["processes"] - 1 for run in runs),
        "killed_after_the_results": sum(len(run["kills"]) == run["processes"] for run in runs),
        "kills_of_a_run": {"most": max(len(run["kills"]) for run in runs),
                           "mean": round(statistics.fmean(len(run["kills"]) for run in runs), 2)},
        "runs_equal_to_the_undisturbed": sum(not run["faults"] for run in runs),
        "faults": [fault for run in runs for fault in run["faults"]],
        "steps_trained_again_since_last_checkpoint": sum(
            run["steps_trained_again_since_last_checkpoint"] for run in runs
        ),
        "stages_kept": sum(run["stages_kept"] for run in runs),
        "compared": dict(compared),
        "save_steps": {"train": 2, "compare": 2, "merge": SAVE_STEPS},
        "versions": versions(),
        "every_run": runs,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the figures")
    parser.add_argument("--seed", type=int, default=0)
    for verb, wanted in KILLS.items():
        parser.add_argument(
            f"--{verb}", type=int, default=wanted, metavar="N", help=f"kills of mosld {verb} ({wanted})"
        )
    options = parser.parse_args()
    wanted, runs = {verb: getattr(options, verb) for verb in KILLS}, []
    with tempfile.TemporaryDirectory() as folder:
        for run in campaign(Path(folder), wanted, options.seed):
            runs.append(run)
            print(
                f"{run['verb']}: {len(run['kills'])} kills, {run['seconds']} s", *run["faults"], sep="\n  ", flush=True
            )
    report = gather(runs, options.seed)
    write_text_atomic(options.output, json.dumps(report, indent=1) + "\n")
    print(f"{report['kills']} kills, {len(report['faults'])} faults; written to {options.output}")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
