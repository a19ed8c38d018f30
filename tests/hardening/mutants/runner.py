"""Runs tests with one planted fault at a time, in a copy of the repository: which test notices which fault.

A fault's text is put in place of the right one, its tests run in a process of their own (`warm`) up to the first that
fails, and the text is put back. Tests marked slow or gpu do not take part. A hang is a fault caught, and told apart.
"""

import hashlib
import json
import os
import queue
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from tests.hardening.mutants.fault import Fault

NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "dist")
PYTEST = ("-q", "-x", "--color=no", "-p", "no:cacheprovider", "-m", "not slow and not gpu")
# What many tests import, and what takes long to import.
PRELOADED = (
    "torch", "pytest", "peft", "transformers.trainer", "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
)  # fmt: skip
_RED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)


class Outcome(NamedTuple):
    """What a run of tests came to.

    how: "passed", or how a fault showed: "failed", "error" (while collecting or in a fixture), "hang", "crash".
    test: the first in which it showed.
    """

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


def _not_copied(root: Path, folder: str, names: list[str]) -> set[str]:
    """What no test reads. What setuptools builds lies in `build` at the root; docs/build has the writers of pages."""
    left_out = NOT_COPIED(folder, names)
    return left_out | {"build"} if Path(folder) == root else left_out


class Tree:
    """A copy of the repository, and a process that runs tests in it.

    packages: what must be imported from this copy and from no other, an installed one say. preloaded: see `PRELOADED`.
    """

    def __init__(self, root: Path, folder: Path, packages: Sequence[str], preloaded: Sequence[str]):
        self.folder, self.path, self.packages = folder, folder / "tree", list(packages)
        shutil.copytree(root, self.path, ignore=partial(_not_copied, root))
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm.py")), *preloaded], env=self._environment(), bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTEST_ADDOPTS", "PYTHONPATH")}
        if not torch.cuda.is_available():
            kept["TRITON_INTERPRET"] = "1"  # as tests/conftest.py does, which comes too late here
        return {
            **kept,
            "OMP_NUM_THREADS": "1",
            # A file as long as before and written within the same second would pass for the one compiled before.
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # no test needs one
            "MOSLD_CACHE": str(self.folder / "cache"),  # what a faulty run leaves there serves nobody else
        }

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            pipe.close()  # pyright: ignore

    def run(self, tests: Sequence[str], timeout: float) -> Outcome:
        """Run pytest's paths `tests`, up to the first that fails.

        raises RunnerError where pytest itself could not run, found no test, or tested another copy.
        """
        log = self.folder / "log.txt"
        arguments = [*PYTEST, f"--basetemp={self.folder / 'scratch'}", *tests]
        request = {"tree": str(self.path), "packages": self.packages, "log": str(log), "arguments": arguments}
        self._process.stdin.write(f"{json.dumps(request)}\n".encode())
        group = self._answer()  # the first time it comes when all is imported
        start = time.monotonic()
        hangs = not select.select([self._process.stdout], [], [], timeout)[0]
        with suppress(ProcessLookupError):  # whatever it has started ends with it
            os.killpg(group, signal.SIGKILL)
        status, seconds = os.waitstatus_to_exitcode(self._answer()), time.monotonic() - start
        if hangs:
            return Outcome("hang", "", seconds)
        if status < 0:
            return Outcome("crash", signal.Signals(-status).name, seconds)
        if status == 0:
            return Outcome("passed", "", seconds)
        output = log.read_text(errors="replace")
        red = _RED.findall(output)
        if status in (1, 2) and red:  # 2: a file could not be collected
            return Outcome("error" if f"ERROR {red[0]}" in output else "failed", red[0], seconds)
        raise RunnerError(f"pytest ended with {status} on {' '.join(tests)}:\n{output[-3000:]}")

    def _answer(self) -> int:
        line = self._process.stdout.readline()  # pyright: ignore
        if not line:
            raise RunnerError(f"the process that runs tests ended with {self._process.wait()}")
        return int(line)

    def run_fault(self, fault: Fault, timeout: float) -> Outcome:
        """Plant, test, and put back."""
        path = self.path / fault.file
        right = path.read_text()
        path.write_text(fault.planted(right))
        try:
            return self.run(fault.tests, timeout)
        finally:
            path.write_text(right)


@contextmanager
def trees(root: Path, count: int, packages: Sequence[str], preloaded: Sequence[str]) -> Iterator[list[Tree]]:
    """`count` of them, each in a folder of its own, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ExitStack() as stack:
        made = []
        for number in range(count):
            own = Path(folder).resolve() / str(number)
            own.mkdir()
            made.append(tree := Tree(root, own, packages, preloaded))
            stack.callback(tree.close)
        yield made


def check_green(tree: Tree, faults: Sequence[Fault], timeout: float) -> None:
    """raises RunnerError where a test fails without any fault."""
    tests = sorted({test for fault in faults for test in fault.tests})
    tests = [test for test in tests if "::" not in test or test.partition("::")[0] not in tests]
    outcome = tree.run(tests, timeout * max(1, len(tests)))
    if outcome.caught:
        raise RunnerError(f"{outcome.test or 'a test'} does not pass without a fault ({outcome.how})")


def run_faults(
    root: Path, faults: Sequence[Fault], jobs: int, timeout: float, after: Callable[[Fault, Outcome], object],
    preloaded: Sequence[str] = PRELOADED,
) -> None:  # fmt: skip
    """Run `faults`, `jobs` at a time, and call `after` with each as soon as it is done.

    raises RunnerError before the first where a test is red without a fault.
    """
    packages = sorted({Path(fault.file).parts[0] for fault in faults})
    with trees(root, jobs, packages, preloaded) as made, ThreadPoolExecutor(jobs) as threads:
        check_green(made[0], faults, timeout)
        free: queue.SimpleQueue[Tree] = queue.SimpleQueue()
        for tree in made:
            free.put(tree)

        def in_a_tree(fault: Fault) -> Outcome:
            tree = free.get()
            try:
                return tree.run_fault(fault, timeout)
            finally:
                free.put(tree)

        running = {threads.submit(in_a_tree, fault): fault for fault in faults}
        try:
            for done in as_completed(running):
                after(running[done], done.result())
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
