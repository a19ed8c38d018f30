"""What the README and the pages of docs/ show a reader to type: fenced blocks, and commands in these and in the text.

`fault` says what is wrong with a command.
"""

import importlib.util
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from torch.distributed import run as torchrun

from benchmarks import __main__ as benchmarks
from mosld.cli.main import build_parser
from mosld.training.arguments import training_arguments

ROOT = Path(__file__).parent.parent.parent
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^ *(?:```|~~~)", flags=re.MULTILINE)
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
# Commands that are neither ours nor torchrun's: none yet. The first word, and why it cannot be checked here.
OTHERS: dict[str, str] = {}


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def run(self, names: dict) -> None:
        """As a reader does who pastes it where `names` are known; what it defines is added to them."""
        exec(compile("\n" * self.line + self.text, self.page, "exec"), names)

    def commands(self) -> list[list[str]]:
        """The words of every line, without comments and with the lines joined that a backslash continues."""
        found = []
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                found.append(words)
        return found


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page from top to bottom, of one language or of all."""
    text = text_of(page)
    found = []
    for match in BLOCK.finditer(text):
        line = text[: match.start()].count("\n") + 1
        if language in (None, match[1]):
            found.append(Block(page, line, match[1], match[2]))
    return found


def mentioned(page: str) -> list[list[str]]:
    """The words of the commands that the text itself names, in backquotes: `make x` and `python -m x`."""
    outside = BLOCK.sub("", text_of(page))
    found = []
    for code in re.findall(r"`([^`]+)`", outside):
        command = " ".join(code.split())
        if re.match(r"(?:\w+=\S+ )*(?:make|(?:\S*/)?python -m) ", command):
            found.append(shlex.split(command))
    return found


def fault(words: list[str]) -> str:
    """What is wrong with a command, as far as one can tell without running it."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # of the environment
        words = words[1:]
    for word in words:
        if _names_a_file_here(word) and not (ROOT / word).exists():
            return f"{word} does not exist"
    try:
        return _fault(words)
    except SystemExit as left:
        return f"the parser refuses {' '.join(words)}" if left.code else ""
    except ValueError as error:
        return str(error)


def _names_a_file_here(word: str) -> bool:
    return re.match(r"(?:tests|docs|benchmarks|configs|mosld|mosld_kernels)/", word) is not None


def _fault(words: list[str]) -> str:
    program, *rest = words
    program = program.removeprefix(".venv/bin/")  # which make writes
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        unknown = [word for word in rest if not re.search(rf"^{re.escape(word)}:", makefile, flags=re.MULTILINE)]
        return f"the Makefile has no {', '.join(unknown)}" if unknown else ""
    if program == "torchrun":
        own = torchrun.get_args_parser().parse_args(rest)
        return _fault(["python", "-m", own.training_script, *own.training_script_args]) if own.module else "no module"
    if program == "python" and rest[:1] == ["-m"]:
        return _module(rest[1], rest[2:])
    if program == "mosld":
        return _mosld(rest)
    return "" if program in OTHERS else f"{program} is no command that is known here"


def _module(name: str, words: list[str]) -> str:
    if name == "mosld":
        return _mosld(words)
    if name == "benchmarks":
        benchmarks._parser().parse_args(words)
        return ""
    found = importlib.util.find_spec(name)
    if found is not None and found.submodule_search_locations:
        found = importlib.util.find_spec(f"{name}.__main__")
    return "" if found else f"there is no module {name} to run"


def _mosld(words: list[str]) -> str:
    """`...` is what the reader puts in himself."""
    if words[-1:] == ["..."]:
        words = words[:-1]
    if words == ["train"]:
        return ""
    options, more = build_parser().parse_known_args(words)
    if more and options.command in ("train", "compare"):
        training_arguments(more, Path("runs"))
        return ""
    return f"mosld {options.command} has no {' '.join(more)}" if more else ""
