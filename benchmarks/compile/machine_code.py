"""One recorded launch compiled to machine code, as it would be launched, and judged: no GPU is needed.

What the machine code uses is held against the chip's limits.
"""

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError
from triton.runtime.errors import PTXASError

from mosld_kernels.triton import tiles

from .recorded import PROCESSORS, Launch

ARCHS = tuple(PROCESSORS)
# Shared memory a program may use, in bytes. Rows for any architecture must fit the smallest GPUs from 8.0 on.
SHARED = {0: 101376, 80: 166912, 90: 232448, 100: 232448}
REGISTERS_PER_PROCESSOR, WARPS_PER_PROCESSOR = 65536, 64
WIDE_LOADS = (  # of 16 bytes, from global memory
    r"cp\.async\.\w+\.shared\.global.*0x10|ld\.global[\w.:]*\.v(4\.b32|4\.f32|2\.b64)|ld\.global[\w.:]*\.v8\.b32"
)
TENSOR_CORES = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}
# No instruction of the chip's own kind; there may be those of older chips.
NO_TENSOR_CORES = "no tensor-core instruction"
NARROW_LOADS = "x or dout is not loaded 16 bytes at a time"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Report(NamedTuple):
    kernel: str
    arch: int
    dtype: str
    sizes: str  # the constants that tell variants apart
    warps: int
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    tensor_core_instructions: int = 0
    wide_loads: int = 0  # of 16 bytes, from global memory
    programs_per_processor: int = 0
    rows_aligned: bool = True
    faults: tuple[str, ...] = ()


def compile_launch(launch: Launch) -> Report:
    module, _, name = launch.kernel.partition(":")
    function = getattr(importlib.import_module(module), name)
    # Triton names constants by the path to their argument, and wants to hear of divisible arguments by their place.
    constants, attributes = {}, {}
    for argument, value in launch.constants:
        constants[function.arg_names.index(argument),] = value
    for place in launch.divisible:
        attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=dict(launch.signature), constexprs=constants, attrs=attributes)
    options = dict(num_warps=launch.warps, num_stages=launch.stages, maxnreg=launch.most_registers)
    report = Report(
        kernel=name.strip("_").removesuffix("_kernel"),
        arch=launch.arch,
        dtype=_first_pointer(launch),
        sizes=_sizes(launch),
        warps=launch.warps,
        rows_aligned=_rows_aligned(launch),
    )
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", launch.arch, 32), options=options)
    except (PTXASError, CompilationError) as error:
        return report._replace(faults=(f"does not compile: {' '.join(str(error).split())}",))
    return _judge(report, launch, compiled.asm, compiled.metadata.shared)


def _first_pointer(launch: Launch) -> str:
    """The dtype of the first tensor."""
    for _, kind in launch.signature:
        if kind.startswith("*"):
            return kind.strip("*")
    raise ValueError(f"{launch.kernel} takes no tensor")


def _judge(report: Report, launch: Launch, code: Mapping[str, Any], shared: int) -> Report:
    registers, stack = resources(code["cubin"])
    # A multiprocessor holds as many programs as the scarcest of its resources allows.
    by_shared = SHARED[launch.arch] // max(shared + 1024, 1)
    by_registers = REGISTERS_PER_PROCESSOR // (registers * 32 * launch.warps)
    report = report._replace(
        registers=registers,
        stack_bytes=stack,
        shared_bytes=shared,
        tensor_core_instructions=len(re.findall(TENSOR_CORES[launch.arch], code["ptx"])),
        wide_loads=len(re.findall(WIDE_LOADS, code["ptx"])),
        programs_per_processor=min(by_shared, by_registers, WARPS_PER_PROCESSOR // launch.warps),
    )
    return report._replace(faults=tuple(_faults(report, launch, code)))


def resources(cubin: bytes) -> tuple[int, int]:
    """-> registers a thread, and bytes of stack a thread: where spilled registers go"""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    return int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"])


def _sizes(launch: Launch) -> str:
    shown = ("R", "Z", "E", "C", "EXPANDS", "DIAGONAL", "PLANES", "DROPS", "CASTS_B", "PRECISION")
    sizes = []
    for name, value in launch.constants:
        if name in shown:
            sizes.append(f"{name}={value}")
    return " ".join(sizes)


def _faults(report: Report, launch: Launch, code: Mapping[str, Any]) -> Iterator[str]:
    row = launch.row
    # Where rows are not aligned it has to run, not to be fast.
    if report.stack_bytes and report.rows_aligned:
        yield f"{report.stack_bytes} bytes of registers spilled"
    most_shared = SHARED[row.arch if row else 0]
    if report.shared_bytes > most_shared:
        yield f"{report.shared_bytes} bytes of shared memory, {most_shared} at most"
    if row is None:
        return
    if report.registers > row.tile.registers:
        yield f"{report.registers} registers, {row.tile.registers} stated"
    if report.dtype in ("bf16", "fp16"):
        if not report.tensor_core_instructions:
            yield NO_TENSOR_CORES
        if report.rows_aligned and not _loads_large_operand_wide(row.tile, code["ttgir"]):
            yield NARROW_LOADS
    if launch.arch == 90 and report.tensor_core_instructions and (note := _serialised(code["ptx"])):
        yield note


def _serialised(ptx: str) -> str | None:
    """What the assembler says where wgmma instructions wait for one another: they should run on while loads arrive."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [TOOLS / "ptxas", "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = re.search(r"\(C75\d\d\).*", said)
    return found[0] if found else None


def _rows_aligned(launch: Launch) -> bool:
    """Whether the rows of x or dout start at multiples of 16 bytes, as they do in real layers; true without a row."""
    if launch.row is None:
        return True
    for place in launch.divisible:
        name, _ = launch.signature[place]
        if name in ("stride_x_t", "stride_left_t", "D_OUT"):
            return True
    return False


def _loads_large_operand_wide(tile: tiles.Tile, ttgir: str) -> bool:
    """Whether a load of a tokens x features tile gives each thread 8 neighbours of 2 bytes.

    The small operand may have a tile of the same shape; its rows are unaligned in the grid's mixture of R = 5, E = 3,
    so there it cannot stand in for the large one.
    """
    layouts = dict(re.findall(r"(#\w+) = #ttg\.blocked<\{sizePerThread = \[([\d, ]+)\]", ttgir))
    shapes = rf"{tile.tokens}x{tile.features}|{tile.features}x{tile.tokens}"
    for line in ttgir.splitlines():
        if not re.search(r"async_copy_global_to_local|tt\.load", line):
            continue
        for layout in re.findall(rf"tensor<(?:{shapes})x!tt\.ptr<\w+>, (#\w+)>", line):
            if max(map(int, layouts[layout].split(","))) >= 8:
                return True
    return False
