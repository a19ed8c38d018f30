"""The example of docs/tutorials/new_router.md, run from its text: what it computes, training, saving and export."""

import copy
import pickle

import peft
import pytest
import torch

from mosld import MoSLDConfig, MoSLDLinear, balance_loss, export_lora, register_router, router_stats, set_routing
from mosld.mixture.routers import ROUTERS
from mosld.presets import preset
from tests.docs.snippets import ROOT, blocks
from tests.helpers.models import perturb, tiny_llama, token_ids

IDS = token_ids()


@pytest.fixture(scope="module")
def config():
    (block,) = blocks("docs/tutorials/new_router.md", "python")
    names: dict = {}
    block.run(names)
    yield names["config"]
    del ROUTERS["cosine_keys"]


def adapted(config):
    return peft.get_peft_model(tiny_llama(), config)


def train(model, steps=10):
    """-> the loss of every step"""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    losses = []
    for _ in range(steps):
        loss = model.train()(IDS, labels=IDS).loss + 1e-3 * balance_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def mixtures(model):
    found = []
    for module in model.modules():
        if hasattr(module, "mixtures"):
            found.append(module.mixtures["default"])
    return found


def by_loop(layer, x, temperature):
    """The layer's output, token by token and expert by expert; top-2 of the cosines over the temperature."""
    a, b, keys = (getattr(layer.adapter, name).weight for name in ("shared_a", "expert_b", "router"))
    rows = []
    for token in x.view(-1, x.shape[-1]):
        cosines = [(key @ token) / (key.norm() * token.norm()) for key in keys]
        best = sorted(range(len(keys)), key=lambda e: -cosines[e].item())[:2]
        weights = {e: (cosines[e] / temperature).exp() for e in best}
        out = layer.weight @ token + layer.bias
        for e, weight in weights.items():
            expert = b.view(len(b), len(keys), -1)[:, e]
            out = out + layer.adapter.scale * weight / sum(weights.values()) * (expert @ (a @ token))
        rows.append(out)
    return torch.stack(rows).view(*x.shape[:-1], -1)


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7)], ids=str)
def test_it_computes_the_cosines_and_their_gradients(config, shape):
    fields = vars(config.mixture_of("q_proj")) | {"r": 3, "dropout": 0.0, "num_experts": 5}
    torch.manual_seed(0)
    layer = MoSLDLinear(7, 4, dtype=torch.float64, **fields)
    for parameter in layer.adapter.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected, ours = by_loop(layer, x, config.temperature), layer(x)
    torch.testing.assert_close(ours, expected.view(ours.shape))
    dout = torch.randn_like(ours)
    trained = [x, *layer.adapter.parameters()]
    gradients = torch.autograd.grad(expected.view(ours.shape), trained, dout)
    torch.testing.assert_close(torch.autograd.grad(ours, trained, dout), gradients)


def test_it_starts_as_the_base_trains_and_saves(config, tmp_path):
    model = adapted(config)
    assert torch.equal(model(IDS).logits, tiny_llama()(IDS).logits)
    keys = [adapter.router.weight.detach().clone() for adapter in mixtures(model)]
    losses = train(model)
    assert losses[-1] < losses[0] - 0.1, losses
    for before, adapter in zip(keys, mixtures(model), strict=True):
        assert not torch.equal(before, adapter.router.weight)
    with torch.no_grad():
        expected = model.eval()(IDS).logits
        model.save_pretrained(str(tmp_path))
        loaded = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
        assert torch.equal(loaded(IDS).logits, expected)
    assert (tmp_path / "README.md").is_file()  # the model card


def test_its_layers_are_copied_and_pickled(config):
    layer = MoSLDLinear(7, 4, **vars(config.mixture_of("q_proj"))).eval()
    perturb(layer.adapter)
    x = torch.randn(3, 7)
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)


@torch.no_grad()
def test_statistics_and_balance_loss_see_its_logits(config):
    model = adapted(config).eval()
    perturb(model)
    model(IDS)
    assert balance_loss(model) > 0
    stats = router_stats(model)
    assert len(stats) == len(mixtures(model))
    for own, adapter in zip(stats.values(), mixtures(model), strict=True):
        assert own.tokens == IDS.numel()
        chosen = adapter.router_logits.flatten(0, 1).topk(2).indices.flatten().bincount(minlength=4)
        torch.testing.assert_close(own.load, chosen / chosen.sum())


@pytest.mark.parametrize("gates", ["uniform", "calibrated"])
@torch.no_grad()
def test_an_exported_lora_is_the_mixture_with_these_gates(config, tmp_path, gates):
    model = adapted(config).eval()
    perturb(model)
    given = "uniform" if gates == "uniform" else [{"input_ids": IDS}]
    fixed = export_lora(model, tmp_path / "lora", gates=given)
    if gates == "calibrated":
        for own in fixed.values():
            assert own.tokens == IDS.numel() and own.update_error > 0 and sum(own.gates) == pytest.approx(1)
    lora = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "lora")).eval()
    external = adapted(MoSLDConfig(router="external", num_experts=4, target_modules=["q_proj"])).eval()
    for ours, theirs in zip(mixtures(model), mixtures(external), strict=True):
        theirs.shared_a.load_state_dict(ours.shared_a.state_dict())
        theirs.expert_b.load_state_dict(ours.expert_b.state_dict())
    set_routing(external, gates={f"base_model.model.{name}": torch.tensor(own.gates) for name, own in fixed.items()})
    torch.testing.assert_close(lora(IDS).logits, external(IDS).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_mean_gates_of_a_calibration_are_those_of_the_forward(config, tmp_path):
    model = adapted(config).eval()
    perturb(model)
    fixed = export_lora(model, tmp_path / "lora", gates=[{"input_ids": IDS}])
    for own, adapter in zip(fixed.values(), mixtures(model), strict=True):
        values, chosen = adapter.router_logits.flatten(0, 1).topk(2)
        gates = torch.zeros(IDS.numel(), 4).scatter(1, chosen, values.softmax(-1))
        torch.testing.assert_close(torch.tensor(own.gates), gates.mean(0))


def test_a_name_that_is_taken_or_unknown_is_refused(config):
    with pytest.raises(ValueError, match="router 'token' is registered already"):
        register_router("token", description="")(lambda x, z, weight, adapter: x)
    with pytest.raises(ValueError, match="router must be one of .*cosine_keys, got 'cosines'"):
        preset("mosld", router="cosines")


def test_no_file_of_the_library_knows_it():
    for package in ("mosld", "mosld_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            assert '"cosine_keys"' not in path.read_text(), path


def test_no_file_but_its_own_asks_for_a_router_by_name():
    asked = ('router == "', 'router != "', "router in (", "router not in (")
    for path in (ROOT / "mosld").rglob("*.py"):
        for question in asked:
            assert question not in path.read_text(), path
