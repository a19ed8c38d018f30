"""Rows of cells as text in columns and as Markdown, and how numbers are written in them."""

from collections.abc import Collection, Sequence

Rows = Sequence[Sequence[str]]


def aligned_lines(rows: Rows, words: Collection[int] = (0,)) -> list[str]:
    """A line for each row; columns of `words` are aligned on the left, the others, which are numbers, on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for place, (cell, width) in enumerate(zip(row, widths, strict=True)):
            cells.append(cell.ljust(width) if place in words else cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return lines


def aligned(rows: Rows, words: Collection[int] = (0,)) -> str:
    """Text in columns under a head and a rule."""
    head, *rest = aligned_lines(rows, words)
    return "\n".join([head, "-" * len(head), *rest])


def markdown_table(rows: Rows, left: int = 2) -> str:
    """A Markdown table with a head; its first `left` columns are words, the others numbers."""
    head, *rest = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|" + "---|" * left + "---:|" * (len(rows[0]) - left)
    return "\n".join([head, rule, *rest])


def percent(share: float | None) -> str:
    """0.5 -> 50.0; None, of what is not known, is an empty cell."""
    return "" if share is None else f"{100 * share:.1f}"
