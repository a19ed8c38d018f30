"""Measurements that decide the design on a GPU, one function each: a setting and sizes -> rows, times in ms.

rates        copy bandwidth and matrix rate of the card, for models
accumulate   does `out.addmm_(x, W^T)` hide its read of out, against `mm`?
own_product  a persistent Triton product against the library's
skinny       x W_down^T, [T, D_in] by [D_in, 32], against one pass over x
tall         dout^T mixed and dprojected^T x, against one pass over their large operand
launches     what one tiny kernel costs, from the host and in a graph
philox       the arithmetic of a mask over [T, D_in]
overlap      a pass over x beside the frozen product, on another stream
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..timing.timers import Timer, Timing

SHAPES = ((8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096), (8192, 2048, 2048), (8192, 8192, 8192))
SHAPES += ((1024, 4096, 4096),)  # T, D_in, D_out
SHAPE = SHAPES[0]
LAUNCHES = 100  # in one timed run
DROP_P = 0.1


class Setting(NamedTuple):
    """What every measurement takes beside its sizes."""

    device: torch.device
    timer: Timer
    dtype: torch.dtype = torch.bfloat16

    def random(self, *sizes: int, scale: float = 1.0) -> Tensor:
        """Normal numbers with this standard deviation."""
        return (scale * torch.randn(*sizes, device=self.device)).to(self.dtype)


def row(name: str, timing: Timing, moved_bytes: float = 0, flops: float = 0, **more) -> dict:
    """One row: the times, and the rates that follow from the counted bytes and FLOP where there are any."""
    rates = {"gb_per_s": moved_bytes / timing.median_ms / 1e6} if moved_bytes and timing.median_ms > 0 else {}
    if flops and timing.median_ms > 0:
        rates["tflop_per_s"] = flops / timing.median_ms / 1e9
    return {"name": name, **asdict(timing), **rates, **more}


def rates(on: Setting, copied_bytes: int = 2**30, side: int = 8192) -> list[dict]:
    """A copy of so many bytes (read and written, both counted) and a square product."""
    source = torch.zeros(copied_bytes, dtype=torch.uint8, device=on.device)
    target, (left, right) = torch.empty_like(source), (on.random(side, side) for _ in range(2))
    out = torch.empty_like(left)
    times = on.timer({"copy": lambda: target.copy_(source), "product": lambda: torch.mm(left, right, out=out)})
    return [
        row("copy", times["copy"], moved_bytes=2 * copied_bytes),
        row("product", times["product"], flops=2 * side**3),
    ]


def accumulate(on: Setting, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> list[dict]:
    """out = x W^T and out += x W^T, and with dout W the same for dx; `over_mm` is the ratio of the two."""
    rows = []
    for T, D_in, D_out in shapes:
        x, dout = on.random(T, D_in), on.random(T, D_out)
        weight = on.random(D_out, D_in, scale=D_in**-0.5)
        for direction, left, right in (("forward", x, weight.t()), ("backward", dout, weight)):
            rows += _accumulate(on, left, right, {"direction": direction, "T": T, "D_in": D_in, "D_out": D_out})
    return rows


def _accumulate(on: Setting, left: Tensor, right: Tensor, labels: dict) -> list[dict]:
    out = torch.zeros(len(left), right.shape[1], dtype=left.dtype, device=left.device)
    times = on.timer(
        {"mm": lambda: torch.mm(left, right, out=out), "addmm_": lambda: out.addmm_(left, right)},
    )
    flops, plain = 2 * left.numel() * right.shape[1], times["mm"].median_ms
    return [row(name, t, flops=flops, over_mm=t.median_ms / plain, **labels) for name, t in times.items()]


def own_product(on: Setting, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> list[dict]:
    """The library's product and Triton's, by tile; `over_mm` is the ratio over the library's.

    raises RuntimeError where Triton's result is not the product.
    """
    from . import kernels as gpu_kernels  # here, because it imports Triton

    rows, programs = [], processors(on.device)
    for T, D_in, D_out in shapes:
        x, weight = on.random(T, D_in), on.random(D_out, D_in, scale=D_in**-0.5)
        out = torch.empty(T, D_out, dtype=x.dtype, device=on.device)
        runs: dict[str, Callable[[], Tensor]] = {"mm": lambda x=x, w=weight, out=out: torch.mm(x, w.t(), out=out)}
        for tile in gpu_kernels.LINEAR_TILES:
            name = f"Triton {tile.tokens}x{tile.outputs}x{tile.features}"
            runs[name] = lambda x=x, w=weight, out=out, t=tile: gpu_kernels.linear(x, w, out, t, programs)
        _expect_equal({name: run().float().clone() for name, run in runs.items()})
        times = on.timer(runs)
        labels = {"T": T, "D_in": D_in, "D_out": D_out}
        for name, t in times.items():
            over = t.median_ms / times["mm"].median_ms
            rows.append(row(name, t, flops=2 * T * D_in * D_out, over_mm=over, **labels))
    return rows


def _expect_equal(results: dict[str, Tensor]) -> None:
    wanted = results["mm"]
    for name, result in results.items():
        error = ((result - wanted).norm() / wanted.norm()).item()
        if not error < 0.01:  # two roundings to bfloat16 differ by about 0.002 of the norm
            raise RuntimeError(f"{name} is not the product: relative error {error:.3g}")


def skinny(on: Setting, shape: tuple[int, int, int] = SHAPE, columns: int = 32) -> list[dict]:
    """The library's x W_down^T with R + E padded to `columns`; GB/s counts one pass over x and what is written."""
    T, D_in, _ = shape
    x, down_weight = on.random(T, D_in), on.random(columns, D_in)
    out = torch.empty(T, columns, dtype=x.dtype, device=on.device)
    times = on.timer({"x W_down^T": lambda: torch.mm(x, down_weight.t(), out=out)})
    moved, flops = 2 * (x.numel() + down_weight.numel() + out.numel()), 2 * x.numel() * columns
    return [row(name, t, moved, flops, T=T, D_in=D_in, columns=columns) for name, t in times.items()]


