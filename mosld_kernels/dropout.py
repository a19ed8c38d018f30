"""Which elements of A are kept: a pure function of (seed, row, column), by counter-based Philox-4x32-10.

    n = row * D_in + col      counter = (n >> 2, 0, layer_id, stream_id)      word = Philox(seed, counter)[n & 3]
    keep = word >= round(p * 2^32)

Integers only, so every backend draws the same bits whatever its tiles are, and the backward pass redraws the mask
from the seed instead of storing it.
"""

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .checks import check_seed
from .philox import philox
from .transforms import needs_plain_operators

try:
    from . import numpy_mask
except ImportError:  # torch runs without NumPy, and so does the operator
    numpy_mask = None


def keep_mask(seed: Tensor, shape: tuple[int, ...], p: float, layer_id: int = 0, stream_id: int = 0) -> Tensor:
    """The dropout mask on the elements of A, True where an element is kept.

    Args:
        seed: int64 [1], on the device where the mask is wanted.
        shape: (R, D_in).
        p: probability of dropping an element, in [0, 1].
        layer_id: a salt in [0, 2^32). Another one gives an independent mask for the same seed.
        stream_id: a second salt of the same kind.

    Returns:
        bool [R, D_in].

    Raises:
        ValueError: for a seed that is not one int64, a shape that is not two sizes, or p outside [0, 1].

    >>> import torch
    >>> from mosld_kernels import keep_mask
    >>> keep_mask(torch.tensor([7]), (2, 4), p=0.5)
    tensor([[ True,  True, False, False],
            [False,  True, False,  True]])
    """
    check_seed(seed)
    if len(shape) != 2 or min(shape) < 0:
        raise ValueError(f"shape must be (R, D_in), both at least 0, got {tuple(shape)}")
    if not 0 <= p <= 1:
        raise ValueError(f"p must be in [0, 1], got {p}")
    if numpy_mask is not None and _on_this_host(seed):
        return numpy_mask.drawn(int(seed), *shape, threshold(p), layer_id, stream_id)
    rows, cols = shape
    blocks = -(-rows * cols // 4)  # one Philox call decides four neighbours
    counter = torch.zeros(4, blocks, dtype=torch.int64, device=seed.device)
    torch.arange(blocks, out=counter[0])
    if layer_id or stream_id:
        counter[2], counter[3] = layer_id, stream_id
    words = philox(seed, counter).t().reshape(-1)[: rows * cols]
    return (words >= threshold(p)).view(rows, cols)


def _on_this_host(seed: Tensor) -> bool:
    """Whether the seed has a value to read now: no fake tensor, and nobody who traces operations to repeat them."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or needs_plain_operators():
        return False  # and do not look further: torch.compile cannot trace the question about modes
    return type(seed) is Tensor and seed.device.type == "cpu" and _get_current_dispatch_mode() is None


# With few tokens drawing the mask is the longest step, and backward wants it again. 32 MiB at most; nobody writes into
# it.
@functools.lru_cache(maxsize=512)
def _remembered(seed: int, rows: int, cols: int, limit: int) -> Tensor:
    assert numpy_mask is not None
    with torch.inference_mode(False):  # it may be wanted again where gradients are
        return numpy_mask.drawn(seed, rows, cols, limit)


MOST_REMEMBERED = 1 << 16  # elements


def threshold(p: float) -> int:
    """The least word that keeps its element. At p = 1 it is 2^32, which no word reaches."""
    return round(p * 2**32)


@functools.cache
def triton_keep():
    """The Triton twin of `keep_mask`, to be called inside kernels. Imports Triton.

    keep(seed, n, limit): seed int64 scalar, n int64 (row * D_in + col) of any shape, limit = threshold(p)
    -> bool of n's shape, bit for bit what `keep_mask` draws there, whatever the tile is.
    """
    global triton, tl  # Triton looks for a kernel's names among its file's globals, not in an enclosing function
    import triton
    import triton.language as tl

    @triton.jit
    def keep(seed, n, limit):
        zero = (n * 0).to(tl.uint32)  # counters of 32 bits: with wider ones tl.philox is another generator
        a, b, c, d = tl.philox(seed, (n >> 2).to(tl.uint32), zero, zero, zero)  # pyright: ignore
        lane = n & 3
        word = tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))
        return word.to(tl.int64) >= limit

    return keep


def draw_keep(seed: Tensor | None, shape: tuple[int, ...], p: float) -> Tensor | None:
    """The keep mask of one call, not to be written into; None when nothing is dropped and no randomness is wanted."""
    if p == 0:
        return None
    if seed is None:
        raise ValueError(f"dropout_p={p} needs a seed: an int64 tensor of shape [1]")
    if numpy_mask is not None and _on_this_host(seed) and shape[0] * shape[1] <= MOST_REMEMBERED:
        return _remembered(int(seed), *shape, threshold(p))
    return keep_mask(seed, shape, p)


def drop_elements(values: Tensor, keep: Tensor | None, p: float, dtype: torch.dtype) -> Tensor:
    """values [R, D_in] -> keep * values / (1 - p) in `dtype`, the inverted dropout of MoSLD's Eq. 2.

    Linear in `values`, so the same function maps the gradient of the dropped A to the gradient of A. Scaled in the
    wider of the two dtypes and rounded once. May return `values` itself when there is no mask.
    """
    if keep is None:
        return values.to(dtype)
    kept_share = 1 - p if p < 1 else 1.0  # p = 1 keeps nothing, so there is nothing to scale
    wide = values.to(torch.promote_types(values.dtype, dtype))
    return torch.where(keep, wide, 0.0).div_(kept_share).to(dtype)
