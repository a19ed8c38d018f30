"""Every preset through PEFT on a small LLaMA: starts as the base, trains, saves, compiles, leaves others' tokens."""

import copy
import pickle

import peft
import pytest
import torch

from mosld import balance_loss, presets, router_stats, set_routing
from tests.helpers.models import perturb, tiny_llama, token_ids

NAMES = list(presets.PRESETS)
SMALL = {  # else the preset's own values
    "mixlora": {"r": 2, "target_modules": ["q_proj", "mlp"]},
    "mixlora_conditional": {"r": 2, "num_experts": 6},
    "malora": {"mixing_options": {"r_up": 5}},
}
BY_SEQUENCE = ["mixlora_conditional"]
BY_TASK = ["moelora_medical", "mtl_lora"]
BALANCING = ["mosld", "mosl", "mosld_up", "hydralora", "mola", "loramoe", "moelora", "malora", "mixlora"]
DENSE = ["hydralora", "loramoe"]  # every expert is chosen, so there is nothing to balance
IDS, TASKS = token_ids(rows=3, length=7), torch.tensor([5, 0, 3])
CLOSE = dict(rtol=1e-4, atol=1e-5)


def adapted(name, trained=True, **changes):
    config = presets.preset(name, **{"target_modules": ["q_proj", "down_proj"], **SMALL.get(name, {}), **changes})
    torch.manual_seed(2)
    model = peft.get_peft_model(tiny_llama(), config)
    if trained:
        torch.manual_seed(1)
        perturb(model)
        for parameter_name, parameter in model.named_parameters():
            if name == "mor1e" and "mixer" in parameter_name:
                parameter.data.mul_(0.05)  # a hundred times that goes into a sigmoid
    return route(name, model).eval()


def route(name, model, tasks=TASKS):
    if name in BY_TASK:
        set_routing(model, task_ids=tasks)
    return model


def test_every_preset_is_here():
    assert set(BY_SEQUENCE) | set(BY_TASK) | set(BALANCING) | {"lora", "mode", "mor1e"} == set(NAMES)
    for name in NAMES:
        assert getattr(presets, name) is presets.PRESETS[name]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_it_starts_as_the_base_bit_for_bit_and_trains_the_adapter_alone(name):
    expected, model = tiny_llama()(IDS).logits, adapted(name, trained=False)
    assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model.train()(IDS).logits, expected)  # dropout has nothing to scale yet
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".mosld_" in n for n in trained)
    layers, mixture = 2, model.peft_config["default"].mixture_of("layer")
    of_other = mixture.parameters(*(32, 48) if name == "mixlora" else (48, 32))  # a block, or down_proj
    counted = layers * (mixture.for_linear_layers.parameters(32, 32) + of_other)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == counted


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls(name):
    model = adapted(name, trained=False).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    losses = []
    for _ in range(12):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.15, losses
    for n, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert not torch.equal(parameter, before[n]), f"{n} never moved"


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_saved_and_loaded_into_a_fresh_model_it_is_the_same(name, tmp_path):
    model = adapted(name)
    expected = model(IDS).logits
    model.save_pretrained(str(tmp_path))
    loaded = route(name, peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))).eval()
    assert torch.equal(loaded(IDS).logits, expected)
    assert (expected - tiny_llama()(IDS).logits).abs().max() > 1e-2
    assert loaded.peft_config["default"].mixture_of("q_proj") == model.peft_config["default"].mixture_of("q_proj")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_copies_and_pickles_compute_the_same(name):
    model = adapted(name)
    expected = model(IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        if name in BY_TASK:  # whose rows were they?
            with pytest.raises(RuntimeError, match="call mosld.set_routing"):
                other(IDS)
        assert torch.equal(route(name, other)(IDS).logits, expected)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_batch_mates_and_later_tokens_change_nothing_where_tokens_or_tasks_decide(name):
    model = adapted(name)
    whole = model(IDS).logits
    mates = route(name, model, TASKS[1:2])(IDS[1:2]).logits
    torch.testing.assert_close(mates[0], whole[1], **CLOSE)
    earlier = route(name, model)(IDS[:, :4]).logits
    if name in BY_SEQUENCE:
        assert (earlier - whole[:, :4]).abs().max() > 1e-3
    else:
        torch.testing.assert_close(earlier, whole[:, :4], **CLOSE)
    told = " ".join(presets.PRESETS[name].__doc__.split())
    assert ("later tokens change earlier ones" in told) == (name in BY_SEQUENCE)


@pytest.mark.parametrize("name", BY_TASK)
@torch.no_grad()
def test_each_row_follows_its_own_task(name):
    model = adapted(name)
    whole = model(IDS).logits
    for row in range(3):
        for task in range(8):
            set_routing(model, task_ids=task)
            same = torch.allclose(model(IDS[row : row + 1]).logits[0], whole[row], **CLOSE)
            assert same == (task == TASKS[row])
    docs = presets.PRESETS[name].__doc__
    assert "set_routing" in docs and "num_tasks" in docs


@pytest.mark.parametrize("name", NAMES)
def test_balance_and_statistics_are_there_where_tokens_choose_and_refused_elsewhere(name):
    model = adapted(name).train()
    model(IDS)
    if name not in BALANCING:
        for function in (balance_loss, router_stats):
            with pytest.raises(ValueError, match="there is no load to balance and none to tell of: mixing="):
                function(model)
        return
    stats = router_stats(model)
    assert len(stats) == (2 if name == "mixlora" else 4)  # its linear layers have one expert
    for own in stats.values():
        torch.testing.assert_close(own.load.sum(), torch.tensor(1.0))
        assert own.tokens == IDS.numel()
    loss = balance_loss(model)
    if name in DENSE:
        assert loss == 0
        return
    loss.backward()
    assert loss > len(stats) * 0.9  # at least 1 a layer, but for chance
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if "router" in n)