def tall(on: Setting, shape: tuple[int, int, int] = SHAPE, R: int = 16, E: int = 8):
    """The gradients' sums over tokens by the library, as they stand and turned; GB/s counts one pass."""
    T, D_in, D_out = shape
    rows = []
    cases = (("dout^T mixed", D_out, E * R), ("x^T dprojected", D_in, R + E))
    for name, features, columns in cases:
        left, right = on.random(T, features), on.random(T, columns)
        grad, turned = (
            torch.empty(s, dtype=left.dtype, device=on.device) for s in ((features, columns), (columns, features))
        )
        times = on.timer(
            {
                name: lambda a=left, b=right, out=grad: torch.mm(a.t(), b, out=out),
                f"({name})^T": lambda a=left, b=right, out=turned: torch.mm(b.t(), a, out=out),
            }
        )
        moved, flops = 2 * (left.numel() + right.numel() + grad.numel()), 2 * left.numel() * columns
        rows += [row(key, t, moved, flops, T=T, features=features, columns=columns) for key, t in times.items()]
    return rows


def launches(on: Setting, host: Timer, graphs: bool = True, count: int = LAUNCHES) -> list[dict]:
    """`launch_us`: what one of `count` tiny kernels in a row costs, by the host's clock and in graphs."""
    from . import kernels as gpu_kernels

    one = torch.zeros(1, device=on.device)
    tiny = {"torch add_": lambda: one.add_(1.0), "Triton kernel": lambda: gpu_kernels.touch(one)}

    def many(run: Callable[[], object], waits: bool) -> Callable[[], None]:
        def run_many() -> None:
            for _ in range(count):
                run()
            if waits and on.device.type == "cuda":
                torch.cuda.synchronize(on.device)

        return run_many

    rows = []
    for way, timer in (("eager", host), ("graph", on.timer)):
        if way == "eager" or graphs:
            times = timer({name: many(run, way == "eager") for name, run in tiny.items()})
            rows += [row(name, t, way=way, launch_us=1e3 * t.median_ms / count) for name, t in times.items()]
    return rows


