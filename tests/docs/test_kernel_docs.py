"""docs/reference/kernels.md tells what the code says and what the committed files hold."""

import json
from pathlib import Path

from benchmarks.compile import run as compiled
from benchmarks.compile.machine_code import Report
from benchmarks.model.kernels import Cuts, KernelRow, cuts_of, kernel_lines, kernel_table
from benchmarks.model.methods import DEVICES, Problem

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs/reference/kernels.md").read_text()


def results(name):
    return json.loads((ROOT / "benchmarks/results" / name).read_text())


def test_the_tile_rows_are_those_of_the_code():
    assert compiled.tile_rows() in PAGE


def test_the_compile_table_is_that_of_the_committed_run():
    written = results("compiled.json")
    reports = [Report(**row) for row in written["kernels"]]
    assert compiled.summary(reports) in PAGE
    assert f"Triton {written['triton']}" in PAGE


def test_the_model_is_that_of_the_code_and_of_the_committed_file():
    written = results("kernel_model.json")
    rows = [KernelRow(**row) for row in written["kernels"]]
    assert "\n".join(kernel_lines(rows)) in PAGE
    problem, cuts = Problem(DEVICES["H200"]), Cuts(**written["cuts"])
    assert cuts == cuts_of(problem, 90, 132)
    assert kernel_table(problem, cuts) == rows


def test_the_readme_gives_the_models_figures_as_a_model():
    written = results("kernel_model.json")
    methods = {row["method"]: row["model_both_percent"] for row in written["methods"]}
    times = [row["model_us"]["H200"] for row in written["kernels"] if not row["kernel"].startswith("base")]
    whole = sum(times) / 2 / written["base_us"]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"{100 * whole:.1f} % with everything the kernels move" in text
    assert f"costs {methods['ours']:.1f} % over the frozen one on an H200" in text
    assert f"PEFT's LoRA with dropout {methods['PEFT LoRA, eager']:.0f} %" in text
    assert "not a measurement" in text and "Not measured on a GPU." in text


def test_the_cost_of_a_call_is_that_of_the_committed_run():
    calls = {row["name"]: f"{row['median_us']:.0f}" for row in results("calls.json")["calls"]}
    text = " ".join((ROOT / "docs/design/decisions.md").read_text().split())
    forward = (calls["autograd function, forward"], calls["registered operator, forward"])
    both = (calls["autograd function, both"], calls["registered operator, both"])
    assert "{} us forward against {} us through the registered operator".format(*forward) in text
    assert "{} against {} us with backward".format(*both) in text
