"""Sharded by FSDP2, two processes compute what one does on the whole batch, and save the same adapter."""

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file

from tests.integration.processes.case import RATE, adapted, alone, halves_alone, trained
from tests.integration.processes.launch import assert_same, both, torchrun

pytestmark = pytest.mark.slow
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    torchrun("tests.integration.processes.fsdp", str(folder))
    return folder


def test_loss_and_gradients_are_those_of_one_process(run):
    first, second = both(run, "float32")
    assert_same(first, alone()[1])
    assert_same(second, first, share=0)


@pytest.mark.parametrize("way", ["float32", "mixed", "half-base"])
def test_the_adapter_saved_from_the_shards_is_the_same_file(run, way, tmp_path):
    adapted().save_pretrained(str(tmp_path))
    assert (run / f"{way}-before" / FILE).read_bytes() == (tmp_path / FILE).read_bytes()
    assert PeftConfig.from_pretrained(run / f"{way}-before") == PeftConfig.from_pretrained(tmp_path)


def test_the_adapter_saved_after_a_step_is_that_of_one_process(run, tmp_path):
    model, _ = alone()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE).step()
    model.save_pretrained(str(tmp_path))
    assert_same(load_file(run / "float32-after" / FILE), load_file(tmp_path / FILE))


@pytest.mark.parametrize(("way", "base"), [("mixed", torch.float32), ("half-base", torch.bfloat16)])
def test_mixed_precision_computes_in_bfloat16_and_keeps_float32_gradients(run, way, base):
    first, second = both(run, way)
    assert {tensor.dtype for tensor in first.values()} == {torch.float32}
    assert_same(first, halves_alone(base))
    assert_same(second, first, share=0)


def test_the_trainers_steps_and_its_file_are_those_of_one_process_that_accumulates(run, tmp_path):
    first, second = both(run, "trained")
    assert_same(first, trained(tmp_path, accumulation=2))
    assert_same(second, first, share=0)
    assert_same(load_file(run / "trainer" / "adapter" / FILE), load_file(tmp_path / "adapter" / FILE))


def test_an_adapters_weight_that_is_sharded_by_itself_is_refused(run):
    for rank in (0, 1):
        assert "apply fully_shard to the transformer block" in (run / f"refused-{rank}.txt").read_text()