def philox(on: Setting, shape: tuple[int, int, int] = SHAPE) -> list[dict]:
    """A mask over [T, D_in] drawn and counted, by rounds and by elements that share a call; beside the estimate.

    raises RuntimeError where the share of kept elements is not 1 - p, which 10 and 7 rounds both must give.
    """
    from ..model.kernels import PHILOX_OPS
    from ..model.methods import DEVICES
    from . import kernels as gpu_kernels

    T, D_in, _ = shape
    seed, elements = torch.tensor([1234567], device=on.device), T * D_in
    cases = {f"{r} rounds, {n} per call": (r, n == 4) for r in (10, 7) for n in (1, 4)}
    for name, (rounds, four) in cases.items():
        kept = gpu_kernels.philox_kept(seed, elements, DROP_P, rounds, four).sum().item() / elements
        if abs(kept - (1 - DROP_P)) > 5 * (DROP_P * (1 - DROP_P) / elements) ** 0.5:
            raise RuntimeError(f"{name} keeps {kept:.4f} of the elements, not {1 - DROP_P}")
    times = on.timer(
        {name: lambda c=case: gpu_kernels.philox_kept(seed, elements, DROP_P, *c) for name, case in cases.items()}
    )
    calls = {name: elements / (4 if four else 1) * rounds / 10 for name, (rounds, four) in cases.items()}
    estimate = {name: 1e3 * PHILOX_OPS * count / DEVICES["H200"].integer_ops for name, count in calls.items()}
    return [row(name, t, elements=elements, model_h200_ms=estimate[name]) for name, t in times.items()]


def overlap(
    on: Setting, shape: tuple[int, int, int] = SHAPE, left_free: Sequence[int] = (0, 4, 8, 12, 16)
) -> list[dict]:
    """The frozen product and a pass over another x: each alone, and together on two streams.

    left_free: how many multiprocessors the product is asked to leave; the pass takes as many programs (8 at 0).
    `over_sequence` is the time of the pair over that of both at full width, one after the other.
    The product is a linear layer with a bias: that way goes through cuBLASLt, which heeds the setting as a hint.
    """
    T, D_in, D_out = shape
    x, other = on.random(T, D_in), on.random(T, D_in)
    weight, bias = on.random(D_out, D_in, scale=D_in**-0.5), on.random(D_out)
    side = torch.cuda.Stream(on.device) if on.device.type == "cuda" else None
    product = partial(F.linear, x, weight, bias)
    wide = on.timer({"product": product, "pass": _pass(other, processors(on.device))})
    sequence = wide["product"].median_ms + wide["pass"].median_ms
    rows = [row(f"{name} alone, full width", t) for name, t in wide.items()]
    for free in left_free:
        narrow = _pass(other, free or 8)
        with sm_carve_out(free) as heeded:
            times = on.timer(
                {"product": product, "pass": narrow, "pair": lambda narrow=narrow: _together(side, narrow, product)}
            )
        for name, t in times.items():
            more = {"over_sequence": t.median_ms / sequence} if name == "pair" else {}
            rows.append(row(name, t, left_free=free, programs=free or 8, setting_exists=heeded, **more))
    return rows


def _pass(x: Tensor, programs: int) -> Callable[[], Tensor]:
    from . import kernels as gpu_kernels

    sums = torch.empty(programs, device=x.device)
    return lambda: gpu_kernels.stream(x, sums)


def _together(side, first: Callable[[], object], second: Callable[[], object]) -> None:
    """`first` on the side stream beside `second` on the current one; one after the other where there is no stream."""
    if side is None:
        first()
        second()
        return
    current = torch.cuda.current_stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):  # launched first: its few programs find their place before the product fills the chip
        first()
    second()
    current.wait_stream(side)


@contextlib.contextmanager
def sm_carve_out(count: int) -> Iterator[bool]:
    """Ask the library's products to leave `count` multiprocessors; yields whether this torch has such a setting.

    It is private and experimental in torch, so it may be gone; without it, or for 0, nothing is changed.
    """
    set_count = getattr(torch._C, "_set_sm_carveout_experimental", None)
    if set_count is None or count == 0:
        yield set_count is not None
        return
    set_count(count)
    try:
        yield True
    finally:
        set_count(None)


def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; 4 where Triton's interpreter stands in for one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
