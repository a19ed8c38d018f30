"""Any mixture of LoRA experts in three stages: two products of torch's library with a small mixing between them.

    x~ = keep_x * x / (1 - p)        A~, B~: dropout on the elements of A and of B       z~: dropout on z
    z  = x~ A~^T     l = x Wr^T      h = s * mix(z~, l)       y = x W0^T + b0 + h B~^T

`mix` is plain differentiable torch on [T, R_in] and [T, n]. What the products save for backward is x, h and the two
adapter weights; of a dropout on x one bit an element, of those on A and B the seed. The gradient of x is accumulated
by the products themselves: `_Down` hands x on to `_Up`, so that what `_Up` owes x arrives in `_Down`'s backward.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .autograd import no_autocast
from .dispatch import FLOATS, TRITON_FLOATS, _describe, _product_dtype, autocasts
from .dropout import check_seed, drop_elements, keep_mask
from .products import add_mm, mm, mm_sum
from .reference import router_dtype

Mix = Callable[[Tensor, Tensor | None], Tensor]
UP_STREAM = 1  # of the mask on B; that of A has stream 0


@dataclass(frozen=True)
class Dropout:
    """Probabilities in [0, 1] of dropping elements of A, of B, of x before A, and of z. All scale what stays by 1 / (1 - p)."""

    down: float = 0.0
    up: float = 0.0
    x: float = 0.0
    z: float = 0.0

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

    x: [..., D_in]. weight: [D_out, D_in], the base layer, or None for the update alone. bias: [D_out] or None. Both in
        x's dtype.
    down_weight: [R_in, D_in], every row of every A once. up_weight: [D_out, R_out]. router_weight: [n, D_in] or None.
        They are cast to x's dtype, and their gradients come back in their own.
    mix: (z [..., R_in], router logits [..., n] or None) -> h [..., R_out], both in the routing's dtype (float32, or
        float64 for float64 x). It must treat tokens apart if the layer shall; see `mosld_kernels.mixing`.
    dropout: where it falls. seed: int64 [1], needed for dropout on elements of A or B, whose masks are pure functions
        of it; those on x and z are drawn from torch's generator.

    returns y [..., D_out] in x's dtype (the autocast dtype under autocast) and the router logits [..., n] or None.
    raises ValueError for shapes and values that do not fit, with the rule and the value.
    """
    dropout = dropout or Dropout()
    dtype = _product_dtype(x)
    _check_shapes(x, weight, bias, down_weight, up_weight, router_weight)
    _check_kinds(x, weight, bias, down_weight, up_weight, router_weight, dtype)
    _check_seed(x, dropout, seed)
    with no_autocast(x.device.type) if autocasts(x) else contextlib.nullcontext():
        x = x.to(dtype)
        down_weight = _dropped(down_weight, dropout.down, seed, 0, dtype)
        up_weight = _dropped(up_weight, dropout.up, seed, UP_STREAM, dtype)
        if router_weight is not None:
            router_weight = router_weight.to(dtype)
        if weight is not None:
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        leading, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
        keep = draw_bits(x, dropout.x) if dropout.x else None
        by_products = not torch.compiler.is_compiling() and type(x) in (Tensor, torch.nn.Parameter)
        if by_products:
            x, z, logits = _Down.apply(x, down_weight, router_weight, keep)  # pyright: ignore
        else:
            z = F.linear(zeroed(x, keep), down_weight)
            logits = None if router_weight is None else F.linear(x, router_weight)
        routed = router_dtype(dtype)
        if logits is not None:
            logits = logits.to(routed).view(*leading, logits.shape[1])
        z = z.to(routed).view(*leading, z.shape[1])
        if 0 < dropout.x < 1:
            z = z / (1 - dropout.x)  # the scale of what stays of x, on the smaller side of the product
        z = F.dropout(z, dropout.z)
        h = (scale * mix(z, logits)).to(dtype)
        if h.shape != (*leading, up_weight.shape[1]):
            raise ValueError(
                f"mix must return [..., R_out] = {[*leading, up_weight.shape[1]]} for up_weight "
                f"{list(up_weight.shape)}, got {list(h.shape)}"
            )
        h = h.reshape(-1, h.shape[-1])
        if by_products:
            out = _Up.apply(x, weight, bias, h, up_weight)
        else:
            out = F.linear(h, up_weight) if weight is None else F.linear(x, weight, bias) + F.linear(h, up_weight)
    return out.view(*leading, out.shape[1]), logits  # pyright: ignore


class _Down(torch.autograd.Function):
    """x [T, D_in] -> x again, z [T, R_in], logits [T, n] or None. The x that comes back is for `_Up` alone."""

    @staticmethod
    def forward(ctx, x, down_weight, router_weight, keep):
        ctx.save_for_backward(x, down_weight, router_weight, keep)
        ctx.set_materialize_grads(False)
        needs_x, needs_down, needs_router = ctx.needs_input_grad[:3]
        rows = len(down_weight)
        if keep is not None:
            z, logits = mm(zeroed(x, keep), down_weight.t()), None
            if router_weight is not None:
                logits = mm(x, router_weight.t())
        elif router_weight is None:
            z, logits = mm(x, down_weight.t()), None
        else:  # one pass over x
            both = mm(x, torch.cat((down_weight, router_weight)).t())
            z, logits = both[:, :rows].contiguous(), both[:, rows:].contiguous()
        x = x.view_as(x)
        # An output asks for a gradient when any input does. What would arrive for these reaches nobody, and the one of x
        # costs a product with the base weight.
        asked = ((x, needs_x), (z, needs_x or needs_down), (logits, needs_x or needs_router))
        ctx.mark_non_differentiable(*(out for out, needed in asked if out is not None and not needed))
        return x, z, logits

    @staticmethod
    @once_differentiable
    def backward(ctx, dx, dz, dlogits):
        x, down_weight, router_weight, keep = ctx.saved_tensors
        needs_x, needs_down, needs_router = ctx.needs_input_grad[:3]
        ddown = drouter = None
        dz = None if dz is None else dz.contiguous()
        if dz is not None:
            if needs_down:
                ddown = mm(dz.t(), zeroed(x, keep))
            if needs_x and keep is None:
                dx = mm(dz, down_weight) if dx is None else add_mm(dx, dz, down_weight)
            elif needs_x:
                own = zeroed(mm(dz, down_weight), keep)
                dx = own if dx is None else dx.add_(own)
        if dlogits is not None:
            dlogits = dlogits.contiguous()
            if needs_router:
                drouter = mm(dlogits.t(), x)
            if needs_x:
                dx = mm(dlogits, router_weight) if dx is None else add_mm(dx, dlogits, router_weight)
        return dx if needs_x else None, ddown, drouter, None


