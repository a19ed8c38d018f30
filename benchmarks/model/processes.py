"""A calculation, not a measurement: what weak scaling costs, every process with the same number of tokens a step.

    adapter = sum over layers of R D_in + E R D_out + E D_in        gradients travel in float32
    DDP: a ring sends 2 (N - 1) / N of it from each of N processes
    FSDP2: it is sent (N - 1) / N times, and all weights are gathered in 16 bits, once forward and once backward
    compute = 4 T (frozen weights) + 6 T (adapter weights) FLOP     forward and dx; forward, dx and the adapter's own

Left out: latency, attention's own products, what the optimiser does. The matrix rate is that of large products: a real
step computes longer, so that it waits for less of its time than stated here.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..timing import files
from .methods import DEVICES

GRADIENT_BYTES, WEIGHT_BYTES = 4, 2
# Bytes a second one way, nominal.
LINKS = {
    "25 Gb/s": 25e9 / 8,
    "100 Gb/s": 100e9 / 8,
    "400 Gb/s": 400e9 / 8,
    "NVLink 4": 450e9,
}
DEFAULT_TOKENS = 8192


class Linear(NamedTuple):
    """`number` linear layers of one size in a model."""

    D_in: int
    D_out: int
    number: int


class Model(NamedTuple):
    """The linear layers of a model by name, then the numbers of weights in its head and embedding, not adapted."""

    layers: dict[str, Linear]
    head: int
    embedding: int


BLOCKS = 32
LLAMA_2_7B = Model(
    {
        "q": Linear(4096, 4096, BLOCKS),
        "k": Linear(4096, 4096, BLOCKS),
        "v": Linear(4096, 4096, BLOCKS),
        "o": Linear(4096, 4096, BLOCKS),
        "gate": Linear(4096, 11008, BLOCKS),
        "up": Linear(4096, 11008, BLOCKS),
        "down": Linear(11008, 4096, BLOCKS),
    },
    head=32000 * 4096,
    embedding=32000 * 4096,
)
TARGETS = {"q, v": ("q", "v"), "all seven": tuple(LLAMA_2_7B.layers)}


def adapter_parameters(layers: Sequence[Linear], R: int, E: int) -> int:
    total = 0
    for layer in layers:
        shared_a, expert_b, router = R * layer.D_in, E * R * layer.D_out, E * layer.D_in
        total += layer.number * (shared_a + expert_b + router)
    return total


def multiplied_weights(model: Model) -> int:
    """Frozen weights that every token is multiplied with."""
    total = model.head
    for layer in model.layers.values():
        total += layer.number * layer.D_in * layer.D_out
    return total


class Row(NamedTuple):
    """One way of training over one kind of link. Shares: of a step's time that is computation."""

    targets: str
    engine: str
    adapter: int
    sent_mb: float  # by each process, a step
    link: str
    link_ms: float
    compute_ms: float
    share: float  # when nothing is sent while computing
    share_overlapped: float  # when all that can be is: gradients during backward, weights during the whole step


def row(targets: str, engine: str, link: str, *, processes: int, tokens: int, R: int, E: int, device: str) -> Row:
    adapter = adapter_parameters([LLAMA_2_7B.layers[name] for name in TARGETS[targets]], R, E)
    multiplied = multiplied_weights(LLAMA_2_7B)
    sent = 2 * GRADIENT_BYTES * adapter
    if engine == "FSDP2":
        sent = GRADIENT_BYTES * adapter + 2 * WEIGHT_BYTES * (multiplied + LLAMA_2_7B.embedding + adapter)
    sent *= (processes - 1) / processes
    compute = tokens * (4 * multiplied + 6 * adapter) / DEVICES[device].flops
    sending = sent / LINKS[link]
    # Backward is about half of the step; the gathers of FSDP2 run beside all of it.
    hidden = min(sending, compute if engine == "FSDP2" else compute / 2)
    return Row(
        targets=targets,
        engine=engine,
        adapter=adapter,
        sent_mb=sent / 1e6,
        link=link,
        link_ms=1e3 * sending,
        compute_ms=1e3 * compute,
        share=compute / (compute + sending),
        share_overlapped=compute / (compute + sending - hidden),
    )


def table(processes: int = 8, tokens: int = DEFAULT_TOKENS, R: int = 8, E: int = 8, device: str = "H100") -> list[Row]:
    settings = {"processes": processes, "tokens": tokens, "R": R, "E": E, "device": device}
    rows = []
    for engine, targets, link in itertools.product(("DDP", "FSDP2"), TARGETS, LINKS):
        rows.append(row(targets, engine, link, **settings))
    return rows


def lines(rows: Sequence[Row]) -> list[str]:
    head = f"{'adapted':11}{'engine':8}{'adapter':>9}{'sent':>10}  {'link':10}{'sending':>10}{'computing':>11}"
    text = [f"{head}{'efficiency':>12}{'overlapped':>12}"]
    for r in rows:
        way = f"{r.targets:11}{r.engine:8}{r.adapter / 1e6:7.1f} M{r.sent_mb:7.0f} MB  {r.link:10}"
        times = f"{r.link_ms:7.1f} ms{r.compute_ms:8.0f} ms"
        shares = f"{100 * r.share:10.0f} %{100 * r.share_overlapped:10.0f} %"
        text.append(f"{way}{times}{shares}")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks processes`."""
    parser.add_argument("--processes", type=int, default=8, help="N (default: 8)")
    text = f"tokens of each process in a step (default: {DEFAULT_TOKENS})"
    parser.add_argument("-T", "--tokens", type=int, default=DEFAULT_TOKENS, help=text)
    parser.add_argument("--rank", type=int, default=8, help="rank (default: 8)")
    parser.add_argument("--experts", type=int, default=8, help="experts per layer (default: 8)")
    parser.add_argument("--hardware", choices=DEVICES, default="H100", help="device with a known rate (default: H100)")
    parser.add_argument("--out", type=Path, help="also write the table to this JSON file")


def run(options: argparse.Namespace) -> int:
    """Print the table and write it to `options.out` if given. raises ValueError for sizes that are not positive."""
    sizes = {
        "processes": options.processes,
        "tokens": options.tokens,
        "rank": options.rank,
        "experts": options.experts,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    rows = table(options.processes, options.tokens, options.rank, options.experts, options.hardware)
    rate = DEVICES[options.hardware].flops / 1e12
    in_words = ", ".join(f"{name} {value}" for name, value in sizes.items())
    print(f"A calculation, not a measurement: LLaMA-2-7B, {in_words}")
    print(f"{options.hardware} at {rate:g} TFLOP/s, links at their nominal rate\n\n" + "\n".join(lines(rows)))
    if options.out:
        settings = {**sizes, "hardware": options.hardware, "links": LINKS}
        in_json = [each._asdict() for each in rows]
        files.write({"kind": "calculation, not a measurement", "settings": settings, "rows": in_json}, options.out)
    return 0
