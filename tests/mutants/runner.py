"""Runs tests with one planted fault at a time, in a copy of the repository: which test notices which fault.

A fault's text is put in place of the right one, its tests run in a process of their own up to the first that fails, and the
text is put back. Tests marked slow or gpu do not take part. A hang is a fault caught, and told apart.
"""

import hashlib
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tests.mutants.fault import Fault

NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "build", "dist")
PYTEST = ("-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "-m", "not slow and not gpu")
_RED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)


class Outcome(NamedTuple):
    """how: "passed", or how a fault showed: "failed", "error" (while collecting or in a fixture), "hang", "crash". test:
    the first that did."""

    how: str
    test: str
    seconds: float

    @property
    def caught(self) -> bool:
        return self.how != "passed"


class RunnerError(RuntimeError):
    """The tests could not be run as they should; nothing is known of the faults."""


def key(root: Path, fault: Fault) -> str:
    """Changes with the fault, the text of its file and the text of its tests."""
    digest = hashlib.sha256()
    for text in fault.texts(root):
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:16]


def run_tests(tree: Path, tests: Sequence[str], timeout: float) -> Outcome:
    """Run pytest's paths `tests` in the copy `tree`, up to the first that fails.

    raises RunnerError where pytest itself could not run, or found no test.
    """
    command = [sys.executable, *PYTEST, f"--basetemp={tree.parent / 'scratch'}", "-x", *tests]
    start = time.monotonic()
    with subprocess.Popen(
        command, cwd=tree, env=_environment(tree), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return Outcome("hang", "", time.monotonic() - start)
        finally:
            with suppress(ProcessLookupError):  # whatever it has started ends with it
                os.killpg(process.pid, signal.SIGKILL)
    seconds = time.monotonic() - start
    red = _RED.findall(output)
    if process.returncode < 0:
        return Outcome("crash", signal.Signals(-process.returncode).name, seconds)
    if process.returncode == 0:
        return Outcome("passed", "", seconds)
    if process.returncode in (1, 2) and red:  # 2: a file could not be collected
        return Outcome("error" if f"ERROR {red[0]}" in output else "failed", red[0], seconds)
    raise RunnerError(f"pytest ended with {process.returncode} on {' '.join(tests)}:\n{output[-3000:]}")


def _environment(tree: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTEST_ADDOPTS", "PYTHONPATH")}
    return {
        **kept,
        "OMP_NUM_THREADS": "1",
        # A file that is as long as before and written within the same second would pass for the one compiled before.
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # no test needs one, and importing them takes longer than many tests
        "MOSLD_CACHE": str(tree.parent / "cache"),  # what a faulty run leaves there serves nobody else
    }


@contextmanager
def copies(root: Path, count: int) -> Iterator[list[Path]]:
    """`count` copies of the repository, gone at the end; each in a folder of its own, for what its tests write."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees = [Path(folder).resolve() / str(number) / "tree" for number in range(count)]
        for tree in trees:
            shutil.copytree(root, tree, ignore=NOT_COPIED)
        yield trees


def check_imports(tree: Path, packages: Sequence[str]) -> None:
    """raises RunnerError where tests in `tree` would import another copy, an installed one say: no fault would show."""
    program = f"import importlib.util as u\nfor name in {list(packages)!r}: print(u.find_spec(name).origin)"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=tree, env=_environment(tree), capture_output=True, text=True, check=True
    )
    for origin in found.stdout.splitlines():
        if not Path(origin).resolve().is_relative_to(tree):
            raise RunnerError(f"tests in the copy would import {origin}")


def check_green(tree: Path, faults: Sequence[Fault], timeout: float) -> None:
    """raises RunnerError where a test fails without any fault."""
    tests = sorted({test for fault in faults for test in fault.tests})
    tests = [test for test in tests if test.partition("::")[0] == test or test.partition("::")[0] not in tests]
    outcome = run_tests(tree, tests, timeout * max(1, len(tests)))
    if outcome.caught:
        raise RunnerError(f"{outcome.test or 'a test'} does not pass without a fault ({outcome.how})")


def run_fault(tree: Path, fault: Fault, timeout: float) -> Outcome:
    """Plant, test, and put back."""
    path = tree / fault.file
    right = path.read_text()
    path.write_text(fault.planted(right))
    try:
        return run_tests(tree, fault.tests, timeout)
    finally:
        path.write_text(right)


def run_faults(
    root: Path, faults: Sequence[Fault], jobs: int, timeout: float, after: Callable[[Fault, Outcome], object]
) -> None:
    """Run `faults`, `jobs` at a time, and call `after` with each as soon as it is done.

    raises RunnerError before the first where a test is red without a fault, or the copy is not what is tested.
    """
    with copies(root, jobs) as trees:
        check_imports(trees[0], sorted({Path(fault.file).parts[0] for fault in faults}))
        check_green(trees[0], faults, timeout)
        free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for tree in trees:
            free.put(tree)

        def in_a_tree(fault: Fault) -> Outcome:
            tree = free.get()
            try:
                return run_fault(tree, fault, timeout)
            finally:
                free.put(tree)

        with ThreadPoolExecutor(jobs) as threads:
            running = {threads.submit(in_a_tree, fault): fault for fault in faults}
            try:
                for done in as_completed(running):
                    after(running[done], done.result())
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
