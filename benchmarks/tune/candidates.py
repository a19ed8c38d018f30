"""Candidate tiles, how one is put in front of the table, and which of them the compiler rules out without a GPU.

A candidate is dropped where `compile.machine_code` finds that its launch spills registers, takes more shared memory
than the chip has, or does not compile. What is merely likely to be slow is left to the clock.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple
from unittest import mock

from tqdm.auto import tqdm

from mosld_kernels.limits import padded
from mosld_kernels.triton import tiles
from mosld_kernels.triton.tiles import Row, Tile

from ..compile import machine_code, recorded
from ..timing.shapes import DTYPES, LayerShape


class Case(NamedTuple):
    """One launch at one layer's sizes: kernel is a row's, `name` the shape's, arch the GPU's, such as 90."""

    kernel: str
    name: str
    shape: LayerShape
    dtype: str
    arch: int

    def __str__(self) -> str:
        return f"{self.kernel} {self.name} {self.dtype}"

    def features(self) -> int:
        """Of the large operand: x for the passes over x, dout for the others."""
        return self.shape.D_in if self.over_x() else self.shape.D_out

    def columns(self) -> int:
        """What `columns_to` bounds."""
        return self.shape.R + self.shape.E if self.over_x() else self.shape.E * self.shape.R

    def over_x(self) -> bool:
        return self.kernel in ("down", "grad_down")

    def element_bytes(self) -> int:
        return DTYPES[self.dtype].itemsize

    def default(self) -> Row:
        """The row that the launch takes as things are."""
        d_in, d_out = (self.features(), 0) if self.over_x() else (0, self.features())
        return tiles.pick(self.kernel, self.arch, self.shape.T, d_in, d_out, self.columns(), self.element_bytes())

    def row(self, tile: Tile) -> Row:
        """What the measurement shows of the tile: for these columns and T's bucket, and what is smaller."""
        bounds = dict(columns_to=self.columns(), tokens_to=tiles.bucket(self.shape.T))
        return Row(self.kernel, tile, arch=self.arch, bytes=self.element_bytes(), **bounds)


# Around the default rows: how much is in flight (tokens x features x stages), how tall, and in how many programs.
# Registers as many as leave room for 1 or 2 programs of 8 warps (255, 128), for 2, 3 or 4 of 4 warps (255, 168, 128).
# Tiles of 256 columns are for mixtures of more than 128; smaller ones leave them out.
CANDIDATES: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("down", 2): (
        Tile(64, 128, 0, 4, 3, 128),
        Tile(64, 128, 0, 4, 6, 128),
        Tile(64, 128, 0, 8, 4, 128),
        Tile(64, 64, 0, 4, 6, 128),
        Tile(64, 64, 0, 8, 3, 255),
        Tile(64, 256, 0, 4, 3, 168),
        Tile(64, 256, 0, 8, 3, 128),
        Tile(32, 128, 0, 4, 5, 128),
        Tile(32, 256, 0, 4, 4, 168),
        Tile(128, 64, 0, 8, 5, 128),
        Tile(128, 128, 0, 8, 4, 128),
    ),
    ("up_backward", 2): (
        Tile(64, 64, 128, 4, 3, 255),
        Tile(64, 64, 128, 4, 5, 168),
        Tile(64, 64, 128, 8, 4, 128),
        Tile(64, 128, 128, 4, 3, 255),
        Tile(64, 128, 128, 8, 3, 128),
        Tile(128, 64, 128, 8, 3, 255),
        Tile(128, 64, 128, 8, 5, 255),
        Tile(128, 128, 128, 8, 3, 255),
        Tile(64, 64, 256, 8, 3, 255),
        Tile(128, 64, 256, 16, 3, 128),
        Tile(128, 64, 256, 8, 3, 255),
    ),
    ("grad_expert_b", 2): (
        Tile(64, 64, 128, 4, 4, 255),
        Tile(64, 64, 128, 4, 6, 255),
        Tile(64, 128, 64, 4, 5, 255),
        Tile(64, 128, 128, 4, 4, 255),
        Tile(64, 128, 128, 8, 3, 255),
        Tile(64, 128, 128, 8, 6, 255),
        Tile(32, 128, 128, 8, 6, 255),
        Tile(128, 128, 128, 8, 3, 255),
        Tile(64, 256, 128, 8, 3, 255),
        Tile(64, 128, 256, 8, 3, 255),
        Tile(64, 128, 256, 16, 3, 128),
    ),
    ("grad_down", 2): (
        Tile(64, 128, 64, 4, 3, 255),
        Tile(64, 128, 64, 4, 6, 168),
        Tile(64, 128, 64, 8, 4, 128),
        Tile(128, 128, 64, 4, 3, 168),
        Tile(128, 128, 64, 8, 4, 128),
        Tile(128, 64, 64, 4, 5, 168),
        Tile(64, 64, 64, 4, 6, 168),
        Tile(32, 128, 64, 4, 6, 168),
        Tile(64, 256, 64, 8, 4, 255),
        Tile(32, 256, 64, 8, 6, 255),
        Tile(128, 256, 64, 8, 3, 255),
    ),
    ("down", 4): (
        Tile(32, 32, 0, 4, 3, 128),
        Tile(32, 64, 0, 4, 2, 168),
        Tile(16, 32, 0, 4, 3, 128),
        Tile(16, 64, 0, 4, 3, 128),
        Tile(64, 32, 0, 4, 2, 255),
        Tile(64, 32, 0, 8, 3, 128),
        Tile(32, 16, 0, 4, 4, 128),
    ),
    ("up_backward", 4): (
        Tile(32, 16, 64, 4, 3, 255),
        Tile(32, 32, 64, 4, 2, 255),
        Tile(32, 16, 128, 8, 2, 255),
        Tile(32, 32, 128, 8, 2, 255),
        Tile(64, 16, 64, 8, 2, 255),
        Tile(64, 16, 128, 8, 2, 255),
        Tile(16, 32, 128, 8, 2, 255),
    ),
    ("grad_expert_b", 4): (
        Tile(16, 64, 64, 8, 3, 255),
        Tile(32, 64, 64, 8, 2, 255),
        Tile(16, 64, 128, 8, 2, 255),
        Tile(16, 128, 64, 8, 2, 255),
        Tile(32, 32, 64, 4, 2, 255),
        Tile(16, 32, 128, 8, 2, 255),
        Tile(16, 64, 64, 4, 2, 255),
    ),
    ("grad_down", 4): (
        Tile(32, 64, 64, 4, 3, 255),
        Tile(16, 64, 64, 4, 3, 255),
        Tile(64, 64, 64, 8, 2, 255),
        Tile(32, 128, 64, 8, 2, 255),
        Tile(32, 32, 64, 4, 3, 255),
        Tile(64, 32, 64, 4, 2, 255),
        Tile(16, 128, 64, 8, 2, 255),
    ),
}


