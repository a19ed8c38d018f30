"""Each verb is one file, and nothing but the command line reads a command line."""

import ast
from pathlib import Path

import pytest

from mosld.cli.main import VERBS, build_parser

PACKAGE = Path(__file__).parents[2] / "mosld"


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_options_are_read_in_the_folder_of_the_command_line_alone(path):
    """So a new option is a change of its verb's file: everything else takes plain values."""
    assert path.parent.name == "cli" or "argparse" not in imported(path)


def test_verbs_do_not_know_of_each_other():
    files = {Path(str(verb.__file__)) for verb in VERBS.values()}
    assert len(files) == len(VERBS)
    stems = {path.stem for path in files}
    for path in files:
        tree = ast.parse(path.read_text())
        beside = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
        assert not stems & set(beside), path


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_help_and_examples(name):
    help_text = build_parser().format_help()
    assert VERBS[name].HELP in " ".join(help_text.split())
    assert f"mosld {name}" in VERBS[name].EXAMPLES
