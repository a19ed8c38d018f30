"""Every kernel compiled ahead of time, as the launches would launch it, and judged: no GPU is needed.

Each recorded launch, with the tile row that its sizes select on the wanted architecture, is compiled to machine code.
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from tqdm.auto import tqdm

from mosld_kernels.triton import tiles

from ..timing.names import require_known
from .grid import grid
from .machine_code import ARCHS, Report, compile_launch
from .recorded import Launch, launches

HEADS = (
    "kernel", "sm", "dtype", "sizes", "warps", "regs", "stack", "shared", "mma", "16 B loads", "per SM", "aligned",
    "faults",
)  # fmt: skip


def compile_grid(archs: Sequence[int], quick: bool, out: Path | None) -> int:
    """Compile the grid, print a table, write it to `out` as JSON; -> how many faults there are.

    A tile row that no launch of the whole grid selects is a fault as well.
    raises ValueError for an architecture that is not one of ARCHS.
    """
    require_known("", map(str, archs), list(map(str, ARCHS)))
    recorded = set()
    for problem in grid(archs, quick):
        forward, backward = launches(problem)
        recorded.update(forward, backward)
    unused = [] if quick else _unused_rows(archs, recorded)
    reports = _compiled(sorted(recorded, key=_order))
    print(table(reports), summary(reports), sep="\n\n")
    for row in unused:
        print(f"no launch of the grid selects {row}")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(json.dumps(report._asdict()) for report in reports)
        out.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{rows}\n]}}\n')
    faults = len(unused)
    for report in reports:
        faults += bool(report.faults)
    print(f"{len(reports)} kernels compiled with Triton {triton.__version__}, {faults} at fault")
    return faults


def _unused_rows(archs: Sequence[int], recorded: Iterable[Launch]) -> list[tiles.Row]:
    """Rows of the table that should have been selected; those for any architecture are selected on sm_80."""
    selected = {launch.row for launch in recorded}
    unused = []
    for row in tiles.ROWS:
        wanted = row.arch in archs or (row.arch == 0 and 80 in archs)
        if wanted and row not in selected:
            unused.append(row)
    return unused


def _order(launch: Launch) -> tuple:
    return launch.kernel, launch.arch, launch.signature, str(launch.constants)


def _compiled(order: Sequence[Launch]) -> list[Report]:
    with ProcessPoolExecutor() as pool:
        found = pool.map(compile_launch, order, chunksize=4)
        return list(tqdm(found, total=len(order), unit="kernel", leave=False))


def table(reports: Sequence[Report]) -> str:
    rows: list[tuple[str, ...]] = [HEADS]
    for report in reports:
        rows.append((*map(str, report[:-1]), "; ".join(report.faults)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = map(str.ljust, row, widths)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def summary(reports: Sequence[Report]) -> str:
    """One line a kernel, dtype and architecture: the most that any variant of aligned rows uses, and so how many
    programs fit at least."""
    heads = f"{'variants':>10}{'registers':>11}{'spilled':>9}{'shared':>9}{'per SM':>8}"
    lines = [f"{'kernel':14}{'dtype':>6}{'sm':>5}{heads}"]
    for (kernel, dtype, arch), group in itertools.groupby(sorted(reports, key=_kind), key=_kind):
        variants = list(group)
        registers, stack = _largest(variants, "registers"), _largest(variants, "stack_bytes")
        shared = _largest(variants, "shared_bytes")
        fits = min(variant.programs_per_processor for variant in variants)
        lines.append(f"{kernel:16}{dtype:>6}{arch:>5}{len(variants):>10}{registers:>11}{stack:>9}{shared:>9}{fits:>8}")
    return "\n".join(lines)


def _largest(reports: Sequence[Report], field: str) -> int:
    return max(getattr(report, field) for report in reports)


def _kind(report: Report) -> tuple[str, str, int]:
    return report.kernel, report.dtype, report.arch


def tile_rows() -> str:
    """The rows of tiles.py, one a line."""
    bounds = f"{'launch':14}{'sm':>5}{'bytes':>7}{'columns to':>12}{'tokens to':>11}"
    lines = [f"{bounds}{'tokens x features x columns':>29}{'warps':>7}{'stages':>8}{'registers':>11}"]
    for row in tiles.ROWS:
        arch, columns, tokens = row.arch or "any", row.columns_to or "any", row.tokens_to or "any"
        bounds = f"{row.kernel:14}{arch:>5}{row.bytes:>7}{columns:>12}{tokens:>11}"
        tile = f"{row.tile.tokens} x {row.tile.features} x {row.tile.columns or 'all'}"
        options = f"{row.tile.warps:>7}{row.tile.stages:>8}{row.tile.registers:>11}"
        lines.append(f"{bounds}{tile:>29}{options}")
    return "\n".join(lines)
