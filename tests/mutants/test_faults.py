"""Every planted fault can still be planted: its text is where it was, it changes what the file does, its tests are there."""

import ast
import re
from pathlib import Path

import pytest

from tests.mutants.fault import Fault
from tests.mutants.faults import AREAS

ROOT = Path(__file__).parent.parent.parent
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


@pytest.mark.parametrize(("text", "found"), [("a = 2\n", 0), ("a = 1\nb = 1\n", 2)])
def test_a_text_that_is_gone_or_not_unique_is_refused(text, found):
    fault = Fault("turned", "a.py", " = 1", " = 3", "harm", ("test_a.py",))
    with pytest.raises(ValueError, match=f"old text of turned must occur exactly once in a.py, got {found}"):
        fault.planted(text)
