"""The two ways in which the tests write the formula agree, so that neither is wrong by itself."""

import torch

from mosld_kernels.autograd import Inputs
from tests.hardening.properties.balls import outside
from tests.hardening.properties.formula import GRADIENTS, balls, loops
from tests.hardening.properties.profile import cases
from tests.hardening.properties.recipes import MODERATE, recipes


@cases(25, recipe=recipes(kinds=MODERATE, layouts=("plain",), dtypes=(torch.float64,)))
def test_derivatives_by_hand_are_those_of_the_loops(recipe):
    shape = recipe.shape
    few = shape._replace(T=min(shape.T, 4), D_in=min(shape.D_in, 5), D_out=min(shape.D_out, 5), R=min(shape.R, 3))
    recipe = recipe._replace(shape=few, leading=(few.T,))
    tensors = {n: t.requires_grad_(n in GRADIENTS) for n, t in recipe.tensors().items()}
    given = [tensors[n] if recipe.base or n not in ("weight", "bias") else None for n in GRADIENTS]
    inputs, settings = Inputs(*given, torch.tensor([recipe.seed])), recipe.settings()
    y, logits = loops(inputs, settings)
    wanted = [t for t in given if t is not None]
    grads = torch.autograd.grad(
        (y, logits), wanted, (tensors["dout"], tensors["dlogits"]), allow_unused=True, materialize_grads=True
    )
    results = {f"d{n}": g for n, g in zip([n for n in GRADIENTS if tensors[n] in set(wanted)], grads, strict=True)}
    results |= {"y": y, "logits": logits}
    expected = balls(inputs, settings, logits.detach(), tensors["dout"], tensors["dlogits"])
    assert expected.keys() == results.keys()
    for name, value in results.items():
        assert expected[name].known.all()
        assert (wrong := outside(value, expected[name])) is None, f"{name}: {wrong}"
