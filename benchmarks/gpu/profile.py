"""The kernels that one adapted layer runs on a GPU, in their order, each with its time as the profiler sees it.

The profiler times kernels apart, so the gaps between them and the host's work are not in these times. The L2 cache is
as the kernels before left it, as it is in training.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..peers.compare import trainable
from ..peers.known import FROZEN
from ..timing.shapes import LayerShape
from .layers import WithBackend, modules_for

ROUNDS = 20


def kernels(device: torch.device, shape: LayerShape, dtype: torch.dtype) -> list[dict]:
    """-> rows of the Triton and the eager backend and the frozen layer, forward and backward, one a kernel.

    position counts from 0 within the direction; `median_us` is over the rounds.
    """
    torch.manual_seed(0)
    modules = modules_for(shape, dtype, device)
    x = torch.randn(shape.T, shape.D_in, device=device).to(dtype).requires_grad_()
    dout = torch.randn(shape.T, shape.D_out, device=device).to(dtype)
    rows = []
    for name, module in modules.items():
        if name != FROZEN and not isinstance(module, WithBackend):
            continue
        for direction, run in _directions(module, x, dout).items():
            for row in by_position(profiled(run), ROUNDS):
                rows.append({"name": name, "direction": direction, **row})
    return rows


def _directions(module: nn.Module, x: torch.Tensor, dout: torch.Tensor) -> dict[str, Callable[[], object]]:
    wanted, out = [x, *trainable(module)], module(x)
    return {
        "forward": lambda: module(x),
        "backward": lambda: torch.autograd.grad(out, wanted, dout, retain_graph=True),
    }


def profiled(run: Callable[[], object], rounds: int = ROUNDS) -> list[tuple[str, float]]:
    """-> (kernel, us) of every kernel of `rounds` runs, in the order in which they started; nothing without a GPU"""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(rounds):
            run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    kernels = []
    for event in profile.events() or ():
        # Annotations of the user's stand on the GPU's time line as well, and are no kernels.
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False):
            kernels.append(event)
    kernels.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us()) for event in kernels]


def by_position(events: Sequence[tuple[str, float]], rounds: int) -> list[dict]:
    """-> one row a kernel of a round. Where rounds differ from each other, one row a name, with its calls."""
    names, times = zip(*events, strict=True) if events else ((), ())
    count = len(events) // rounds
    rows = []
    if names[:count] * rounds == names:
        for position, name in enumerate(names[:count]):
            median_us = statistics.median(times[position::count])
            rows.append({"position": position, "kernel": name[:200], "median_us": median_us})
        return rows
    by_name = defaultdict(list)
    for name, us in events:
        by_name[name].append(us)
    for name, own in by_name.items():
        rows.append({"kernel": name[:200], "calls": len(own), "median_us": statistics.median(own)})
    return rows
