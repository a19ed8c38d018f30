"""A model, not a measurement: what an adapter adds to a frozen linear layer, from bytes, FLOP and two rates of a device.

    time = max(FLOP / FLOP per s, bytes / bytes per s) of each step        pass = one read or write of a 16-bit tensor

A pass over x moves 2 T D_in bytes, one over out 2 T D_out. The frozen layer is one product forward and one backward
(dx alone). Left out: launches, hits in the L2 cache, tiles read again inside products, atomics.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ELEMENT_BYTES = 2  # bfloat16 and float16
MMA_WIDTH = 16  # tensor cores take ranks in multiples of this
US = 1e6


class Device(NamedTuple):
    """Rates per second: 16-bit matrix FLOP, bytes to and from memory, 32-bit integer instructions. Then what decides how
    the kernels cut their sums: the architecture (90 is sm_90) and the number of multiprocessors."""

    flops: float
    bandwidth: float
    integer_ops: float
    arch: int
    processors: int


# Matrix and copy rates: measured on an H200, assumed for the others. Integers: multiprocessors x 64 lanes x boost clock.
DEVICES = {
    "H200": Device(790e12, 4.3e12, 132 * 64 * 1.755e9, 90, 132),
    "H100": Device(700e12, 3.0e12, 132 * 64 * 1.755e9, 90, 132),
    "A100": Device(270e12, 1.75e12, 108 * 64 * 1.41e9, 80, 108),
}


class Problem(NamedTuple):
    """One adapted layer on one device: T tokens, D_in and D_out features, R rank, E experts, K chosen. Times in us."""

    device: Device
    T: int = 8192
    D_in: int = 4096
    D_out: int = 4096
    R: int = 16
    E: int = 8
    K: int = 2
    dropout: bool = True
    element_bytes: int = ELEMENT_BYTES

    def time_us(self, flops: float, moved_bytes: float, integer_ops: float = 0.0) -> float:
        """Whichever of the three takes longest."""
        rates = self.device
        return max(flops / rates.flops, moved_bytes / rates.bandwidth, integer_ops / rates.integer_ops) * US

    @property
    def base(self) -> float:
        """The frozen layer in one direction."""
        elements = self.T * self.D_in + self.T * self.D_out + self.D_in * self.D_out
        return self.time_us(2 * self.T * self.D_in * self.D_out, self.element_bytes * elements)

    @property
    def x(self) -> float:
        """One pass over x."""
        return self.time_us(0, self.element_bytes * self.T * self.D_in)

    @property
    def out(self) -> float:
        """One pass over out."""
        return self.time_us(0, self.element_bytes * self.T * self.D_out)

    @property
    def token_dropout(self) -> float:
        """Dropout on x in eager torch, either direction: a read, a write, and a mask of one byte an element."""
        return (2 + 1 / self.element_bytes) * self.x if self.dropout else 0.0

    def expand(self, passes: int) -> float:
        """The product between [T, E * R] and [T, D_out]: its arithmetic, or this many passes over out."""
        return self.time_us(
            2 * self.T * self.D_out * self.E * self.R, passes * self.element_bytes * self.T * self.D_out
        )

    def extension(self, columns: int, contraction: int) -> float:
        """Lengthening the sums of the base product, `contraction` long, by this many columns."""
        return self.base * columns / contraction


def padded(columns: int) -> int:
    """The next multiple of what tensor cores take."""
    return -(-columns // MMA_WIDTH) * MMA_WIDTH


# Each method: what it adds to the frozen layer, (forward, backward) in us.


def peft_eager(p: Problem) -> tuple[float, float]:
    """One LoRA: dropout on x, A reads it, B writes, the scale is a round trip, the sum reads two and writes one."""
    forward = p.token_dropout + p.x + p.out + 2 * p.out + 3 * p.out
    # scale; dB and dhidden read dout; dA reads x; dhidden A is written; dropout; the sum into dx
    backward = 2 * p.out + 2 * p.out + p.x + p.x + p.token_dropout + 3 * p.x
    return forward, backward


def peft_compiled(p: Problem) -> tuple[float, float]:
    """The same with chains of elementwise steps fused by torch.compile; the dropped x is still written."""
    dropped = p.x if p.dropout else 0.0
    return 2 * dropped + p.x + 4 * p.out, 2 * p.out + 5 * p.x + dropped


def expert_loop(p: Problem) -> tuple[float, float]:
    """HydraLoRA's published loop: dropout, A, B, gate, scale and sum once per expert, and a router."""
    forward = p.token_dropout + p.x + p.out + 2 * p.out + 2 * p.out + 3 * p.out
    backward = 2 * p.out + 3 * p.out + 2 * p.out + 2 * p.x + p.token_dropout + 3 * p.x
    return p.E * forward + p.x, p.E * backward + 5 * p.x


