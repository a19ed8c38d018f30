"""python -m benchmarks layer | calls | roofline | compile | gpu | tune [options]; each with --help"""

import argparse
import os
import sys
from pathlib import Path

from . import calls, gpu, layer, roofline
from .shapes import LAYERS


def _layer(options: argparse.Namespace) -> int:
    if options.rounds < 2:
        raise ValueError(f"rounds must be at least 2, got {options.rounds}")
    layer.run(options.shape, options.dtype, options.rounds, options.out)
    return 0


def _roofline(options: argparse.Namespace) -> int:
    roofline.run(options)
    return 0


def _calls(options: argparse.Namespace) -> int:
    if options.rounds < 2:
        raise ValueError(f"rounds must be at least 2, got {options.rounds}")
    calls.run(options.rounds, options.out)
    return 0


def _compile(options: argparse.Namespace) -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 interprets the kernels: unset it to compile them")
    from . import compiled  # here, because it imports Triton

    return 1 if compiled.run(options.arch, options.quick, options.out) else 0


def _tune(options: argparse.Namespace) -> int:
    device = gpu.nvidia_gpu()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 interprets the kernels: unset it to measure them")
    from . import tune  # here, because it imports Triton

    return tune.main(options, device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ratios over the frozen linear layer.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("layer", help="one adapted layer, forward and backward, beside its rivals")
    one.add_argument("--shape", nargs="+", default=["cpu-1024"], help=f"of {', '.join(LAYERS)} (default: cpu-1024)")
    one.add_argument("--dtype", nargs="+", default=list(layer.DTYPES), help="of float32, bfloat16 (default: both)")
    one.add_argument("--rounds", type=int, default=60, help="runs of every candidate (default: 60)")
    one.add_argument("--out", type=Path, help="also write the rows to this JSON file")
    one.set_defaults(run=_layer)
    model = verbs.add_parser("roofline", help="a model of the cost on a GPU, by method and by kernel; needs no GPU")
    roofline.add_arguments(model)
    model.set_defaults(run=_roofline)
    cost = verbs.add_parser("calls", help="what a call costs beside its arithmetic, by the two ways into the operator")
    cost.add_argument("--rounds", type=int, default=200, help="runs of every way (default: 200)")
    cost.add_argument("--out", type=Path, help="also write the rows to this JSON file")
    cost.set_defaults(run=_calls)
    code = verbs.add_parser("compile", help="every Triton kernel to machine code, without a GPU, and its limits")
    code.add_argument("--arch", nargs="+", type=int, default=[80, 90, 100], help="of 80, 90, 100 (default: all)")
    code.add_argument("--quick", action="store_true", help="one layer a dtype instead of the whole grid")
    code.add_argument("--out", type=Path, help="also write the table to this JSON file")
    code.set_defaults(run=_compile)
    everything = verbs.add_parser("gpu", help="every check and measurement that needs an NVIDIA GPU, in eight minutes")
    gpu.add_arguments(everything)
    everything.set_defaults(run=gpu.main)
    tiles = verbs.add_parser("tune", help="candidate tile sizes on the GPU at hand, and rows for the table of tiles")
    kernels = "down, up_backward, grad_expert_b, grad_down"
    layers = [name for name in LAYERS if name.startswith("gpu-")]
    tiles.add_argument("--kernel", nargs="+", help=f"of {kernels} (default: all)")
    tiles.add_argument("--shape", nargs="+", default=layers, help=f"of {', '.join(LAYERS)} (default: gpu-*)")
    tiles.add_argument(
        "--dtype", nargs="+", default=["bfloat16"], help="of float32, bfloat16, float16 (default: bfloat16)"
    )
    tiles.add_argument(
        "--budget", type=float, default=450, help="seconds after which nothing is started (default: 450)"
    )
    tiles.add_argument("--out", type=Path, help="also write the rows to this JSON file, which MOSLD_TILES can name")
    tiles.set_defaults(run=_tune)
    return parser


def main() -> int:
    options = _parser().parse_args()
    try:
        return options.run(options)
    except ValueError as error:
        print(f"python -m benchmarks {options.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
