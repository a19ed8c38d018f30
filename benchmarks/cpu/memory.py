"""What each peer keeps between forward and backward beside x and its parameters: bytes, exact on any machine."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..peers.compare import DROPOUT, describe, inputs_of, memory_of, mixture_of
from ..peers.known import Builder, build
from ..timing.files import Writer
from ..timing.shapes import LAYERS, named
from ..timing.timers import machine
from .layer import DTYPES


def run(names: Sequence[str], dtype: str, peers: Mapping[str, Builder], out: Path | None) -> dict:
    """One table a shape, written to `out` after each; on a GPU, where there is one, `peak_bytes` as well.

    raises ValueError for a shape or dtype that does not exist, listing those that do.
    """
    if dtype not in DTYPES:
        raise ValueError(f"there is no {dtype}; there are: {', '.join(DTYPES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"dropout": DROPOUT, "device": device.type, "peers": list(peers)}
    writer = Writer({"verb": "memory", "machine": machine(), "settings": settings, "tables": []}, out)
    for name, shape in named(LAYERS, names).items():
        torch._dynamo.reset()  # a compiled peer is compiled for these sizes, as in `compare`
        linear, x, dout = inputs_of(shape, DTYPES[dtype], device)
        rows = []
        for peer in tqdm(peers, desc=f"memory {name}", leave=False):
            try:
                module = build(peer, linear, mixture_of(shape))
                trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
                rows.append({"name": peer, **memory_of(module, x, dout), "parameters": trained})
            except Exception as failure:  # whatever a peer does wrong is a result
                rows.append({"name": peer, "failure": describe(failure)})
        print(f"\n{shape}, {dtype}: kept for backward\n{text(rows)}")
        writer.add({"name": name, "shape": shape._asdict(), "dtype": dtype, "rows": rows})
    return writer.result


def text(rows: Sequence[dict]) -> str:
    lines = [f"{'':32}{'saved MiB':>12}{'trained parameters':>20}"]
    for row in rows:
        numbers = row.get("failure") or f"{row['saved_bytes'] / 2**20:12.3f}{row['parameters']:20,}"
        lines.append(f"{row['name']:32}{numbers}")
    return "\n".join(lines)
