"""A model of this library's steps on a GPU, one row a kernel: bytes moved as written against the fewest, FLOP, time.

moved  = the sizes of what the kernel reads and writes         time as `Problem.time_us` has it
fewest = its share of the traffic floor: beside the frozen layer's own products, x is read once forward, dout and x
         once backward, parameters once, what backward needs and the gradients are written; the rest stays on chip
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .methods import DEVICES, Device, Problem, ceil_div, padded

# 32-bit instructions of one call: ten rounds of two wide products, two three-way xors, two key steps.
PHILOX_OPS = 60


class Cuts(NamedTuple):
    """How the kernels cut their sums.

    down_planes, up_planes, b_planes, adapter_planes: parts in which `down`, `up_backward`, `grad_expert_b` and
    `grad_down` are summed, in float32 planes, each written once and read once; 1 is not cut.
    columns: how many of the E * R columns one program holds; with more there, dout is read again for the next ones.
    """

    down_planes: int = 1
    up_planes: int = 1
    b_planes: int = 1
    adapter_planes: int = 1
    columns: int = 128


UNCUT = Cuts()


def cuts_of(p: Problem, arch: int, processors: int) -> Cuts:
    """The cuts that the library's tile rows make in 16-bit elements on a GPU of this architecture (90 is sm_90) with
    so many multiprocessors. Needs Triton to be installed."""
    from mosld_kernels.triton import tiles  # here, because it imports Triton, without which the rest of the model works

    columns, projected = p.E * p.R, p.R + p.E
    down = tiles.pick("down", arch, p.T, p.D_in, 0, projected, 2).tile
    up = tiles.pick("up_backward", arch, p.T, 0, p.D_out, columns, 2).tile
    b = tiles.pick("grad_expert_b", arch, p.T, 0, p.D_out, columns, 2).tile
    adapter = tiles.pick("grad_down", arch, p.T, p.D_in, 0, projected, 2).tile
    b_programs = ceil_div(p.D_out, b.features) * ceil_div(columns, b.columns)
    adapter_programs = ceil_div(p.D_in, adapter.features) * ceil_div(projected, adapter.columns)
    return Cuts(
        down_planes=tiles.split_k(down.blocks(p.T), ceil_div(p.D_in, down.features), processors),
        up_planes=tiles.split_k(up.blocks(p.T), ceil_div(p.D_out, up.features), processors),
        b_planes=tiles.split_k(b_programs, b.blocks(p.T), processors),
        adapter_planes=tiles.split_k(adapter_programs, adapter.blocks(p.T), processors),
        columns=up.columns,
    )


class KernelRow(NamedTuple):
    """One step as modelled; `moved` and `fewest` name what is counted, `model_us` holds one time a device."""

    kernel: str
    direction: str
    moved: str
    fewest: str
    moved_bytes: int
    fewest_bytes: int
    flops: int
    integer_ops: int
    model_us: dict[str, float]


class _Step(NamedTuple):
    kernel: str
    direction: str
    reads: str
    writes: str
    fewest: str
    flops: Callable[[Problem], int] = lambda p: 0
    integer_ops: Callable[[Problem], int] = lambda p: 0


def tensor_bytes(p: Problem, cuts: Cuts = UNCUT) -> dict[str, int]:
    """-> the bytes of everything that a kernel may read or write, with 16-bit elements and float32 routing."""
    adapter = 2 * (p.R + p.E) * p.D_in
    again = ceil_div(p.E * p.R, cuts.columns) - 1
    return {
        **dict.fromkeys(("x", "dx"), 2 * p.T * p.D_in),
        **dict.fromkeys(("out", "dout"), 2 * p.T * p.D_out),
        "weight": 2 * p.D_in * p.D_out,
        **dict.fromkeys(("a_and_router", "down_weight", "da_and_drouter"), adapter),
        **dict.fromkeys(("expert_b", "dexpert_b"), 2 * p.D_out * p.E * p.R),
        "hidden": 2 * p.T * p.R,
        **dict.fromkeys(("logits", "gates"), 4 * p.T * p.E),
        "mixed": 2 * p.T * p.E * p.R,
        "dprojected": 2 * p.T * (p.R + p.E),
        "dout_again": again * 2 * p.T * p.D_out,
        "down_planes": _plane_bytes(cuts.down_planes, p.T * (p.R + p.E)),
        "up_planes": _plane_bytes(cuts.up_planes, p.T * (p.R + p.E)),
        "expert_b_planes": _plane_bytes(cuts.b_planes, p.D_out * p.E * p.R),
        "down_weight_planes": _plane_bytes(cuts.adapter_planes, p.D_in * (p.R + p.E)),
    }


def _plane_bytes(planes: int, elements: int) -> int:
    """Partial sums in float32, each written once and read once; none where a sum is not cut."""
    return 2 * 4 * planes * elements if planes > 1 else 0


def _base_flops(p: Problem) -> int:
    return 2 * p.T * p.D_in * p.D_out


def _expand_flops(p: Problem) -> int:
    return 2 * p.T * p.D_out * p.E * p.R


def _down_flops(p: Problem) -> int:
    return 2 * p.T * p.D_in * (padded(p.R) + padded(p.E))


def _projected_flops(p: Problem) -> int:
    return 2 * p.T * p.D_in * padded(p.R + p.E)


def _philox_ops(p: Problem) -> int:
    return PHILOX_OPS * p.R * p.D_in if p.dropout else 0  # one call an element of A


# Backward prepares anew, because nothing of that size is saved.
# The product for dx reads what it writes, so dx is counted on both sides of it.
STEPS = (
    _Step("prepare", "forward", "a_and_router", "down_weight", "a_and_router", integer_ops=_philox_ops),
    _Step(
        "down", "forward",
        reads="x down_weight", writes="hidden logits gates mixed down_planes",
        fewest="x hidden logits gates", flops=_down_flops,
    ),
    _Step("mixed @ B^T", "forward", "mixed expert_b", "out", "expert_b", _expand_flops),
    _Step("base addmm_ onto out", "forward", "x weight out", "out", "x weight out", _base_flops),
    _Step(
        "up_backward", "backward",
        reads="dout dout_again expert_b hidden gates", writes="dprojected up_planes",
        fewest="dout expert_b hidden gates", flops=_expand_flops,
    ),
    _Step(
        "grad_expert_b", "backward",
        reads="dout dout_again hidden gates", writes="dexpert_b expert_b_planes",
        fewest="dexpert_b", flops=_expand_flops,
    ),
    _Step("prepare again", "backward", "a_and_router", "down_weight", "a_and_router", integer_ops=_philox_ops),
    _Step(
        "grad_down", "backward",
        reads="x dprojected", writes="da_and_drouter down_weight_planes",
        fewest="x da_and_drouter", flops=_projected_flops, integer_ops=_philox_ops,
    ),
    _Step("dprojected @ down_weight", "backward", "dprojected down_weight", "dx", "", _projected_flops),
    _Step("base addmm_ onto dx", "backward", "dout weight dx", "dx", "dout weight dx", _base_flops),
)  # fmt: skip


def kernel_table(p: Problem, cuts: Cuts = UNCUT, devices: dict[str, Device] | None = None) -> list[KernelRow]:
    """-> one row a step, forward then backward. A model.

    p: the problem; its own device is ignored. devices: name -> rates, by default those of `methods.DEVICES`.
    """
    sizes = tensor_bytes(p, cuts)
    known = DEVICES if devices is None else devices
    return [_row(step, p, sizes, known) for step in STEPS]


def _row(step: _Step, p: Problem, sizes: dict[str, int], devices: dict[str, Device]) -> KernelRow:
    moved, moved_bytes = _counted(f"{step.reads} {step.writes}", sizes)
    fewest, fewest_bytes = _counted(step.fewest, sizes)
    flops, integer_ops = step.flops(p), step.integer_ops(p)
    times = {}
    for name, device in devices.items():
        times[name] = p._replace(device=device).time_us(flops, moved_bytes, integer_ops)
    return KernelRow(
        step.kernel, step.direction, moved, fewest, moved_bytes, fewest_bytes, flops, integer_ops, times
    )  # fmt: skip


def _counted(tensors: str, sizes: dict[str, int]) -> tuple[str, int]:
    """-> those of the tensors that have a size at all, in words, and their bytes together"""
    names = [name for name in tensors.split() if sizes[name]]
    return " + ".join(names) or "nothing", sum(sizes[name] for name in names)


def kernel_lines(rows: Sequence[KernelRow]) -> list[str]:
    """-> the table as text, a line a kernel."""
    devices = "".join(f"{name + ' us':>10}" for name in rows[0].model_us)
    lines = [f"{'model: one kernel each':26}{'moved MB':>10}{'fewest':>9}{'GFLOP':>9}{devices}   moves"]
    for row in rows:
        times = "".join(f"{time:10.1f}" for time in row.model_us.values())
        sizes = f"{row.moved_bytes / 1e6:10.1f}{row.fewest_bytes / 1e6:9.1f}{row.flops / 1e9:9.1f}"
        lines.append(f"{row.kernel:26}{sizes}{times}   {row.moved}")
    return lines
