"""docs/reference/reliability.md says what the tests and the committed long runs say, and the results hold."""

import json

import pytest

from docs.build import reliability
from docs.build.reliability import GUARANTEES, PAGE, ROOT, functions, page

TESTS: set[str] = set()
for own in GUARANTEES.values():
    for guarantee in own:
        TESTS.update(guarantee.tests)


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "python -m docs.build.reliability writes it anew"


@pytest.mark.parametrize("test", sorted(TESTS))
def test_what_keeps_a_guarantee_is_there(test):
    path, _, names = test.partition("::")
    path = ROOT / "tests" / path
    files = [path] if path.is_file() else sorted(path.glob("test_*.py"))
    assert any(functions(file) for file in files), f"no tests in {path}"
    if names:
        assert set(names.split(", ")) <= functions(path)


def test_the_committed_runs_are_as_long_as_asked_and_found_nothing():
    kills, soak, curves, mutants, fuzz = map(reliability.read, ("kills", "soak", "curves", "mutants", "fuzz"))
    assert kills["kills"] >= 50 and kills["runs_equal_to_the_undisturbed"] == kills["runs"] and not kills["faults"]
    assert soak["memory"]["steps"] >= 3000 and len(soak["resuming"]["killed_after"]) >= 10
    assert soak["switching"]["switches"] >= 10_000 and all(soak["checks"].values())
    assert all(row["within"] for row in curves["rows"])
    assert mutants["faults"] >= 40 and mutants["share"] >= 0.95
    assert fuzz["passed"] and fuzz["cases"] == sum(fuzz["per_test"].values())


def test_the_page_follows_its_files(tmp_path, monkeypatch):
    """Other results make another page: none of its figures is written by hand."""
    for path in reliability.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(reliability, "RESULTS", tmp_path)
    assert page() == PAGE.read_text()

    def changed(name: str, change) -> str:
        path = tmp_path / f"{name}.json"
        text = path.read_text()
        data = json.loads(text)
        change(data)
        path.write_text(json.dumps(data))
        try:
            return page()
        finally:
            path.write_text(text)

    assert "98,765 random cases" in changed("fuzz", lambda data: data.update(cases=98_765))
    assert "**Some case failed.**" in changed("fuzz", lambda data: data.update(passed=False))
    survivor = changed("mutants", lambda data: data["rows"][0].update(how="passed"))
    assert f"not caught: {reliability.read('mutants')['rows'][0]['name']} in" in survivor
    assert "SIGKILL 321 times" in changed("kills", lambda data: data.update(kills=321))
    assert "+7.70 %" in changed("soak", lambda data: data["memory"].update(resident_growth=0.077))
    assert "2 of 3 curves of ours" in changed("curves", lambda data: data["rows"][-1].update(within=False))
