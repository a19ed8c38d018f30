"""MoSLDTrainer: transformers' Trainer with the load-balance loss in the training loss."""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import Trainer

from .balance import balance_loss

BY_HAND_COEF = 1e-3  # the default of MoSLDConfig, for layers without one
_Base = Trainer if TYPE_CHECKING else object  # what the mixin expects beside it


class MoSLDTrainerMixin(_Base):
    """Adds `balance_coef * balance_loss(model)` to the training loss of any Trainer subclass; put it first.

    balance_coef: the weight; None takes it from the active adapter's MoSLDConfig, or 1e-3 where layers were adapted by
        hand. 0 leaves the loss alone.

    The evaluation loss stays the task's own. Padding, as told by `attention_mask` in the batch, is left out. The
    gradient is that of the mean over micro-batches and processes, whatever the number of either.
    """

    def __init__(self, *args, balance_coef: float | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"MoSLD does not run under nn.DataParallel, which Trainer chooses for {self.args.n_gpu} GPUs in one "
                "process: start one process per GPU with torchrun, or show it one GPU with CUDA_VISIBLE_DEVICES=0"
            )
        self.balance_coef = (
            _configured_balance_coef(cast(nn.Module, self.model)) if balance_coef is None else balance_coef
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        attention_mask = inputs.get("attention_mask")
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.balance_coef and model.training:
            penalty = self.balance_coef * balance_loss(model, attention_mask)
            loss = loss + penalty.to(loss.device) / self._undivided_steps(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _undivided_steps(self, num_items_in_batch: torch.Tensor | int | None) -> int:
        """By how much the penalty must be divided here so that accumulation leaves its weight alone.

        A loss that is normalised over the whole accumulated batch is summed over micro-batches without a further
        division, which would count the penalty once for each of them; other losses the Trainer itself divides.
        """
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # the attribute is younger than transformers 5.0
        if scaled is None:
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_model or self.compute_loss_func is not None
        return self.current_gradient_accumulation_steps if scaled else 1


class MoSLDTrainer(MoSLDTrainerMixin, Trainer):
    """transformers' Trainer for models adapted with MoSLD; see MoSLDTrainerMixin for what it adds."""


def _configured_balance_coef(model: nn.Module) -> float:
    configs = getattr(model, "peft_config", None)
    if not configs:
        return BY_HAND_COEF
    active: Any = getattr(model, "active_adapters", None)  # a method in transformers, a property in PEFT
    names = list(cast(Any, active() if callable(active) else active or configs))
    coefs = {getattr(configs[name], "balance_coef", 0.0) for name in names if name in configs}
    if len(coefs) > 1:
        raise ValueError(f"the active adapters have different balance_coef {sorted(coefs)}: pass balance_coef")
    return coefs.pop() if coefs else 0.0  # no adapter is active
