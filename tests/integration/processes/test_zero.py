"""Two processes under DeepSpeed's ZeRO take the step that one takes on the whole batch, if DeepSpeed is there."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.processes.case import RATE, alone
from tests.integration.processes.launch import assert_same, both, torchrun

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="DeepSpeed is not installed"),
]
FILE = "adapter_model.safetensors"


@pytest.mark.parametrize("stage", [2, 3])
def test_loss_step_and_saved_adapter_are_those_of_one_process(stage, tmp_path):
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # DeepSpeed calls ninja, once
    torchrun(
        "tests.integration.processes.zero", str(tmp_path), str(stage), timeout_s=600, DS_ACCELERATOR="cpu", PATH=beside
    )
    first, second = both(tmp_path, f"zero{stage}")
    model, expected = alone()
    assert_same({"loss": (first.pop("loss") + second.pop("loss")) / 2}, {"loss": expected["loss"]})
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE).step()
    after = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert_same(
        {name: first[name] - before[name] for name in after}, {name: after[name] - before[name] for name in after}, 1e-4
    )
    assert_same(second, first, share=0)
    model.save_pretrained(str(tmp_path / "alone"))
    assert_same(load_file(tmp_path / f"zero{stage}" / FILE), load_file(tmp_path / "alone" / FILE))
