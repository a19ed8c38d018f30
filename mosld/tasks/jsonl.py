"""Files of unknown origin with one JSON object a line, read line by line within limits: a bad line is one fault.

Whatever a line holds, reading it takes bounded memory and either gives its value or raises LineError. Lines end with a
line feed, with or without a carriage return before it. A file that is text of another encoding, or no regular file, is
refused whole.
"""

import codecs
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Bytes of one line.
MAX_LINE = 1 << 20
# Digits of one integer.
MAX_DIGITS = 20
# Bad lines after which a file is not read on: it is of another kind.
MAX_FAULTS = 100_000
# How text of another encoding begins. The mark of UTF-32 comes first, since that of UTF-16 is its beginning.
FOREIGN = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"{\0": "UTF-16",
    b"\0{": "UTF-16",
}


class LineError(ValueError):
    """A line, or a whole file, that is not what it should be; the message names neither."""


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The number, from 1, and the bytes of every line that is not blank, without its line feed.

    Of a line longer than MAX_LINE the first MAX_LINE + 1 bytes, which `decode` refuses. A UTF-8 byte order mark at the
    beginning is left out.
    raises LineError for a file of another encoding and for what is no regular file, and OSError.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # a device or a pipe may never end
        raise LineError("not a regular file")
    with open(path, "rb") as file:
        start = file.read(4)
        for mark, encoding in FOREIGN.items():
            if start.startswith(mark):
                raise LineError(f"{encoding} text, where UTF-8 is needed")
        file.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE and not line.endswith(b"\n"):
                # The rest of a line that is too long belongs to it, and is read in pieces and thrown away.
                while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                    pass
            if line.strip():
                yield number, line.removesuffix(b"\n")


def decode(line: bytes) -> Any:
    """The JSON value of one line. raises LineError; RecursionError where it is nested deeper than Python reads."""
    if len(line) > MAX_LINE:
        raise LineError(f"longer than {MAX_LINE} bytes")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise LineError(f"not UTF-8: 0x{line[error.start]:02x} is its byte {error.start + 1}") from None
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_integer, parse_constant=_constant)
    except json.JSONDecodeError as error:
        more = "; a carriage return alone ends no line" if "\r" in text.strip() else ""
        raise LineError(f"not JSON: {error.msg} at column {error.colno}{more}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        ((often, count),) = Counter(name for name, _ in pairs).most_common(1)
        raise LineError(f"the field {often!r:.60} is given {count} times")
    return made


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise LineError(f"a number of {len(text)} digits, where at most {MAX_DIGITS} are read")
    return int(text)


def _constant(name: str) -> Any:
    raise LineError(f"not JSON: {name} is no number of it")
