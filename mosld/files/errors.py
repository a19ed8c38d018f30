"""What stops a run from outside, and its message: a full disk, a folder that is not writable, too little memory."""

import errno
import gc
import os
import re
import shutil
from pathlib import Path

import torch

NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is larger than this process or the file system may make one",
}
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
# torch.save does not say why a write failed. With less than this left free, the disk counts as full.
FULL_BYTES = 1 << 20
_RUST = re.compile(r"\(os error (\d+)\)")  # safetensors
_TORCH_SAVE = re.compile(r"inline_container\.cc.*unexpected pos|PytorchStreamWriter failed", re.DOTALL)
_NO_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)
# What needs less memory. All of it changes the settings of a run, which then needs another folder.
LESS_MEMORY = {
    "train": "a smaller --per_device_train_batch_size (with --gradient_accumulation_steps), "
    "--gradient_checkpointing true or a smaller --eval-batch-size",
    "merge": "a smaller --batch-size or --eval-batch-size",
}
LESS_MEMORY["compare"] = LESS_MEMORY["train"]


class CellsFailed(RuntimeError):
    """Cells of a comparison that had too little memory; the message names them and says what to do."""


def explain(error: BaseException, command: str, folder: Path | None) -> str | None:
    """The message for the user of `mosld command`, which writes to `folder`; None for a fault of the program."""
    if isinstance(error, CellsFailed):
        return str(error)
    if isinstance(error, FloatingPointError):  # a training that diverged, answers that are no numbers
        return str(error)
    go_on = "Run the same command again"
    if command in LESS_MEMORY:  # the verbs with a folder of their own
        go_on = "What is finished is kept: run the same command again to go on"
    if reason := no_room(error, folder):
        return f"{reason}: {_place(error, folder)} cannot be written. Make room there. {go_on}."
    if isinstance(error, OSError) and error.errno in REFUSED:
        return f"{error.filename or folder} cannot be written or read: {error.strerror}. {go_on} when it can."
    if out_of_memory(error):
        less = LESS_MEMORY.get(command, "a smaller --eval-batch-size")
        other = " and another --output" if command in LESS_MEMORY else ""
        return f"out of memory ({first_line(error)}). Free some, or give {less}{other}. {go_on}."
    return None


def no_room(error: BaseException, folder: Path | None) -> str | None:
    """Why there was no room for a file, in words; None where that is not what `error`, or a cause of it, says."""
    while True:
        number = error.errno if isinstance(error, OSError) else None
        if match := _RUST.search(str(error)):
            number = int(match[1])
        if number in NO_ROOM:
            return NO_ROOM[number]
        if isinstance(error, RuntimeError) and _TORCH_SAVE.search(str(error)):
            full = folder is not None and shutil.disk_usage(existing(folder)).free < FULL_BYTES
            return NO_ROOM[errno.ENOSPC] if full else "a file could not be written to its end"
        if error.__cause__ is None:
            return None
        error = error.__cause__


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device's memory or the machine's was used up."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def free_memory() -> None:
    """Return memory that is no longer used to the device; the error must be gone first, since it holds the frames."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()


def escape_control_chars(text: str) -> str:
    """`text` with its control characters written out: a message may quote a file that would command a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """Of the message; the name of the error's class where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return place


def writable(place: Path) -> bool:
    """Whether this process may write to the file `place`, or make files in the folder `place`."""
    return os.access(place, os.W_OK | (os.X_OK if place.is_dir() else 0))


def _place(error: BaseException, folder: Path | None) -> str:
    """The folder, and the file where the error names it."""
    file = error.filename if isinstance(error, OSError) else None
    if folder is None:
        return str(file or "a file")
    return str(folder) if file is None else f"{folder} ({file})"
