"""How a new adapter starts: B at zero, the rest as each method says, made anew or around a layer that is there."""

import math

import pytest
import torch
from torch import nn

from mosld import MoSLDLinear, presets

D_IN, D_OUT = 400, 300
NAMES = list(presets.PRESETS)


def made(config):
    """The two ways to a layer."""
    fields = vars(config.mixture_of("layer").for_linear_layers)  # of MixLoRA the LoRA beside its blocks
    yield MoSLDLinear(D_IN, D_OUT, **fields).adapter
    yield MoSLDLinear.from_linear(nn.Linear(D_IN, D_OUT), **fields).adapter


def assert_uniform(weight, bound):
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert weight.mean().abs() < 0.1 * bound


@pytest.mark.parametrize("name", NAMES)
def test_b_starts_at_zero_and_a_as_its_method_says(name):
    config = presets.preset(name)
    for adapter in made(config):
        assert (adapter.expert_b.weight == 0).all()
        if name in ("mode", "moelora_medical"):
            assert adapter.shared_a.weight.std().item() == pytest.approx(0.01, rel=0.1)
        else:
            assert_uniform(adapter.shared_a.weight, 1 / math.sqrt(D_IN))
        if adapter.router is not None and name not in ("mor1e", "mtl_lora", "moelora_medical"):
            assert_uniform(adapter.router.weight, 1 / math.sqrt(D_IN))


def test_cores_gates_and_embeddings_start_as_their_method_says():
    for adapter in made(presets.mtl_lora(r=5)):
        assert torch.equal(adapter.mixer.weight, torch.eye(5).expand(8, 5, 5))
    for adapter in made(presets.malora(r=6)):
        assert adapter.mixer.weight.shape == (8, 12, 6)
        assert_uniform(adapter.mixer.weight, 1 / math.sqrt(6))
    for adapter in made(presets.mor1e()):  # half of the softmax's matrix, and half of that
        assert (adapter.router.weight == 0).all() and (adapter.mixer.weight == 0).all()
    for adapter in made(presets.mixlora_conditional()):
        assert_uniform(adapter.mixer.weight, 1 / math.sqrt(D_IN))
    for adapter in made(presets.moelora_medical()):
        assert adapter.tasks.weight.std().item() == pytest.approx(1.0, rel=0.1)
    for adapter in made(presets.mola(router="constant", num_experts=5)):
        assert torch.equal(adapter.router.weight, torch.full((1, 5), 0.2))
