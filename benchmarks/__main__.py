"""python -m benchmarks VERB [options]; without a verb, or with --help, it lists them."""

import argparse
import os
import sys
from pathlib import Path

from .cpu import calls, layer, memory, scaling, training
from .cpu import steps as kernels
from .gpu import run as gpu
from .long import curves, soak
from .model import methods as roofline
from .model import processes
from .peers.known import PEERS, choose
from .report import bench
from .report import page as report
from .timing.shapes import LAYERS
from .timing.timers import Budget


def _budget(options: argparse.Namespace) -> Budget:
    if options.rounds < 2:
        raise ValueError(f"rounds must be at least 2, got {options.rounds}")
    if not options.seconds > 0:
        raise ValueError(f"seconds must be positive, got {options.seconds}")
    return Budget(options.rounds, options.seconds, min(options.rounds, Budget().least))


def _kernels(options: argparse.Namespace) -> int:
    kernels.run(options.shape, options.dtype, _budget(options), options.out)
    return 0


def _layer(options: argparse.Namespace) -> int:
    tables = layer.layers(options.shape, options.dtype, training=not options.eval)
    layer.run(tables, choose(options.peers, options.checkout), _budget(options), options.out)
    return 0


def _training(options: argparse.Namespace) -> int:
    training.run(options.size, options.targets, choose(options.peers, options.checkout), _budget(options), options.out)
    return 0


def _memory(options: argparse.Namespace) -> int:
    memory.run(options.shape, options.dtype, choose(options.peers, options.checkout), options.out)
    return 0


def _scaling(options: argparse.Namespace) -> int:
    tables = scaling.tables(options.sweep, middle=scaling.TOY) if options.toy else scaling.tables(options.sweep)
    scaling.run(tables, choose(options.peers, options.checkout), _budget(options), options.out)
    return 0


def _report(options: argparse.Namespace) -> int:
    report.run(options.files, options.out)
    return 0


def _bench(options: argparse.Namespace) -> int:
    bench.run(options.results, options.out, options.toy)
    return 0


def _roofline(options: argparse.Namespace) -> int:
    roofline.run(options)
    return 0


def _calls(options: argparse.Namespace) -> int:
    calls.run(_budget(options).rounds, options.out)
    return 0


def _compile(options: argparse.Namespace) -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 interprets the kernels: unset it to compile them")
    from .compile import machine_code as compiled  # here, because it imports Triton

    return 1 if compiled.run(options.arch, options.quick, options.out) else 0


def _tune(options: argparse.Namespace) -> int:
    device = gpu.nvidia_gpu()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 interprets the kernels: unset it to measure them")
    from .tune import run as tune  # here, because it imports Triton

    return tune.main(options, device)


def _timed(parser: argparse.ArgumentParser, rounds: int, seconds: float, peers: bool = True) -> None:
    """The options that the verbs which time things share."""
    text = f"runs of every candidate at most (default: {rounds})"
    parser.add_argument("--rounds", type=int, default=rounds, help=text)
    text = f"seconds after which a table ends, once it has {Budget().least} rounds (default: {seconds:g})"
    parser.add_argument("--seconds", type=float, default=seconds, help=text)
    if peers:
        _peers(parser)
    parser.add_argument("--out", type=Path, help="also write the rows to this JSON file, after every table")


def _peers(parser: argparse.ArgumentParser, default: tuple[str, ...] | None = None) -> None:
    told = ", ".join(default) if default else "all"
    parser.add_argument(
        "--peers", nargs="+", default=default, help=f"of {', '.join(map(repr, PEERS))} (default: {told})"
    )
    text = "folder of an optional peer's source, put on the import path; may be given again"
    parser.add_argument("--checkout", type=Path, action="append", default=[], help=text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Ratios over the frozen linear layer.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    shapes = f"of {', '.join(LAYERS)}"

    steps = verbs.add_parser("kernels", help="the operator's steps one by one, beside the model of this CPU")
    steps.add_argument("--shape", nargs="+", default=["cpu-1024"], help=f"{shapes} (default: cpu-1024)")
    steps.add_argument("--dtype", nargs="+", default=["float32"], help="of float32, bfloat16, float16")
    _timed(steps, rounds=60, seconds=60, peers=False)
    steps.set_defaults(run=_kernels)

    one = verbs.add_parser("layer", help="one adapted layer, forward and backward, beside its peers")
    one.add_argument("--shape", nargs="+", default=["cpu-1024"], help=f"{shapes} (default: cpu-1024)")
    text = "of float32, bfloat16, float16 (default: the first two)"
    one.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help=text)
    one.add_argument("--eval", action="store_true", help="forward in eval mode without gradients instead")
    _timed(one, rounds=60, seconds=60)
    one.set_defaults(run=_layer)

    end = verbs.add_parser("training", help="a small LLaMA: training step and generation, tokens per second")
    end.add_argument("--size", nargs="+", default=["small"], help="of toy, small (default: small)")
    end.add_argument("--targets", default="all", help="all seven linears of a block, or qv (default: all)")
    _timed(end, rounds=20, seconds=60)
    end.set_defaults(run=_training)

    kept = verbs.add_parser("memory", help="bytes kept for backward by every peer, exact on any machine")
    kept.add_argument("--shape", nargs="+", default=["cpu-1024"], help=f"{shapes} (default: cpu-1024)")
    kept.add_argument("--dtype", default="float32", help="of float32, bfloat16, float16 (default: float32)")
    _peers(kept)
    kept.add_argument("--out", type=Path, help="also write the rows to this JSON file, after every table")
    kept.set_defaults(run=_memory)

    grow = verbs.add_parser("scaling", help="how cost grows with tokens, experts, rank, chosen experts, by dtype")
    known = ", ".join(scaling.SWEEPS)
    grow.add_argument("--sweep", nargs="+", default=["E"], help=f"of {known} (default: E)")
    grow.add_argument("--toy", action="store_true", help="a tiny layer in the middle, to see that it runs")
    _timed(grow, rounds=20, seconds=20, peers=False)
    _peers(grow, default=scaling.PEERS)
    grow.set_defaults(run=_scaling)

    pages = verbs.add_parser("report", help="result files into one document with charts")
    pages.add_argument("files", nargs="+", type=Path, help="JSON files that the other verbs wrote")
    pages.add_argument("--out", type=Path, default=Path("docs/performance.md"), help="the document")
    pages.set_defaults(run=_report)

    whole = verbs.add_parser("bench", help="a short version of all that runs on a CPU, and the report; five minutes")
    whole.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder for the JSON files")
    whole.add_argument("--out", type=Path, default=Path("docs/performance.md"), help="the document")
    whole.add_argument("--toy", action="store_true", help="everything tiny, to see that it runs")
    whole.set_defaults(run=_bench)

    model = verbs.add_parser("roofline", help="a model of the cost on a GPU, by method and by kernel; needs no GPU")
    roofline.add_arguments(model)
    model.set_defaults(run=_roofline)
    weak = verbs.add_parser("processes", help="a calculation of what limits training on many processes")
    processes.add_arguments(weak)
    weak.set_defaults(run=processes.run)
    cost = verbs.add_parser("calls", help="what a call costs beside its arithmetic, by the two ways into the operator")
    _timed(cost, rounds=200, seconds=60, peers=False)
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
    long = verbs.add_parser("soak", help="thousands of training steps, kills and adapter switches: no leak, no drift")
    soak.add_arguments(long)
    long.set_defaults(run=soak.run)
    many = verbs.add_parser("curves", help="training curves in every dtype beside float64's, and how far seeds differ")
    curves.add_arguments(many)
    many.set_defaults(run=curves.run)
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
