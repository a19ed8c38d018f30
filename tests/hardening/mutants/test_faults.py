"""Every planted fault can still be planted: its text is there once, it changes what the file does, its tests exist."""

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.hardening.mutants.fault import Fault
from tests.hardening.mutants.faults import AREAS

ROOT = Path(__file__).parents[3]
SLOW = "pytest.mark.slow"
FAULTS = [fault for faults in AREAS.values() for fault in faults]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted_and_changes_the_program(fault):
    right = (ROOT / fault.file).read_text()
    wrong = fault.planted(right)  # raises where the old text is not there exactly once
    assert ast.dump(ast.parse(wrong)) != ast.dump(ast.parse(right))


def test_names_are_unique_and_say_what_a_user_would_get():
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 48
    assert all(re.fullmatch(r"\w+", fault.name) and fault.harm for fault in FAULTS)


def test_the_tests_that_should_notice_are_there():
    for path in sorted({path for fault in FAULTS for path in fault.tests}):
        file, _, name = path.partition("::")
        functions = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text()))
                     if isinstance(node, ast.FunctionDef)}  # fmt: skip
        assert not name or name in functions, path


@functools.cache
def fast_tests(file: str) -> set[str]:
    """The test functions that run where slow tests do not."""
    body = ast.parse((ROOT / file).read_text()).body
    if any(isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
           and SLOW in ast.unparse(node.value) for node in body):  # fmt: skip
        return set()
    return {node.name for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
            and SLOW not in map(ast.unparse, node.decorator_list)}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_fault_has_a_test_that_is_not_slow(fault):
    for path in fault.tests:
        file, _, name = path.partition("::")
        if name in fast_tests(file) or (not name and fast_tests(file)):
            return
    pytest.fail(f"{fault.name}: every test of {', '.join(fault.tests)} is slow, and the runner leaves those out")


@pytest.mark.parametrize(("text", "found"), [("a = 2\n", 0), ("a = 1\nb = 1\n", 2)])
def test_a_text_that_is_gone_or_not_unique_is_refused(text, found):
    fault = Fault("turned", "a.py", " = 1", " = 3", "harm", ("test_a.py",))
    with pytest.raises(ValueError, match=f"old text of turned must occur exactly once in a.py, got {found}"):
        fault.planted(text)
