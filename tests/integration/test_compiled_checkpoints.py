"""The balance loss where torch.compile and activation checkpointing come together.

The gradients are those without either, or torch refuses; the loss is never lost. `COMBINATIONS` is what the page of
what works with what shows.

A layer remembers its logits, and inside a checkpoint torch.compile takes what remembers only under a setting of its
own, `SETTING`: what the forward remembers then stays, and backward, which runs it again, does not remember it anew.
"""

import contextlib
import functools

import peft
import pytest
import torch
from torch import fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.exc import Unsupported
from torch.utils.checkpoint import checkpoint

from mosld import MoSLDConfig, MoSLDLinear, balance_loss, forget_routing
from mosld.layers.adapter import MoSLDAdapter
from mosld.tuner.layer import MoSLDPeftLinear
from mosld_kernels import dispatch
from tests.helpers.models import perturb, tiny_llama, token_ids
from tests.training.test_trainer import checkpointing, trained

SETTING = "skip_fwd_side_effects_in_bwd_under_checkpoint"  # of torch._dynamo.config
COLUMNS = ("default", "setting", "setting, fullgraph=True")
COMPILED, NOT_COMPILED, REFUSED = "same", "same, but the checkpointed blocks are not compiled", "torch refuses"
# What is compiled -> the kind of checkpoint, which is around every transformer block -> the outcome in each column.
COMBINATIONS = {
    "the whole step, loss included": {
        "non-reentrant": (NOT_COMPILED, COMPILED, COMPILED),
        "reentrant": (NOT_COMPILED, COMPILED, REFUSED),
    },
    "the model": {
        "non-reentrant": (NOT_COMPILED, COMPILED, COMPILED),
        "reentrant": (NOT_COMPILED, COMPILED, REFUSED),
    },
    "each transformer block": {
        "non-reentrant": (NOT_COMPILED, COMPILED, COMPILED),
        "reentrant": (NOT_COMPILED, COMPILED, COMPILED),
    },
    "attention and MLP of each block": {
        "non-reentrant": (COMPILED, COMPILED, COMPILED),
        "reentrant": (COMPILED, COMPILED, COMPILED),
    },
    "each adapted layer": {
        "non-reentrant": (COMPILED, COMPILED, COMPILED),
        "reentrant": (COMPILED, COMPILED, COMPILED),
    },
}
CASES = [
    (what, checkpoints, column, outcome)
    for what, kinds in COMBINATIONS.items()
    for checkpoints, outcomes in kinds.items()
    for column, outcome in zip(COLUMNS, outcomes, strict=True)
]
pytestmark = [
    pytest.mark.slow,
    # Dynamo's own, while it traces: of its inputs, and of how it makes an autograd function
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


def step_of(called, model):
    return lambda ids: called(ids, labels=ids, use_cache=False).loss + 0.5 * balance_loss(model)


def compiled_step(what, model, **options):
    """The step of `model`, of which `what` is compiled."""
    if what == "the whole step, loss included":
        return torch.compile(step_of(model, model), **options)
    if what == "the model":
        return step_of(torch.compile(model, **options), model)
    blocks = model.get_base_model().model.layers
    modules = {
        "each transformer block": list(blocks),
        "attention and MLP of each block": [part for block in blocks for part in (block.self_attn, block.mlp)],
        "each adapted layer": [module for module in model.modules() if isinstance(module, MoSLDPeftLinear)],
    }
    for module in modules[what]:
        module.compile(**options)
    return step_of(model, model)


def llama(checkpoints=None):
    config = dict(r=2, num_experts=4, dropout=0.3, target_modules=["q_proj", "up_proj"])
    model = peft.get_peft_model(tiny_llama(num_hidden_layers=1), MoSLDConfig(**config))  # one block: tracing takes long
    torch.manual_seed(1)
    perturb(model)
    base = model.get_base_model()
    if checkpoints:
        enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
        enable({"use_reentrant": checkpoints == "reentrant"})
        if checkpoints == "reentrant":
            model.enable_input_require_grads()
        else:
            # Only reentrant checkpoints need them, and torch.compile takes no such hook.
            base.disable_input_require_grads()
    return model.train()


def two_steps(model, step):
    """-> loss and gradients of each"""
    results = []
    for seed in (2, 3):
        model.zero_grad()
        torch.manual_seed(seed)
        loss = step(token_ids(2, 6, seed).to(model.device))
        loss.backward()
        results += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
    return results


@functools.cache
def truth():
    model = llama()
    results = two_steps(model, step_of(model, model))
    without = two_steps(model, lambda ids: model(ids, labels=ids, use_cache=False).loss)
    far = [(a - b).norm() / a.norm() for a, b in zip(results, without, strict=True)]
    assert max(far) > 0.3  # a lost balance loss would show
    return results


class Layers:
    """Counts the layers that are in a compiled graph, and the calls of those that are not."""

    def __init__(self, monkeypatch):
        self.in_graphs, self.eager_calls, plain = 0, 0, dispatch.MoSLDFunction

        class Counted:
            @staticmethod
            def apply(*args):
                self.eager_calls += 1
                return plain.apply(*args)

        monkeypatch.setattr(dispatch, "MoSLDFunction", Counted)

    def backend(self, graph, inputs):
        graphs = [
            module for module in graph.modules() if isinstance(module, fx.GraphModule)
        ]  # checkpoints have their own
        self.in_graphs += sum("mosld.linear" in str(node.target) for module in graphs for node in module.graph.nodes)
        return aot_eager(graph, inputs)


@pytest.fixture
def layers(monkeypatch):
    torch._dynamo.reset()
    return Layers(monkeypatch)


def setting(on):
    return torch._dynamo.config.patch(**{SETTING: on})


@pytest.mark.parametrize(
    ("what", "checkpoints", "column", "outcome"), CASES, ids=["-".join(case[:3]) for case in CASES]
)
def test_the_gradients_are_the_plain_ones_or_torch_refuses(what, checkpoints, column, outcome, layers):
    expected, model = truth(), llama(checkpoints)
    fullgraph = column.endswith("fullgraph=True")
    with setting(column.startswith("setting")):
        step = compiled_step(what, model, fullgraph=fullgraph, backend=layers.backend)
        with pytest.raises(Unsupported) if outcome == REFUSED else contextlib.nullcontext():
            for ours, plain in zip(two_steps(model, step), expected, strict=True):
                torch.testing.assert_close(ours, plain)
        if outcome == COMPILED:
            assert layers.in_graphs > 0 and layers.eager_calls == 0
        if outcome == NOT_COMPILED:
            assert layers.in_graphs == 0 and layers.eager_calls > 0
            torch._dynamo.reset()
            model = llama(checkpoints)
            with pytest.raises(Unsupported, match="Unsafe side effect"):  # rather than that, when asked for one graph
                two_steps(model, compiled_step(what, model, fullgraph=True, backend=layers.backend))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_by_hand_around_a_compiled_block(use_reentrant, layers):
    results = []
    for compiled in (False, True):
        torch.manual_seed(1)
        block = nn.Sequential(MoSLDLinear(6, 8, r=2, num_experts=4), nn.GELU(), MoSLDLinear(8, 6, r=2, num_experts=4))
        perturb(block)
        x = torch.randn(2, 5, 6, requires_grad=True)
        run = torch.compile(block, fullgraph=True, backend=layers.backend) if compiled else block
        torch.manual_seed(5)
        out = checkpoint(run, x, use_reentrant=use_reentrant) if compiled else run(x)
        loss = out.square().mean() + balance_loss(block, recomputed=True if compiled and use_reentrant else None)
        loss.backward()
        results.append([loss, x.grad, *(p.grad for p in block.parameters() if p.requires_grad)])
        if not compiled:
            layers.eager_calls = 0
    for ours, plain in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, plain)
    assert layers.in_graphs and not layers.eager_calls


