"""Any mixture of LoRA experts in three stages: two products of torch's library with a small mixing between them.

    x~ = keep_x * x / (1 - p)        A~, B~: dropout on the elements of A and of B       z~: dropout on z
    z  = x~ A~^T     l = x Wr^T      h = s * mix(z~, l)       y = x W0^T + b0 + h B~^T

`mix` is plain differentiable torch on [T, R_in] and [T, n]; the products are those of `stages`.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .bits import draw_bits, zeroed
from .checks import check_input, check_seed
from .precision import FLOATS, autocasts, castable_dtypes, no_autocast, product_dtype, router_dtype
from .products import frozen, multiplies_apart
from .stages import Down, Up, drop_weight
from .transforms import needs_plain_operators

Mix = Callable[[Tensor, Tensor | None], Tensor]
UP_STREAM = 1  # of the mask on B; that of A has stream 0


@dataclass(frozen=True)
class Dropout:
    """Probabilities in [0, 1] of dropping elements. All scale what stays by 1 / (1 - p)."""

    down: float = 0.0  # of A
    up: float = 0.0  # of B
    x: float = 0.0  # of x before A
    z: float = 0.0  # of z

    def __post_init__(self):
        for name, p in vars(self).items():
            if not 0 <= p <= 1:
                raise ValueError(f"dropout on {name} must be in [0, 1], got {p}")


def staged_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    down_weight: Tensor,
    up_weight: Tensor,
    mix: Mix,
    *,
    scale: float,
    router_weight: Tensor | None = None,
    dropout: Dropout | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A linear layer with any mixture beside it: y = x W0^T + b0 + s mix(x~ A~^T, x Wr^T) B~^T.

    The adapter's weights are cast to x's dtype, and their gradients come back in their own.

    Args:
        x: [..., D_in].
        weight: [D_out, D_in], the base layer in x's dtype, or None for the update alone.
        bias: [D_out] or None, in x's dtype.
        down_weight: [R_in, D_in], every row of every A once.
        up_weight: [D_out, R_out].
        mix: (z [..., R_in], router logits [..., n] or None) -> h [..., R_out], both in the routing's dtype (float32, or
            float64 for float64 x). It must treat tokens apart if the layer shall; see `mosld_kernels.mixing`.
        scale: s = alpha / R.
        router_weight: [n, D_in] or None.
        dropout: where it falls. Masks on x and z are drawn from torch's generator.
        seed: int64 [1], needed for dropout on elements of A or B, whose masks are pure functions of it.

    Returns:
        y [..., D_out] in x's dtype (the autocast dtype under autocast), and the router logits [..., n] or None.

    Raises:
        ValueError: for shapes and values that do not fit, with the rule and the value.
    """
    dropout = dropout or Dropout()
    dtype = product_dtype(x)
    _check_shapes(x, weight, bias, down_weight, up_weight, router_weight)
    _check_kinds(x, weight, bias, down_weight, up_weight, router_weight, dtype)
    _check_seed(x, dropout, seed)
    with no_autocast(x.device.type) if autocasts(x) else contextlib.nullcontext():
        down_weight = drop_weight(down_weight, dropout.down, seed, 0, dtype)
        up_weight = drop_weight(up_weight, dropout.up, seed, UP_STREAM, dtype)
        # What is cast is cast here: from now on everything but the mixing is in the products' dtype.
        x = x.to(dtype)
        weight = None if weight is None else weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        router_weight = None if router_weight is None else router_weight.to(dtype)
        return _products(x, weight, bias, down_weight, up_weight, router_weight, mix, scale, dropout)


def _products(x, weight, bias, down_weight, up_weight, router_weight, mix: Mix, scale: float, dropout: Dropout):
    """All in one dtype, x [..., D_in] -> y [..., D_out], router logits [..., n] or None"""
    base = None
    if weight is not None and multiplies_apart(x):
        base, weight, bias = frozen(x, weight, bias), None, None
    leading, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
    keep = draw_bits(x, dropout.x) if dropout.x else None
    # torch.compile and tensors without memory want operators that they know.
    is_plain_tensor = type(x) in (Tensor, torch.nn.Parameter)
    by_products = is_plain_tensor and not torch.compiler.is_compiling() and not needs_plain_operators()
    if by_products:
        x, z, logits = Down.apply(x, down_weight, router_weight, keep)  # pyright: ignore
    else:
        z = F.linear(zeroed(x, keep), down_weight)
        logits = None if router_weight is None else F.linear(x, router_weight)
    routed = router_dtype(x.dtype)
    if logits is not None:
        logits = logits.to(routed).view(*leading, logits.shape[1])
    z = z.to(routed).view(*leading, z.shape[1])
    if 0 < dropout.x < 1:
        z = z / (1 - dropout.x)  # the scale of what stays of x, on the smaller side of the product
    z = F.dropout(z, dropout.z)
    h = (scale * mix(z, logits)).to(x.dtype)
    if h.shape != (*leading, up_weight.shape[1]):
        raise ValueError(
            f"mix must return [..., R_out] = {[*leading, up_weight.shape[1]]} for up_weight "
            f"{list(up_weight.shape)}, got {list(h.shape)}"
        )
    h = h.reshape(-1, h.shape[-1])
    if by_products:
        out = Up.apply(x, weight, bias, h, up_weight)
    else:
        out = F.linear(h, up_weight) if weight is None else F.linear(x, weight, bias) + F.linear(h, up_weight)
    out = out.view(*leading, out.shape[1])  # pyright: ignore[reportOptionalMemberAccess]
    return out if base is None else base + out, logits


def _check_shapes(x, weight, bias, down_weight, up_weight, router_weight) -> None:
    check_input(x)
    d_in = x.shape[-1]
    for name, rule, tensor in (("down_weight", "R_in", down_weight), ("router_weight", "n", router_weight)):
        if tensor is not None and (tensor.dim() != 2 or tensor.shape[1] != d_in):
            raise ValueError(f"{name} must be [{rule}, D_in] with D_in={d_in}, got {list(tensor.shape)}")
    if up_weight.dim() != 2:
        raise ValueError(f"up_weight must be [D_out, R_out], got {list(up_weight.shape)}")
    d_out = len(up_weight)
    if weight is not None and weight.shape != (d_out, d_in):
        raise ValueError(f"weight must be [D_out, D_in] = {[d_out, d_in]}, got {list(weight.shape)}")
    if bias is not None and weight is None:
        raise ValueError(f"bias must come with weight, which is None, got {list(bias.shape)}")
    if bias is not None and bias.shape != (d_out,):
        raise ValueError(f"bias must be [D_out] = {[d_out]}, got {list(bias.shape)}")


def _check_kinds(x, weight, bias, down_weight, up_weight, router_weight, dtype: torch.dtype) -> None:
    """dtype: of the products. Autocast casts x and the base to it from floats of at most 32 bits, and nothing else."""
    castable = castable_dtypes(x, dtype)
    base = {"weight": weight, "bias": bias}
    adapter = {"down_weight": down_weight, "up_weight": up_weight, "router_weight": router_weight}
    for name, tensor in {**base, **adapter}.items():
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
        if name in base and tensor.dtype not in castable:
            raise ValueError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}")
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def _check_seed(x: Tensor, dropout: Dropout, seed: Tensor | None) -> None:
    if not (dropout.down or dropout.up):
        return
    if seed is None:
        raise ValueError("dropout on elements of A or B needs a seed: an int64 tensor of shape [1]")
    check_seed(seed, x.device)
