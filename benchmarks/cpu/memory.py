"""What each peer keeps between forward and backward beside x and its parameters: bytes, exact on any machine."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..peers.compare import count_trainable, describe, inputs_of, memory_of, mixture_of
from ..peers.known import Builder, build
from ..peers.options import add_peers, peers_of
from ..timing.files import Writer
from ..timing.machine import machine
from ..timing.names import require_known
from ..timing.options import add_out
from ..timing.shapes import DROPOUT, DTYPES, LAYERS, LayerShape, named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks memory`."""
    parser.add_argument("--shape", nargs="+", default=["cpu-1024"], help=f"of {', '.join(LAYERS)} (default: cpu-1024)")
    parser.add_argument("--dtype", default="float32", help="of float32, bfloat16, float16 (default: float32)")
    add_peers(parser)
    add_out(parser)


def run(options: argparse.Namespace) -> int:
    """raises ValueError for a shape, dtype or peer that does not exist, listing those that do."""
    measure_shapes(options.shape, options.dtype, peers_of(options), options.out)
    return 0


def measure_shapes(names: Sequence[str], dtype: str, peers: Mapping[str, Builder], out: Path | None) -> dict:
    """One table a shape, written to `out` after each; on a GPU, where there is one, `peak_bytes` as well.

    raises ValueError for a shape or dtype that does not exist, listing those that do.
    """
    require_known("", [dtype], DTYPES)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"dropout": DROPOUT, "device": device.type, "peers": list(peers)}
    writer = Writer({"verb": "memory", "machine": machine(), "settings": settings, "tables": []}, out)
    for name, shape in named(LAYERS, names).items():
        rows = _rows(shape, DTYPES[dtype], device, tqdm(peers, desc=f"memory {name}", leave=False))
        print(f"\n{shape}, {dtype}: kept for backward\n{text(rows)}")
        writer.add({"name": name, "shape": shape._asdict(), "dtype": dtype, "rows": rows})
    return writer.result


def _rows(shape: LayerShape, dtype: torch.dtype, device: torch.device, peers: Iterable[str]) -> list[dict]:
    # Without this a compiled peer would be compiled for any size once a second one comes, as in `compare`.
    torch._dynamo.reset()
    linear, x, dout = inputs_of(shape, dtype, device)
    rows = []
    for peer in peers:
        try:
            module = build(peer, linear, mixture_of(shape))
            rows.append({"name": peer, **memory_of(module, x, dout), "parameters": count_trainable(module)})
        except Exception as failure:  # whatever a peer does wrong is a result
            rows.append({"name": peer, "failure": describe(failure)})
    return rows


def text(rows: Sequence[dict]) -> str:
    lines = [f"{'':32}{'saved MiB':>12}{'trained parameters':>20}"]
    for row in rows:
        numbers = row.get("failure") or f"{row['saved_bytes'] / 2**20:12.3f}{row['parameters']:20,}"
        lines.append(f"{row['name']:32}{numbers}")
    return "\n".join(lines)
