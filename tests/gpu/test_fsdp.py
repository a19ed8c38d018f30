"""accelerate's FSDP plugin, which leaves CPUs out: MoSLDTrainer's steps are those of one process that accumulates."""

import os

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.processes.case import trained
from tests.integration.processes.launch import assert_same, torchrun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch finds none"),
]


def test_the_trainers_steps_and_what_it_saves(tmp_path):
    processes = min(torch.cuda.device_count(), 2)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))
    run, alone = tmp_path / "run", tmp_path / "alone"
    run.mkdir()
    torchrun("tests.integration.processes.trainer_fsdp", str(run), processes=processes, CUDA_VISIBLE_DEVICES=visible)
    expected = trained(alone, accumulation=processes)
    assert_same(load_file(run / "trained-0.safetensors"), expected, share=1e-3)
    saved, whole = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, alone))
    assert_same(saved, whole, share=1e-3)
