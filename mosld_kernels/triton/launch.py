"""What every launch asks of its device and its tensors."""

import contextlib
import functools

import torch
from torch import Tensor

from . import tiles

INTERPRETED_ARCH = 80
INTERPRETED_PROCESSORS = 4


def on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the current device: make it the tensor's."""
    device = tensor.device
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


@functools.cache
def _properties(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def properties(device: torch.device) -> tuple[int, int]:
    """-> architecture as in sm_90, and the number of multiprocessors"""
    return _properties(device) if device.type == "cuda" else (INTERPRETED_ARCH, INTERPRETED_PROCESSORS)


def tile_for(kernel: str, tokens: int, d_in: int, d_out: int, columns: int, tensor: Tensor) -> tiles.Tile:
    arch, _ = properties(tensor.device)
    return tiles.pick(kernel, arch, tokens, d_in, d_out, columns, tensor.element_size()).tile


def split_k_for(programs: int, steps: int, tensor: Tensor) -> int:
    """Into how many planes of partial sums a launch cuts its sum; see `tiles.split_k`."""
    _, processors = properties(tensor.device)
    return tiles.split_k(programs, steps, processors)


def precision() -> str:
    """How `tl.dot` multiplies float32: TF32 only where torch's own products would use it."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def cdiv(size: int, block: int) -> int:
    return -(-size // block)
