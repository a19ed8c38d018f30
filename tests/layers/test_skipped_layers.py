"""A layer that the last forward skipped (layerdrop, conditional computation) counts for nothing until it runs again."""

import copy

import peft
import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainingArguments

from mosld import MoSLDConfig, MoSLDLinear, MoSLDTrainer, balance_loss, forget_routing, router_stats
from mosld.layers.host import running_adapters
from mosld.layers.stats import RouterUse
from tests.helpers.models import perturb, tiny_llama, token_ids

IDS = token_ids()
CONFIG = dict(r=2, num_experts=4, dropout=0.0, balance_coef=0.5, target_modules=["0", "1", "2"])


class Drops(nn.Module):
    """Three linear layers, of which a forward leaves `dropped` out."""

    def __init__(self):
        super().__init__()
        self.layers, self.dropped = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)).double(), ()

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            if i not in self.dropped:
                x = layer(x).tanh()
        return x


def through_peft():
    return peft.get_peft_model(Drops(), MoSLDConfig(**CONFIG))


def by_hand():
    model = Drops()
    for i, layer in enumerate(model.layers):
        model.layers[i] = MoSLDLinear.from_linear(layer, r=2, num_experts=4, dropout=0.0)
    model.register_forward_pre_hook(lambda module, args: forget_routing(module))
    return model


def drops(model):
    return next(module for module in model.modules() if isinstance(module, Drops))


@pytest.fixture(params=[through_peft, by_hand])
def model(request):
    torch.manual_seed(0)
    model = request.param()
    perturb(model)
    return model


def test_a_second_step_that_skips_a_layer_is_that_of_a_model_without_it(model):
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    balance_loss(model if model(x) is not None else model).backward()
    drops(model).dropped, use = (1,), RouterUse()
    model.zero_grad()
    out = model(x)
    use.update("", model)
    loss = out.square().mean() + 0.3 * balance_loss(model)
    loss.backward()

    fresh = copy.deepcopy(model)  # remembers nothing
    fresh.zero_grad()
    expected = fresh(x).square().mean() + 0.3 * balance_loss(fresh)
    expected.backward()
    assert torch.equal(loss, expected)
    for (name, ours), other in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert (ours.grad is None) == (other.grad is None) == (not ours.requires_grad or ".1." in name), name
        assert ours.grad is None or torch.equal(ours.grad, other.grad), name
    for stats in (router_stats(model), use.stats()[""]):
        assert [name.rpartition(".")[2] for name in stats] == ["0", "2"]
    drops(model).dropped = ()
    model(x)
    assert len(router_stats(model)) == 3


@pytest.mark.parametrize("task", [None, "CAUSAL_LM", "FEATURE_EXTRACTION"])
@pytest.mark.parametrize("way", ["forward", "generate"])
def test_every_way_into_a_peft_model_begins_anew(task, way):
    config = MoSLDConfig(r=2, num_experts=4, target_modules=["q_proj", "v_proj"], task_type=task)
    model = peft.get_peft_model(tiny_llama(), config)
    model(input_ids=IDS)
    assert len(router_stats(model)) == 4
    model.get_base_model().model.layers[0].forward = lambda hidden, **_: hidden  # only the second layer runs
    if way == "forward":
        model(input_ids=IDS)
    else:
        model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, use_cache=False)
    assert {name.partition("layers.")[2][0] for name in router_stats(model)} == {"1"}


def add_adapter():
    model = tiny_llama()
    model.add_adapter(MoSLDConfig(**{**CONFIG, "target_modules": ["q_proj", "v_proj"]}))
    return model


def llama_by_hand():
    model = tiny_llama()
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            linear = getattr(layer.self_attn, name)
            setattr(layer.self_attn, name, MoSLDLinear.from_linear(linear, r=2, num_experts=4, dropout=0.0))
    return model


@pytest.mark.parametrize("build", [add_adapter, llama_by_hand])
def test_the_trainer_forgets_where_no_peft_model_does(tmp_path, build):
    model, forwards = build(), []
    whole = model.model.layers[0].forward

    def every_other(hidden, **kwargs):
        forwards.append(1)
        return whole(hidden, **kwargs) if len(forwards) % 2 else hidden

    model.model.layers[0].forward = every_other
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=3, logging_steps=1, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in torch.cat((IDS, IDS))]
    trainer = MoSLDTrainer(model=model, args=arguments, train_dataset=rows, balance_coef=0.5, router_logs="layers")
    trainer.train()
    assert len(forwards) == 2
    logged = [{key.split("/")[1] for key in e if key.count("/") == 2} for e in trainer.state.log_history if "loss" in e]
    assert [len(names) for names in logged] == [4, 2] and not any("layers.0." in name for name in logged[1])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputation_is_no_forward(use_reentrant):
    """A checkpoint around the whole model runs it again in backward, and not to its end."""
    model = through_peft()
    perturb(model)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    out = checkpoint(model, x, use_reentrant=use_reentrant)
    before = {name: stats.load for name, stats in router_stats(model).items()}
    adapters = [adapter for _, adapter in running_adapters(model)]
    seen, handle = (
        [],
        drops(model).register_forward_pre_hook(
            lambda *_: seen.append([adapter.router_logits is not None for adapter in adapters])
        ),
    )
    out.sum().backward()
    handle.remove()
    assert seen == [[True] * 3]
    after = {name: stats.load for name, stats in router_stats(model).items()}
    assert before.keys() == after.keys() and all(torch.equal(load, after[name]) for name, load in before.items())


@pytest.mark.slow
def test_compiled_whole_a_skipped_layer_costs_its_own_graph_and_no_other(model):
    x = torch.randn(2, 5, 6, dtype=torch.float64)

    def loss(x):
        return model(x).square().mean() + 0.3 * balance_loss(model)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for step in range(6):
        drops(model).dropped = (1,) if step % 2 else ()
        results = []
        for function in (compiled, loss):
            model.zero_grad()
            value = function(x)
            value.backward()
            results.append([value, *(p.grad for p in model.parameters())])
        for ours, truth in zip(*results, strict=True):
            assert (ours is None) == (truth is None)
            if truth is not None:
                torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 2


def test_an_adapter_per_row_is_refused_and_not_passed_over():
    with pytest.raises(ValueError, match="adapter_names must not be given"):
        through_peft()(torch.ones(1, 6, dtype=torch.float64), adapter_names=["default"])
