"""From times to rows: which tile beats the default, what the row says, and where in the table it belongs.

Shapes whose rows would have the same bounds are judged together, since one row serves them all: the geometric mean
of time over the default's, and no shape may lose. A new row belongs just above the row it replaces: further up it
would hide the rows for smaller sizes that come before.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from mosld_kernels.triton.tiles import Row, Tile

from ..timing.timers import Timing
from .candidates import Case

# A smaller gain is within what two runs of the same tile differ by.
GAIN = 1.03


class Measurement(NamedTuple):
    """The times of every tile whose result was right, the default's among them; why the others have none."""

    case: Case
    default: Row
    times: dict[Tile, Timing]
    dropped: dict[Tile, str]
    operand_bytes: int

    def ratio(self, tile: Tile) -> float:
        return self.times[tile].median_ms / self.times[self.default.tile].median_ms


class Verdict(NamedTuple):
    """`row` has the default's tile where that stays. ratio: of the best other tile, over the default; NaN if alone."""

    row: Row
    default: Row
    best: Tile
    ratio: float
    measured: tuple[Measurement, ...]

    def is_new(self) -> bool:
        return self.row.tile != self.default.tile


def choose(measured: Sequence[Measurement]) -> list[Verdict]:
    """One verdict for each kernel, bounds and default, smaller bounds first."""

    def place(one: Measurement) -> tuple[Row, Row]:
        return one.case.row(one.default.tile), one.default

    def order(one: Measurement) -> tuple:
        row, default = place(one)
        return row.kernel, row.bytes, row.tokens_to, row.columns_to, default

    verdicts = []
    for (row, default), group in itertools.groupby(sorted(measured, key=order), place):
        verdicts.append(_verdict(row, default, tuple(group)))
    return verdicts


def _verdict(row: Row, default: Row, measured: tuple[Measurement, ...]) -> Verdict:
    """`row` is the default's tile in the measured bounds."""
    means, loses = {}, {}
    for tile in _measured_everywhere(measured):
        if tile == default.tile:
            continue
        ratios = [one.ratio(tile) for one in measured]
        means[tile] = math.prod(ratios) ** (1 / len(ratios))
        # A tile that loses at one shape is out, however much it wins elsewhere.
        loses[tile] = max(ratios) >= GAIN
    if not means:
        return Verdict(row, default, default.tile, math.nan, measured)
    best = min(means, key=lambda tile: (loses[tile], means[tile]))
    wins = means[best] * GAIN < 1 and not loses[best]
    return Verdict(row._replace(tile=best) if wins else row, default, best, means[best], measured)


def _measured_everywhere(measured: Sequence[Measurement]) -> list[Tile]:
    """A tile whose result was wrong at one of the shapes is out for all of them."""
    common = dict.fromkeys(measured[0].times)
    for one in measured[1:]:
        for tile in common.keys() - one.times.keys():
            del common[tile]
    return list(common)


def insertions(verdicts: Sequence[Verdict]) -> dict[Row, list[Row]]:
    """Row of the table -> the rows that belong just above it, smaller bounds first.

    Where the default stays at smaller bounds than those of a new row, a row with its tile says so before.
    """
    above: dict[Row, list[Row]] = {}
    for default in _replaced(verdicts):
        same = [verdict for verdict in verdicts if verdict.default == default]
        # What comes after the last new row has larger bounds, where the default is found anyhow.
        while not same[-1].is_new():
            same.pop()
        above[default] = [verdict.row for verdict in same]
    return above


def _replaced(verdicts: Sequence[Verdict]) -> list[Row]:
    """The defaults that lose somewhere, each once, in the order of the verdicts."""
    defaults = []
    for verdict in verdicts:
        if verdict.is_new() and verdict.default not in defaults:
            defaults.append(verdict.default)
    return defaults


def file_rows(verdicts: Sequence[Verdict], known: Sequence[Row], arch: int) -> list[Row]:
    """What MOSLD_TILES can name: the new rows and, because a file comes before the table, the rows of the table that
    come before those they replace. known: the rows that such a GPU has as things are, in their order."""
    above, rows = insertions(verdicts), []
    for kernel, group in itertools.groupby(above, lambda default: default.kernel):
        replaced = list(group)
        last = max(map(known.index, replaced))
        for place, row in enumerate(known[: last + 1]):
            if row.kernel != kernel or not any(_share_elements(row, default) for default in replaced):
                continue
            rows += above.get(row, [])
            if place < last:
                rows.append(row._replace(arch=arch))
    return rows


def _share_elements(one: Row, other: Row) -> bool:
    return one.bytes == other.bytes or 0 in (one.bytes, other.bytes)


def row_text(row: Row) -> str:
    """As a line of tiles.py."""
    arguments = [f'"{row.kernel}"', tile_text(row.tile)]
    for name in ("arch", "bytes", "d_in_to", "d_out_to", "columns_to", "tokens_to"):
        if bound := getattr(row, name):
            arguments.append(f"{name}={bound}")
    return f"Row({', '.join(arguments)}),"


def tile_text(tile: Tile) -> str:
    return f"Tile({', '.join(map(str, tile))})"


def times_text(one: Measurement) -> str:
    """A line for each tile, the fastest first, with GB/s of the large operand alone; then what was dropped."""
    lines = [f"{one.case}: {one.case.shape}"]
    for tile, timing in sorted(one.times.items(), key=lambda item: item[1].median_ms):
        rate = one.operand_bytes / timing.median_ms / 1e6
        span = f"{1e3 * timing.median_ms:9.1f} us ({1e3 * timing.low_ms:.1f} to {1e3 * timing.high_ms:.1f})"
        mark = "  default" if tile == one.default.tile else ""
        lines.append(f"  {tile_text(tile):34} {span} {rate:7.0f} GB/s {one.ratio(tile):6.3f}{mark}")
    for tile, why in one.dropped.items():
        lines.append(f"  {tile_text(tile):34} dropped: {why}")
    return "\n".join(lines)


def verdict_text(verdict: Verdict) -> str:
    """What was decided, with the times of both tiles at each shape."""
    row = verdict.row
    head = f"{row.kernel}, {row.bytes}-byte elements, up to {row.columns_to} columns and {row.tokens_to} tokens: "
    default = verdict.default.tile
    times = []
    for one in verdict.measured:
        best = "" if math.isnan(verdict.ratio) else f"{_us(one, verdict.best)}, default "
        times.append(f"{one.case.name} {one.case.dtype} {best}{_us(one, default)}")
    if math.isnan(verdict.ratio):
        change = "the default stays, there being no other tile that was right at every shape"
    else:
        change = f"{tile_text(verdict.best)} takes {verdict.ratio:.3f} of the default's time"
        if not verdict.is_new():
            change += f", and the default {tile_text(default)} stays"
    return f"{head}{change} ({'; '.join(times)})"


def _us(one: Measurement, tile: Tile) -> str:
    return f"{1e3 * one.times[tile].median_ms:.1f} us"


def summary(verdicts: Sequence[Verdict]) -> str:
    """Every verdict, then the rows for tiles.py, each under the row above which it belongs."""
    lines = [verdict_text(verdict) for verdict in verdicts]
    for default, rows in insertions(verdicts).items():
        lines += ["", f"above {row_text(default)}"]
        for row in rows:
            lines.append(f"    {row_text(row)}")
    return "\n".join(lines)
