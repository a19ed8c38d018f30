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
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..model.kernels import PHILOX_OPS
from ..model.methods import DEVICES
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
    result = {"name": name, **asdict(timing)}
    if moved_bytes and timing.median_ms > 0:
        result["gb_per_s"] = moved_bytes / timing.median_ms / 1e6
    if flops and timing.median_ms > 0:
        result["tflop_per_s"] = flops / timing.median_ms / 1e9
    return {**result, **more}


def rates(on: Setting, copied_bytes: int = 2**30, side: int = 8192) -> list[dict]:
    """A copy of so many bytes (read and written, both counted) and a square product."""
    source = torch.zeros(copied_bytes, dtype=torch.uint8, device=on.device)
    target = torch.empty_like(source)
    left, right = on.random(side, side), on.random(side, side)
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
    times = on.timer({"mm": lambda: torch.mm(left, right, out=out), "addmm_": lambda: out.addmm_(left, right)})
    flops = 2 * left.numel() * right.shape[1]
    rows = []
    for name, timing in times.items():
        over_mm = timing.median_ms / times["mm"].median_ms
        rows.append(row(name, timing, flops=flops, over_mm=over_mm, **labels))
    return rows


def own_product(on: Setting, shapes: Sequence[tuple[int, int, int]] = SHAPES) -> list[dict]:
    """The library's product and Triton's, by tile; `over_mm` is the ratio over the library's.

    raises RuntimeError where Triton's result is not the product.
    """
    rows = []
    for T, D_in, D_out in shapes:
        x, weight = on.random(T, D_in), on.random(D_out, D_in, scale=D_in**-0.5)
        out = torch.empty(T, D_out, dtype=x.dtype, device=on.device)
        runs = _products(x, weight, out, processors(on.device))
        # Every run writes the same tensor, so what it wrote is copied before the next one.
        _expect_equal({name: run().float().clone() for name, run in runs.items()})
        times = on.timer(runs)
        labels = {"T": T, "D_in": D_in, "D_out": D_out}
        for name, timing in times.items():
            over_mm = timing.median_ms / times["mm"].median_ms
            rows.append(row(name, timing, flops=2 * T * D_in * D_out, over_mm=over_mm, **labels))
    return rows


def _products(x: Tensor, weight: Tensor, out: Tensor, programs: int) -> dict[str, Callable[[], Tensor]]:
    """Name -> a call that writes x W^T into `out` and returns it."""
    from . import kernels  # here, because it imports Triton

    runs: dict[str, Callable[[], Tensor]] = {"mm": partial(torch.mm, x, weight.t(), out=out)}
    for tile in kernels.LINEAR_TILES:
        name = f"Triton {tile.tokens}x{tile.outputs}x{tile.features}"
        runs[name] = partial(kernels.linear, x, weight, out, tile, programs)
    return runs


def _expect_equal(results: dict[str, Tensor]) -> None:
    wanted = results["mm"]
    for name, result in results.items():
        error = ((result - wanted).norm() / wanted.norm()).item()
        # Two roundings to bfloat16 differ by about 0.002 of the norm.
        if not error < 0.01:
            raise RuntimeError(f"{name} is not the product: relative error {error:.3g}")


def skinny(on: Setting, shape: tuple[int, int, int] = SHAPE, columns: int = 32) -> list[dict]:
    """The library's x W_down^T with R + E padded to `columns`; GB/s counts one pass over x and what is written."""
    T, D_in, _ = shape
    x, down_weight = on.random(T, D_in), on.random(columns, D_in)
    out = torch.empty(T, columns, dtype=x.dtype, device=on.device)
    times = on.timer({"x W_down^T": lambda: torch.mm(x, down_weight.t(), out=out)})
    moved, flops = 2 * (x.numel() + down_weight.numel() + out.numel()), 2 * x.numel() * columns
    return [row(name, t, moved, flops, T=T, D_in=D_in, columns=columns) for name, t in times.items()]


def tall(on: Setting, shape: tuple[int, int, int] = SHAPE, R: int = 16, E: int = 8) -> list[dict]:
    """The gradients' sums over tokens by the library, as they stand and turned; GB/s counts one pass."""
    T, D_in, D_out = shape
    return [
        *_sums_over_tokens(on, "dout^T mixed", T, features=D_out, columns=E * R),
        *_sums_over_tokens(on, "x^T dprojected", T, features=D_in, columns=R + E),
    ]


