"""A base that is not a plain weight: the layer is called and the update added, all as by the formula."""

from collections.abc import Callable
from typing import NamedTuple

import peft
import pytest
import torch
from torch import nn

from mosld import MoSLDConfig, balance_loss
from mosld.tuner.layer import MoSLDPeftLinear
from mosld_kernels import reference
from tests.helpers.models import perturb, tiny_llama, token_ids

IDS = token_ids()
TARGETS = ["q_proj", "v_proj", "down_proj"]


def with_linears(replace) -> nn.Module:
    model = whole_blocks()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in name:
            model.set_submodule(name, replace(module))
    return model


def whole_blocks() -> nn.Module:
    return tiny_llama(hidden_size=128, intermediate_size=256)  # of which the quantisers take whole ones


def four_bit() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def replace(linear):
        sizes = (linear.in_features, linear.out_features)
        layer = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(linear.weight.data.clone(), requires_grad=False, quant_type="nf4")
        return layer

    return with_linears(replace)


def eight_bit() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def replace(linear):
        layer = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        return layer

    return with_linears(replace)


def torchao(configuration: str) -> nn.Module:
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao import quantization

    model = whole_blocks()
    quantization.quantize_(model, getattr(quantization, configuration)())
    return model


class Base(NamedTuple):
    make: Callable[[], nn.Module]
    stored: torch.dtype  # of its weights
    library: str


BASES = {
    "4-bit (nf4)": Base(four_bit, torch.uint8, "bitsandbytes"),
    "8-bit": Base(eight_bit, torch.int8, "bitsandbytes"),
    "int8, weights alone": Base(lambda: torchao("Int8WeightOnlyConfig"), torch.int8, "torchao"),
    "float8 (e4m3fn), weights alone": Base(lambda: torchao("Float8WeightOnlyConfig"), torch.float8_e4m3fn, "torchao"),
}
pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own, about kernels and deprecations


def build(name: str, device: str = "cpu") -> nn.Module:
    """The base of this name on the device, where bitsandbytes quantises what arrives."""
    return BASES[name].make().to(device).eval()


@pytest.fixture(params=BASES)
def name(request):
    return request.param


@pytest.fixture
def base(name) -> nn.Module:
    return build(name)


def adapted(base, **changes):
    config = dict(r=4, num_experts=4, dropout=0.0, target_modules=TARGETS)
    return peft.get_peft_model(base, MoSLDConfig(**{**config, **changes}))


@torch.no_grad()
def test_a_fresh_adapter_is_the_identity(base):
    expected = base(IDS).logits
    assert torch.equal(adapted(base).eval()(IDS).logits, expected)


def test_one_layer_is_the_base_and_the_formula_values_and_gradients(base):
    model = adapted(base)
    perturb(model)
    layer = next(module for module in model.modules() if isinstance(module, MoSLDPeftLinear))
    mixture = layer.mixtures["default"]
    tensors = [mixture.shared_a.weight, mixture.expert_b.weight, mixture.router.weight]
    x = torch.randn(5, layer.in_features, requires_grad=True)
    delta, _ = reference.mosld_delta(x, *tensors, top_k=2, scale=mixture.scale)
    expected = layer.base_layer(x) + delta
    dout = torch.randn_like(expected)
    truth = torch.autograd.grad(expected, [x, *tensors], dout)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for ours, grad in zip(torch.autograd.grad(y, [x, *tensors], dout), truth, strict=True):
        torch.testing.assert_close(ours, grad, rtol=1e-4, atol=1e-5)


def test_it_trains_saves_and_loads(name, tmp_path):
    trains_saves_and_loads(name, "cpu", tmp_path)


def trains_saves_and_loads(name, device, folder):
    base, ids = build(name, device), IDS.to(device)
    weight = base.model.layers[0].self_attn.q_proj.weight
    assert getattr(weight, "qdata", weight).dtype == BASES[name].stored
    model = adapted(base, dropout=0.2).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "mosld_" in name}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = model(ids, labels=ids).loss
        (loss + 1e-3 * balance_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    model.eval().save_pretrained(str(folder))
    with torch.no_grad():
        expected = model(ids).logits
        loaded = peft.PeftModel.from_pretrained(build(name, device), str(folder)).eval()
        assert torch.equal(loaded(ids).logits, expected)
        assert not torch.allclose(expected, build(name, device)(ids).logits, atol=1e-2)
