"""What `mosld export` reads from its command line and its tasks, and what it prints."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..convert.fixed_gates import LayerGates
from ..tasks.encode import Encoder
from ..tasks.examples import Task, TaskFileError


def parse_gates(text: str) -> str | list[float]:
    """ "uniform", "calibrate", or numbers with commas between them; raises ValueError for anything else."""
    if text in ("uniform", "calibrate"):
        return text
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"gates must be uniform, calibrate or weights such as 0.5,0.5, got {text!r}") from None


def calibration_batches(encoder: Encoder, tasks: Sequence[Task], batch_size: int) -> list[dict[str, Tensor]]:
    """The training examples of `tasks`, prompt and right answer, as input_ids and attention_mask [rows, longest row].

    raises TaskFileError, naming the task, for an answer that does not fit.
    """
    rows = []
    for task in tasks:
        try:
            rows += [encoder.training_row(example)["input_ids"] for example in task.train]
        except TaskFileError as error:
            raise TaskFileError(f"task {task.name}: {error}") from None
    rows.sort(key=len)  # rows of one batch are about as long: little padding
    return [_padded(rows[start : start + batch_size], encoder.pad) for start in range(0, len(rows), batch_size)]


def _padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }


def table(layers: Mapping[str, LayerGates]) -> str:
    """The layers with their gates and, where they come from tokens, what is lost by fixing them, as text."""
    rows = [["layer", "tokens", "gate variance", "update error", "output error", "gates"]]
    for name, layer in layers.items():
        measured = [""] * 4
        if layer.gate_variance is not None:
            values = (sum(layer.gate_variance), layer.update_error, layer.output_error)
            measured = [str(layer.tokens), *(f"{value:.4f}" for value in values)]
        rows.append([name, *measured, " ".join(f"{gate:.3f}" for gate in layer.gates)])
    if all(layer.gate_variance is None for layer in layers.values()):
        rows = [[row[0], row[-1]] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
