"""Files and folders that appear whole or not at all, however the process that writes them ends.

They are written beside their place, under a name that begins with a dot, and renamed into it. A process that is killed
leaves what was there before, and a leftover beside it. Nothing is flushed to the disk: a power failure may lose both.
"""

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

NEW, OLD = "new", "old"
_LEFTOVER = re.compile(rf"\.(?P<name>.+)\.[0-9a-f]{{8}}\.(?P<kind>{NEW}|{OLD})")
# Of <fcntl.h> and <linux/fs.h>.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def write_text_atomic(path: Path, text: str) -> None:
    """Make the file `path`, or replace it, with the content `text` in UTF-8."""
    aside = _beside(path, NEW)
    try:
        aside.write_text(text, encoding="utf-8", newline="")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, for what is then renamed to `path`; removed at the end with what is left in it."""
    aside = _beside(path, NEW)
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def atomic_folder(folder: Path, check: Callable[[], object] | None = None) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `folder` at the end.

    check: called just before; when it raises, `folder` stays as it was.
    Where the system cannot swap two folders in one step (Linux can, on local file systems), a process that is killed
    between its two renames leaves no `folder`, and the previous one beside it; `remove_leftovers` puts it back.
    """
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_beside(folder) as aside:
        yield aside
        if check is not None:
            check()
        _take_place(aside, folder)


def _take_place(aside: Path, folder: Path) -> None:
    if not folder.exists():
        aside.replace(folder)
    elif not _exchange(aside, folder):
        before = _beside(folder, OLD)
        folder.replace(before)
        aside.replace(folder)
        shutil.rmtree(before, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap what two names stand for, in one step; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _beside(path: Path, kind: str) -> Path:
    # The random part keeps other processes and threads from using the same name.
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{kind}")


def is_leftover(path: Path) -> bool:
    """Whether `path` has the name of a file or folder that was being written when its process was killed."""
    return _LEFTOVER.fullmatch(path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left in `folder` and below it; no other process may be writing there."""
    # All names are read before the first is removed: the walk must not meet what changes under it.
    for path in list(folder.rglob(".*")):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        if match["kind"] == OLD and not (place := path.with_name(match["name"])).exists():
            path.replace(place)  # killed between the two renames
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
