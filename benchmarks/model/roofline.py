"""`python -m benchmarks roofline`: the models of methods and of kernels for one problem, as tables and as JSON."""

import argparse
import json
from pathlib import Path

from .kernels import cuts_of, kernel_lines, kernel_table
from .methods import DEVICES, Problem, dense_limit, extension_limit_percent, method_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks roofline`."""
    default = Problem(DEVICES["H200"])
    parser.add_argument("--hardware", choices=DEVICES, default="H200", help="device with known rates (default: H200)")
    parser.add_argument("--flops", type=float, help="16-bit matrix FLOP/s, instead of the named device's")
    parser.add_argument("--bandwidth", type=float, help="memory bytes/s, instead of the named device's")
    parser.add_argument("-T", "--tokens", type=int, default=default.T, help=f"tokens (default: {default.T})")
    parser.add_argument("--d-in", type=int, default=default.D_in, help=f"input features (default: {default.D_in})")
    parser.add_argument("--d-out", type=int, default=default.D_out, help=f"output features (default: {default.D_out})")
    parser.add_argument("--rank", type=int, default=default.R, help=f"rank (default: {default.R})")
    parser.add_argument("--experts", type=int, default=default.E, help=f"experts (default: {default.E})")
    parser.add_argument("--top-k", type=int, default=default.K, help=f"experts chosen per token (default: {default.K})")
    parser.add_argument("--no-dropout", action="store_true", help="price the methods without dropout")
    parser.add_argument("--out", type=Path, help="also write the tables to this JSON file")


def run(options: argparse.Namespace) -> int:
    """Print the tables of methods and of kernels, and write them to `options.out` if given.

    raises ValueError for sizes and rates that are not positive.
    """
    p = problem(options)
    limits = {"dense_limit_columns": dense_limit(p.device), "gap_percent": extension_limit_percent(p.device, p.D_in)}
    devices = dict(DEVICES)
    if p.device != DEVICES[options.hardware]:
        devices["given"] = p.device
    cuts = cuts_of(p, p.device.arch, p.device.processors)
    kernels = kernel_table(p, cuts, devices)
    result = {
        "kind": "model, not a measurement",
        "hardware": options.hardware,
        "problem": {**p._asdict(), "device": p.device._asdict()},
        "base_us": p.base,
        "methods": method_table(p),
        "cuts": cuts._asdict(),
        "kernels": [row._asdict() for row in kernels],
        **limits,
    }
    print("\n".join(_lines(p, result)))
    print("\n".join(kernel_lines(kernels)))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def problem(options: argparse.Namespace) -> Problem:
    """The problem that the arguments describe.

    raises ValueError for a size or rate that is not positive, or top_k outside [1, experts].
    """
    known = DEVICES[options.hardware]
    flops = known.flops if options.flops is None else options.flops
    bandwidth = known.bandwidth if options.bandwidth is None else options.bandwidth
    p = Problem(
        known._replace(flops=flops, bandwidth=bandwidth), options.tokens, options.d_in, options.d_out,
        options.rank, options.experts, options.top_k, not options.no_dropout,
    )  # fmt: skip
    for name, value in {"flops": flops, "bandwidth": bandwidth, **p._asdict()}.items():
        if name not in ("device", "dropout") and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if p.K > p.E:
        raise ValueError(f"top_k must be in [1, experts={p.E}], got {p.K}")
    return p


def _lines(p: Problem, result: dict) -> list[str]:
    sizes = f"{p.T} tokens, {p.D_in} -> {p.D_out}, R={p.R}, E={p.E}, K={p.K}, dropout {'on' if p.dropout else 'off'}"
    rates = f"{p.device.flops / 1e12:g} TFLOP/s, {p.device.bandwidth / 1e12:g} TB/s"
    head = f"{'model: added to it':32}{'forward us':>12}{'%':>8}{'backward us':>13}{'%':>8}{'both %':>9}"
    lines = [
        f"Model, not a measurement: {sizes}; {rates}",
        f"frozen layer {p.base:.0f} us each way; a pass over x {p.x:.1f} us, over out {p.out:.1f} us",
        "",
        head,
    ]
    for row in result["methods"]:
        forward = f"{row['model_forward_us']:12.1f}{row['model_forward_percent']:8.1f}"
        backward = f"{row['model_backward_us']:13.1f}{row['model_backward_percent']:8.1f}"
        lines.append(f"{row['method']:32}{forward}{backward}{row['model_both_percent']:9.1f}")
    units = f"{'passes':>8}{'GFLOP':>8}"
    lines += ["", f"{'model: moved and multiplied':32}{'forward MB':>12}{units}{'backward MB':>13}{units}"]
    for row in result["methods"]:
        forward = f"{row['forward_bytes'] / 1e6:12.0f}{_passes_and_gflop(row, 'forward')}"
        backward = f"{row['backward_bytes'] / 1e6:13.0f}{_passes_and_gflop(row, 'backward')}"
        lines.append(f"{row['method']:32}{forward}{backward}")
    return [
        *lines,
        "",
        f"a dense expansion is bound by arithmetic above E * R = {result['dense_limit_columns']:.0f}",
        f"a base product that holds it may be {result['gap_percent']:.1f} % slower than the library's",
        "",
    ]


def _passes_and_gflop(row: dict, step: str) -> str:
    return f"{row[f'{step}_passes']:8.1f}{row[f'{step}_flops'] / 1e9:8.0f}"
