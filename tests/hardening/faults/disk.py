"""A process of `mosld` whose disk becomes full just before a named change of the file system."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mosld.cli.main import main
from tests.hardening.faults.moments import save_often
from tests.helpers.kills import TIMEOUT_S, processes


@contextmanager
def small_disk(folder: Path, mib: int = 8) -> Iterator[Path]:
    """A file system of its own, in memory; raises PermissionError where this process may not mount one."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        raise PermissionError(made.stderr.decode())
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_at(change: str, filler: Path, words: list[str], printed: Path) -> tuple[int, str]:
    """-> exit status and what was printed by `mosld *words`, on a disk that `filler` fills when the regular expression
    `change` finds an audit event, such as "open PATH" or "os.mkdir PATH"."""
    process = processes.Process(target=_run, args=(change, filler, words, printed))
    process.start()
    process.join(TIMEOUT_S)
    assert process.exitcode is not None
    assert filler.exists(), f"{change} never came: {printed.read_text()}"
    return process.exitcode, printed.read_text()


def _run(change: str, filler: Path, words: list[str], printed: Path) -> None:
    to_file(printed)
    save_often()
    done = False

    def listen(event: str, arguments: tuple) -> None:
        nonlocal done
        if done or not (event == "open" or event.startswith("os.")) or not arguments:
            return
        if re.search(change, f"{event} {arguments[0]}"):
            done = True
            fill(filler)

    sys.addaudithook(listen)
    sys.exit(main(words))


def fill(filler: Path) -> None:
    """To the last byte."""
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def to_file(printed: Path) -> None:
    """What this process prints goes to the file."""
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
