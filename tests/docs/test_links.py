"""Every relative link of README, CONTRIBUTING and the pages of docs/ leads to a file, and to a heading in it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
# A label may hold code with brackets and run over the end of a line.
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
DEFINITION = re.compile(r"^\[[^\]]+\]: (\S+)$", flags=re.MULTILINE)
HEADING = re.compile(r"^#+ (.*)$", flags=re.MULTILINE)


def targets(text: str) -> list[str]:
    """Where a page's links lead, but for other sites."""
    prose = CODE.sub("code", BLOCK.sub("", text))
    found = LINK.findall(prose) + DEFINITION.findall(prose)
    return [target for target in found if not re.match(r"\w+:", target)]


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in links to them: as GitHub makes them."""
    made: set[str] = set()
    for heading in HEADING.findall(BLOCK.sub("", text)):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        made.add(kept.replace(" ", "-"))
    return made


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in targets(page.read_text()):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists():
            broken.append(f"{page.name}: {target}: there is no such file")
        elif anchor and anchor not in anchors(file.read_text()):
            broken.append(f"{page.name}: {target}: there is no such heading")
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_its_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_every_page_is_named_by_the_index():
    named = {(ROOT / "docs" / target).resolve() for target in targets((ROOT / "docs/index.md").read_text())}
    pages = {page for page in PAGES if page.is_relative_to(ROOT / "docs") and page.name != "index.md"}
    assert pages <= named


@pytest.mark.parametrize(
    ("link", "wrong"),
    [
        ("[other](other.md)", ""),
        ("[its part](other.md#what-is-1--2-there)", ""),
        ("[here](#title)", ""),
        ("![a picture\nof two lines](pictures)", ""),
        ("[`code[0]` and `more`](other.md)", ""),
        ("[elsewhere](https://example.org/none.md)", ""),
        ("`[code](none.md)`", ""),
        ("```\n[printed](none.md)\n```", ""),
        ("[other]\n\n[other]: others.md\n\nmore", "others.md: there is no such file"),
        ("[other](others.md)", "others.md: there is no such file"),
        ("![picture](pictures/none.png)", "pictures/none.png: there is no such file"),
        ("[`more[0]`](folder/other.md)", "folder/other.md: there is no such file"),
        ("[its part](other.md#none)", "other.md#none: there is no such heading"),
        ("[its part](other.md#printed)", "other.md#printed: there is no such heading"),
        ("[here](#titles)", "#titles: there is no such heading"),
    ],
)
def test_a_planted_broken_link_is_found(tmp_path, link, wrong):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "other.md").write_text("# Other\n\n```\n# printed\n```\n\n## What is 1 + 2, there?\n")
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\nSee {link} for more.\n" if not link.startswith("```") else f"# Title\n\n{link}\n")
    assert broken_links(page) == ([f"page.md: {wrong}"] if wrong else [])


# Paths and modules of this repository, as prose names them in backticks.
FOLDERS = ("mosld", "mosld_kernels", "benchmarks", "tests", "docs", "configs", "findings")
PATH = re.compile(r"`((?:{})/[\w./-]*)`".format("|".join(FOLDERS)))


def missing_paths(text: str) -> list[str]:
    """What a text names as a file or folder of this repository, and what is not there."""
    prose = LINK.sub("", text)  # a link's target is looked at above; its label may be short
    return [path for path in PATH.findall(prose) if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_it_names_exist(page):
    assert missing_paths(BLOCK.sub("", page.read_text())) == []


def test_a_planted_path_that_is_gone_is_found():
    named = "See `mosld/layers/linear.py`, `tests/docs`, `mosld/linear.py` and `docs/methods.md`; `mosld/` is whole."
    assert missing_paths(named) == ["mosld/linear.py", "docs/methods.md"]
