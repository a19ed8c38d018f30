"""docs/reference/security.md names the tests that keep its guarantees, and its numbers are those of the code."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/reference/security.md").read_text()
LIMITS = re.findall(r"^\| [^|]+ \| (\d+) \| `([\w.]+)\.(\w+)` \|$", PAGE, flags=re.MULTILINE)


@pytest.mark.parametrize(("value", "module", "constant"), LIMITS, ids=[constant for *_, constant in LIMITS])
def test_a_limit_is_that_of_the_code(value, module, constant):
    assert int(value) == getattr(importlib.import_module(module), constant)


def test_every_limit_is_on_the_page():
    named = {f"{module}.{constant}" for _, module, constant in LIMITS}
    there = set()
    for module in {module for _, module, _ in LIMITS}:
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        for name in re.findall(r"^(MAX_\w+) =", source, flags=re.MULTILINE):
            there.add(f"{module}.{name}")
    assert named == there and PAGE.count("| `mosld.") == len(LIMITS)


def test_the_tests_it_names_are_there_and_are_all():
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", PAGE))
    assert all((ROOT / path).is_file() for path in named)
    own = {f"tests/hardening/security/{path.name}" for path in Path(__file__).parent.glob("test_*.py")}
    own.remove("tests/hardening/security/test_docs.py")
    assert own == {path for path in named if path.startswith("tests/hardening/security/")}


def test_the_readme_and_the_guide_lead_there():
    assert "docs/reference/security.md" in (ROOT / "README.md").read_text()
    assert "docs/reference/security.md" in (ROOT / "CONTRIBUTING.md").read_text()
