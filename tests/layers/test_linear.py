"""MoSLDLinear is an nn.Linear with a mixture beside it."""

import copy
import io
import pickle

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mosld import MoSLDConfig, MoSLDLinear
from mosld.layers.adapter import MoSLDAdapter
from mosld_kernels import mosld_linear, reference
from tests.helpers.models import perturb


def trained(*args, **kwargs) -> MoSLDLinear:
    layer = MoSLDLinear(*args, **kwargs)
    perturb(layer)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (64, 64), (33, 129), (1024, 384)], ids=str)
@pytest.mark.parametrize("leading", [(1,), (65,), (2, 17), (0,)], ids=str)
def test_a_fresh_layer_equals_the_frozen_one_bit_for_bit(dtype, bias, size, leading):
    linear = nn.Linear(*size, bias=bias, dtype=dtype)
    layer = MoSLDLinear.from_linear(linear, dropout=0.5)
    x = torch.randn(*leading, size[0], dtype=dtype)
    for training in (True, False):
        assert torch.equal(layer.train(training)(x), linear(x))


def test_forward_is_the_operator():
    layer = trained(12, 10, r=3, alpha=6, num_experts=4, top_k=2, dropout=0.25)
    x = torch.randn(2, 5, 12)
    torch.manual_seed(9)
    y = layer(x)
    torch.manual_seed(9)
    seed = torch.randint(2**62, (1,))
    tensors = (layer.weight, layer.bias, layer.shared_a.weight, layer.expert_b.weight, layer.router.weight)
    truth, logits = mosld_linear(x, *tensors, top_k=2, scale=2.0, dropout_p=0.25, seed=seed)
    assert torch.equal(y, truth) and torch.equal(layer.adapter.router_logits, logits)


def test_one_expert_equals_peft_lora_values_and_gradients():
    linear = nn.Linear(24, 18, dtype=torch.float64)
    lora = peft.get_peft_model(
        nn.Sequential(copy.deepcopy(linear)), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"])
    )
    perturb(lora)
    wrapped = lora.base_model.model[0]
    layer = MoSLDLinear.from_linear(linear, r=4, alpha=6, num_experts=1, top_k=1, dropout=0.0)
    layer.shared_a.weight.data.copy_(wrapped.lora_A["default"].weight)
    layer.expert_b.weight.data.copy_(wrapped.lora_B["default"].weight)
    x, dout = torch.randn(11, 24, dtype=torch.float64), torch.randn(11, 18, dtype=torch.float64)
    grads = []
    for model in (layer, lora):
        own_x = x.clone().requires_grad_()
        y = model(own_x)
        y.backward(dout)
        grads.append((y, own_x.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        layer.shared_a.weight.grad, wrapped.lora_A["default"].weight.grad, rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(
        layer.expert_b.weight.grad, wrapped.lora_B["default"].weight.grad, rtol=1e-12, atol=1e-12
    )
    assert (layer.router.weight.grad == 0).all()  # with one expert there is nothing to route


def test_it_is_an_nn_linear_whose_base_stays_frozen():
    layer = MoSLDLinear(6, 4, r=2, num_experts=3, top_k=2)
    assert isinstance(layer, nn.Linear) and (layer.in_features, layer.out_features) == (6, 4)
    trainable = [name for name, p in layer.named_parameters() if p.requires_grad]
    assert trainable == ["adapter.shared_a.weight", "adapter.expert_b.weight", "adapter.router.weight"]
    before = copy.deepcopy(layer.state_dict())
    optimiser = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # at first only B moves, A and the router follow
        optimiser.zero_grad()
        layer(torch.randn(8, 6)).square().sum().backward()
        optimiser.step()
    moved = {name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == set(trainable)


def test_initial_values_are_kaiming_uniform_and_zero():
    layer = MoSLDLinear(1000, 30, r=16, num_experts=8)
    bound = 1000**-0.5  # Kaiming-uniform with a = sqrt(5)
    for weight in (layer.shared_a.weight, layer.router.weight):
        assert 0.95 * bound < weight.abs().max() <= bound
        assert abs(weight.std().item() - bound / 3**0.5) < 0.05 * bound
    assert (layer.expert_b.weight == 0).all()
    assert layer.shared_a.weight.shape == (16, 1000)
    assert layer.expert_b.weight.shape == (30, 128)
    assert layer.router.weight.shape == (8, 1000)


def test_from_linear_shares_the_weight_and_keeps_dtype_and_mode():
    linear = nn.Linear(6, 4, dtype=torch.bfloat16).eval()
    layer = MoSLDLinear.from_linear(linear, r=2, num_experts=3, top_k=1)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
    assert not linear.weight.requires_grad
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer.shared_a.weight.abs().max() > 0 and (layer.expert_b.weight == 0).all()


def test_from_linear_refuses_what_is_no_plain_linear():
    with pytest.raises(ValueError, match="takes a plain nn.Linear, got MoSLDLinear"):
        MoSLDLinear.from_linear(MoSLDLinear(4, 4))


def test_a_plain_checkpoint_loads_strictly_and_leaves_the_adapter_alone():
    plain = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3, bias=False))
    adapted = nn.Sequential(MoSLDLinear(6, 5), nn.ReLU(), MoSLDLinear(5, 3, bias=False))
    before = adapted[0].shared_a.weight.clone()
    adapted.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(4, 6)
    assert torch.equal(adapted(x), plain(x)) and torch.equal(adapted[0].shared_a.weight, before)
    assert not adapted[0].weight.requires_grad


def test_a_checkpoint_with_part_of_the_adapter_is_refused():
    layer = MoSLDLinear(6, 5)
    state = layer.state_dict()
    del state["adapter.router.weight"]
    with pytest.raises(RuntimeError, match="adapter.router.weight"):
        layer.load_state_dict(state)


def test_copies_pickles_and_state_dicts_compute_the_same():
    layer = trained(6, 5, r=2, num_experts=3).eval()
    x = torch.randn(4, 6, requires_grad=True)
    y = layer(x)  # leaves logits that belong to a graph
    other = MoSLDLinear(6, 5, r=2, num_experts=3).eval()
    other.load_state_dict(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False), other]
    for copied in copies:
        assert copied.adapter.router_logits is None
        assert torch.equal(copied(x), y)


