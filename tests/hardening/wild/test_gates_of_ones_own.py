"""A mixing with a gate function of its own: load, gates and balance loss are those of the gates that were used."""

import peft
import pytest
import torch
from torch import nn

from mosld import MoSLDConfig, MoSLDLinear, balance_loss, register_mixing, router_stats
from mosld.mixture import MIXINGS
from tests.helpers.models import perturb, tiny_llama, token_ids


@pytest.fixture
def thresholds():
    """An expert counts where its probability is above one over their number, by that probability."""

    def gate(logits, adapter):
        probability = logits.softmax(-1)
        return torch.where(probability > 1 / probability.shape[-1], probability, 0.0)

    @register_mixing("above_even", down=lambda m: m.r, up=lambda m: m.num_experts * m.r, gate=gate, per_expert=True)
    def above_even(z, gates, mixer):
        return (gates.unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2)

    yield "above_even"
    MIXINGS.pop("above_even")


def test_statistics_and_loss_are_those_of_the_gates_that_were_used(thresholds):
    torch.manual_seed(0)
    layer = MoSLDLinear(6, 5, r=2, num_experts=4, mixing=thresholds, dropout=0.0)
    with torch.no_grad():
        layer.router.weight.normal_(std=2.0)
        layer.router.weight[3] = layer.router.weight[2] - 10 * torch.eye(6)[0]  # hardly ever above
    x = torch.randn(3, 7, 6)
    x[..., 0] = x[..., 0].abs() + 1
    layer(x)
    mask = torch.ones(3, 7)
    mask[1, 4:] = 0
    load, gates, probability, count = [torch.zeros(4).double() for _ in range(3)] + [0]
    for token, real in zip(x.flatten(0, 1).double(), mask.flatten(), strict=True):
        if not real:
            continue
        chances = (layer.router.weight.detach().double() @ token).softmax(0)
        used = torch.where(chances > 0.25, chances, 0.0)
        load, gates, probability, count = load + (used > 0), gates + used, probability + chances, count + 1
    stats = router_stats(layer, mask)[""]
    torch.testing.assert_close(stats.load.double(), load / load.sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.gates.double(), gates / count, rtol=1e-5, atol=1e-6)
    assert stats.dead == [3] and stats.tokens == count == 18
    expected = 4 * (load / load.sum() * probability / count).sum()
    loss = balance_loss(layer, mask)
    assert loss.item() == pytest.approx(float(expected), rel=1e-5) and loss.item() > 0
    loss.backward()
    assert layer.router.weight.grad.any()


@pytest.mark.parametrize("renormalise", [True, False])
def test_gates_of_blocks_are_those_that_were_used(renormalise):
    """Without renormalising (the Switch Transformer's router) a token's gates add up to less than one."""
    config = MoSLDConfig(
        r=2, num_experts=4, top_k=2, mixing="block", mixing_options={"renormalise": renormalise}, dropout=0.0,
        target_modules=["mlp"],
    )  # fmt: skip
    model = peft.get_peft_model(tiny_llama(), config)
    perturb(model)
    seen = {}
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            module.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: (module, args[0])}))
    with torch.no_grad():
        model(token_ids())
    stats = router_stats(model)
    assert len(seen) == len(stats) == 2
    for name, (layer, x) in seen.items():
        router = layer.mixtures["default"].router.weight.detach().double()
        gates, load = torch.zeros(4).double(), torch.zeros(4).double()
        for token in x.flatten(0, 1).double():
            chances = (router @ token).softmax(0)
            chosen = chances.argsort(descending=True)[:2]
            gates[chosen] += chances[chosen] / (chances[chosen].sum() if renormalise else 1)
            load[chosen] += 1
        torch.testing.assert_close(stats[name].gates.double(), gates / x[..., 0].numel(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats[name].load.double(), load / load.sum(), rtol=1e-5, atol=1e-6)


def test_gates_of_another_form_tell_nothing_of_a_load():
    @register_mixing(
        "pairs", down=lambda m: m.r, up=lambda m: m.r, gate=lambda logits, adapter: logits.softmax(-1)[..., :2],
        per_expert=True,
    )  # fmt: skip
    def pairs(z, gates, mixer):
        return z * gates.sum(-1, keepdim=True)

    try:
        layer = MoSLDLinear(6, 5, r=2, num_experts=4, mixing="pairs")
        layer(torch.randn(3, 6))
        with pytest.raises(RuntimeError, match="no MoSLD layer has run yet"):
            router_stats(layer)
        assert isinstance(layer, nn.Linear)
    finally:
        MIXINGS.pop("pairs")
