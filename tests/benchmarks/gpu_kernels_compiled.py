"""The measurements' Triton kernels compiled for sm_90, run as a program; prints a JSON line a kernel. No GPU needed."""

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.compile.machine_code import resources
from benchmarks.gpu import kernels

ALIGNED = ("D_IN", "D_OUT", "N", "T")


def compile_kernel(kernel, types: dict, constants: dict, **options) -> None:
    """types: argument -> Triton's type, i32 where not given; constants: argument -> value"""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in ALIGNED]
    source = ASTSource(
        kernel, signature, {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )  # fmt: skip
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    found = {"wgmma": ptx.count("wgmma.mma_async"), "tma": ptx.count("cp.async.bulk.tensor")}
    told = {"name": kernel.__name__, "shared": compiled.metadata.shared, "stack": resources(compiled.asm["cubin"])[1]}
    print(json.dumps({**told, **found}), flush=True)


def main() -> None:
    for tile in kernels.LINEAR_TILES:
        blocks = dict(BLOCK_T=tile.tokens, BLOCK_O=tile.outputs, BLOCK_D=tile.features)
        sides = dict(x_desc=("T", "D"), weight_desc=("O", "D"), out_desc=("T", "O"))
        types = {n: f"tensordesc<bf16[{blocks['BLOCK_' + a]},{blocks['BLOCK_' + b]}]>" for n, (a, b) in sides.items()}
        constants = dict(PROGRAMS=132, GROUP=kernels.GROUP, **blocks)
        compile_kernel(kernels._linear_kernel, types, constants, num_warps=tile.warps, num_stages=tile.stages)
    for rounds in (10, 7):
        for four in (True, False):
            constants = dict(ROUNDS=rounds, FOUR_PER_CALL=four, BLOCK=kernels.PHILOX_BLOCK)
            types = dict(seed_ptr="*i64", kept_ptr="*i32", limit="i64")
            compile_kernel(kernels._philox_kernel, types, constants, num_warps=4)
    constants = dict(PROGRAMS=12, BLOCK=kernels.STREAM_BLOCK, STAGES=kernels.STREAM_STAGES)
    compile_kernel(kernels._stream_kernel, dict(x_ptr="*bf16", sums_ptr="*fp32"), constants, num_warps=16)
    compile_kernel(kernels._touch_kernel, dict(x_ptr="*fp32"), {}, num_warps=1)


if __name__ == "__main__":
    main()
