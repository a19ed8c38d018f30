"""The example of docs/new_mixture.md, run from its text: it computes what it says, trains, saves and is exported."""

import peft
import pytest
import torch

from mosld import MoSLDConfig, MoSLDLinear, balance_loss, export_lora, router_stats
from mosld.mixture.registry import MIXINGS
from tests.helpers.models import perturb, tiny_llama, token_ids
from tests.snippets import blocks

IDS = token_ids()


@pytest.fixture(scope="module")
def config():
    (block,) = blocks("docs/new_mixture.md", "python")
    assert sum(bool(line.strip()) for line in block.text.splitlines()) <= 15
    names: dict = {}
    block.run(names)
    yield names["config"]
    del MIXINGS["merged_core"]


def trained(config):
    model = peft.get_peft_model(tiny_llama(), config)
    torch.manual_seed(1)
    perturb(model)
    return model.eval()


def test_it_computes_the_sum_over_experts_and_its_gradients(config):
    m = MoSLDConfig(**{**config.to_dict(), "r": 3, "dropout": 0.0, "num_experts": 5}).mixture_of("q_proj")
    layer = MoSLDLinear(7, 4, dtype=torch.float64, **vars(m))
    for parameter in layer.adapter.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    a, b, router, cores = (getattr(layer.adapter, n).weight for n in ("shared_a", "expert_b", "router", "mixer"))
    rows = []
    for token in x.view(-1, 7):
        z = a @ token
        weights = (router @ z).exp() / (router @ z).exp().sum()
        h = sum(weights[e] * (cores[e] @ z) for e in range(5))
        rows.append(layer.weight @ token + layer.bias + 16 / 3 * b @ h)
    expected, ours = torch.stack(rows).view(2, 3, 4), layer(x)
    torch.testing.assert_close(ours, expected)
    dout = torch.randn_like(expected)
    trained = [x, *layer.adapter.parameters()]
    torch.testing.assert_close(torch.autograd.grad(ours, trained, dout), torch.autograd.grad(expected, trained, dout))


def test_it_starts_as_the_base_trains_and_saves(config, tmp_path):
    model = peft.get_peft_model(tiny_llama(), config)
    assert torch.equal(model(IDS).logits, tiny_llama()(IDS).logits)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    losses = []
    for _ in range(15):
        loss = model.train()(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1, losses
    with torch.no_grad():
        expected = model.eval()(IDS).logits
        assert balance_loss(model) == 0  # every expert is always chosen
        assert all(own.tokens == IDS.numel() for own in router_stats(model).values())
        model.save_pretrained(str(tmp_path))
        loaded = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
        assert torch.equal(loaded(IDS).logits, expected)


@torch.no_grad()
def test_it_leaves_as_a_lora_with_the_mean_core(config, tmp_path):
    model = trained(config)
    export_lora(model, tmp_path / "lora")
    lora = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "lora")).eval()
    for layer in (m for m in model.modules() if hasattr(m, "mixtures")):
        layer.mixtures["default"].router.weight.zero_()  # so that all gates are the same
    torch.testing.assert_close(lora(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-5)


def test_unregistered_it_is_refused_by_name(config):
    parts = MIXINGS.pop("merged_core")
    try:
        with pytest.raises(ValueError, match="mixing must be one of .*, got 'merged_core'"):
            MoSLDConfig(mixing="merged_core")
    finally:
        MIXINGS["merged_core"] = parts
