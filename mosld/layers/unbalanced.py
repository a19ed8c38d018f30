"""Whether a training leaves out the balance loss that its configuration asks for: transformers' own Trainer knows none.

That is certain only when backward begins: until then somebody, a Trainer's own `compute_loss` say, may take the loss of
the forward that ended. So the first training forward under such a Trainer leaves a hook for its backward.
"""

import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import MoSLDAdapter


def note_balanced(adapter: MoSLDAdapter) -> None:
    """Note that somebody takes a balance loss of `adapter`."""
    if not torch.compiler.is_compiling() and not adapter.balanced:
        adapter.balanced = True


def watch_balance(model: nn.Module, running: Iterable[tuple[str, MoSLDAdapter]], output: Any) -> None:
    """Warn in the backward of the forward that made `output` where nobody took a balance loss, and somebody should.

    running: the mixtures that take part in forwards of `model`, each with its layer's name.
    """
    configs = getattr(model, "peft_config", None) or {}
    coef = max((getattr(config, "balance_coef", 0) for config in configs.values()), default=0)
    adapters = []
    for _, adapter in running:
        if adapter.mixture.tokens_choose and adapter.top_k < adapter.num_experts:
            adapters.append(adapter)
    trainer = _plain_trainer() if coef and adapters else None
    outputs = _differentiable(output)
    if trainer is None or not outputs:
        return

    def tell(_: Tensor) -> None:
        if not any(adapter.balanced for adapter in adapters):
            warnings.warn(
                f"balance_coef={coef} asks for a balance loss, which {trainer} does not add: train with MoSLDTrainer, "
                "put mosld.MoSLDTrainerMixin before another Trainer, or say balance_coef=0",
                stacklevel=2,
            )

    torch.autograd.graph.register_multi_grad_hook(outputs, tell, mode="any")


def _plain_trainer() -> str | None:
    """The class of transformers' Trainer, or of one built on it, that is running; None for MoSLD's and for none."""
    frame = sys._getframe(1)
    while frame is not None:
        kind = type(frame.f_locals.get("self"))
        bases = {base.__name__: base.__module__ for base in kind.__mro__}
        if bases.get("Trainer", "").startswith("transformers."):
            return None if "MoSLDTrainerMixin" in bases else kind.__name__
        frame = frame.f_back
    return None


def _differentiable(output: Any) -> list[Tensor]:
    """What a loss can begin at: the output itself, or the tensors that it holds."""
    if isinstance(output, Mapping):
        output = list(output.values())
    values = output if isinstance(output, (list, tuple)) else [output]
    return [value for value in values if isinstance(value, Tensor) and value.requires_grad]
