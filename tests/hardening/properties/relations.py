"""What a call of the operator must have in common with other calls: one relation, judged in two ways.

Whole: all numbers are small integers, in float64, and all gates powers of two: nothing is rounded, and bits must agree.
Real: any dtype and real numbers; the two sides may differ by what rounding can do to each. Logits are whole here, too,
or rounding them could choose other experts on one side.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.hardening.properties.balls import Ball
from tests.hardening.properties.formula import GRADIENTS, balls
from tests.hardening.properties.recipes import DTYPES, Recipe, call, laid_out, shapes

Results = dict[str, Tensor]
ROUTING = 8  # features that the router looks at, so that bfloat16 holds its logits
MOST_APART = 9  # experts, or groups of them, whose logits are told apart by sixteenths


class Other(NamedTuple):
    """Another call: its recipe, its tensors, and other values of its settings."""

    recipe: Recipe
    tensors: dict[str, Tensor]
    changes: dict[str, Any] = {}  # noqa: RUF012  never written to


@st.composite
def related(draw, dtypes=DTYPES, dropout=(0.0, 0.5, 0.1)) -> tuple[Recipe, bool]:
    """-> a recipe that wants everything, and whether it is whole"""
    whole = draw(st.booleans())
    shape, leading = draw(shapes(most_tokens=33))
    if whole:
        top_k = draw(st.sampled_from((2, 1, 4)))
        shape = shape._replace(E=draw(st.sampled_from((3, 1, 2, 5))) * top_k, K=top_k)
    elif shape.E > MOST_APART:
        shape = shape._replace(E=MOST_APART, K=min(shape.K, MOST_APART))
    dtype = torch.float64 if whole else draw(st.sampled_from(dtypes))
    base = draw(st.booleans())
    kinds = dict.fromkeys(("weight", "bias", "shared_a", "dout", "dlogits"), "signs" if whole else "normal")
    layouts = st.sampled_from(("plain", "plain", "transposed", "strided", "offset"))
    recipe = Recipe(
        shape,
        (shape.T,),
        dtype,
        dtype if whole else draw(st.sampled_from((dtype, torch.float32))),
        dropout_p=draw(st.sampled_from(dropout[:2] if whole else dropout)),
        scale=draw(st.sampled_from((2.0, 1.0, 0.5, -1.0))),
        base=base,
        bias=base and draw(st.booleans()),
        wanted=GRADIENTS,
        incoming=("dout", "dlogits"),
        kinds=kinds | {"x": "signs", "router_weight": "signs", "expert_b": "signs" if whole else "coarse"},
        layouts={name: draw(layouts) for name in (*GRADIENTS, "dout", "dlogits")},
        by_tokens=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
    return recipe, whole


def tensors_of(recipe: Recipe, whole: bool) -> dict[str, Tensor]:
    """The recipe's own, with a router that gives no two experts equal logits.

    Where all is whole no two groups of K experts have equal logits, and the experts of one group have, so that gates
    are 1 / K.
    """
    tensors, group = recipe.tensors(), recipe.shape.K if whole else 1
    router, x = tensors["router_weight"][::group].clone(), tensors["x"].clone()
    x[:, 0] = 1
    router[:, 0] = torch.arange(len(router)) / 16  # the other features' part is whole
    router[:, ROUTING:] = 0
    router = router.repeat_interleave(group, 0)
    return tensors | {
        "x": laid_out(x, recipe.layouts["x"]),
        "router_weight": laid_out(router, recipe.layouts["router_weight"]),
    }


def hold(
    recipe: Recipe, tensors: dict[str, Tensor], whole: bool, others: list[Other],
    combine: Callable[..., Results],
) -> tuple[Results, list[Results]]:  # fmt: skip
    """What the call returns is what `combine` makes of the other calls' results, one dict each, in all that it names.

    combine: only permutes, joins, adds and scales by positive numbers, so that it combines radii, too.
    -> the call's results and the others'
    """
    mine, mine_balls = _judged(Other(recipe, tensors), whole)
    judged = [_judged(other, whole) for other in others]
    expected = combine(*(results for results, _ in judged))
    assert expected
    radii = combine(*({n: b.rad for n, b in balls.items()} for _, balls in judged)) if not whole else {}
    for name, value in expected.items():
        assert value.shape == mine[name].shape, name
        if whole:
            assert torch.equal(mine[name], value), name
            continue
        apart = (mine[name].double() - value.double()).abs()
        # Combining rounds in its own dtype, if there is something to combine.
        allowed = mine_balls[name].rad + radii[name] + torch.finfo(value.dtype).eps * value.double().abs()
        assert (apart <= allowed).all(), f"{name}: {(apart / allowed).max().item():.3g} times what rounding can do"
    return mine, [results for results, _ in judged]


def _judged(other: Other, whole: bool) -> tuple[Results, dict[str, Ball]]:
    recipe, tensors, changes = other
    inputs, results, dout, dlogits = call(recipe, tensors, **changes)
    if whole:
        return results, {}
    settings = recipe.settings()._replace(**changes)
    return results, balls(inputs, settings, results["logits"], dout, dlogits, recipe.by_tokens)
