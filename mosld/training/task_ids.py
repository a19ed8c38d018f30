"""A `task_ids` column in a Trainer's data goes to `mosld.set_routing`, batch by batch, before the model runs."""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import Trainer

from ..layers.routing import set_routing

COLUMN = "task_ids"
# What the mixin expects beside it: a type checker must know the methods that it extends, but any Trainer will do.
_Base = Trainer if TYPE_CHECKING else object


class KeepsTasks:
    """A data collator that passes on the rows' ids, whatever the one inside it makes of the rows."""

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """rows with task_ids, or none -> the batch, with `task_ids` int64 [rows]"""
        if not rows or COLUMN not in rows[0]:
            return self.collator(rows)
        others = []
        for row in rows:
            others.append({name: value for name, value in row.items() if name != COLUMN})
        batch = dict(self.collator(others))
        batch[COLUMN] = torch.tensor([int(row[COLUMN]) for row in rows])
        return batch


def _has_column(dataset: Any) -> bool:
    return COLUMN in (getattr(dataset, "column_names", None) or ())


class TaskColumnMixin(_Base):
    """Routes by the `task_ids` of every batch, in training, evaluation and prediction, and keeps the column.

    A column of integers, one a row; transformers' collators make a tensor of it. Without the column the ids stay those
    of the last call of `mosld.set_routing`, which serves data of one task.

    TRL's trainers make other datasets and batches of the data: the column is kept through them. Preference trainers
    (DPO, reward) put the chosen rows before the rejected ones, which get the same ids.

    raises ValueError at construction for a trainer that cannot keep the column: one that packs several rows into one,
    or that makes its batches of generations. And in evaluation and prediction for a batch without the column after
    batches with it, whose ids would be taken for its own.
    """

    _saw_tasks = False

    def __init__(self, *args, **kwargs):
        given = {name: kwargs.get(name) for name in ("train_dataset", "eval_dataset")}
        super().__init__(*args, **kwargs)
        for name, dataset in given.items():
            if _has_column(dataset):
                self._keep_column(name, dataset)

    def _keep_column(self, name: str, given: Any) -> None:
        """Give the dataset that was made of `given` its ids again, and a collator that passes them on."""
        trainer, kind = cast(Any, self), type(self).__name__
        if hasattr(trainer, "_generate_and_score_completions"):
            raise ValueError(
                f"{kind} makes its batches of generations, which have no {COLUMN}: leave the column out, and train one "
                "task at a time with mosld.set_routing(model, task_ids=...)"
            )
        for option in ("packing", "padding_free"):
            if getattr(trainer.args, option, False):
                raise ValueError(f"{kind} with {option}=True puts several rows into one, and {COLUMN} is one a row")
        made = getattr(trainer, name)
        if not _has_column(made):
            if not hasattr(made, "add_column") or len(made) != len(given):
                raise ValueError(f"{kind} makes {name} anew without {COLUMN}, and with other rows")
            setattr(trainer, name, made.add_column(COLUMN, list(given[COLUMN])))
        if not isinstance(trainer.data_collator, KeepsTasks):
            trainer.data_collator = KeepsTasks(trainer.data_collator)

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, self._routed(model, inputs), *args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        if self._saw_tasks and COLUMN not in inputs:
            raise ValueError(f"a batch has no {COLUMN} where earlier ones had: give this data the column, too")
        return super().prediction_step(model, self._routed(model, inputs), *args, **kwargs)

    def _routed(self, model, inputs: Any) -> Any:
        if COLUMN not in inputs:
            return inputs
        ids = inputs[COLUMN]
        rows = inputs.get("input_ids")
        if isinstance(rows, Tensor) and len(rows) == 2 * len(ids) and self._halves():
            ids = torch.cat([ids, ids])
        set_routing(model, task_ids=ids)
        self._saw_tasks = True
        return {name: value for name, value in inputs.items() if name != COLUMN}

    def _halves(self) -> bool:
        """Whether a batch is all chosen rows and then all rejected ones."""
        return any(base.__name__ in ("DPOTrainer", "RewardTrainer") for base in type(self).__mro__)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = getattr(self, "_signature_columns", None) or []
        if COLUMN not in columns:
            self._signature_columns = [*columns, COLUMN]