def accumulate_after(p: Problem) -> tuple[float, float]:
    """One LoRA without dropout in closed form, accumulated onto the base product's out, as fused LoRA libraries do."""
    return p.x + 2 * p.out, 2 * p.out + p.x + p.x + 2 * p.x


def packed_token_dropout(p: Problem) -> tuple[float, float]:
    """Plain torch with A shared and B packed, dropout on x: down, router, one product added onto out."""
    forward = p.token_dropout + 2 * p.x + p.expand(passes=2)
    return forward, 2 * p.expand(passes=1) + 4 * p.x + p.token_dropout + 3 * p.x


def packed_a_dropout(p: Problem) -> tuple[float, float]:
    """The same with dropout on the elements of A, which costs nothing of the size of x."""
    return 2 * p.x + p.expand(passes=2), 2 * p.expand(passes=1) + 2 * p.x + 4 * p.x


def lorafusion(p: Problem) -> tuple[float, float]:
    """LoRAFusion with one LoRA: the adapter inside the base products, the dropped x and a mask stored."""
    mask = p.x / 2 if p.dropout else 0.0
    forward = p.token_dropout + p.x + p.extension(p.R, p.D_in)
    return forward, p.out + p.x + mask + p.extension(p.R, p.D_out)


def ours(p: Problem) -> tuple[float, float]:
    """This library: the update is stored, the base product accumulates onto it and hides its read of out."""
    return p.x + p.expand(passes=1), 2 * p.expand(passes=1) + 2 * p.x


def extended_product(p: Problem) -> tuple[float, float]:
    """The expansion inside a base product of one's own that is as fast as the library's."""
    forward = p.x + p.extension(padded(p.E * p.R), p.D_in)
    return forward, 2 * p.expand(passes=1) + p.x + p.extension(padded(p.R + p.E), p.D_out)


def floor(p: Problem) -> tuple[float, float]:
    """x read once forward, dout and x once backward, arithmetic for the chosen experts alone."""
    forward = p.x + p.extension(padded(p.K * p.R), p.D_in)
    return forward, p.out + p.x + p.extension(padded(p.R + p.E), p.D_out)


METHODS: dict[str, Callable[[Problem], tuple[float, float]]] = {
    "PEFT LoRA, eager": peft_eager,
    "PEFT LoRA, compiled": peft_compiled,
    "loop over experts": expert_loop,
    "packed torch, dropout on x": packed_token_dropout,
    "packed torch, dropout on A": packed_a_dropout,
    "LoRAFusion, one LoRA": lorafusion,
    "ours": ours,
    "inside an ideal base product": extended_product,
    "floor": floor,
}


def method_table(p: Problem) -> list[dict]:
    """-> one row a method: what it adds forward and backward, in us and in percent of the frozen layer, as bytes and as
    passes over x, and the FLOP of its products. A model."""
    rows = []
    for name, method in METHODS.items():
        forward, backward = method(p)
        percent = {"forward": forward, "backward": backward, "both": (forward + backward) / 2}
        row: dict[str, float | str] = {"method": name, "model_forward_us": forward, "model_backward_us": backward}
        row |= {f"model_{key}_percent": 100 * us / p.base for key, us in percent.items()}
        for step, moved in zip(("forward", "backward"), moved_bytes(method, p), strict=True):
            row |= {f"{step}_bytes": moved, f"{step}_passes": moved / (p.element_bytes * p.T * p.D_in)}
            row[f"{step}_flops"] = added_flops(name, p) * (1 if step == "forward" else 2)
        rows.append(row)
    return rows


