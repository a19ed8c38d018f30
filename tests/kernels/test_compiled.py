"""The kernels compiled for real GPUs, without one: each in a process of its own, since this one's interpret."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def run(*arguments, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.slow
def test_every_launch_of_every_tile_row_compiles_within_its_limits(tmp_path):
    result = run("-m", "benchmarks", "compile", "--out", str(tmp_path / "compiled.json"))
    assert result.returncode == 0, result.stdout + result.stderr
    kernels = json.loads((tmp_path / "compiled.json").read_text())["kernels"]
    seen = {(kernel["kernel"], kernel["arch"]) for kernel in kernels}
    names = ("prepare", "down", "down_sum", "up_backward", "up_backward_sum", "gram", "gram_sum")
    assert seen == {(name, arch) for name in names for arch in (80, 90, 100)}
    for kernel in kernels:
        assert not kernel["faults"], kernel
        if not kernel["rows_aligned"]:
            continue
        assert kernel["stack_bytes"] == 0, kernel
        if kernel["kernel"] in ("down", "up_backward", "gram") and kernel["dtype"] in ("bf16", "fp16"):
            assert kernel["tensor_core_instructions"] and kernel["wide_loads"], kernel


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "registers", "fault"),
    [
        (8, 255, "bytes of shared memory, 101376 at most"),
        (2, 128, "bytes of registers spilled"),
        (2, 32, "does not compile: .*Insufficient registers"),
    ],
)
def test_a_tile_that_does_not_fit_is_reported(stages, registers, fault, tmp_path):
    tile = dict(tokens=128, features=64, columns=128, warps=4, stages=stages, registers=registers)
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps([dict(kernel="up_backward", tile=tile)]))
    result = run("-m", "benchmarks", "compile", "--arch", "90", "--quick", MOSLD_TILES=str(path))
    assert result.returncode == 1, result.stdout + result.stderr
    assert re.search(fault, result.stdout), result.stdout


def test_one_call_launches_no_more_than_it_must():
    result = run("-m", "tests.kernels.launch_counts")
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout)
    assert counts["one variant a bucket"], "another length of the same bucket compiles anew"
    products = {"forward": ["addmm", "addmm_"], "backward": ["mm", "addmm_"]}
    for case in ("wide float32", "wide bfloat16", "wide diagonal"):  # adapters of another dtype cost no launch more
        assert counts[case]["forward"] == ["prepare", "down", *products["forward"]]
        assert counts[case]["backward"] == ["gram", "prepare", "up_backward", "gram", *products["backward"]]
    for case in ("usual float32", "usual bfloat16", "usual diagonal"):  # three sums in planes
        assert counts[case]["backward"] == [
            "gram", "gram_sum", "prepare", "up_backward", "up_backward_sum", "gram", "gram_sum", *products["backward"]
        ]  # fmt: skip
    assert counts["delta"]["forward"] == ["prepare", "down", "mm"]
    assert counts["delta"]["backward"] == ["gram", "prepare", "up_backward", "gram", "mm"]
    assert counts["x needs no gradient"]["backward"] == ["gram", "prepare", "up_backward", "gram"]
    assert counts["x needs no gradient, same dtype"]["backward"] == ["gram", "up_backward", "gram"]
    assert counts["only x"]["backward"] == ["prepare", "up_backward", "mm", "addmm_"]
    assert counts["only B"]["backward"] == ["gram"]
