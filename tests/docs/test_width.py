"""No line of Python or Markdown in the repository is wider than 120 columns."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
WIDTH = 120
# What is installed, written by a run, or built; a folder's name, or a path from the root.
LEFT_OUT = {".git", ".venv", "__pycache__", "runs", "dist"}
BUILT = ROOT / "build"
LINK = re.compile(r"!?\[[^\]]*\]\([^)\s]*\)[.,;:]?")


def files(root: Path) -> Iterator[Path]:
    """Every file of Python and Markdown below a folder, but for those of the folders that are left out."""
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if name not in LEFT_OUT and Path(folder, name) != BUILT)
        for name in sorted(names):
            if name.endswith((".py", ".md")):
                yield Path(folder, name)


def wide_lines(path: Path) -> list[str]:
    """file:line and width of every line that is too wide and could be narrower."""
    found = []
    language: str | None = None  # of the fenced block that the line is in
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if path.suffix == ".md" and line.startswith("```"):
            language = line.strip("` ") if language is None else None
        is_printed = language in ("", "text")
        may_be_wide = _is_one_piece(line) or (path.suffix == ".md" and (is_printed or line.startswith("|")))
        if len(line) > WIDTH and not may_be_wide:
            found.append(f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{number}: {len(line)}")
    return found


def _is_one_piece(line: str) -> bool:
    """Whether it is one word or one link, alone or as an item of a list or a word of a command that goes on."""
    content = line.strip().removeprefix("- ").removesuffix(" \\")
    return " " not in content or LINK.fullmatch(content) is not None


def test_no_line_is_wider_than_120_columns():
    found = []
    for path in files(ROOT):
        found += wide_lines(path)
    assert not found, "\n".join(["these lines are too wide:", *found])


def test_the_files_are_those_of_the_repository():
    seen = {str(path.relative_to(ROOT)) for path in files(ROOT)}
    assert seen >= {
        "README.md",
        "docs/index.md",
        "docs/build/methods.py",
        "mosld/__init__.py",
        "tests/docs/test_width.py",
    }
    assert not any("site-packages" in path for path in seen)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("page.md", "# Title\n\n" + "word " * 24 + "words\n", 3),
        ("page.md", "```sh\n" + "mosld train " * 11 + "\n```\n", 2),
        ("page.md", "```\nprinted\n```\n" + "word " * 25, 4),
        ("page.md", "```text\nprinted\n```\n\n```python\n" + "word " * 25 + "\n```\n", 6),
        ("page.md", "See [a page](page.md) " + "word " * 25, 1),
        ("code.py", '"""Short."""\n' + "# " + "word " * 24, 2),
        ("code.py", "| " + "word " * 25, 1),
    ],
)
def test_a_planted_wide_line_is_found(tmp_path, name, text, line):
    planted = tmp_path / "folder" / name
    planted.parent.mkdir()
    planted.write_text(text)
    assert [path for path in files(tmp_path)] == [planted]
    (found,) = wide_lines(planted)
    assert found.startswith(f"{planted}:{line}: 1")


@pytest.mark.parametrize(
    "text",
    [
        "word " * 23 + "words",
        "| " + "cell | " * 30,
        "```\n" + "1.00  " * 30 + "\n```",
        "```python\nimport mosld\n```\n\n```text\n" + "1.00  " * 30 + "\n```",
        "[a page](" + "folder/" * 20 + "page.md).",
        "- https://example.org/" + "folder/" * 20,
        "```sh\nmosld compare --merge \\\n    " + "task_arithmetic," * 10 + " \\\n    --seeds 3\n```",
    ],
)
def test_what_cannot_be_narrower_may_be_wide(tmp_path, text):
    (tmp_path / "page.md").write_text(text + "\n")
    assert wide_lines(tmp_path / "page.md") == []
