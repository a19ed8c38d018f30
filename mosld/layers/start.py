"""Initial values for weights that were made without any: on the meta device, to be filled from a checkpoint.

A plain model's checkpoint has none for a mixture. What it lacks is then memory as it was found, and nobody is told: the
plain checkpoint is all that the model class promises to need.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class StartsWithoutCheckpoint(nn.Module):
    """A module whose `parts` (leaf modules with a weight, or None) start where nobody gives values.

    There are two ways off the meta device. `to_empty` is noticed as it happens. transformers' from_pretrained replaces
    the parameters one by one, then marks the modules that it knows no initial values for as done.
    """

    parts: tuple[str, ...]

    def reset_parameters(self) -> None:
        """Start anew, in place, and `_mark_started`."""
        raise NotImplementedError

    def _mark_started(self) -> None:
        """Note whether the values of the weights are still to come: on the meta device there are none."""
        self.__dict__["_unset"] = self._on_meta()

    def _on_meta(self) -> bool:
        first: Any = self._modules[self.parts[0]]
        return first.weight.is_meta

    def _apply(self, fn: Callable, recurse: bool = True) -> "StartsWithoutCheckpoint":
        had_values = not self._on_meta()
        super()._apply(fn, recurse)
        if not (had_values or self._on_meta()):
            self.reset_parameters()
        return self

    @property
    def _is_hf_initialized(self) -> bool:
        """How transformers marks a module that needs no initial values any more."""
        return self.__dict__.get("_started", False)

    @_is_hf_initialized.setter
    @torch.no_grad()
    def _is_hf_initialized(self, value: bool) -> None:
        self.__dict__["_started"] = value
        if not (value and self.__dict__.get("_unset")):
            return
        loaded: list[tuple[Tensor, Tensor]] = []
        for part in self.parts:
            own: Any = self._modules[part]
            # Loaded parameters carry the same mark, one by one.
            if own is not None and getattr(own.weight, "_is_hf_initialized", False):
                loaded.append((own.weight.data, own.weight.detach().clone()))
        self.reset_parameters()
        for weight, values in loaded:
            weight.copy_(values)
