"""docs/kernels.md tells what the code says and what the committed files hold."""

import json
from pathlib import Path

from benchmarks import compiled
from benchmarks.kernel_model import KernelRow, kernel_lines

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/kernels.md").read_text()


def results(name):
    return json.loads((ROOT / "benchmarks/results" / name).read_text())


def test_the_tile_rows_are_those_of_the_code():
    assert compiled.tile_rows() in PAGE


def test_the_compile_table_is_that_of_the_committed_run():
    written = results("compiled.json")
    assert compiled.summary([compiled.Report(**row) for row in written["kernels"]]) in PAGE
    assert f"Triton {written['triton']}" in PAGE


def test_the_model_is_that_of_the_code_and_of_the_committed_file():
    written = results("kernel_model.json")
    assert "\n".join(kernel_lines([KernelRow(**row) for row in written["kernels"]])) in PAGE
    from benchmarks.kernel_model import Cuts, cuts_of, kernel_table
    from benchmarks.roofline import DEVICES, Problem

    problem = Problem(DEVICES["H200"])
    assert Cuts(**written["cuts"]) == cuts_of(problem, 90, 132)
    assert [row._asdict() for row in kernel_table(problem, Cuts(**written["cuts"]))] == written["kernels"]
