"""docs/kernels.md tells what the code says and what the committed files hold."""

import json
from pathlib import Path

from benchmarks.compile import run as compiled
from benchmarks.compile.machine_code import Report
from benchmarks.model.kernels import KernelRow, kernel_lines

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/kernels.md").read_text()


def results(name):
    return json.loads((ROOT / "benchmarks/results" / name).read_text())


def test_the_tile_rows_are_those_of_the_code():
    assert compiled.tile_rows() in PAGE


def test_the_compile_table_is_that_of_the_committed_run():
    written = results("compiled.json")
    assert compiled.summary([Report(**row) for row in written["kernels"]]) in PAGE
    assert f"Triton {written['triton']}" in PAGE


def test_the_model_is_that_of_the_code_and_of_the_committed_file():
    written = results("kernel_model.json")
    assert "\n".join(kernel_lines([KernelRow(**row) for row in written["kernels"]])) in PAGE
    from benchmarks.model.kernels import Cuts, cuts_of, kernel_table
    from benchmarks.model.methods import DEVICES, Problem

    problem = Problem(DEVICES["H200"])
    assert Cuts(**written["cuts"]) == cuts_of(problem, 90, 132)
    assert [row._asdict() for row in kernel_table(problem, Cuts(**written["cuts"]))] == written["kernels"]


def test_the_readme_gives_the_models_figures_as_a_model():
    methods = {row["method"]: row["model_both_percent"] for row in results("kernel_model.json")["methods"]}
    kernels = [row for row in results("kernel_model.json")["kernels"] if not row["kernel"].startswith("base")]
    whole = sum(row["model_us"]["H200"] for row in kernels) / 2 / results("kernel_model.json")["base_us"]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"{100 * whole:.1f} % with everything the kernels move" in text
    assert f"costs {methods['ours']:.1f} % over the frozen one on an H200" in text
    assert f"PEFT's LoRA with dropout {methods['PEFT LoRA, eager']:.0f} %" in text
    assert "not a measurement" in text and "Not measured on a GPU." in text


def test_the_cost_of_a_call_is_that_of_the_committed_run():
    calls = {row["name"]: f"{row['median_us']:.0f}" for row in results("calls.json")["calls"]}
    text = " ".join((ROOT / "docs/decisions.md").read_text().split())
    ways = [
        [calls[f"{way}, {step}"] for way in ("autograd function", "registered operator")]
        for step in ("forward", "both")
    ]
    assert "{} us forward against {} us through the registered operator".format(*ways[0]) in text
    assert "{} against {} us with backward".format(*ways[1]) in text
