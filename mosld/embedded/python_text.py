"""The texts that ship with Python, and which of them are held out for tests.

characters()   every named character of `unicodedata`, with its Unicode block
docstrings()   every docstring of the standard library's sources, with what it documents and its file
held_out(key)  whether a block, a file or a text belongs to the test side
"""

import ast
import bisect
import hashlib
import re
import sys
import sysconfig
import unicodedata
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

# Of 0 to 299 the salt that leaves the tasks the most labels on both sides; no accuracy was looked at.
SALT = 132
TEST_SHARE = 5  # one key in five is held out

KINDS = {
    ast.Module: "module",
    ast.ClassDef: "class",
    ast.FunctionDef: "function",
    ast.AsyncFunctionDef: "function",
}
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
NUMBERED_NAME = re.compile(r"-[0-9A-F]{3,6}$|^HANGUL SYLLABLE|^VARIATION SELECTOR")  # names that say nothing

# First code points of the Unicode blocks up to Unicode 18 (Blocks.txt). Python knows no blocks.
BLOCK_STARTS = """
0 80 100 180 250 2B0 300 370 400 500 530 590 600 700 750 780 7C0 800 840 860 870 8A0 900 980 A00 A80 B00 B80
C00 C80 D00 D80 E00 E80 F00 1000 10A0 1100 1200 1380 13A0 1400 1680 16A0 1700 1720 1740 1760 1780 1800 18B0
1900 1950 1980 19E0 1A00 1A20 1AB0 1B00 1B80 1BC0 1C00 1C50 1C80 1C90 1CC0 1CD0 1D00 1D80 1DC0 1E00 1F00
2000 2070 20A0 20D0 2100 2150 2190 2200 2300 2400 2440 2460 2500 2580 25A0 2600 2700 27C0 27F0 2800 2900
2980 2A00 2B00 2C00 2C60 2C80 2D00 2D30 2D80 2DE0 2E00 2E80 2F00 2FF0 3000 3040 30A0 3100 3130 3190 31A0
31C0 31F0 3200 3300 3400 4DC0 4E00 A000 A490 A4D0 A500 A640 A6A0 A700 A720 A800 A830 A840 A880 A8E0 A900
A930 A960 A980 A9E0 AA00 AA60 AA80 AAE0 AB00 AB30 AB70 ABC0 AC00 D7B0 D800 DB80 DC00 E000 F900 FB00 FB50
FE00 FE10 FE20 FE30 FE50 FE70 FF00 FFF0 10000 10080 10100 10140 10190 101D0 10280 102A0 102E0 10300 10330
10350 10380 103A0 10400 10450 10480 104B0 10500 10530 10570 105C0 10600 10780 10800 10840 10860 10880 108E0
10900 10920 10940 10980 109A0 10A00 10A60 10A80 10AC0 10B00 10B40 10B60 10B80 10C00 10C80 10D00 10D40 10E60
10E80 10EC0 10F00 10F30 10F70 10FB0 10FE0 11000 11080 110D0 11100 11150 11180 111E0 11200 11280 112B0 11300
11380 11400 11480 11580 11600 11660 11680 116D0 11700 11800 118A0 11900 119A0 11A00 11A50 11AB0 11AC0 11B00
11B60 11BC0 11C00 11C70 11D00 11D60 11DB0 11DF0 11EE0 11F00 11FB0 11FC0 12000 12400 12480 12550 12F90 13000
13430 13460 14400 16100 16800 16A40 16A70 16AD0 16B00 16D40 16E40 16EA0 16F00 16FE0 17000 18800 18B00 18D00
18D80 18E00 191A0 1AFF0 1B000 1B100 1B130 1B170 1BC00 1BCA0 1CC00 1CEC0 1CF00 1D000 1D100 1D200 1D250 1D2C0
1D2E0 1D300 1D360 1D400 1D800 1DB00 1DF00 1E000 1E030 1E100 1E290 1E2C0 1E4D0 1E5D0 1E6C0 1E7E0 1E800 1E900
1EC70 1ED00 1EE00 1F000 1F030 1F0A0 1F100 1F200 1F300 1F600 1F650 1F680 1F700 1F780 1F800 1F900 1FA00 1FA70
1FB00 20000 2A700 2B740 2B820 2CEB0 2EBF0 2F800 30000 31350 323B0 3D000 E0000
"""


class Character(NamedTuple):
    """A named character and the Unicode block it is in, given by the block's first code point ("0370")."""

    char: str
    name: str
    block: str


class Docstring(NamedTuple):
    """A standard-library docstring, what it documents and the source file it stands in ("json/decoder.py")."""

    text: str
    kind: str
    file: str


def held_out(key: str) -> bool:
    """Whether a block, a file or a text is on the test side. `hash()` would change from process to process."""
    return int.from_bytes(hashlib.sha256(f"{SALT}/{key}".encode()).digest()[:8], "big") % TEST_SHARE == 0


@cache
def characters() -> list[Character]:
    """All characters with a telling name, by code point."""
    starts = [int(start, 16) for start in BLOCK_STARTS.split()]
    found = []
    for code in range(sys.maxunicode + 1):
        name = unicodedata.name(chr(code), "")
        if name and not NUMBERED_NAME.search(name):
            found.append(Character(chr(code), name, f"{starts[bisect.bisect(starts, code) - 1]:04X}"))
    return found


@cache
def docstrings() -> list[Docstring]:
    """All docstrings of the standard library's sources, read without importing them, by file and line."""
    library = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(library.rglob("*.py")):
        file = path.relative_to(library)
        if not SKIPPED_FOLDERS.intersection(file.parts):
            found += [Docstring(text, kind, file.as_posix()) for text, kind in _parse(path)]
    return found


def _parse(path: Path) -> list[tuple[str, str]]:
    """The docstrings of one source file, each with its kind; none where the file cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Warning)  # about the library's own code
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return []
    found: list[tuple[str, str]] = []
    waiting: list[tuple[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, str]] = [(tree, "module")]
    while waiting:
        node, kind = waiting.pop()
        if text := ast.get_docstring(node):
            found.append((text, kind))
        for child in reversed(node.body):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                method = kind == "class" and not isinstance(child, ast.ClassDef)
                waiting.append((child, "method" if method else KINDS[type(child)]))
    return found


def first_sentence(docstring: str) -> str:
    """The first paragraph up to its first full stop, on one line."""
    paragraph = " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
    sentence = re.match(r".+?[.!?](?=\s|$)", paragraph)
    return sentence.group() if sentence else paragraph
