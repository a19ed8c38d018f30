"""Products of matrices by whichever of torch's libraries is fastest for them; on a GPU that is torch.mm.

On a CPU torch.mm hands float32 to MKL, and 16-bit floats to oneDNN where the processor has instructions for them and
to plain loops, a hundred times slower, where it has not. So on AMD processors short float32 sums go to oneDNN, which is
up to a third faster there (`docs/design/decisions.md` has the measurements), and 16-bit floats that the processor
cannot multiply go through float32. Both are decided by the processor and the sizes alone: the same inputs give the same
bits.
The frozen layer's own product in forward stays torch's, because a fresh layer equals the frozen one bit for bit.
"""

import contextlib
import functools
import platform

import torch
from torch import Tensor
from torch.nn import functional as F

from .precision import autocasts, no_autocast
from .transforms import needs_plain_operators

FEWEST_FLOP = 8_000_000  # oneDNN's operator costs 15 us more to call; below, that is more than it saves
# It adds up one product after the other, MKL in blocks of at most this length: up to here both round alike. Beyond,
# where rounding errors do not cancel (all terms of one sign), oneDNN is up to twice as far from the truth as MKL, and
# more than 1.5 times is not allowed. Cutting longer sums as MKL does costs what oneDNN saves.
LONGEST_SUM = 192


def mm(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, S], b [S, N], bias [N] -> a b + bias [M, N], all in one dtype"""
    if a.device.type == "cpu":
        if lacks(a.dtype):
            return mm(a.float(), b.float(), None if bias is None else bias.float()).to(a.dtype)
        if a.dtype == torch.float32 and _onednn_is_faster(a, b):
            return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def mm_sum(
    large: tuple[Tensor, Tensor], small: tuple[Tensor, Tensor], bias: Tensor | None = None, as_frozen: bool = False
) -> Tensor:
    """large [M, S] x [S, N], small [M, s] x [s, N] with s far below S, bias [N] -> both products and the bias, added

    as_frozen: with a small product of zeros the result is bit for bit that of torch.nn.functional.linear.
    """
    a, b = large
    if a.device.type == "cpu" and not as_frozen:
        return add_mm(mm(a, b, bias), *small)
    # The large product accumulates onto the stored small one: the other way round takes one more pass over the sum.
    return mm(*small, bias).addmm_(a, b)


def multiplies_apart(x: Tensor) -> bool:
    """Whether torch multiplies x [..., D_in] batch by batch where its rows do not lie one after the other, as those of
    [tokens, batch, D_in] that was transposed: the product of all rows at once has other last bits.
    """
    return x.dim() > 2 and not x.is_contiguous()


def frozen(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The frozen layer's own product, by torch, whatever lies where; in the dtypes that are given."""
    is_plain_tensor = type(x) in (Tensor, torch.nn.Parameter)
    with no_autocast(x.device.type) if autocasts(x) else contextlib.nullcontext():
        if is_plain_tensor and not torch.compiler.is_compiling() and not needs_plain_operators():
            return _Frozen.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
        return F.linear(x, weight, bias)


class _Frozen(torch.autograd.Function):
    """torch's linear layer over a frozen weight, with gradients that do not depend on which are wanted.

    torch chooses the product by what asks for a gradient, in forward and in backward.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.detach(), weight.detach(), None if bias is None else bias.detach())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        flat = dout.reshape(-1, dout.shape[-1])
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        dx = mm(flat, weight).view(x.shape) if wants_x else None
        dweight = mm(flat.t(), x.reshape(-1, x.shape[-1])) if wants_weight else None
        return dx, dweight, flat.sum(0) if wants_bias else None


def add_mm(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out [M, N] += a [M, S] b [S, N], in place"""
    return out.add_(mm(a, b)) if a.device.type == "cpu" and lacks(a.dtype) else out.addmm_(a, b)


def bmm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a [N, M, S], b [N, S, L] -> out [N, M, L]"""
    if a.device.type == "cpu" and lacks(a.dtype):
        return out.copy_(torch.bmm(a.float(), b.float()))
    return torch.bmm(a, b, out=out)


def dense_up(x: Tensor, weight: Tensor | None, bias: Tensor | None, mixed: Tensor, expert_b: Tensor) -> Tensor:
    """x [T, D_in], weight [D_out, D_in], bias [D_out], mixed [T, E * R], expert_b [D_out, E * R]
    -> out [T, D_out]: the base product and the update, the update alone without a weight"""
    update = (mixed, expert_b.t())
    return mm(*update, bias) if weight is None else mm_sum((x, weight.t()), update, bias, as_frozen=True)


def grad_x(dout: Tensor, weight: Tensor | None, dprojected: Tensor, down_weight: Tensor) -> Tensor:
    """dout [T, D_out], weight [D_out, D_in], dprojected [T, Z + E], down_weight [Z + E, D_in] -> dx [T, D_in]"""
    update = (dprojected, down_weight)
    return mm(*update) if weight is None else mm_sum((dout, weight), update)


@functools.cache
def lacks(dtype: torch.dtype) -> bool:
    """Whether this processor has no instructions for products in `dtype`, as far as torch uses them."""
    supported = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    if dtype not in supported:
        return False
    # A torch that cannot be asked keeps its own products.
    is_supported = getattr(torch.ops.mkldnn, supported[dtype], None)
    return is_supported is not None and not is_supported()


def _onednn_is_faster(a: Tensor, b: Tensor) -> bool:
    rows, summed = a.shape
    return summed <= LONGEST_SUM and 2 * rows * summed * b.shape[1] >= FEWEST_FLOP and _prefers_onednn()


def _prefers_onednn() -> bool:
    return torch.backends.mkldnn.enabled and _is_amd_with_onednn()  # pyright: ignore: the flag is set on the module


@functools.cache
def _is_amd_with_onednn() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "AuthenticAMD" in _vendor()
    )


def _vendor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line for line in lines if line.startswith("vendor_id")), "")
    except OSError:  # not Linux
        return platform.processor()
