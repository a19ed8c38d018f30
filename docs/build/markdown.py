"""Tables and paragraphs in Markdown as lists of lines, of which the writers of pages put them together."""

import re
import textwrap
from collections.abc import Iterable

WIDTH = 120
# Short code is easier to find and to copy when it stays in one line.
_CODE = re.compile(r"`[^`]+`")
_SHORT = 60
# Where a line that began with the next word would be read as a list, a heading, a quotation or a table row.
_BEFORE_A_MARK = re.compile(r" (?=(?:[-+*>|=]|#+|\d+[.)])(?: |$))")


def wrapped(text: str) -> list[str]:
    """The lines of one paragraph, or of one item of a list ("- ..."), whatever its text was broken into before."""
    is_item = text.startswith("- ")
    words = _CODE.sub(_in_one_line, " ".join(text.split()))
    lines = textwrap.wrap(
        _BEFORE_A_MARK.sub("\0", words),
        WIDTH,
        subsequent_indent="  " if is_item else "",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace("\0", " ") for line in lines]


def _in_one_line(code: re.Match) -> str:
    return code[0].replace(" ", "\0") if len(code[0]) <= _SHORT else code[0]


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> list[str]:
    titles = list(head)
    lines = [_row(titles), "|" + "---|" * len(titles)]
    for row in rows:
        lines.append(_row(row))
    return lines


def _row(cells: Iterable[object]) -> str:
    texts = [str(cell).replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(texts)} |"
