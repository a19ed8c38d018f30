"""Under autocast the inputs are cast and nothing else is: the same bits as with inputs that were cast before."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mosld_kernels import mosld_linear, products
from tests.helpers.inputs import Shape, make_case
from tests.helpers.runs import PLACES, SEED

SHAPES = [Shape(65, 33, 129, 16, 3, 2), Shape(130, 40, 72, 5, 64, 2)]  # the second is sorted by expert


class Products(TorchDispatchMode):
    """Notes every product of matrices with the dtypes that it really gets."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(word in str(function) for word in ("mm", "linear")):
            self.seen.append((str(function), *(arg.dtype for arg in args if isinstance(arg, torch.Tensor))))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_gradients", [True, False], ids=["gradients", "no-gradients"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_inside_is_cast_again(shape, dtype, with_gradients, monkeypatch):
    # As on a processor without instructions for `dtype`: its products run in float32, which autocast would cast back.
    monkeypatch.setattr(products, "lacks", lambda used: used == dtype)
    case, results, products_seen = make_case(shape).to(torch.float32), [], []
    for autocast in (False, True):
        cast = 0 if autocast else 3  # x, weight and bias
        inputs = [t.to(dtype) if i < cast else t.clone() for i, t in enumerate(case[:6])]
        inputs = [t.requires_grad_(i in PLACES) for i, t in enumerate(inputs)]
        with (
            torch.autocast("cpu", dtype, enabled=autocast),
            torch.set_grad_enabled(with_gradients),
            Products() as noted,
        ):
            y, logits = mosld_linear(*inputs, top_k=2, scale=2.0, dropout_p=0.2, seed=torch.tensor([SEED]))
        products_seen.append(noted.seen)
        results.append([y, logits])
        if with_gradients:
            trained = [inputs[place] for place in PLACES]
            grads = torch.autograd.grad((y, logits), trained, (case.dout.to(dtype), case.dlogits))
            results[-1] += [grad.float() for grad in grads]
    assert products_seen[0] == products_seen[1] and len(products_seen[0]) >= 3
    for outside, inside in zip(*results, strict=True):
        assert torch.equal(outside, inside)
