"""Every kernel compiled ahead of time, as the launches would launch it, and judged: no GPU is needed.

Each recorded launch, with the tile row that its sizes select on the wanted architecture, is compiled to machine code;
what the machine code uses is held against the chip's limits.
"""

import importlib
import itertools
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import triton
from tqdm.auto import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError
from triton.runtime.errors import PTXASError

from mosld_kernels.triton import tiles

from ..timing.shapes import LayerShape
from .recorded import DTYPES, PROCESSORS, Launch, Problem, launches

ARCHS = tuple(PROCESSORS)
# Shared memory a program may use, in bytes. Rows for any architecture must fit the smallest GPUs from 8.0 on.
SHARED = {0: 101376, 80: 166912, 90: 232448, 100: 232448}
REGISTERS_PER_PROCESSOR, WARPS_PER_PROCESSOR = 65536, 64
TENSOR_CORES = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}
NO_TENSOR_CORES = "no tensor-core instruction"  # of the chip's own kind; it may have those of older chips
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
    source = ASTSource(
        fn=function,
        signature=dict(launch.signature),
        constexprs={(function.arg_names.index(name),): value for name, value in launch.constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.divisible},
    )
    options = dict(num_warps=launch.warps, num_stages=launch.stages, maxnreg=launch.most_registers)
    report = Report(
        kernel=name.strip("_").removesuffix("_kernel"),
        arch=launch.arch,
        dtype=next(kind for _, kind in launch.signature if kind.startswith("*")).strip("*"),
        sizes=_sizes(launch),
        warps=launch.warps,
        rows_aligned=_rows_aligned(launch),
    )
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", launch.arch, 32), options=options)
    except (PTXASError, CompilationError) as error:
        return report._replace(faults=(f"does not compile: {' '.join(str(error).split())}",))
    return _judge(report, launch, compiled.asm, compiled.metadata.shared)


def _judge(report: Report, launch: Launch, code: Mapping[str, Any], shared: int) -> Report:
    registers, stack = resources(code["cubin"])
    wide = r"cp\.async\.\w+\.shared\.global.*0x10|ld\.global[\w.:]*\.v(4\.b32|4\.f32|2\.b64)|ld\.global[\w.:]*\.v8\.b32"
    by_shared = SHARED[launch.arch] // max(shared + 1024, 1)
    by_registers = REGISTERS_PER_PROCESSOR // (registers * 32 * launch.warps)
    report = report._replace(
        registers=registers,
        stack_bytes=stack,
        shared_bytes=shared,
        tensor_core_instructions=len(re.findall(TENSOR_CORES[launch.arch], code["ptx"])),
        wide_loads=len(re.findall(wide, code["ptx"])),
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
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def _sizes(launch: Launch) -> str:
    shown = ("R", "Z", "E", "C", "EXPANDS", "DIAGONAL", "PLANES", "DROPS", "CASTS_B", "PRECISION")
    return " ".join(f"{name}={value}" for name, value in launch.constants if name in shown)


def _faults(report: Report, launch: Launch, code: Mapping[str, Any]) -> Iterator[str]:
    row = launch.row
    if report.stack_bytes and report.rows_aligned:  # elsewhere it has to run, not to be fast
        yield f"{report.stack_bytes} bytes of registers spilled"
    if report.shared_bytes > SHARED[row.arch if row else 0]:
        yield f"{report.shared_bytes} bytes of shared memory, {SHARED[row.arch if row else 0]} at most"
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
    names = [name for name, _ in launch.signature]
    return launch.row is None or any(names[i] in ("stride_x_t", "stride_left_t", "D_OUT") for i in launch.divisible)


def _loads_large_operand_wide(tile: tiles.Tile, ttgir: str) -> bool:
    """Whether a load of a tokens x features tile gives each thread 8 neighbours of 2 bytes.

    The small operand may have a tile of the same shape; its rows are unaligned in the grid's mixture of R = 5, E = 3,
    so there it cannot stand in for the large one.
    """
    layouts = dict(re.findall(r"(#\w+) = #ttg\.blocked<\{sizePerThread = \[([\d, ]+)\]", ttgir))
    loads = "\n".join(line for line in ttgir.splitlines() if re.search(r"async_copy_global_to_local|tt\.load", line))
    shapes = rf"{tile.tokens}x{tile.features}|{tile.features}x{tile.tokens}"
    used = re.findall(rf"tensor<(?:{shapes})x!tt\.ptr<\w+>, (#\w+)>", loads)
    return any(max(int(size) for size in layouts[layout].split(",")) >= 8 for layout in used)


MIXTURES = ((16, 8), (8, 8), (1, 1), (5, 3), (64, 4), (64, 8), (48, 5), (24, 33), (16, 32), (8, 64), (128, 64))
DIAGONAL = ((8, 8), (16, 4), (4, 8), (5, 3), (16, 8), (4, 32))  # with an A for each expert
TOKENS = (8192, 256)  # a full chip, and one that needs planes
AWKWARD = (  # sizes of one, which a compiler takes for constants, and rows that no vector of 16 bytes divides
    LayerShape(1, 4096, 4096, 16, 8, 2),
    LayerShape(8191, 4096, 4096, 16, 8, 2),
    LayerShape(1, 1, 1, 1, 1, 1),
    LayerShape(100, 1, 4095, 16, 8, 2),
    LayerShape(4097, 4095, 1, 64, 8, 2),
)


def grid(archs: Sequence[int] = ARCHS, quick: bool = False) -> list[Problem]:
    problems = []
    for arch, (R, E), T in itertools.product(archs, () if quick else MIXTURES, TOKENS):
        shape = LayerShape(T, 4096, 4096, R, E, min(2, E))
        problems += [Problem(shape, dtype, "float32", arch) for dtype in ("bfloat16", "float32")]
    for arch, (R, E), T in itertools.product(archs, () if quick else DIAGONAL, TOKENS):
        shape = LayerShape(T, 4096, 4096, R, E, min(2, E))
        for dtype in ("bfloat16", "float32"):
            problems.append(Problem(shape, dtype, "float32", arch, mixing="diagonal"))
    for arch, shape in itertools.product(archs, () if quick else AWKWARD):
        problems += [Problem(shape, dtype, "float32", arch) for dtype in ("bfloat16", "float32")]
    for arch in archs:
        shape = LayerShape(8192, 4096, 14336, 16, 8, 2)
        problems += [Problem(shape, dtype, dtype, arch) for dtype in DTYPES]
        problems += [Problem(shape, "float16", "float32", arch), Problem(shape, "float32", "float32", arch, "tf32")]
    return problems


def run(archs: Sequence[int], quick: bool, out: Path | None) -> int:
    """Compile the grid, print a table, write it to `out` as JSON; -> how many faults there are.

    A tile row that no launch of the whole grid selects is a fault as well.
    raises ValueError for an architecture that is not one of ARCHS.
    """
    unknown = [str(arch) for arch in archs if arch not in ARCHS]
    if unknown:
        raise ValueError(f"there is no {', '.join(unknown)}; there are: {', '.join(map(str, ARCHS))}")
    recorded = {launch for problem in grid(archs, quick) for launch in itertools.chain(*launches(problem))}
    wanted = [] if quick else [row for row in tiles.ROWS if row.arch in archs or (row.arch == 0 and 80 in archs)]
    unused = [row for row in wanted if row not in {launch.row for launch in recorded}]
    order = sorted(recorded, key=lambda launch: (launch.kernel, launch.arch, launch.signature, str(launch.constants)))
    with ProcessPoolExecutor() as pool:
        reports = list(tqdm(pool.map(compile_launch, order, chunksize=4), total=len(order), unit="kernel", leave=False))
    print(table(reports), summary(reports), sep="\n\n")
    for row in unused:
        print(f"no launch of the grid selects {row}")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(json.dumps(report._asdict()) for report in reports)
        out.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{rows}\n]}}\n')
    faults = sum(bool(report.faults) for report in reports) + len(unused)
    print(f"{len(reports)} kernels compiled with Triton {triton.__version__}, {faults} at fault")
    return faults