def candidates(case: Case) -> list[Tile]:
    """The tile that is taken as things are, first, and the others to try; no tile twice."""
    widest = max(128, padded(case.columns()))
    narrow = [tile for tile in CANDIDATES[case.kernel, case.element_bytes()] if tile.columns <= widest]
    return list(dict.fromkeys([case.default().tile, *narrow]))


@contextlib.contextmanager
def forced(row: Row) -> Iterator[None]:
    """Inside, `row` is looked at before all others, those of MOSLD_TILES included. What `tiles` has cached stays."""
    behind = tiles.rows_for
    with mock.patch.object(tiles, "rows_for", lambda arch, path: [row, *behind(arch, path)]):
        yield


def faults(wanted: Mapping[Case, Sequence[Tile]]) -> dict[tuple[Case, Tile], tuple[str, ...]]:
    """What the compiler holds against each tile of each case; nothing of it runs, and no GPU is needed."""
    launches = {}
    for case, chosen in wanted.items():
        for tile in chosen:
            launches[case, tile] = _launch(case, tile)
    found = _judged(list(dict.fromkeys(launches.values())))
    return {key: found[launch] for key, launch in launches.items()}


def _judged(launches: Sequence[recorded.Launch]) -> dict[recorded.Launch, tuple[str, ...]]:
    """Each launch -> its faults, by a process for each core."""
    workers = min(len(os.sched_getaffinity(0)), len(launches) or 1)
    # Not forked: this process may hold a GPU, and a fork of it may not.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        found = pool.map(_faults, launches)
        shown = tqdm(found, total=len(launches), desc="compile", unit="kernel", leave=False)
        return dict(zip(launches, shown, strict=True))


def _launch(case: Case, tile: Tile) -> recorded.Launch:
    """What the compiler gets for the tile, as on the case's GPU.

    A GPU that `compile.machine_code` does not know counts as sm_80 with the shared memory that every GPU from there on
    has: arch 0 in the row stands for that.
    """
    arch = case.arch if case.arch in machine_code.ARCHS else 80
    row = Row(case.kernel, tile, arch if arch == case.arch else 0)
    with forced(row):
        forward, backward = recorded.launches(recorded.Problem(case.shape, case.dtype, "float32", arch))
    (launch,) = [launch for launch in (*forward, *backward) if launch.row == row]
    return launch


def _faults(launch: recorded.Launch) -> tuple[str, ...]:
    try:
        faults = machine_code.compile_launch(launch).faults
    except Exception as error:  # a compiler fails in many ways; whichever it is, the tile is out
        return (f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",)
    slow = (machine_code.NO_TENSOR_CORES, machine_code.NARROW_LOADS)
    return tuple(fault for fault in faults if fault not in slow)


def _start_worker() -> None:
    """Ctrl-C reaches every process of the terminal: the one that started this one ends it. And Triton prints the whole
    program that an assembler refuses, which is no news here."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
