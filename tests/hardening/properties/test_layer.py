"""`MoSLDLinear` as a whole against the formula: values and all gradients, those through the balance loss too."""

import math

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mosld import MoSLDLinear, balance_loss
from mosld_kernels.autograd import Inputs
from mosld_kernels.precision import router_dtype
from tests.hardening.properties.balls import Ball, ball, exact, outside, rounded, times
from tests.hardening.properties.formula import balls, largest, softmax, through_softmax
from tests.hardening.properties.profile import cases
from tests.hardening.properties.recipes import (
    GRADIENTS,
    MODERATE,
    TRAINED,
    Recipe,
    flat,
    identical,
    recipes,
    sorted_by_expert,
)

BALANCE = 0.25
ALPHA = st.sampled_from((0.5, 3.0, 16))


def layer_of(recipe: Recipe, alpha: float, tensors: dict[str, Tensor]) -> MoSLDLinear:
    """With the tensors' numbers; the adapter in its own dtype, as PEFT has it in float32 beside a bfloat16 base"""
    _, d_in, d_out, rank, experts, top_k, mixing = recipe.shape
    layer = MoSLDLinear(
        d_in, d_out, bias=recipe.bias, r=rank, alpha=alpha, num_experts=experts, top_k=top_k, dropout=recipe.dropout_p,
        dtype=recipe.dtype, mixing=mixing,
    )  # fmt: skip
    layer.adapter.to(recipe.adapter_dtype)
    parts = {n: getattr(layer.adapter, n.removesuffix("_weight")).weight for n in GRADIENTS[3:]}
    parts |= {"weight": layer.weight} | ({"bias": layer.bias} if recipe.bias else {})
    with torch.no_grad():
        for name, part in parts.items():
            part.copy_(tensors[name])
            part.requires_grad_(name in recipe.wanted)
    return layer


def balance_gradient(logits: Tensor, top_k: int) -> tuple[float, Ball]:
    """-> E sum_e f_e P_e over the tokens, NaN where a row of logits has no softmax; its gradient [T, E]"""
    tokens, experts = logits.shape
    load = torch.zeros(experts, dtype=torch.float64)
    for row in logits.tolist():
        load[largest(row, top_k)] += 1 / (tokens * top_k)
    probability = softmax(logits, experts, logits.dtype)
    loss = experts * (load * probability.mid.sum(0)).sum().item() / max(tokens, 1)
    if not probability.known.all():
        loss = math.nan
    for_each = rounded(ball((experts / max(tokens, 1) * load).expand(tokens, experts)), logits.dtype, times=8)
    return loss, through_softmax(probability, for_each, experts, logits.dtype)


def run_layer(recipe: Recipe, layer: MoSLDLinear, tensors: dict[str, Tensor], balance: float) -> dict[str, Tensor]:
    x = tensors["x"].detach().requires_grad_("x" in recipe.wanted)
    with sorted_by_expert(recipe):
        torch.manual_seed(recipe.seed)
        y = layer(x)
        logits = layer.adapter.router_logits
        assert y.shape == (*recipe.leading, recipe.shape.D_out) and logits.shape == (*recipe.leading, recipe.shape.E)
        results = {"y": flat(y.detach()), "logits": flat(logits.detach())}
        wanted = [n for n in recipe.present() if n in recipe.wanted]
        if not wanted:
            assert not y.requires_grad
            return results
        trained = {n: getattr(layer.adapter, n.removesuffix("_weight")).weight for n in GRADIENTS[3:]}
        trained |= {"x": x, "weight": layer.weight, "bias": layer.bias}
        loss = balance_loss(layer) if balance else None
        outs, arriving = [y], [tensors["dout"]]
        if loss is not None and loss.requires_grad:
            outs, arriving = [y, loss], [tensors["dout"], torch.full_like(loss, balance)]
        grads = torch.autograd.grad(outs, [trained[n] for n in wanted], arriving)
    if loss is not None:
        results["loss"] = loss.detach()
    return results | {f"d{n}": flat(g) if n == "x" else g for n, g in zip(wanted, grads, strict=True)}


@pytest.mark.parametrize("keep_hidden", [False, True], ids=["fused", "staged"])
@cases(100, recipe=recipes(), alpha=ALPHA, training=st.booleans(), balance=st.sampled_from((0.0, BALANCE)))
def test_values_and_gradients_are_the_formulas(recipe, alpha, training, balance, keep_hidden):
    recipe = recipe._replace(base=True)
    tensors = recipe.tensors()
    layer = layer_of(recipe, alpha, tensors).train(training)
    layer.adapter.keep_hidden = keep_hidden
    results = run_layer(recipe, layer, tensors, balance)
    torch.manual_seed(recipe.seed)
    seed = torch.randint(2**62, (1,))  # what the layer drew
    given = [tensors[n] if n in recipe.present() else None for n in GRADIENTS]
    inputs = Inputs(flat(given[0]), *given[1:], seed)
    settings = recipe.settings()._replace(scale=alpha / recipe.shape.R, dropout_p=recipe.dropout_p if training else 0.0)
    dlogits, loss = None, results.pop("loss", None)
    if loss is not None and recipe.shape.K < recipe.shape.E:
        expected, gradient = balance_gradient(results["logits"], recipe.shape.K)
        routed = router_dtype(recipe.dtype)
        assert loss.item() == pytest.approx(expected, rel=100 * torch.finfo(routed).eps, nan_ok=True)
        dlogits = times(gradient, exact(torch.tensor(balance)))
    elif loss is not None:
        assert not loss.any()
    pieces = recipe.by_tokens and not keep_hidden
    truth = balls(inputs, settings, results["logits"], flat(tensors["dout"]), dlogits, pieces)
    for name, value in results.items():
        assert (wrong := outside(value, truth[name])) is None, f"{name}: {wrong}"


@cases(40, recipe=recipes(kinds=("normal",), layouts=("plain",), dtypes=(torch.float64, torch.float32, torch.bfloat16)),
       factor=st.sampled_from((2, 4)))  # fmt: skip
def test_a_power_of_two_times_alpha_is_so_many_times_the_update(recipe, factor):
    """And so are the gradients of A, B and the router, bit for bit; the base's, zero here, adds nothing."""
    recipe = recipe._replace(wanted=TRAINED, bias=False, base=True)
    tensors = recipe.tensors()
    tensors["weight"].zero_()
    once, larger = (run_layer(recipe, layer_of(recipe, alpha, tensors), tensors, 0.0) for alpha in (1.5, 1.5 * factor))
    for name, value in once.items():
        assert torch.equal(larger[name], value if name == "logits" else value * factor), name


@cases(40, recipe=recipes(kinds=MODERATE, layouts=("plain",)), alpha=ALPHA)
def test_a_fresh_layer_is_the_frozen_one_and_learns_b_first(recipe, alpha):
    recipe = recipe._replace(wanted=TRAINED, base=True)
    tensors = recipe.tensors()
    layer = layer_of(recipe, alpha, tensors)
    layer.adapter.reset_parameters()
    results = run_layer(recipe, layer, tensors, 0.0)
    assert identical(results["y"], flat(F.linear(tensors["x"], layer.weight, layer.bias)))
    assert not results["dshared_a"].any() and not results["drouter_weight"].any()
