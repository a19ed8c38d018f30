"""The folder of a run: whose it is, whether it is finished, and what may be written into it.

run.json       the settings that decide the results; written first
lock           held by the process that trains here
stages/        one file per finished stage          checkpoints/   of the stage being trained
results.json   written last: a folder that has it holds a finished run

A comparison (`mosld compare`) is never finished: the same command with more methods, seeds or settings goes on in it.
Its `rows`, by name, must agree where both have them.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO, cast

from ..files.adapter_folder import sha256
from ..files.atomic import is_leftover, remove_leftovers, write_text_atomic
from ..files.errors import existing, writable

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

TRAIN, COMPARE, MERGE = "mosld train", "mosld compare", "mosld merge"
LOCK = "lock"
_locks: list[TextIO] = []  # that this process holds
# In the order in which they are removed: wherever that stops, what is left is an unfinished run, and known as one.
OWN = (
    "results.json",
    "stages",
    "checkpoints",
    "adapter",
    "adapters",
    "accuracy.png",
    "loss.png",
    "experts.png",
    "compare.json",
    "compare.md",
    "parameters.png",
    "state",
    "model",
    "snr.png",
    "run.json",
)


class RunFolderError(ValueError):
    """The output folder cannot take this run; the message says what to do."""


def check_free(folder: Path, settings: Mapping[str, object], overwrite: bool = False, program: str = TRAIN) -> str:
    """Whether `folder` can take this run: "new", "unfinished" (this very run, to go on with) or, to overwrite, "run".

    raises RunFolderError for a folder that holds another run, a finished one, or something else, for one where this
    process may not write, and for a run with symbolic links in it.
    """
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file: choose another --output")
    if link := next(_links(folder), None):
        raise RunFolderError(
            f"{link} is a symbolic link, through which a run would write or remove files outside {folder}: choose "
            "another --output, or put the file or folder itself there"
        )
    _check_writable(folder)
    state, changed = _state(folder, json.loads(json.dumps(settings)), program)  # as it is read back
    if state == "foreign":
        raise RunFolderError(f"{folder} is not empty and holds no run: choose another --output")
    if overwrite and state != "new":
        return "run"
    if state == "finished":
        raise RunFolderError(f"{folder} holds a finished run: choose another --output, or --overwrite to replace it")
    if state == "other":
        raise RunFolderError(
            f"{folder} holds a run with other settings ({', '.join(changed)}): choose another --output, or --overwrite "
            "to replace it"
        )
    return state


def claim(folder: Path, settings: Mapping[str, object], overwrite: bool = False, program: str = TRAIN) -> bool:
    """Make `folder` the run's own and return whether an unfinished run of the same settings goes on in it.

    raises RunFolderError as `check_free`.
    """
    state = check_free(folder, settings, overwrite, program)
    folder.mkdir(parents=True, exist_ok=True)
    _lock(folder)
    if state == "run":
        _clear(folder)
    remove_leftovers(folder)
    written = {"program": program, **settings}
    if state == "unfinished" and "rows" in settings:
        before = json.loads((folder / "run.json").read_text())
        written["rows"] = {**before["rows"], **cast(dict, settings["rows"])}
    write_text_atomic(folder / "run.json", json.dumps(written, indent=2) + "\n")
    return state == "unfinished"


def _own_paths(folder: Path) -> list[Path]:
    """What a run may have in `folder`, whether it is there or not."""
    return [folder / name for name in (*OWN, LOCK)]


def _links(folder: Path) -> Iterator[Path]:
    """Symbolic links among what is a run's in `folder`, which may be one itself: whoever runs `mosld` has chosen it."""
    for own in _own_paths(folder):
        if own.is_symlink():
            yield own
            continue
        for path in own.rglob("*"):
            if path.is_symlink():
                yield path


def _check_writable(folder: Path) -> None:
    """What is of a run in `folder`, or the folder that it would be made in, before anything costs time."""
    for path in (existing(folder), *_own_paths(folder)):
        if path.exists() and not writable(path):
            raise RunFolderError(
                f"{folder} cannot be written, since this process may not write to {path}: choose another --output, or "
                "change its permissions"
            )


def release() -> None:
    """Give back every folder that this process has claimed."""
    while _locks:
        _locks.pop().close()


def _lock(folder: Path) -> None:
    """Keep `folder` for this process as long as it lives: two runs in one folder would remove each other's files."""
    if fcntl is None:
        return
    handle = open(folder / LOCK, "w")  # noqa: SIM115  held until `release`
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise RunFolderError(f"another process is training in {folder}: wait or choose another --output") from None
    _locks.append(handle)


def free_folder(name: str, settings: Mapping[str, object], program: str = TRAIN) -> Path:
    """runs/NAME, or the first of runs/NAME-2, runs/NAME-3, ... that is new or holds this very run unfinished."""
    settings = json.loads(json.dumps(settings))
    number = 1
    while True:
        folder = Path("runs") / (name if number == 1 else f"{name}-{number}")
        if _state(folder, settings, program)[0] in ("new", "unfinished"):
            return folder
        number += 1


def _state(folder: Path, settings: Mapping[str, object], program: str) -> tuple[str, list[str]]:
    """ "new", "unfinished", "finished", "other" (with the settings that differ) or "foreign"."""
    if not folder.is_dir() or _is_empty(folder):
        return "new", []
    before = _read_run(folder / "run.json")
    if before is None:
        return "foreign", []
    if "processes" in settings:
        before.setdefault("processes", 1)  # a run of an older version, which did not write it
    changed = _changed_settings(before, settings, program)
    if changed:
        return "other", changed
    return ("finished" if (folder / "results.json").is_file() else "unfinished"), []


def _is_empty(folder: Path) -> bool:
    """Whether nothing is in it but a lock and what a killed process was about to write."""
    return all(path.name == LOCK or is_leftover(path) for path in folder.iterdir())


def _read_run(path: Path) -> dict | None:
    """The settings of the run that wrote this file; None where no program of ours did, however the file is called."""
    if not path.is_file():
        return None
    try:
        run = json.loads(path.read_text())
    except json.JSONDecodeError:
        return None
    ours = isinstance(run, dict) and run.get("program") in (TRAIN, COMPARE, MERGE)
    return run if ours else None


def _changed_settings(before: dict, settings: Mapping[str, object], program: str) -> list[str]:
    """What differs, in words; rows that only one of them has do not count."""
    if before["program"] == program:
        names = {*before, *settings} - {"program", "rows"}
        changed = sorted(name for name in names if before.get(name) != settings.get(name))
    else:
        changed = [f"it is one of {before['program']}"]
    old_rows = before.get("rows") or {}
    new_rows = cast(dict, settings.get("rows") or {})
    for name, row in old_rows.items():
        if name in new_rows and new_rows[name] != row:
            changed.append(f"row {name}")
    return changed


def _clear(folder: Path) -> None:
    """Remove a run and nothing else."""
    for name in OWN:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    return sha256(path)[:16]