def test_eval_and_no_dropout_use_no_randomness():
    for layer in (trained(6, 5, dropout=0.5).eval(), trained(6, 5, dropout=0.0)):
        state = torch.get_rng_state()
        first, second = layer(torch.ones(3, 6)), layer(torch.ones(3, 6))
        assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)


def test_training_draws_a_new_mask_each_time_from_torchs_generator():
    layer = trained(16, 5, dropout=0.5)
    x = torch.ones(3, 16)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)


def test_dropout_keeps_the_mean_of_the_update():
    layer = trained(8, 4, r=2, dropout=0.3).double()
    x = torch.randn(2, 8, dtype=torch.float64)
    frozen = nn.functional.linear(x, layer.weight, layer.bias)
    draws = torch.stack([layer(x) - frozen for _ in range(4000)])
    expected = layer.eval()(x) - frozen
    deviation = draws.std(0) / 4000**0.5
    assert ((draws.mean(0) - expected).abs() < 5 * deviation).all()


def test_mosld_is_what_the_reference_says_in_training_of_two_steps():
    """The same two SGD steps with the operator and with the reference in its place end at the same parameters."""
    ends = []
    for function in (mosld_linear, reference.mosld_linear):
        torch.manual_seed(2)
        layer = trained(10, 7, r=3, num_experts=4, dropout=0.2).double()
        tensors = [layer.shared_a.weight, layer.expert_b.weight, layer.router.weight]
        for step in range(2):
            x = torch.randn(20, 10, dtype=torch.float64)
            seed = torch.tensor([step])
            y, logits = function(x, layer.weight, layer.bias, *tensors, top_k=2, scale=2.0, dropout_p=0.2, seed=seed)
            grads = torch.autograd.grad(y.square().mean() + 0.1 * logits.square().mean(), tensors)
            with torch.no_grad():
                for tensor, grad in zip(tensors, grads, strict=True):
                    tensor -= 0.1 * grad
        ends.append([tensor.detach().clone() for tensor in tensors])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("through_peft", [False, True])
