"""The operator against the formula in float64: values and all gradients, of any shape, layout, dtype and numbers."""

from collections import Counter

import torch
from hypothesis import strategies as st

from tests.hardening.properties.balls import outside
from tests.hardening.properties.formula import balls
from tests.hardening.properties.profile import cases
from tests.hardening.properties.recipes import INSERTED, Recipe, call, flat, identical, insert, recipes
from tests.helpers.inputs import torch_spreads_nan


def judge(recipe: Recipe, tensors: dict | None = None) -> Counter:
    """Values and all wanted gradients of one call -> how many numbers were judged, and how many could be anything"""
    inputs, results, dout, dlogits = call(recipe, tensors)
    expected = balls(inputs, recipe.settings(), results["logits"], dout, dlogits, recipe.by_tokens)
    count = Counter()
    for name, value in results.items():
        wrong = outside(value, expected[name])
        assert wrong is None, f"{name}: {wrong}"
        count += Counter(judged=value.numel(), anything=int((~expected[name].known).sum()))
    return count


def where_nan_stays(recipe: Recipe) -> Recipe:
    """The recipe, in float32 where torch's own products of these sizes would spread what is not finite."""
    odd = any(size % 2 for size in recipe.shape[:5])
    spreads = odd and (torch_spreads_nan(recipe.dtype) or torch_spreads_nan(recipe.adapter_dtype))
    return recipe._replace(dtype=torch.float32, adapter_dtype=torch.float32) if spreads else recipe


@cases(300, recipe=recipes())
def test_every_number_is_where_rounding_can_take_it(recipe):
    count = judge(recipe)
    if torch.float16 not in (recipe.dtype, recipe.adapter_dtype):  # which overflows
        assert not count["anything"]


@cases(150, recipe=recipes(), where=st.lists(INSERTED, min_size=1, max_size=3))
def test_what_is_not_finite_spoils_only_what_the_formula_says(recipe, where):
    """Infinities, NaN, the largest and the smallest numbers anywhere: no number that has a finite value is touched."""
    recipe = where_nan_stays(recipe)
    tensors = recipe.tensors()
    insert(tensors, where)
    judge(recipe, tensors)


@cases(
    100, recipe=recipes(kinds=("normal", "integers")), token=st.integers(0, 64), value=st.sampled_from(("nan", "inf"))
)
def test_a_token_that_is_not_finite_is_not_hidden_and_stays_alone(recipe, token, value):
    if not recipe.shape.T:
        return
    recipe = where_nan_stays(recipe)
    tensors = recipe.tensors()
    x = flat(tensors["x"]).clone()
    token %= len(x)
    x[token] = float(value)
    plain = {"x": flat(tensors["x"]).clone().view(tensors["x"].shape)}
    clean = call(recipe, tensors | plain).results
    spoiled = call(recipe, tensors | {"x": x.view(tensors["x"].shape)}).results
    others = torch.arange(len(x)) != token
    if recipe.base:  # without one B may be zero, and the update with it
        assert not spoiled["y"][token].isfinite().any()
    for name in ("y", "logits", "dx"):
        if name in clean and _keeps_bits(recipe, name):
            assert identical(spoiled[name][others], clean[name][others]), name


def _keeps_bits(recipe: Recipe, name: str) -> bool:
    """Sorted by expert a token's neighbours in a block depend on the others, and the bits with them."""
    return not recipe.by_tokens or recipe.shape.mixing == "diagonal" or name == "logits"
