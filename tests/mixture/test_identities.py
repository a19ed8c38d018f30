"""Where two methods must coincide they do: with each other, with PEFT's LoRA, with a weight."""

import peft
import pytest
import torch
from torch.nn import functional as F

from mosld import MoSLDLinear, import_lora, presets, set_routing
from tests.helpers.models import perturb, tiny_llama, token_ids

D_IN, D_OUT = 7, 5
CLOSE = dict(rtol=1e-10, atol=1e-10)


def layer_of(config, seed=0, **copied):
    """A layer in float64 with random adapter weights, or those in `copied`."""
    torch.manual_seed(seed)
    layer = MoSLDLinear(D_IN, D_OUT, dtype=torch.float64, **vars(config.mixture_of("layer")))
    for name, parameter in layer.named_parameters():
        parameter.data.normal_()
        if name in copied:
            parameter.data.copy_(copied[name])
    return layer


def results(layer, names=("shared_a", "expert_b", "router")):
    """-> y, and the gradients of x and of the adapter's parts"""
    x = torch.randn(3, 4, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = layer(x)
    dout = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return [y, *torch.autograd.grad(y, [x, *(getattr(layer.adapter, name).weight for name in names)], dout)]


def weights_of(layer):
    return {name: parameter.data for name, parameter in layer.named_parameters()}


def test_mosl_with_every_expert_chosen_is_hydralora_without_its_dropout():
    """The first runs in the fused operator, the second in stages, for it may drop."""
    mosl = layer_of(presets.mosl(r=3, alpha=12, num_experts=3, top_k=3))
    hydra = layer_of(presets.hydralora(r=3, alpha=12), **weights_of(mosl)).eval()
    assert mosl.adapter.mixture.uses_fused_operator and not hydra.adapter.mixture.uses_fused_operator
    torch.testing.assert_close(results(mosl), results(hydra), **CLOSE)


@pytest.mark.parametrize("preset", [presets.mola, presets.loramoe])
def test_the_fused_operator_and_the_stages_give_the_same(preset):
    fused = layer_of(preset(r=3, num_experts=4, input_dropout=0.0))
    staged = layer_of(preset(r=3, num_experts=4, input_dropout=0.1), **weights_of(fused)).eval()
    assert fused.adapter.mixture.uses_fused_operator and not staged.adapter.mixture.uses_fused_operator
    torch.testing.assert_close(results(fused), results(staged), **CLOSE)


def test_mode_with_one_group_of_all_ranks_is_hydralora():
    mode = layer_of(presets.mode(r=3, alpha=12, num_experts=3, mixing_options={"group_size": 3}))
    hydra = layer_of(presets.hydralora(r=3, alpha=12, input_dropout=0.0), **weights_of(mode))
    torch.testing.assert_close(results(mode), results(hydra), **CLOSE)


def test_mtl_lora_with_the_identity_and_one_task_is_a_lora_with_the_mixed_b():
    mtl = layer_of(presets.mtl_lora(r=3, num_tasks=1, input_dropout=0.0))
    mtl.adapter.mixer.weight.data.copy_(torch.eye(3))
    set_routing(mtl, task_ids=0)
    share = (mtl.adapter.router.weight[0] / 0.1).softmax(0)
    mixed = (mtl.expert_b.weight.view(D_OUT, 3, 3) * share[None, :, None]).sum(1)
    lora = layer_of(presets.lora(r=3), **{**weights_of(mtl), "adapter.expert_b.weight": mixed.detach()})
    ours, truth = results(mtl), results(lora, ("shared_a", "expert_b"))
    torch.testing.assert_close(ours[:3], truth[:3], **CLOSE)  # y, and the gradients of x and A
    of_experts = ours[3].view(D_OUT, 3, 3)
    for expert in range(3):
        torch.testing.assert_close(of_experts[:, expert], share[expert] * truth[3], **CLOSE)


@pytest.mark.parametrize("mixing", ["expand", "diagonal"])
def test_constant_gates_fold_into_the_weight(mixing):
    config = presets.mola(mixing=mixing, router="constant", r=3, num_experts=4, input_dropout=0.0)
    layer = layer_of(config)
    a, b, gates = layer.shared_a.weight, layer.expert_b.weight.view(D_OUT, 4, 3), layer.router.weight[0]
    a = a.view(4, 3, D_IN) if mixing == "diagonal" else a.expand(4, 3, D_IN)
    folded = layer.weight + 16 / 3 * sum(gates[e] * b[:, e] @ a[e] for e in range(4))
    x = torch.randn(6, D_IN, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, folded, layer.bias), **CLOSE)


def test_one_hot_gates_from_outside_pick_one_expert_exactly():
    """What the others hold, however large, leaves no trace in a bit."""
    layer = layer_of(presets.mola(router="external", r=3, num_experts=4, input_dropout=0.0))
    x, chosen = torch.randn(4, 2, D_IN, dtype=torch.float64), torch.tensor([2, 0, 3, 2])
    set_routing(layer, gates=F.one_hot(chosen, 4).double())
    y = layer(x)
    for row, expert in enumerate(chosen.tolist()):
        a = layer.shared_a.weight.view(4, 3, D_IN)[expert]
        b = layer.expert_b.weight.view(D_OUT, 4, 3)[:, expert]
        torch.testing.assert_close(y[row], F.linear(x[row], layer.weight + 16 / 3 * b @ a, layer.bias), **CLOSE)
    with torch.no_grad():
        layer.shared_a.weight.view(4, 3, D_IN)[1] = 1e100
        layer.expert_b.weight.view(D_OUT, 4, 3)[:, 1] = 1e100
    assert torch.equal(layer(x), y)
    picked = torch.tensor([[0.0, 0, 1, 0]]).double()
    set_routing(layer, gates=picked)
    assert torch.equal(layer(x)[0], y[0])  # one row of gates for all


@pytest.fixture
def lora(tmp_path):
    """-> PEFT's LoRA in float64, trained-looking, and the folder that it is saved in"""
    model = peft.get_peft_model(
        tiny_llama().double(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    )
    torch.manual_seed(1)
    perturb(model)
    model.save_pretrained(str(tmp_path))
    return model, tmp_path


@pytest.mark.parametrize(
    "settings", [dict(num_experts=1, top_k=1), dict(num_experts=1, top_k=1, router="none")], ids=["one expert", "lora"]
)
def test_one_expert_is_pefts_lora_from_the_same_file(lora, settings):
    theirs, folder = lora
    ours, ids = import_lora(tiny_llama().double(), folder, dropout=0.0, **settings), token_ids()
    mixture = next(m for m in ours.modules() if hasattr(m, "mixtures")).mixtures["default"].mixture
    assert mixture.uses_fused_operator == (settings.get("router") != "none")
    logits = []
    for model in (theirs, ours):
        model.train()
        out = model(ids, labels=ids)
        out.loss.backward()
        logits.append(out.logits)
    torch.testing.assert_close(logits[1], logits[0], **CLOSE)
    truth = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    compared = 0
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad and "router" not in name:
            same = name.replace("mosld_shared_a", "lora_A").replace("mosld_expert_b", "lora_B")
            torch.testing.assert_close(parameter.grad, truth[same], **CLOSE)
            compared += 1
    assert compared == len(truth) == 8
