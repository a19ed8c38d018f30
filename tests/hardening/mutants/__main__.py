"""How many planted faults the fast tests notice.

    python -m tests.hardening.mutants                          every fault without a row, or whose file or tests changed
    python -m tests.hardening.mutants --only scale_forgotten   this one, again

The exit status is 1 when fewer than 95 % are caught or a survivor has no excuse.
"""

import argparse
import difflib
import sys
from pathlib import Path

from tqdm.auto import tqdm

from tests.hardening.mutants.fault import Fault
from tests.hardening.mutants.faults import AREAS
from tests.hardening.mutants.results import LEAST_SHARE, Results
from tests.hardening.mutants.runner import Outcome, RunnerError, run_faults

ROOT = Path(__file__).parents[3]
RESULT = "benchmarks/results/mutants.json"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.hardening.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults, whether they have a row or not")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time, each in a copy of its own (default 1)")
    parser.add_argument("--timeout", type=float, default=180, help="seconds after which tests hang (default 180)")
    parser.add_argument("--output", type=Path, default=ROOT / RESULT, help=f"default {RESULT}")
    arguments = parser.parse_args(words)
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    faults = {fault.name: fault for own in AREAS.values() for fault in own}
    for name in arguments.only or []:
        if name not in faults:
            near = difflib.get_close_matches(name, faults, n=3) or list(faults)[:3]
            parser.error(f"no fault is called {name!r}, the nearest are {', '.join(near)}")
    results = Results(arguments.output, ROOT, AREAS)
    wanted = arguments.only or [name for name in faults if name not in results.rows]
    try:
        _run(results, [faults[name] for name in wanted], arguments.jobs, arguments.timeout)
    except RunnerError as error:
        print(error, file=sys.stderr)
        return 2
    return _tell(results)


def _run(results: Results, faults: list[Fault], jobs: int, timeout: float) -> None:
    if not faults:
        return
    survived: list[str] = []
    with tqdm(total=len(faults), desc="the tests without a fault", unit="fault") as progress:

        def after(fault: Fault, outcome: Outcome) -> None:
            results.add(fault, outcome)
            if not outcome.caught:
                survived.append(fault.name)
            progress.set_description("mutants", refresh=False)
            progress.update()
            progress.set_postfix_str(f"{len(survived)} survived {' '.join(survived[-2:])}".strip())

        run_faults(ROOT, faults, jobs, timeout, after)


def _tell(results: Results) -> int:
    report = results.report()
    for area, counts in report["areas"].items():
        print(f"{area:12} {counts['caught']:3} of {counts['faults']:3}")
    print(f"{'together':12} {report['caught']:3} of {report['faults']:3}, {100 * (report['share'] or 0):.1f} %")
    survivors = results.survivors()
    for fault in survivors:
        print(
            f"survived: {fault.name} ({fault.file}): {fault.harm}. {fault.excuse or 'Write a test that fails with it.'}"
        )
    return int((report["share"] or 0) < LEAST_SHARE or any(not fault.excuse for fault in survivors))


if __name__ == "__main__":
    sys.exit(main())
