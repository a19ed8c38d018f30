"""A `task_ids` column in a Trainer's data goes to `mosld.set_routing`, batch by batch, before the model runs."""

from typing import TYPE_CHECKING, Any

from transformers import Trainer

from ..layers.routing import set_routing

COLUMN = "task_ids"
# What the mixin expects beside it: a type checker must know the methods that it extends, but any Trainer will do.
_Base = Trainer if TYPE_CHECKING else object


class TaskColumnMixin(_Base):
    """Routes by the `task_ids` of every batch, in training, evaluation and prediction, and keeps the column.

    A column of integers, one a row; transformers' collators make a tensor of it. Without the column the ids stay those
    of the last call of `mosld.set_routing`, which serves data of one task.

    raises ValueError in evaluation and prediction for a batch without the column after batches with it, whose ids
    would be taken for its own.
    """

    _saw_tasks = False

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, self._routed(model, inputs), *args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        if self._saw_tasks and COLUMN not in inputs:
            raise ValueError(f"a batch has no {COLUMN} where earlier ones had: give this data the column, too")
        return super().prediction_step(model, self._routed(model, inputs), *args, **kwargs)

    def _routed(self, model, inputs: Any) -> Any:
        if COLUMN not in inputs:
            return inputs
        set_routing(model, task_ids=inputs[COLUMN])
        self._saw_tasks = True
        return {name: value for name, value in inputs.items() if name != COLUMN}

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = getattr(self, "_signature_columns", None) or []
        if COLUMN not in columns:
            self._signature_columns = [*columns, COLUMN]
