"""Activation checkpointing runs layers again in backward: with the routing, adapter, dropout and scale of their
forward, whatever was set since. The gradients are those without checkpointing."""

import peft
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mosld
from mosld import MoSLDConfig, MoSLDLinear, balance_loss
from mosld.layers.host import all_adapters
from tests.helpers.models import checkpoint_layers, perturb, tiny_llama, token_ids

KINDS = [None, True, False]
NAMES = {None: "no checkpointing", True: "reentrant", False: "not reentrant"}


def adapted(**changes) -> peft.PeftModel:
    settings = {"r": 2, "num_experts": 3, "dropout": 0.0, "target_modules": ["q_proj", "down_proj"], **changes}
    model = peft.get_peft_model(tiny_llama(), MoSLDConfig(**settings))
    perturb(model)
    return model.double().train()


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(actual, expected) -> None:
    assert actual.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


def of_kind(model, kind):
    if kind is not None:
        checkpoint_layers(model.get_base_model(), kind)
    return model


TASKS = dict(router="task", num_tasks=3)


def losses_of_tasks(model, told) -> torch.Tensor:
    """Three tasks on the same tokens, one forward each, and one backward for their sum."""
    total = 0
    for task in range(3):
        total = total + told(model, task)
    return total


def by_setting(model, task):
    mosld.set_routing(model, task_ids=[task] * 3)
    return (task + 1) * model(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss


def by_block(model, task):
    with mosld.routing(model, task_ids=[task] * 3):
        return (task + 1) * model(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss


@pytest.mark.parametrize("told", [by_setting, by_block])
@pytest.mark.parametrize("kind", [True, False], ids=NAMES.get)
def test_a_loss_over_several_tasks(kind, told):
    plain = adapted(**TASKS)
    losses_of_tasks(plain, told).backward()
    expected = gradients(plain)
    model = of_kind(adapted(**TASKS), kind)
    losses_of_tasks(model, told).backward()
    assert_close(gradients(model), expected)


@pytest.mark.parametrize("kind", [True, False], ids=NAMES.get)
def test_backward_in_another_order_than_the_forwards(kind):
    plain, model = adapted(**TASKS), of_kind(adapted(**TASKS), kind)
    for own in (plain, model):
        losses = [by_setting(own, task) for task in range(3)]
        for task in (1, 0, 2):
            losses[task].backward()
    assert_close(gradients(model), gradients(plain))


@pytest.mark.parametrize("kind", [True, False], ids=NAMES.get)
def test_an_adapter_that_is_switched_before_backward(kind):
    results = []
    for own_kind in (None, kind):
        model = of_kind(adapted(), own_kind)
        torch.manual_seed(3)
        model.add_adapter("other", MoSLDConfig(r=2, num_experts=3, dropout=0.0, target_modules=["q_proj", "down_proj"]))
        model.double()
        model.set_adapter("default")
        loss = model(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss
        model.base_model.set_adapter("other")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("default" in name)
        loss.backward()
        results.append({name: grad for name, grad in gradients(model).items() if "default" in name})
    assert_close(results[1], results[0])


@pytest.mark.parametrize("kind", [True, False], ids=NAMES.get)
@pytest.mark.parametrize("keeps_random_state", [True, False])
def test_masks_scale_and_flags_are_those_of_the_forward(kind, keeps_random_state):
    """Also where the checkpoint leaves random numbers alone: the seed of the masks is kept by the mixture."""
    layer = MoSLDLinear(8, 8, r=2, num_experts=3, dropout=0.5).double()
    torch.nn.init.normal_(layer.expert_b.weight)
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        if checkpointed:
            out = checkpoint(layer, x, use_reentrant=kind, preserve_rng_state=keeps_random_state)
        else:
            out = layer(x)
        layer.eval()
        scale, layer.adapter.scale = layer.adapter.scale, 100.0
        torch.rand(5)
        out.square().sum().backward()
        layer.adapter.scale = scale
        layer.train()
        results.append((out.detach(), x.grad.clone(), layer.shared_a.weight.grad.clone()))
        x.grad = None
        layer.zero_grad()
    for plain, own in zip(*results, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("outer", [True, False], ids=NAMES.get)
@pytest.mark.parametrize("inner", [True, False], ids=NAMES.get)
def test_a_checkpoint_inside_a_checkpoint(outer, inner):
    layers = torch.nn.ModuleList(
        [MoSLDLinear(8, 8, r=2, num_experts=3, dropout=0.0, **TASKS) for _ in range(2)]
    ).double()
    perturb(layers)
    x = torch.randn(3, 8, dtype=torch.float64)

    def run(x, checkpoints):
        if not checkpoints:
            return layers[1](layers[0](x))
        return checkpoint(lambda y: layers[1](checkpoint(layers[0], y, use_reentrant=inner)), x, use_reentrant=outer)

    results = []
    for checkpoints in (False, True):
        mosld.set_routing(layers, task_ids=[0, 1, 2])
        first = run(x.requires_grad_(), checkpoints)
        mosld.set_routing(layers, task_ids=[2, 2, 1])
        second = run(x, checkpoints)
        mosld.set_routing(layers, task_ids=[1, 1, 1])
        (first.square().sum() + second.pow(3).sum()).backward()
        results.append(gradients(layers))
    assert_close(results[1], results[0])


@pytest.mark.parametrize("kind", [True, False], ids=NAMES.get)
def test_the_balance_loss_of_several_forwards(kind):
    """Its gradient arrives in the recomputation of the very forward that it belongs to."""
    results = []
    for own_kind in (None, kind):
        model = of_kind(adapted(top_k=1), own_kind)
        total = 0
        for seed in range(3):
            ids = token_ids(seed=seed)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            total = total + loss + (seed + 1) * balance_loss(model)
        total.backward()
        results.append(gradients(model))
    assert_close(results[1], results[0])


@pytest.mark.parametrize("kind", [True, False], ids=NAMES.get)
def test_a_whole_model_in_one_checkpoint(kind):
    """Its recomputation is the forward that it was, and not another one."""
    results = []
    for checkpointed in (False, True):
        model = adapted(top_k=1)
        embeds = model.get_input_embeddings()(token_ids()).detach().requires_grad_()

        def run(x, model=model):
            return model(inputs_embeds=x, use_cache=False).logits

        out = checkpoint(run, embeds, use_reentrant=kind) if checkpointed else run(embeds)
        before = [adapter.last_forward for _, adapter in all_adapters(model)]
        (out.square().mean() + balance_loss(model)).backward()
        assert [adapter.last_forward for _, adapter in all_adapters(model)] == before
        assert all(adapter.router_logits is not None for _, adapter in all_adapters(model))
        results.append(gradients(model) | {"x": embeds.grad})
    assert_close(results[1], results[0])


def test_what_others_give_as_context_still_runs():
    entered = []

    class Counted:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            entered.append(self.name)

        def __exit__(self, *error):
            entered.append(f"{self.name} left")

    layer = MoSLDLinear(4, 4, num_experts=2)
    x = torch.randn(2, 4, requires_grad=True)
    out = checkpoint(layer, x, use_reentrant=False, context_fn=lambda: (Counted("forward"), Counted("again")))
    out.sum().backward()
    assert entered == ["forward", "forward left", "again", "again left"]
    assert [name for name, _ in all_adapters(layer)] == [""]
