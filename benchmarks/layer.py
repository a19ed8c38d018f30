"""One adapted linear layer, forward and backward, as a ratio over the frozen layer in the same interleaved run."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from .measure import interleaved, machine
from .rivals import candidates
from .shapes import LAYERS, LayerShape

DROPOUT = 0.1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def step(module: nn.Module, x: Tensor, dout: Tensor) -> Callable[[], None]:
    """Forward and backward with x and the adapters wanting gradients, starting from none."""
    parameters = [x, *(p for p in module.parameters() if p.requires_grad)]

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        module(x).backward(dout)

    return run


def measure_layer(shape: LayerShape, dtype: torch.dtype, rounds: int, label: str) -> list[dict]:
    """-> one row a candidate: its times in ms, and its ratio over the frozen linear."""
    torch.manual_seed(0)
    x = torch.randn(shape.T, shape.D_in).to(dtype).requires_grad_()
    dout = torch.randn(shape.T, shape.D_out).to(dtype)
    linear = nn.Linear(shape.D_in, shape.D_out).to(dtype).requires_grad_(False)
    modules = candidates(linear, r=shape.R, num_experts=shape.E, top_k=shape.K, dropout=DROPOUT)
    timings = interleaved({name: step(module, x, dout) for name, module in modules.items()}, rounds, label)
    frozen = timings["frozen linear"].median_ms
    return [{"name": name, **asdict(t), "ratio": t.median_ms / frozen} for name, t in timings.items()]


def run(names: Sequence[str], dtypes: Sequence[str], rounds: int, out: Path | None) -> dict:
    """Measure every shape in every dtype, print a table each, and write all to `out` as JSON after each one.

    raises ValueError for a shape or dtype that does not exist, listing those that do.
    """
    for given, known in ((names, LAYERS), (dtypes, DTYPES)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"there is no {', '.join(unknown)}; there are: {', '.join(known)}")
    result = {"machine": machine(), "dropout": DROPOUT, "rounds": rounds, "layers": []}
    for name in names:
        for dtype in dtypes:
            rows = measure_layer(LAYERS[name], DTYPES[dtype], rounds, f"{name} {dtype}")
            result["layers"].append({"name": name, "shape": LAYERS[name]._asdict(), "dtype": dtype, "rows": rows})
            print(f"\n{LAYERS[name]}, {dtype}: forward + backward\n{table(rows)}")
            if out:  # after each table, so that an interruption keeps what is measured
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(result, indent=2) + "\n")
    return result


def table(rows: Sequence[dict]) -> str:
    lines = [f"{'':24}{'median ms':>11}{'20 % to 80 %':>18}{'over frozen':>13}"]
    for row in rows:
        spread = f"{row['low_ms']:.2f} to {row['high_ms']:.2f}"
        lines.append(f"{row['name']:24}{row['median_ms']:11.2f}{spread:>18}{row['ratio']:12.2f}x")
    return "\n".join(lines)
