"""One call of an operator with all its gradients, and its accuracy against float64: the same for every backend."""

import torch
from torch import Tensor

from mosld_kernels import mosld_linear, reference
from tests.helpers.accuracy import assert_no_less_accurate
from tests.helpers.inputs import Case, Shape, make_case

SEED = 20240731
NAMES = ("x", "shared_a", "expert_b", "router_weight")
PLACES = (0, 3, 4, 5)  # of the trained tensors among an operator's arguments


def run(function, case: Case, shape: Shape, p=0.2, bias=True, device="cpu", **options) -> dict[str, Tensor]:
    """-> y, logits, and the gradients of x, A, B and the router for incoming gradients at both outputs"""
    inputs = [tensor.to(device, copy=True).requires_grad_(i in PLACES) for i, tensor in enumerate(case[:6])]
    if not bias:
        inputs[2] = None
    seed = torch.tensor([SEED], device=device)
    y, logits = function(*inputs, top_k=shape.K, scale=2.0, dropout_p=p, seed=seed, mixing=shape.mixing, **options)
    trained = [inputs[place] for place in PLACES]
    incoming = (case.dout.to(device, y.dtype), case.dlogits.to(device, logits.dtype))
    grads = torch.autograd.grad((y, logits), trained, incoming)
    return dict(y=y, logits=logits, **{f"d{name}": grad for name, grad in zip(NAMES, grads, strict=True)})


def assert_accurate(
    shape: Shape,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None = None,
    p: float = 0.2,
    draws: int = 4,
    bias: bool = True,
    device: str = "cpu",
    **options,
) -> None:
    """Several draws together: in a shape of few elements one draw's error is luck."""
    truth, eager, ours = [], [], []
    for seed in range(draws):
        exact, case = make_cases(shape, dtype, adapter_dtype or dtype, seed)
        truth.append(run(reference.mosld_linear, exact, shape, p, bias, device))
        eager.append(run(reference.mosld_linear, case, shape, p, bias, device))
        ours.append(run(mosld_linear, case, shape, p, bias, device, **options))
    for name in truth[0]:
        joined = (torch.cat([draw[name].flatten() for draw in draws]) for draws in (ours, eager, truth))
        assert_no_less_accurate(*joined, f"{name} {dtype} {adapter_dtype}")


def make_cases(shape: Shape, dtype: torch.dtype, adapter_dtype: torch.dtype, seed: int) -> tuple[Case, Case]:
    """-> one case in float64, and the same numbers with x and the base in `dtype`, the adapter in `adapter_dtype`"""
    kinds = {dtype, adapter_dtype}
    # Numbers that both hold: bfloat16 has the fewest digits, float16 the next.
    held = next((kind for kind in (torch.bfloat16, torch.float16) if kind in kinds), dtype)
    exact = make_case(shape, held, seed)
    adapter = {name: getattr(exact, name).to(adapter_dtype) for name in NAMES[1:]}
    return exact, exact.to(dtype)._replace(**adapter)