def moved_bytes(method: Callable[[Problem], tuple[float, float]], p: Problem) -> tuple[float, float]:
    """What the method moves forward and backward: its time where arithmetic costs nothing. An extension of the base
    product moves its columns' share of that product's bytes."""
    free = p._replace(device=p.device._replace(flops=float("inf"), integer_ops=float("inf")))
    forward, backward = (us / US * p.device.bandwidth for us in method(free))
    return forward, backward


def added_flops(name: str, p: Problem) -> int:
    """Multiplications and additions of the method's products in forward; backward has twice as many, a product for
    either gradient of each."""
    lora, router = 2 * p.T * p.R * (p.D_in + p.D_out), 2 * p.T * p.E * p.D_in
    if name == "loop over experts":
        return p.E * lora + router
    if "LoRA" in name:
        return lora
    experts = p.K if name == "floor" else p.E
    return 2 * p.T * p.D_in * p.R + router + 2 * p.T * p.D_out * experts * p.R


def dense_limit(device: Device) -> float:
    """E * R above which a dense expansion takes longer to compute than to write."""
    return device.flops / device.bandwidth


def extension_limit_percent(device: Device, D_in: int, passes_saved: int = 1) -> float:
    """How much slower than the library's, in percent, a base product may be that saves so many passes over out."""
    return 100 * passes_saved * device.flops / (D_in * device.bandwidth)


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


def run(options: argparse.Namespace) -> dict:
    """Print the tables of methods and of kernels, write them to `options.out` if given, and return them.

    raises ValueError for sizes and rates that are not positive.
    """
    from .kernels import cuts_of, kernel_lines, kernel_table  # here, because it builds on this file

    p = problem(options)
    limits = {"dense_limit_columns": dense_limit(p.device), "gap_percent": extension_limit_percent(p.device, p.D_in)}
    own = {} if p.device == DEVICES[options.hardware] else {"given": p.device}
    cuts = cuts_of(p, p.device.arch, p.device.processors)
    kernels = kernel_table(p, cuts, devices={**DEVICES, **own})
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
    return result


def _lines(p: Problem, result: dict) -> list[str]:
    sizes = f"{p.T} tokens, {p.D_in} -> {p.D_out}, R={p.R}, E={p.E}, K={p.K}, dropout {'on' if p.dropout else 'off'}"
    rates = f"{p.device.flops / 1e12:g} TFLOP/s, {p.device.bandwidth / 1e12:g} TB/s"
    head = f"{'model: added to it':32}{'forward us':>12}{'%':>8}{'backward us':>13}{'%':>8}{'both %':>9}"
    lines = [f"Model, not a measurement: {sizes}; {rates}"]
    lines += [f"frozen layer {p.base:.0f} us each way; a pass over x {p.x:.1f} us, over out {p.out:.1f} us", "", head]
    for row in result["methods"]:
        forward = f"{row['model_forward_us']:12.1f}{row['model_forward_percent']:8.1f}"
        backward = f"{row['model_backward_us']:13.1f}{row['model_backward_percent']:8.1f}"
        lines.append(f"{row['method']:32}{forward}{backward}{row['model_both_percent']:9.1f}")
    lines += [
        "",
        f"{'model: moved and multiplied':32}{'forward MB':>12}{'passes':>8}{'GFLOP':>8}{'backward MB':>13}{'passes':>8}{'GFLOP':>8}",
    ]
    for row in result["methods"]:
        cells = [
            (row[f"{s}_bytes"] / 1e6, row[f"{s}_passes"], row[f"{s}_flops"] / 1e9) for s in ("forward", "backward")
        ]
        (mb, passes, gflop), (back_mb, back_passes, back_gflop) = cells
        lines.append(
            f"{row['method']:32}{mb:12.0f}{passes:8.1f}{gflop:8.0f}{back_mb:13.0f}{back_passes:8.1f}{back_gflop:8.0f}"
        )
    lines += ["", f"a dense expansion is bound by arithmetic above E * R = {result['dense_limit_columns']:.0f}"]
    return lines + [f"a base product that holds it may be {result['gap_percent']:.1f} % slower than the library's", ""]
