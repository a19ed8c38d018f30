"""The runner on a repository of two files: what is caught, what survives, what hangs, and what is not run again."""

import json
import os
from functools import partial

import pytest

from tests.hardening.mutants import __main__ as command
from tests.hardening.mutants.fault import Fault
from tests.hardening.mutants.results import Results
from tests.hardening.mutants.runner import Outcome, RunnerError, key, run_faults

PRELOADED = ("pytest",)  # these tests import nothing else
SOURCE = (
    "def double(x):\n    n = 0\n    while n < x:\n        n += 1\n    return n + x\n\n\ndef unused():\n    return 1\n"
)
TESTS = (
    "from toy import numbers\n\n\ndef test_nothing():\n    pass\n\n\n"
    "def test_double():\n    assert numbers.double(3) == 6\n"
)


def fault(name: str, old: str, new: str, excuse: str = "") -> Fault:
    return Fault(name, "toy/numbers.py", old, new, "wrong numbers", ("tests/test_numbers.py",), excuse)


WRONG = fault("wrong", "n + x", "n - x")
ENDLESS = fault("endless", "n += 1", "n += 0")
BROKEN = fault("broken", "return n + x", "return n + x\n\n\nraise MemoryError")
CRASH = fault("crash", "n = 0", "n = 0\n    __import__('os').abort()")
HARMLESS = fault("harmless", "return 1", "return 2")


