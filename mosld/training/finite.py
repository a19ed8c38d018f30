"""A training that has diverged ends before it writes over anything that is worth keeping."""

from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

MOST_SKIPPED = 20  # steps that a loss scaler may skip one after the other while it looks for its scale


class NotFiniteError(FloatingPointError):
    """A gradient is infinite or no number. The weights are those before the step that it would have made."""


class StopsWhereNotFinite(TrainerCallback):
    """Ends a Trainer's run at the first optimiser step whose gradient is not finite.

    Such a step would make every weight NaN, and all later losses; transformers logs a loss of 0.0 then, and the run
    ends as if it had gone well. It is looked at before the step, so that model and checkpoints stay as they were. Under
    float16's loss scaling, which skips such steps by itself, 20 of them in a row end the run.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.skipped = trainer, 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        trainer = self.trainer
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:  # each process has a part of the gradient alone
            return
        named = [(name, p.grad) for name, p in trainer.model.named_parameters() if p.grad is not None]
        if not named or bool(torch.isfinite(_norm([grad for _, grad in named]))):
            self.skipped = 0
            return
        self.skipped += 1
        if trainer.accelerator.scaler is not None and self.skipped < MOST_SKIPPED:
            return
        first = next((name for name, grad in named if not bool(torch.isfinite(grad).all())), named[0][0])
        raise NotFiniteError(
            f"the gradient of {first} is not finite at step {state.global_step + 1}: training has diverged. The model "
            f"is as before this step, and checkpoints are kept. A smaller learning_rate than {args.learning_rate:g}, "
            "more warm-up, or bfloat16 in the place of float16 helps most often"
        )


def _norm(grads: list[Tensor]) -> Tensor:
    """Not finite exactly where a gradient is not; one number on the first gradient's device."""
    norms = torch._foreach_norm(grads, float("inf"))  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack([norm.to(grads[0].device, torch.float32) for norm in norms]).sum()