@pytest.mark.parametrize("name", ["mola", "malora", "mixlora_conditional", "mtl_lora"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing_changes_no_gradient(name, use_reentrant):
    """With dropout on x, and the balance loss where there is one."""
    grads = []
    for checkpointing in (False, True):
        model = adapted(name).train()
        if checkpointing:
            base = model.get_base_model()
            enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
            enable({"use_reentrant": use_reentrant})
        torch.manual_seed(4)
        loss = model(IDS, labels=IDS, use_cache=False).loss
        if name in BALANCING:
            loss = loss + 0.5 * balance_loss(model)
        torch.rand(5)
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for n, grad in grads[0].items():
        torch.testing.assert_close(grads[1][n], grad, rtol=1e-5, atol=1e-7, msg=lambda m, n=n: f"{n}: {m}")


def compiled_and_not(model, function, x, name):
    """Outputs and gradients of two calls with other tasks, eager and compiled, and how often each call compiled."""
    results, frames = [], []
    for compile_it in (False, True):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        forward = torch.compile(function, fullgraph=True, backend=counter) if compile_it else function
        own = []
        for tasks in (TASKS, TASKS.flip(0)):
            route(name, model, tasks)
            model.zero_grad()
            torch.manual_seed(6)
            out = forward(x)
            out.square().mean().backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            own.append((out.detach(), grads))
            frames.append(counter.frame_count)
        results.append(own)
    return results, frames[2:]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_layer_is_the_same_forward_and_backward(name):
    """With the preset's dropout, whose masks come from the same generator. Other tasks are no other program."""
    model = adapted(name).double().train()  # in float32 what cancels differs by more than what could be a fault
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(3)).double()
    place = f"base_model.model.model.layers.0.{'mlp' if name == 'mixlora' else 'self_attn.q_proj'}"
    layer = model.get_submodule(place)
    (eager, compiled), frames = compiled_and_not(model, lambda x: layer(x), x, name)
    assert frames == [1, 1]
    assert len(eager[0][1]) == len(layer.mixtures["default"].state_dict())
    torch.testing.assert_close(compiled, eager, rtol=1e-10, atol=1e-12)
    if name in BY_TASK:
        assert not torch.allclose(eager[0][0], eager[1][0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mtl_lora", "mixlora_conditional"])
def test_a_compiled_model_is_the_same_forward_and_backward(name):
    model = adapted(name).train()
    (eager, compiled), frames = compiled_and_not(model, lambda ids: model(ids, use_cache=False).logits, IDS, name)
    assert frames == [1, 1]
    assert len(eager[0][1]) == sum(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(compiled, eager, **CLOSE)