@pytest.fixture
def repository(tmp_path):
    for folder in ("toy", "tests", ".git", "runs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "toy/__init__.py").touch()
    (tmp_path / "toy/numbers.py").write_text(SOURCE)
    (tmp_path / "tests/test_numbers.py").write_text(TESTS)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["gpu", "slow"]\n')
    return tmp_path


def outcomes(repository, *faults, jobs=1, timeout=60.0):
    seen = {}
    run_faults(repository, faults, jobs, timeout, lambda fault, outcome: seen.update({fault.name: outcome}), PRELOADED)
    return seen


def test_each_fault_is_run_alone_and_told_by_the_test_that_saw_it(repository):
    seen = outcomes(repository, WRONG, HARMLESS, BROKEN, CRASH, jobs=2)
    double = "tests/test_numbers.py::test_double"
    assert {name: own[:2] for name, own in seen.items()} == {
        "wrong": ("failed", double),
        "harmless": ("passed", ""),
        "broken": ("error", "tests/test_numbers.py"),
        "crash": ("crash", "SIGABRT"),
    }
    assert [name for name, own in seen.items() if not own.caught] == ["harmless"]
    assert (repository / "toy/numbers.py").read_text() == SOURCE  # the copy was changed, and it alone
    assert not list(repository.rglob("__pycache__"))


def test_a_hang_is_ended_and_told(repository):
    outcome = outcomes(repository, ENDLESS, timeout=5.0)["endless"]
    assert outcome.how == "hang" and outcome.caught and 5 <= outcome.seconds < 30


def test_slow_tests_do_not_take_part(repository):
    marked = TESTS.replace("def test_double", "@pytest.mark.slow\ndef test_double")
    (repository / "tests/test_numbers.py").write_text(f"import pytest\n{marked}")
    assert not outcomes(repository, WRONG)["wrong"].caught


def test_a_test_that_is_red_without_a_fault_stops_everything(repository):
    (repository / "toy/numbers.py").write_text(SOURCE.replace("n + x", "n + x + 0.5"))
    with pytest.raises(RunnerError, match=r"test_double does not pass without a fault \(failed\)"):
        outcomes(repository, HARMLESS)


def test_tests_that_cannot_be_run_are_no_fault_caught(repository):
    with pytest.raises(RunnerError, match="pytest ended with 4"):
        outcomes(repository, WRONG._replace(tests=("tests/test_gone.py",)))


def test_tests_of_another_copy_are_refused(repository):
    elsewhere = repository / "runs/toy"  # where a fault would never show
    elsewhere.mkdir()
    (elsewhere / "__init__.py").write_text(SOURCE)
    path = f"import sys\nsys.path.insert(0, {str(elsewhere.parent)!r})\nimport toy as numbers\n"
    (repository / "tests/test_numbers.py").write_text(path + TESTS.replace("from toy import numbers\n", ""))
    with pytest.raises(RunnerError, match="the tests imported toy from .*runs/toy"):
        outcomes(repository, WRONG)


@pytest.mark.parametrize("what", ["its file", "its test", "itself"])
def test_the_key_follows_the_fault_its_file_and_its_tests_and_nothing_else(repository, what):
    before, changed = key(repository, WRONG), WRONG
    (repository / "toy/other.py").write_text("x = 1\n")
    assert key(repository, WRONG._replace(harm="other words", excuse="none")) == before
    if what == "its file":
        (repository / "toy/numbers.py").write_text(SOURCE + "\n")
    elif what == "its test":
        (repository / "tests/test_numbers.py").write_text(TESTS + "\n")
    else:
        changed = WRONG._replace(new="n * x")
    assert key(repository, changed) != before


@pytest.fixture
def run(repository, monkeypatch):
    """-> a function that runs the command on the small repository: exit status, the rows, and which faults were run"""
    areas = {"numbers": [WRONG], "others": [HARMLESS]}
    monkeypatch.setattr(command, "ROOT", repository)
    monkeypatch.setattr(command, "AREAS", areas)
    monkeypatch.setattr(command, "run_faults", partial(run_faults, preloaded=PRELOADED))
    output, ran = repository / "results/mutants.json", []
    add = Results.add
    monkeypatch.setattr(
        Results, "add", lambda self, fault, outcome: ran.append(fault.name) or add(self, fault, outcome)
    )

    def run(*words):
        ran.clear()
        status = command.main(["--output", str(output), *words])
        return status, json.loads(output.read_text()), list(ran)

    return run, areas, repository


def test_rows_are_written_kept_and_renewed(run, capsys):
    run, areas, repository = run
    status, report, ran = run()
    assert status == 1 and ran == ["wrong", "harmless"] and (report["caught"], report["faults"]) == (1, 2)
    assert report["share"] == 0.5 and report["areas"]["others"] == {"faults": 1, "caught": 0}
    assert "survived: harmless (toy/numbers.py): wrong numbers. Write a test" in capsys.readouterr().out
    row = report["rows"][0]
    assert (row["how"], row["caught_by"]) == ("failed", "tests/test_numbers.py::test_double") and row["seconds"] > 0
    assert str(repository) not in json.dumps(report) and os.path.expanduser("~") not in json.dumps(report)
    assert run()[2] == [] and run("--only", "harmless")[2] == ["harmless"]
    (repository / "tests/test_numbers.py").write_text(TESTS + "\n\ndef test_one():\n    assert numbers.unused() == 1\n")
    status, report, ran = run()
    assert status == 0 and ran == ["wrong", "harmless"] and report["share"] == 1.0
    areas["others"].clear()
    assert len(run("--only", "wrong")[1]["rows"]) == 1  # a fault that is gone has no row


def test_an_excuse_is_told_and_does_not_lower_what_must_be_caught(run, capsys):
    run, areas, repository = run
    areas["others"][0] = HARMLESS._replace(excuse="Nobody calls it.")
    assert run()[0] == 1  # one of two is fewer than 95 %
    assert "wrong numbers. Nobody calls it." in capsys.readouterr().out
    areas["numbers"] += [WRONG._replace(name=f"wrong_{i}") for i in range(18)]
    results = Results(repository / "results/mutants.json", repository, areas)
    for fault in areas["numbers"][1:]:
        results.add(fault, Outcome("failed", "test", 0.1))
    assert run("--only", "wrong")[0] == 0
    areas["others"][0] = HARMLESS
    assert run("--only", "wrong")[0] == 1


def test_a_name_that_no_fault_has_comes_with_the_nearest(run, capsys):
    with pytest.raises(SystemExit):
        run[0]("--only", "wron")
    assert "no fault is called 'wron', the nearest are wrong" in capsys.readouterr().err