class _Up(torch.autograd.Function):
    """x [T, D_in] as `_Down` returned it, h [T, R_out] -> out [T, D_out]: the base product and the update."""

    @staticmethod
    def forward(ctx, x, weight, bias, h, up_weight):
        trains_base = weight is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(x if trains_base else None, weight, h, up_weight)
        update = (h, up_weight.t())
        return mm(*update) if weight is None else mm_sum((x, weight.t()), update, bias, as_frozen=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, weight, h, up_weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_h, needs_up = ctx.needs_input_grad
        dout = dout.contiguous()
        return (
            mm(dout, weight) if needs_x and weight is not None else None,
            mm(dout.t(), x) if needs_weight else None,
            dout.sum(0) if needs_bias else None,
            mm(dout, up_weight) if needs_h else None,
            mm(h.t(), dout).t().contiguous() if needs_up else None,  # walks dout in memory order
        )


class _DropElements(torch.autograd.Function):
    """Dropout on the elements of a weight, in `dtype`; the mask is drawn again in backward."""

    @staticmethod
    def forward(ctx, values, p, seed, stream, dtype):
        ctx.save_for_backward(seed)
        ctx.set_materialize_grads(False)
        ctx.p, ctx.stream, ctx.dtype = p, stream, values.dtype
        return drop_elements(values, keep_mask(seed, values.shape, p, stream_id=stream), p, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dropped):
        (seed,), dvalues = ctx.saved_tensors, dropped[0]
        if dvalues is not None:
            keep = keep_mask(seed, dvalues.shape, ctx.p, stream_id=ctx.stream)
            dvalues = drop_elements(dvalues, keep, ctx.p, ctx.dtype)
        return dvalues, None, None, None, None


def _dropped(values: Tensor, p: float, seed: Tensor | None, stream: int, dtype: torch.dtype) -> Tensor:
    """keep * values / (1 - p), scaled in the wider of the two dtypes and rounded once"""
    if not p:
        return values.to(dtype)
    assert seed is not None
    if torch.compiler.is_compiling():
        return drop_elements(values, keep_mask(seed, values.shape, p, stream_id=stream), p, dtype)
    return _DropElements.apply(values, p, seed, stream, dtype)  # pyright: ignore


DIGITS = 24  # of the binary fraction 1 - p: as exact as float32


def draw_bits(x: Tensor, p: float) -> Tensor:
    """A mask for x [T, D] drawn from torch's generator -> uint8, eight elements a byte: each bit is 1 with probability 1 - p

    From random words, one for each binary digit of 1 - p, 64 elements at a time: w | r has probability (P(w) + 1) / 2,
    w & r has P(w) / 2. A tenth of the time that drawing a number for every element takes on a CPU.
    """
    level, digits = round((1 - p) * 2**DIGITS), DIGITS
    words = torch.full((-(-x.numel() // 64),), -1 if level == 2**DIGITS else 0, dtype=torch.int64, device=x.device)
    if 0 < level < 2**DIGITS:
        while level % 2 == 0:  # a last digit of 0 does nothing to a word of zeros
            level, digits = level // 2, digits - 1
        for digit in range(digits):
            # Not randint_like: torch.compile takes two such calls with the same arguments for one, and their masks would be equal.
            random = torch.randint(-(2**63), 2**63 - 1, words.shape, device=x.device)
            words = words | random if level >> digit & 1 else words & random
    return words.view(torch.uint8)


def unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """uint8 as `draw_bits` made it -> bool of `shape`"""
    one_each = (1 << torch.arange(8, dtype=torch.uint8, device=bits.device)).unsqueeze(1)
    # Element e is bit e // n of byte e % n, for n bytes: two passes over neighbours.
    return (bits & one_each).ne(0).flatten()[: shape.numel()].view(shape)


def zeroed(x: Tensor, bits: Tensor | None) -> Tensor:
    """x where the mask has a 1, zero elsewhere; x itself without a mask"""
    return x if bits is None else torch.where(unpacked(bits, x.shape), x, 0.0)


def _check_shapes(x, weight, bias, down_weight, up_weight, router_weight) -> None:
    if x.dim() == 0 or x.shape[-1] == 0 or x.dtype not in FLOATS:
        raise ValueError(f"x must be a floating-point [..., D_in] with D_in at least 1, got {_describe(x)}")
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
    """dtype: of the products. Autocast casts x and the base to it from a float of at most 32 bits; nothing else is cast."""
    castable = TRITON_FLOATS if dtype != torch.float64 and autocasts(x) else (x.dtype,)
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
    check_seed(seed)
    if seed.device != x.device:
        raise ValueError(f"seed must be on x's device {x.device}, got {seed.device}")