def _sums_over_tokens(on: Setting, name: str, T: int, features: int, columns: int) -> list[dict]:
    left, right = on.random(T, features), on.random(T, columns)
    grad = torch.empty(features, columns, dtype=left.dtype, device=on.device)
    turned = torch.empty(columns, features, dtype=left.dtype, device=on.device)
    times = on.timer({
        name: lambda: torch.mm(left.t(), right, out=grad),
        f"({name})^T": lambda: torch.mm(right.t(), left, out=turned),
    })  # fmt: skip
    moved = 2 * (left.numel() + right.numel() + grad.numel())
    flops = 2 * left.numel() * columns
    return [row(key, t, moved, flops, T=T, features=features, columns=columns) for key, t in times.items()]


def launches(on: Setting, host: Timer, graphs: bool = True, count: int = LAUNCHES) -> list[dict]:
    """`launch_us`: what one of `count` tiny kernels in a row costs, by the host's clock and in graphs."""
    from . import kernels  # here, because it imports Triton

    one = torch.zeros(1, device=on.device)
    tiny = {"torch add_": partial(one.add_, 1.0), "Triton kernel": partial(kernels.touch, one)}
    timers = {"eager": host, "graph": on.timer} if graphs else {"eager": host}
    rows = []
    for way, timer in timers.items():
        runs = {}
        for name, run in tiny.items():
            # Waiting is not allowed inside the capture of a graph.
            runs[name] = _repeated(run, count, waits=way == "eager" and on.device.type == "cuda")
        for name, timing in timer(runs).items():
            rows.append(row(name, timing, way=way, launch_us=1e3 * timing.median_ms / count))
    return rows


def _repeated(run: Callable[[], object], count: int, waits: bool) -> Callable[[], None]:
    def run_many() -> None:
        for _ in range(count):
            run()
        if waits:
            torch.cuda.synchronize()

    return run_many


def philox(on: Setting, shape: tuple[int, int, int] = SHAPE) -> list[dict]:
    """A mask over [T, D_in] drawn and counted, by rounds and by elements that share a call; beside the estimate.

    raises RuntimeError where the share of kept elements is not 1 - p, which 10 and 7 rounds both must give.
    """
    from . import kernels  # here, because it imports Triton

    T, D_in, _ = shape
    seed, elements = torch.tensor([1234567], device=on.device), T * D_in
    runs, estimates_ms = {}, {}
    for rounds, per_call in itertools.product((10, 7), (1, 4)):
        name = f"{rounds} rounds, {per_call} per call"
        runs[name] = partial(kernels.philox_kept, seed, elements, DROP_P, rounds, per_call == 4)
        _expect_share(name, runs[name]().sum().item() / elements, elements)
        calls = elements / per_call * rounds / 10
        estimates_ms[name] = 1e3 * PHILOX_OPS * calls / DEVICES["H200"].integer_ops
    times = on.timer(runs)
    return [row(name, t, elements=elements, model_h200_ms=estimates_ms[name]) for name, t in times.items()]


def _expect_share(name: str, kept: float, elements: int) -> None:
    # The standard deviation of the share that independent draws keep.
    deviation = (DROP_P * (1 - DROP_P) / elements) ** 0.5
    if abs(kept - (1 - DROP_P)) > 5 * deviation:
        raise RuntimeError(f"{name} keeps {kept:.4f} of the elements, not {1 - DROP_P}")


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
        programs = free or 8
        narrow = _pass(other, programs)
        runs = {"product": product, "pass": narrow, "pair": partial(_together, side, narrow, product)}
        with sm_carve_out(free) as heeded:
            times = on.timer(runs)
        for name, timing in times.items():
            labels = {"left_free": free, "programs": programs, "setting_exists": heeded}
            if name == "pair":
                labels["over_sequence"] = timing.median_ms / sequence
            rows.append(row(name, timing, **labels))
    return rows


def _pass(x: Tensor, programs: int) -> Callable[[], Tensor]:
    from . import kernels  # here, because it imports Triton

    sums = torch.empty(programs, device=x.device)
    return partial(kernels.stream, x, sums)


def _together(side, first: Callable[[], object], second: Callable[[], object]) -> None:
    """`first` on the side stream beside `second` on the current one; one after the other where there is no stream."""
    if side is None:
        first()
        second()
        return
    current = torch.cuda.current_stream()
    side.wait_stream(current)
    # Launched before the other: its few programs find their place before the product fills the chip.
    with torch.cuda.stream(side):
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
