"""What is installed is what is declared, in known versions: `make audit` looks up their known vulnerabilities."""

import re
from pathlib import Path

import pytest

from tests.test_architecture import third_parties

tomllib = pytest.importorskip("tomllib", reason="it is in the standard library from Python 3.11 on")
ROOT = Path(__file__).parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
PACKAGES = ("mosld", "mosld_kernels")


def name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("-", "_")


def pinned() -> set[str]:
    lines = [line for line in CONSTRAINTS.splitlines() if line and not line.startswith("#")]
    assert all(re.match(r"[\w-]+==[\w.]+( *;.*)?$", line) for line in lines), lines
    return {name(line) for line in lines}


def excused() -> set[str]:
    (listed,) = re.findall(r"^# Not pinned: ([^.]+)\. \w", CONSTRAINTS, flags=re.MULTILINE)
    return {name(one) for one in listed.split(", ")}


def test_every_dependency_has_a_tested_version_or_a_reason():
    runs = {name(one) for one in PROJECT["dependencies"]}
    optional = {name(one) for extra in PROJECT["optional-dependencies"].values() for one in extra}
    assert runs <= pinned()
    assert optional <= pinned() | excused()
    assert pinned() | excused() <= runs | optional and not pinned() & excused()  # none that is gone


def test_what_the_packages_import_is_declared():
    found = {
        own
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for own in third_parties(path.read_text())
    }
    declared = {name(one) for one in PROJECT["dependencies"]}
    assert found - {*PACKAGES} == declared  # each of them is imported under its own name


def test_the_audit_is_a_command_of_its_own():
    makefile = (ROOT / "Makefile").read_text()
    (commands,) = re.findall(r"^audit:.*\n((?:\t.*\n)+)", makefile, flags=re.MULTILINE)
    assert "pip-audit --requirement" in commands
    assert "audit" not in (ROOT / ".ci" / "run").read_text()
