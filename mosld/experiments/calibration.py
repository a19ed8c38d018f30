"""Training examples as batches, on which `mosld export --gates calibrate` takes the mean of each layer's gates."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tasks.encode import Encoder
from ..tasks.examples import Task, TaskFileError


def calibration_batches(encoder: Encoder, tasks: Sequence[Task], batch_size: int) -> list[dict[str, Tensor]]:
    """The training examples of `tasks`, prompt and right answer, as input_ids and attention_mask [rows, longest row].

    raises TaskFileError, naming the task, for an answer that does not fit.
    """
    rows = []
    for task in tasks:
        try:
            for example in task.train:
                rows.append(encoder.training_row(example)["input_ids"])
        except TaskFileError as error:
            raise TaskFileError(f"task {task.name}: {error}") from None
    rows.sort(key=len)  # rows of one batch are about as long: little padding
    return [_padded(rows[start : start + batch_size], encoder.pad) for start in range(0, len(rows), batch_size)]


def _padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    # On the right, where a causal model's other tokens do not see it.
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad)
    attention_mask = torch.zeros_like(input_ids)
    for place, row in enumerate(rows):
        input_ids[place, : len(row)] = torch.tensor(row)
        attention_mask[place, : len(row)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}
