"""Training on a GPU: quantised bases, float16 with the gradient scaler, bfloat16 with checkpoints, torch.compile.

What is called here is what the tests of the CPU call, in tests/integration and tests/training; only the device differs.
"""

import pytest
import torch

from tests.integration import test_compiled_checkpoints, test_quantised
from tests.training import test_loss_scaling, test_trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch finds none"),
    pytest.mark.filterwarnings("ignore"),  # the quantisers' and Dynamo's own
]


@pytest.mark.parametrize("name", test_quantised.BASES)
def test_a_quantised_base_trains_saves_and_loads(name, tmp_path):
    if "float8" in name and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("torchao's float8 needs compute capability 8.9")
    test_quantised.trains_saves_and_loads(name, "cuda", tmp_path)


@pytest.mark.parametrize("checkpointing", ["off", "non-reentrant", "reentrant"])
def test_float16_with_the_gradient_scaler(checkpointing):
    test_loss_scaling.assert_same_experts("cuda")
    test_loss_scaling.whole_loss(4, checkpointing, "cuda")
    test_loss_scaling.skipped_steps(4, checkpointing, "cuda")


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_trainer_in_bfloat16_with_checkpoints(tmp_path, accumulation, use_reentrant):
    arguments = test_trainer.checkpointing(use_reentrant)
    test_trainer.bfloat16_penalty(tmp_path, accumulation, use_cpu=False, **arguments)


def test_compiled_by_inductor_with_and_without_checkpoints():
    test_compiled_checkpoints.by_inductor("cuda")