@pytest.mark.parametrize("on", [False, True], ids=["default", "setting"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_trainer_compiles_and_checkpoints(use_reentrant, on, layers, tmp_path, monkeypatch):
    for name in ("BACKEND", "MODE"):
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "")  # which TrainingArguments sets: taken back at the end
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")
    plain = trained(tmp_path)
    layers.eager_calls = 0
    arguments = {**checkpointing(use_reentrant), "torch_compile": True, "torch_compile_backend": "aot_eager"}
    with setting(on):
        torch.testing.assert_close(trained(tmp_path, arguments=arguments), plain)
    assert (layers.eager_calls == 0) == on


def test_the_setting_costs_the_memory_of_the_logits_alone(monkeypatch):
    kept = {}
    ids = token_ids(4, 16)
    for keeps in (False, True):
        torch._dynamo.reset()
        monkeypatch.setattr(MoSLDAdapter, "keep_logits", keeps)
        model = llama("non-reentrant")
        own, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def pack(tensor, own=own, saved=saved):
            if tensor.untyped_storage().data_ptr() not in own:
                saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        task = step_of(model, model) if keeps else lambda ids, model=model: model(ids, labels=ids, use_cache=False).loss
        with setting(keeps), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            torch.compile(task, fullgraph=True, backend="aot_eager")(ids).backward()
        kept[keeps] = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    logits, loads = 4 * ids.numel() * 4, 4 * 4  # of a layer, in bytes: float32, four experts
    assert kept[True] - kept[False] == 2 * (logits + loads)


def test_inductor_runs_a_layer_again_with_the_same_dropout():
    by_inductor("cpu")


def by_inductor(device):
    """Its random numbers are its own: what it computes with checkpoints is what it computes without."""
    results = []
    for checkpoints in (None, "non-reentrant"):
        torch._dynamo.reset()
        model = llama(checkpoints).to(device)
        with setting(True):
            results.append(two_steps(model, torch.compile(step_of(model, model), fullgraph=True)))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)
    model = llama().eval().to(device)
    assert not torch.isclose(results[0][0], two_steps(model, step_of(model, model))[0])  # there was dropout
    torch._dynamo.reset()
    compiled = two_steps(model, torch.compile(step_of(model, model), fullgraph=True))
    for ours, plain in zip(compiled, two_steps(model, step_of(model, model)), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_what_a_broken_off_backward_owed_is_forgotten(layers):
    layer = torch.compile(MoSLDLinear(6, 6, r=2, num_experts=4).eval(), fullgraph=True, backend=layers.backend)
    x, adapter = torch.randn(5, 6, requires_grad=True), layer.adapter
    perturb(layer)
    layer(x).sum().backward()
    clean = adapter.router.weight.grad.clone()
    (checkpoint(layer, x, use_reentrant=True).sum() + balance_loss(layer, recomputed=True)).backward()
    adapter.deferred_grads = torch.ones_like(adapter.router_logits)  # as a backward leaves it that breaks off
    forget_routing(layer)
    layer.zero_grad()
    layer(x).sum().backward()
    torch.testing.assert_close(adapter.router.weight.grad, clean)