def test_torchs_fused_encoder_layer_does_not_pass_the_mixture_by(through_peft):
    """In eval without gradients it would read `linear1.weight` and leave the mixture out."""
    block = nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, dropout=0.0, batch_first=True).eval()
    if through_peft:
        block = peft.get_peft_model(block, MoSLDConfig(target_modules=["linear1"])).eval()
        perturb(block)
    else:
        block.linear1 = trained(8, 12).eval()
    x = torch.randn(2, 3, 8)
    with_gradients = block(x)
    with torch.no_grad():
        torch.testing.assert_close(block(x), with_gradients)


def test_shapes_can_be_worked_out_on_the_meta_device():
    layer = MoSLDLinear(6, 5, device="meta")
    x = torch.empty(3, 6, device="meta", requires_grad=True)
    y = layer.eval()(x)
    y.sum().backward()
    assert y.shape == (3, 5) and y.is_meta and x.grad.shape == (3, 6)


def test_repr_names_the_mixture():
    text = repr(MoSLDLinear(6, 5, r=2, alpha=4, num_experts=3, top_k=1, dropout=0.1))
    assert "in_features=6, out_features=5, bias=True, r=2, alpha=4, num_experts=3, top_k=1, dropout=0.1" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(top_k=9), r"top_k must be in \[1, num_experts=8\], got 9"),
        (dict(top_k=0), "top_k must be an integer of at least 1, got 0"),
        (dict(r=0), "r must be an integer of at least 1, got 0"),
        (dict(r=2.5), "r must be an integer of at least 1, got 2.5"),
        (dict(num_experts=True), "num_experts must be an integer of at least 1, got True"),
        (dict(dropout=1.5), r"dropout must be in \[0, 1\], got 1.5"),
        (dict(alpha=0), "alpha must be positive and finite, got 0"),
    ],
)
def test_bad_values_name_the_rule_and_the_value(changes, message):
    with pytest.raises(ValueError, match=message):
        MoSLDLinear(4, 4, **changes)
    with pytest.raises(ValueError, match=message):
        MoSLDLinear.from_linear(nn.Linear(4, 4), **changes)


def test_the_backend_can_be_set_for_one_layer_or_all(monkeypatch):
    layer = MoSLDLinear(6, 5, r=2, num_experts=3, top_k=2)
    monkeypatch.setattr(layer.adapter, "backend", "cuda")
    with pytest.raises(ValueError, match="backend must be one of auto, eager, triton, got 'cuda'"):
        layer(torch.ones(2, 6))
    monkeypatch.undo()
    monkeypatch.setattr(MoSLDAdapter, "backend", "cuda")
    with pytest.raises(ValueError, match="backend must be one of"):
        layer(torch.ones(2, 6))


@pytest.mark.parametrize("kind", [{}, {"mixing": "diagonal"}, {"router": "hidden", "gate": "softmax"}], ids=str)
@pytest.mark.parametrize("shape", [(512, 2, 96), (10, 2, 128), (7, 5, 64), (2, 2, 3, 128)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("with_grad", [True, False], ids=["grad", "no-grad"])
def test_rows_that_do_not_lie_one_after_the_other_give_the_frozen_layers_bits(kind, shape, with_bias, with_grad):
    """Models that compute in [tokens, batch, features] hand transposed inputs to their layers: torch multiplies these
    in another way, and so must a fresh layer, with the gradients of one that is contiguous."""
    torch.manual_seed(0)
    layer = MoSLDLinear(shape[-1], 96, bias=with_bias, r=2, num_experts=3, dropout=0.0, **kind)
    for x in (torch.randn(shape[1], shape[0], *shape[2:]).transpose(0, 1), torch.randn(*shape[:-2], *shape[:-3:-1]).mT):
        assert not x.is_contiguous()
        with torch.set_grad_enabled(with_grad):
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    trained = copy.deepcopy(layer).double()
    for parameter in trained.adapter.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(shape[1], shape[0], *shape[2:], dtype=torch.float64).transpose(0, 1).requires_grad_()
    results = []
    for own in (x, x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()):
        trained.zero_grad()
        y = trained(own)
        y.square().sum().backward()
        results.append([y.detach(), own.grad, *(p.grad for p in trained.adapter.parameters())])
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)
