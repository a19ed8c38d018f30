"""What must agree bit for bit, whatever the numbers: powers of two round nothing, every way in computes the same."""

import pytest
import torch
from hypothesis import strategies as st
from torch.nn import functional as F

from mosld_kernels import dispatch
from mosld_kernels.autograd import MoSLDFunction
from tests.hardening.properties.profile import cases
from tests.hardening.properties.recipes import (
    GRADIENTS,
    MODERATE,
    SUBSETS,
    call,
    flat,
    identical,
    recipes,
    run,
    sorted_by_expert,
)

WIDE = (torch.float64, torch.float32, torch.bfloat16)  # float16 runs into its subnormal numbers, which are rounded
# Multiplying keeps these layouts. With other strides, or elsewhere in memory, a product may be summed in another order.
NORMAL = recipes(kinds=("normal",), layouts=("plain", "transposed"), dtypes=WIDE).map(
    lambda recipe: recipe._replace(wanted=GRADIENTS)
)
POWER = st.sampled_from((0.5, 2.0, 4.0))


def same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert identical(actual[name], value), name


def scaled(results: dict, **factors: float) -> dict:
    return {n: t * factors.get(n, 1.0) for n, t in results.items()}


@cases(40, recipe=NORMAL, factor=POWER)
def test_a_power_of_two_times_alpha_is_so_many_times_the_update(recipe, factor):
    recipe = recipe.update_only()
    once, larger = call(recipe).results, call(recipe, scale=recipe.scale * factor).results
    names = ("y", "dx", "dshared_a", "dexpert_b", "drouter_weight")
    same(larger, scaled(once, **dict.fromkeys(names, factor)))


@cases(40, recipe=NORMAL, factor=POWER)
def test_a_power_of_two_times_b_is_so_many_times_the_update_and_leaves_bs_gradient(recipe, factor):
    recipe = recipe.update_only()
    tensors = recipe.tensors()
    once = call(recipe, tensors).results
    larger = call(recipe, tensors | {"expert_b": tensors["expert_b"] * factor}).results
    same(larger, scaled(once, **dict.fromkeys(("y", "dx", "dshared_a", "drouter_weight"), factor)))


@cases(40, recipe=NORMAL, factor=POWER)
def test_a_and_b_may_share_their_size_as_they_like(recipe, factor):
    tensors = recipe.tensors()
    moved = {"shared_a": tensors["shared_a"] * factor, "expert_b": tensors["expert_b"] / factor}
    once, other = call(recipe, tensors).results, call(recipe, tensors | moved).results
    same(other, scaled(once, dshared_a=1 / factor, dexpert_b=factor))


@cases(40, recipe=NORMAL, factor=POWER)
def test_x_in_other_units_with_weights_in_inverse_ones_gives_the_same(recipe, factor):
    tensors = recipe.tensors()
    moved = {n: tensors[n] / factor for n in ("weight", "shared_a", "router_weight")} | {"x": tensors["x"] * factor}
    once, other = call(recipe, tensors).results, call(recipe, tensors | moved).results
    same(other, scaled(once, dx=1 / factor, dweight=factor, dshared_a=factor, drouter_weight=factor))


@cases(40, recipe=NORMAL, factor=POWER)
def test_gradients_grow_with_what_arrives(recipe, factor):
    tensors = recipe.tensors()
    once = call(recipe, tensors).results
    more = call(recipe, tensors | {n: tensors[n] * factor for n in ("dout", "dlogits")}).results
    same(more, scaled(once, **{n: factor for n in once if n[0] == "d"}))


@cases(40, recipe=recipes())
def test_the_same_call_gives_the_same_bits_with_gradients_and_without(recipe):
    first, again = call(recipe).results, call(recipe).results
    same(again, first)
    with torch.no_grad():
        quiet = call(recipe._replace(wanted=())).results
    same(quiet, {n: first[n] for n in ("y", "logits")})


@cases(60, recipe=recipes(), wanted=SUBSETS)
def test_the_gradients_that_come_do_not_depend_on_which_are_wanted(recipe, wanted):
    every = call(recipe._replace(wanted=GRADIENTS)).results
    some = call(recipe._replace(wanted=wanted)).results
    same(some, {n: every[n] for n in some})


@cases(40, recipe=recipes())
def test_the_registered_operator_gives_the_same_bits(recipe):
    """The way in under torch.compile and torch.export, whose backward is an operator of its own."""
    eager = call(recipe).results

    def apply(*arguments):
        return torch.ops.mosld.linear(*arguments)[:2]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoSLDFunction, "apply", staticmethod(apply))
        same(call(recipe).results, eager)
    assert dispatch.MoSLDFunction is MoSLDFunction


@cases(40, recipe=recipes(kinds=("normal", "integers")))
def test_autocast_is_a_call_in_its_dtype(recipe):
    recipe = recipe._replace(dtype=torch.float32, wanted=tuple(n for n in recipe.wanted if n not in ("weight", "bias")))
    tensors = recipe.tensors()
    low = {n: tensors[n].bfloat16() for n in ("x", "weight", "bias", "dout")}
    plain = call(recipe._replace(dtype=torch.bfloat16), tensors | low).results
    given = {n: tensors[n].detach().requires_grad_(n in recipe.wanted) for n in GRADIENTS}
    with torch.autocast("cpu", torch.bfloat16), sorted_by_expert(recipe):
        seed = torch.tensor([recipe.seed]) if recipe.dropout_p else None
        y, logits = run({n: given[n] for n in recipe.present()}, recipe.settings(), seed)
    assert y.dtype == torch.bfloat16
    results = {"y": flat(y.detach()), "logits": flat(logits.detach())}
    if recipe.wanted:
        arriving = [(out, n) for out, n in ((y, "dout"), (logits, "dlogits")) if n in recipe.incoming]
        with sorted_by_expert(recipe):
            grads = torch.autograd.grad(
                [out for out, _ in arriving],
                [given[n] for n in recipe.wanted],
                [(tensors | low)[n] for _, n in arriving],
            )
        results |= {f"d{n}": flat(g) if n == "x" else g for n, g in zip(recipe.wanted, grads, strict=True)}
    same(results, {n: t.float() if n == "dx" else t for n, t in plain.items()})


@cases(150, recipe=recipes(kinds=MODERATE, layouts=("plain",), dtypes=(torch.bfloat16, *WIDE, torch.float16)))
def test_without_b_it_is_the_frozen_layer(recipe):
    """x is contiguous: of three or more dimensions that are not, torch's linear takes another product than of two."""
    recipe = recipe._replace(base=True, incoming=("dout",))
    tensors = recipe.tensors()
    tensors["expert_b"] = torch.zeros_like(tensors["expert_b"])
    results = call(recipe, tensors).results
    bias = tensors["bias"] if recipe.bias else None
    assert identical(results["y"], flat(F.linear(tensors["x"], tensors["weight"], bias)))
    for name in ("dshared_a", "drouter_weight"):
        assert name not in results or not results[name].any()
