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
from typing import NamedTuple

KERNELS = ("down", "up_backward", "gram")


class Tile(NamedTuple):
    """One program's share: tokens x features of the large operand, against `columns` of the small one."""

    tokens: int
    features: int
    columns: int  # at most this many; the rest goes to further blocks. `down` always takes all.
    warps: int
    stages: int

    def blocks(self, tokens: int) -> int:
        """How many blocks of tokens there are in T's bucket."""
        return -(-bucket(tokens) // self.tokens)


class Row(NamedTuple):
    """For `kernel`, on architecture `arch` (80, 90, 100; 0 for any) and elements of `bytes` bytes (2 or 4), up to the
    given sizes (0 for any). `columns_to` bounds R + E for "down", E * R otherwise; `registers` is the most that one
    thread may use when compiled, a bound that the tests hold."""

    kernel: str
    tile: Tile
    registers: int = 255
    arch: int = 0
    bytes: int = 0
    d_in_to: int = 0
    d_out_to: int = 0
    columns_to: int = 0
    tokens_to: int = 0


ROWS: list[Row] = [
    Row("down", Tile(tokens=64, features=128, columns=0, warps=4, stages=3), columns_to=64, bytes=2),
    Row("down", Tile(tokens=64, features=64, columns=0, warps=4, stages=3), bytes=2),
    Row("down", Tile(tokens=32, features=32, columns=0, warps=4, stages=2), bytes=4),
    Row("up_backward", Tile(tokens=64, features=64, columns=128, warps=4, stages=3), bytes=2),
    Row("up_backward", Tile(tokens=32, features=32, columns=64, warps=4, stages=2), bytes=4),
    Row("gram", Tile(tokens=64, features=128, columns=128, warps=8, stages=3), bytes=2),
    Row("gram", Tile(tokens=32, features=64, columns=64, warps=4, stages=2), bytes=4),
]


def bucket(tokens: int) -> int:
    return 1 << max(0, tokens - 1).bit_length()


def planes(programs: int, steps: int, processors: int, most: int = 16) -> int:
    """Into how many planes a sum of `steps` steps is cut so that `programs` programs fill the chip's processors.

    Powers of two, every plane with at least two steps: a plane costs a write and a read of its partial sums.
    """
    count = 1
    while 2 * count <= most and programs * count < processors and 4 * count <= steps:
        count *= 2
    return count


def pick(kernel: str, arch: int, tokens: int, d_in: int, d_out: int, columns: int, element_bytes: int) -> Tile:
    """The tile of the first row that fits. A size that a launch does not have is 0."""
    sizes = dict(d_in_to=d_in, d_out_to=d_out, columns_to=columns, tokens_to=bucket(tokens))
    for row in _candidates(arch, os.environ.get("MOSLD_TILES")):
        fits = all(getattr(row, bound) == 0 or size <= getattr(row, bound) for bound, size in sizes.items())
        if row.kernel == kernel and row.bytes in (0, element_bytes) and fits:
            return row.tile
    raise ValueError(f"no tile row fits {kernel} on sm_{arch} with {sizes} and {element_bytes}-byte elements")


@functools.cache
def _candidates(arch: int, path: str | None) -> list[Row]:
    own = [row for row in read_rows(path) if row.arch in (0, arch)] if path else []
    return own + [row for row in ROWS if row.arch == arch] + [row for row in ROWS if row.arch == 0]


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
        fields = dict(entry)  # type: ignore[call-overload]
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
    if row.tile.warps not in (1, 2, 4, 8, 16) or row.tile.stages < 1:
        raise ValueError(
            f"{where}: tile.warps must be 1, 2, 4, 8 or 16 and tile.stages at least 1, got "
            f"{row.tile.warps} and {row.tile.stages}"
        )
    return row
