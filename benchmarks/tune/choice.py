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

GAIN = 1.03  # a smaller one is within what two runs of the same tile differ by


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

    return [_verdict(*key, tuple(group)) for key, group in itertools.groupby(sorted(measured, key=order), place)]


def _verdict(row: Row, default: Row, measured: tuple[Measurement, ...]) -> Verdict:
    """`row` is the default's tile in the measured bounds."""
    ratios = {tile: [one.ratio(tile) for one in measured] for tile in _measured_everywhere(measured)}
    means = {tile: math.prod(each) ** (1 / len(each)) for tile, each in ratios.items()}
    others = [tile for tile in means if tile != default.tile]
    if not others:
        return Verdict(row, default, default.tile, math.nan, measured)
    loses = {tile: max(ratios[tile]) >= GAIN for tile in others}  # somewhere, however much it wins elsewhere
    best = min(others, key=lambda tile: (loses[tile], means[tile]))
    wins = means[best] * GAIN < 1 and not loses[best]
    return Verdict(row._replace(tile=best) if wins else row, default, best, means[best], measured)


def _measured_everywhere(measured: Sequence[Measurement]) -> list[Tile]:
    return [tile for tile in measured[0].times if all(tile in one.times for one in measured)]


def insertions(verdicts: Sequence[Verdict]) -> dict[Row, list[Row]]:
    """Row of the table -> the rows that belong just above it, smaller bounds first.

    Where the default stays at smaller bounds than those of a new row, a row with its tile says so before.
    """
    above: dict[Row, list[Row]] = {}
    for default in dict.fromkeys(verdict.default for verdict in verdicts if verdict.is_new()):
        same = [verdict for verdict in verdicts if verdict.default == default]
        last = max(i for i, verdict in enumerate(same) if verdict.is_new())
        above[default] = [verdict.row for verdict in same[: last + 1]]
    return above


def file_rows(verdicts: Sequence[Verdict], known: Sequence[Row], arch: int) -> list[Row]:
    """What MOSLD_TILES can name: the new rows and, because a file comes before the table, the rows of the table that
    come before those they replace. known: the rows that such a GPU has as things are, in their order."""
    above, rows = insertions(verdicts), []
    for kernel, group in itertools.groupby(above, lambda default: default.kernel):
        replaced = list(group)
        last = max(known.index(default) for default in replaced)
        for i, row in enumerate(known[: last + 1]):
            if row.kernel == kernel and any(_share_elements(row, default) for default in replaced):
                rows += [*above.get(row, []), *([row._replace(arch=arch)] if i < last else [])]
    return rows


def _share_elements(one: Row, other: Row) -> bool:
    return one.bytes == other.bytes or 0 in (one.bytes, other.bytes)


def row_text(row: Row) -> str:
    """As a line of tiles.py."""
    bounds = ("arch", "bytes", "d_in_to", "d_out_to", "columns_to", "tokens_to")
    given = "".join(f", {name}={getattr(row, name)}" for name in bounds if getattr(row, name))
    return f'Row("{row.kernel}", {tile_text(row.tile)}{given}),'


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
    lines += [f"  {tile_text(tile):34} dropped: {why}" for tile, why in one.dropped.items()]
    return "\n".join(lines)


def verdict_text(verdict: Verdict) -> str:
    """What was decided, with the times of both tiles at each shape."""
    row = verdict.row
    head = f"{row.kernel}, {row.bytes}-byte elements, up to {row.columns_to} columns and {row.tokens_to} tokens: "
    if math.isnan(verdict.ratio):
        return (
            head
            + "the default stays, there being no other tile that was right at every shape"
            + _default_times(verdict)
        )
    times = (f"{_us(one, verdict.best)}, default {_us(one, verdict.default.tile)}" for one in verdict.measured)
    both = [f"{one.case.name} {one.case.dtype} {text}" for one, text in zip(verdict.measured, times, strict=True)]
    name, change = tile_text(verdict.best), f"takes {verdict.ratio:.3f} of the default's time"
    end = "" if verdict.is_new() else f", and the default {tile_text(verdict.default.tile)} stays"
    return f"{head}{name} {change}{end} ({'; '.join(both)})"


def _default_times(verdict: Verdict) -> str:
    times = [f"{one.case.name} {one.case.dtype} {_us(one, verdict.default.tile)}" for one in verdict.measured]
    return f" ({'; '.join(times)})"


def _us(one: Measurement, tile: Tile) -> str:
    return f"{1e3 * one.times[tile].median_ms:.1f} us"


def summary(verdicts: Sequence[Verdict]) -> str:
    """Every verdict, then the rows for tiles.py, each under the row above which it belongs."""
    lines = [verdict_text(verdict) for verdict in verdicts]
    for default, rows in insertions(verdicts).items():
        lines += ["", f"above {row_text(default)}", *(f"    {row_text(row)}" for row in rows)]
    return "\n".join(lines)
