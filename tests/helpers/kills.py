"""Processes that are killed by SIGKILL at a change of the file system: at each in turn, or at a named one.

What Python does to files raises an audit event first. The process dies at the event, and once more just after a file
was opened for writing, when it is there and empty. What native code does (safetensors) has no event of its own: it lies
between two others.
"""

import gc
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
LONGEST = 500  # more changes than anything here makes
TIMEOUT_S = 300  # the first process waits for all imports

# Its processes begin with everything imported, in milliseconds.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["tests.helpers.kills", "tests.hardening.test_kills", "mosld.cli.main", "tests.hardening.faults.moments"]
)


def killed_at_every_change(work: Callable[[Path], None], folder: Path) -> Iterator[int]:
    """Yields n with `folder` as `work(folder)` left it, begun anew from what `folder` holds and killed at change n.

    `work` is a function of a module that can be imported. The last time, with n = 0, it ended by itself.
    """
    with tempfile.TemporaryDirectory() as elsewhere:
        before = shutil.copytree(folder, Path(elsewhere, "before"))
        for number in range(1, LONGEST):
            shutil.rmtree(folder)
            shutil.copytree(before, folder)
            process = processes.Process(target=_run, args=(work, folder, number))
            process.start()
            process.join(TIMEOUT_S)
            assert process.exitcode in (0, -signal.SIGKILL), f"killed at change {number}: exit code {process.exitcode}"
            ended = process.exitcode == 0
            yield 0 if ended else number
            if ended:
                return
    raise AssertionError(f"{work.__name__} made more than {LONGEST} changes")


def killed_at(change: str, work: Callable[..., None], *arguments: object, never: str | None = None) -> None:
    """Run `work(*arguments)` until it is killed at the change that the regular expression `change` finds.

    A change reads "os.mkdir PATH", "open PATH" and so on, or "opened PATH" just after a file was opened for writing;
    where Python removes a folder, PATH is a name alone. raises AssertionError when nothing was killed, or when a change
    that `never` finds came before.
    """
    process = processes.Process(target=_run_to, args=(change, never, work, arguments))
    process.start()
    process.join(TIMEOUT_S)
    assert process.exitcode == -signal.SIGKILL, f"{change}: exit code {process.exitcode}"


def _run(work: Callable[[Path], None], folder: Path, number: int) -> None:
    gc.freeze()  # looking through what was imported, the collector would copy it into this process
    left = number

    def is_reached(change: str) -> bool:
        nonlocal left
        left -= 1
        return left == 0

    _die_when(is_reached)
    work(folder)
    left = 0  # whatever Python does at its end is no part of the work


def _run_to(change: str, never: str | None, work: Callable[..., None], arguments: tuple) -> None:
    gc.freeze()

    def is_it(seen: str) -> bool:
        if never and re.search(never, seen):
            print("unexpected:", seen, file=sys.stderr)
            os._exit(3)
        return re.search(change, seen) is not None

    _die_when(is_it)
    work(*arguments)


def _die_when(now: Callable[[str], bool]) -> None:
    """Ask `now` at every change from here on, and kill this process when it says so."""
    dying = False

    def listen(event: str, arguments: tuple) -> None:
        nonlocal dying
        opens = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
        if dying or not (opens or event in CHANGES):
            return
        dying = now(f"{event} {arguments[0]}")
        if not dying and opens and isinstance(arguments[0], (str, bytes, os.PathLike)):
            dying = now(f"opened {arguments[0]}")
            if dying:
                os.open(arguments[0], arguments[2], 0o666)
        if dying:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(listen)
