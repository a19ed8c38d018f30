"""`mosld train` under torchrun: one run in one folder, written by the first process alone."""

import json
import os
import re

import pytest
from safetensors.torch import load_file

from tests.integration.processes.launch import ROOT, torchrun

# Python imports sitecustomize before anything else. This one notes what the second process writes into the run's
# folder.
LISTENER = """
import os, sys

def listen(event, arguments):
    writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        if str(arguments[0]).startswith(os.environ["RUN_FOLDER"]):
            print("written by", os.environ["RANK"], event, arguments[0], file=sys.stderr)

if "RANK" in os.environ:
    sys.addaudithook(listen)
"""


@pytest.mark.slow
def test_two_processes_train_one_model_and_the_first_alone_writes(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(LISTENER)
    run = tmp_path / "run"
    words = ["mosld", "train", "--quick", "--no-lora", "--output", str(run), "--max_steps", "3", "--logging_steps", "1"]
    done = torchrun(*words, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}", RUN_FOLDER=str(run))
    writes = re.findall(r"written by (\d) \S+ (.*)", done.stderr)
    seen = {rank: {path for by, path in writes if by == rank} for rank in "01"}
    # In a checkpoint, which is gone at the end, every process keeps the state of its random numbers.
    assert not {path for path in seen["1"] if "/checkpoints" not in path}
    assert any(path.startswith(str(run / ".results.json.")) for path in seen["0"])
    results = json.loads((run / "results.json").read_text())
    assert len(results["tasks"]) == 6 and [step for step, _ in results["methods"]["mosld"]["loss"]] == [1, 2, 3]
    assert done.stdout.count("accuracy in percent") == 1
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    assert any((tensor != 0).any() for name, tensor in adapter.items() if "expert_b" in name)
