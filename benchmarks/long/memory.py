"""The memory that this process uses, and the tensors it holds."""

import gc
import os
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

STATM = Path("/proc/self/statm")


class Memory(NamedTuple):
    """Of this process, in bytes. resident: all that is in memory; anonymous: without what is mapped from files, such as
    libraries, which the system fetches and drops as it likes."""

    resident: int
    anonymous: int


def memory() -> Memory:
    """raises ValueError where there is no /proc/self/statm to read it from."""
    if not STATM.exists():
        raise ValueError(f"memory in use is read from {STATM}, which only Linux has")
    _, resident, shared = map(int, STATM.read_text().split()[:3])
    page = os.sysconf("SC_PAGE_SIZE")
    return Memory(page * resident, page * (resident - shared))


def live_tensors() -> int:
    """How many tensors Python's objects hold."""
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
