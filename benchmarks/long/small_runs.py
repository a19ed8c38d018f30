"""What the long runs (`soak`, `curves`) share: a small model, text with something to learn, and the memory in use."""

import gc
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..cpu.training import SIZES, Size
from ..peers.known import Mixture

MODELS = {
    "toy": SIZES["toy"],
    "small": Size(64, 2, 4, 176, 256, 4, 32, Mixture(8, 8, 2, 0.1)),
}
STATM = Path("/proc/self/statm")
FOLLOWERS = 4  # tokens that may come after a token


def text(size: Size, rows: int) -> Tensor:
    """-> int64 [rows, size.length], the same in every call: each token is followed by one of four, the first of them in
    half of the cases. The entropy, which no model goes below, is 1.21 nats a token: 7/4 log 2.
    """
    generator = torch.Generator().manual_seed(0)
    followers = torch.randint(size.vocabulary, (size.vocabulary, FOLLOWERS), generator=generator)
    shares = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8])
    tokens = [torch.randint(size.vocabulary, (rows,), generator=generator)]
    for _ in range(size.length - 1):
        choice = torch.multinomial(shares, rows, replacement=True, generator=generator)
        tokens.append(followers[tokens[-1], choice])
    return torch.stack(tokens, dim=1)


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
