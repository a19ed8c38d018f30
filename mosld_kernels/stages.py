"""The two products beside a mixing, with their closed-form backward, and dropout on the weights between them.

    z = x~ A~^T     l = x Wr^T     Down          y = x W0^T + b0 + h B~^T     Up

What they save for backward is x, h and the two adapter weights; of a dropout on x one bit an element, of one on a
weight the seed. The gradient of x is accumulated by the products themselves: `Down` hands x on to `Up`, so that what
`Up` has for x arrives in `Down`'s backward.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .bits import zeroed
from .dropout import drop_elements, keep_mask
from .products import add_mm, dense_up, mm
from .transforms import needs_plain_operators


class Down(torch.autograd.Function):
    """x [T, D_in] -> x again, z [T, R_in], logits [T, n] or None. The x that comes back is for `Up` alone."""

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
        # An output asks for a gradient when any input does. What would arrive for these reaches nobody, and the one of
        # x costs a product with the base weight.
        unneeded = []
        if not needs_x:
            unneeded.append(x)
            if not needs_down:
                unneeded.append(z)
            if logits is not None and not needs_router:
                unneeded.append(logits)
        ctx.mark_non_differentiable(*unneeded)
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


class Up(torch.autograd.Function):
    """x [T, D_in] as `Down` returned it, h [T, R_out] -> out [T, D_out]: the base product and the update."""

    @staticmethod
    def forward(ctx, x, weight, bias, h, up_weight):
        trains_base = weight is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(x if trains_base else None, weight, h, up_weight)
        return dense_up(x, weight, bias, h, up_weight)

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


def drop_weight(values: Tensor, p: float, seed: Tensor | None, stream: int, dtype: torch.dtype) -> Tensor:
    """keep * values / (1 - p), scaled in the wider of the two dtypes and rounded once"""
    if not p:
        return values.to(dtype)
    assert seed is not None
    if torch.compiler.is_compiling() or needs_plain_operators():
        return drop_elements(values, keep_mask(seed, values.shape, p, stream_id=stream), p, dtype)
    return _DropElements.apply(values, p, seed, stream, dtype)  # pyright: ignore