def table(reports: Sequence[Report]) -> str:
    heads = (
        "kernel",
        "sm",
        "dtype",
        "sizes",
        "warps",
        "regs",
        "stack",
        "shared",
        "mma",
        "16 B loads",
        "per SM",
        "aligned",
        "faults",
    )
    lines = [heads] + [(*map(str, report[:-1]), "; ".join(report.faults)) for report in reports]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def summary(reports: Sequence[Report]) -> str:
    """One line a kernel, dtype and architecture: the most that any variant of aligned rows uses, and so how many programs
    fit at least."""
    lines = [
        f"{'kernel':14}{'dtype':>6}{'sm':>5}{'variants':>10}{'registers':>11}{'spilled':>9}{'shared':>9}{'per SM':>8}"
    ]
    for key, group in itertools.groupby(sorted(reports, key=_kind), key=_kind):
        variants = list(group)
        most = [max(getattr(v, name) for v in variants) for name in ("registers", "stack_bytes", "shared_bytes")]
        fits = min(variant.programs_per_processor for variant in variants)
        kernel, dtype, arch = key
        lines.append(f"{kernel:16}{dtype:>6}{arch:>5}{len(variants):>10}{most[0]:>11}{most[1]:>9}{most[2]:>9}{fits:>8}")
    return "\n".join(lines)


def _kind(report: Report) -> tuple[str, str, int]:
    return report.kernel, report.dtype, report.arch


def tile_rows() -> str:
    """The rows of tiles.py, one a line."""
    heads = "tokens x features x columns"
    lines = [
        f"{'launch':14}{'sm':>5}{'bytes':>7}{'columns to':>12}{'tokens to':>11}{heads:>29}{'warps':>7}{'stages':>8}"
    ]
    lines[0] += f"{'registers':>11}"
    for row in tiles.ROWS:
        arch, columns, tokens = (value or "any" for value in (row.arch, row.columns_to, row.tokens_to))
        tile = f"{row.tile.tokens} x {row.tile.features} x {row.tile.columns or 'all'}"
        options = f"{row.tile.warps:>7}{row.tile.stages:>8}{row.tile.registers:>11}"
        lines.append(f"{row.kernel:14}{arch:>5}{row.bytes:>7}{columns:>12}{tokens:>11}{tile:>29}{options}")
    return "\n".join(lines)
