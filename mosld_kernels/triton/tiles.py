"""Every tile size, in one place. A row says for which launch it is meant and how the launch is cut.

The first row that fits wins: rows of the file that MOSLD_TILES names, then rows for the GPU's architecture, then rows
for any. A row is chosen by the layer's sizes and a bucket of T (the next power of two), never by T itself: a batch of
another length compiles nothing anew and cuts a token's sums as before, unless it falls into another bucket.
`python -m benchmarks tune` measures candidates on the GPU at hand and prints rows to put here or into a file.
"""

import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple, cast

VARIABLE = "MOSLD_TILES"
KERNELS = ("down", "up_backward", "grad_expert_b", "grad_down")


class Tile(NamedTuple):
    """One program's share: tokens x features of the large operand, against `columns` of the small one."""

    tokens: int
    features: int
    columns: int  # at most this many; the rest goes to further blocks. `down` always takes all.
    warps: int
    stages: int
    # Of one thread at most, a limit for the compiler: left alone, it spills to fit more programs on a multiprocessor.
    registers: int = 255

    def options(self) -> dict[str, int]:
        """The compiler's options of a launch."""
        return dict(num_warps=self.warps, num_stages=self.stages, maxnreg=self.registers)

    def blocks(self, tokens: int) -> int:
        """How many blocks of tokens there are in T's bucket."""
        return -(-bucket(tokens) // self.tokens)


class Row(NamedTuple):
    """For `kernel`, on architecture `arch` (80, 90, 100; 0 for any) and elements of `bytes` bytes (2 or 4), up to the
    given sizes (0 for any). `columns_to` bounds R + E for "down" and "grad_down", E * R for the others. Where every
    expert has an A, E * R stands for R in the first two, and 2 E * R for E * R in the others, padded as in `..limits`
    but in "grad_down"."""

    kernel: str
    tile: Tile
    arch: int = 0
    bytes: int = 0
    d_in_to: int = 0
    d_out_to: int = 0
    columns_to: int = 0
    tokens_to: int = 0


ROWS: list[Row] = [
    # From sm_90: more stages in flight, and at many tokens taller tiles for up_backward, which reads all of B once per
    # tile of tokens.
    *(
        row._replace(arch=arch)
        for arch in (90, 100)
        for row in (
            Row("down", Tile(64, 128, 0, 4, 4, 168), bytes=2, columns_to=48),
            Row("down", Tile(128, 64, 0, 8, 3, 255), bytes=2),
            Row("up_backward", Tile(64, 64, 128, 4, 4, 168), bytes=2, columns_to=128, tokens_to=4096),
            Row("up_backward", Tile(128, 64, 128, 8, 4, 128), bytes=2, columns_to=128),
            Row("up_backward", Tile(64, 64, 128, 8, 4, 255), bytes=2),
            Row("grad_expert_b", Tile(64, 128, 128, 8, 3, 128), bytes=2, columns_to=128),
            Row("grad_expert_b", Tile(64, 128, 128, 8, 4, 255), bytes=2),
            Row("grad_down", Tile(64, 128, 64, 4, 4, 255), bytes=2),
        )
    ),
    # Any GPU from sm_80: within the 99 KB of shared memory that the smallest have. Exact float32 products run on the
    # ordinary cores and want small tiles.
    Row("down", Tile(64, 128, 0, 4, 3, 255), bytes=2, columns_to=48),
    Row("down", Tile(64, 64, 0, 8, 3, 248), bytes=2),
    Row("down", Tile(32, 32, 0, 4, 2, 255), bytes=4, columns_to=64),
    Row("down", Tile(32, 16, 0, 8, 2, 168), bytes=4),
    Row("up_backward", Tile(64, 64, 128, 4, 3, 255), bytes=2, columns_to=128),
    Row("up_backward", Tile(64, 64, 128, 8, 3, 255), bytes=2),
    Row("up_backward", Tile(32, 16, 64, 8, 2, 168), bytes=4),
    Row("grad_expert_b", Tile(64, 128, 128, 8, 3, 255), bytes=2),
    Row("grad_expert_b", Tile(16, 64, 64, 8, 2, 224), bytes=4),
    Row("grad_down", Tile(64, 128, 64, 4, 3, 255), bytes=2),
    Row("grad_down", Tile(32, 64, 64, 4, 2, 255), bytes=4),
]


def bucket(tokens: int) -> int:
    return 1 << max(0, tokens - 1).bit_length()


def split_k(programs: int, steps: int, processors: int, most: int = 16) -> int:
    """Into how many planes a sum of `steps` steps is cut so that `programs` programs fill the chip's processors.

    Powers of two, every plane with at least two steps. Nine tenths of the processors are enough: another doubling
    would write and read every partial sum twice as often for the last tenth.
    """
    count = 1
    while 2 * count <= most and 10 * programs * count < 9 * processors and 4 * count <= steps:
        count *= 2
    return count


def pick(kernel: str, arch: int, tokens: int, d_in: int, d_out: int, columns: int, element_bytes: int) -> Row:
    """The first row that fits. A size that a launch does not have is 0."""
    sizes = dict(d_in_to=d_in, d_out_to=d_out, columns_to=columns, tokens_to=bucket(tokens))
    for row in rows_for(arch, os.environ.get(VARIABLE)):
        if row.kernel == kernel and row.bytes in (0, element_bytes) and _fits(row, sizes):
            return row
    raise ValueError(f"no tile row fits {kernel} on sm_{arch} with {sizes} and {element_bytes}-byte elements")


def _fits(row: Row, sizes: dict[str, int]) -> bool:
    for name, size in sizes.items():
        bound = getattr(row, name)
        if bound and size > bound:
            return False
    return True


def check_file() -> None:
    """Raises what `read_rows` raises for the file that MOSLD_TILES names: once, before the first launch."""
    _own_rows(os.environ.get(VARIABLE))


@functools.cache
def _own_rows(path: str | None) -> list[Row]:
    return read_rows(path) if path else []


@functools.cache
def rows_for(arch: int, path: str | None) -> list[Row]:
    """All rows for an architecture, in the order in which they are tried."""
    own = [row for row in _own_rows(path) if row.arch in (0, arch)]
    # A stable sort: the rows for this architecture, then those for any, each in the order of the file.
    return own + sorted((row for row in ROWS if row.arch in (0, arch)), key=lambda row: row.arch == 0)


def read_rows(path: str) -> list[Row]:
    """The rows of a JSON file: a list of objects with Row's fields, `tile` an object with Tile's.

    raises ValueError naming the file, the row and what is wrong with it.
    """
    try:
        entries = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"MOSLD_TILES={path} cannot be read as JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"MOSLD_TILES={path} must hold a list of rows, got {type(entries).__name__}")
    return [_row(entry, f"MOSLD_TILES={path}, row {number}") for number, entry in enumerate(entries)]


def _row(entry: object, where: str) -> Row:
    try:
        fields: dict[str, Any] = dict(cast(Any, entry))
        row = Row(**{**fields, "tile": Tile(**fields["tile"])})
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"{where}: must be an object with the fields {', '.join(Row._fields)}, and a tile with "
            f"{', '.join(Tile._fields)}: {error}"
        ) from error
    if row.kernel not in KERNELS:
        raise ValueError(f"{where}: kernel must be one of {', '.join(KERNELS)}, got {row.kernel!r}")
    for name, size in {**row.tile._asdict(), **row._asdict()}.items():
        if name not in ("kernel", "tile") and (not isinstance(size, int) or size < 0):
            raise ValueError(f"{where}: {name} must be an integer of at least 0, got {size!r}")
    for name in ("tokens", "features", "columns"):
        size = getattr(row.tile, name)
        if size & (size - 1) or (size < 16 and not (name == "columns" and row.kernel == "down")):
            raise ValueError(f"{where}: tile.{name} must be a power of two of at least 16, got {size}")
    if row.tile.registers * 32 * row.tile.warps > 65536 or not 16 <= row.tile.registers <= 255:
        raise ValueError(
            f"{where}: tile.registers must be in [16, 255] and at most 65536 / (32 * warps), got {row.tile.registers}"
        )
    if row.tile.warps not in (1, 2, 4, 8, 16) or row.tile.stages < 1:
        raise ValueError(
            f"{where}: tile.warps must be 1, 2, 4, 8 or 16 and tile.stages at least 1, got "
            f"{row.tile.warps} and {row.tile.stages}"
        )
    return row
