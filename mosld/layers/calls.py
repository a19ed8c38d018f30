"""One call of a layer: how it computed, and what it kept of it for losses and statistics."""

from typing import Any, NamedTuple

from torch import Tensor


class Slot:
    """Where a loss leaves gradients for what one call inside a checkpointed region kept, until it is run again."""

    __slots__ = ("deferred_grads",)

    def __init__(self):
        self.deferred_grads: dict[str, Tensor] | None = None


class Call(NamedTuple):
    """How one call of a layer computes: dropout's rates that are not 0 at the start, the scale, and masks' seed."""

    rates: dict[str, float]
    scale: float
    seed: Tensor | None
    slot: Slot | None


class EarlierCall:
    """What a layer kept of a call before its last one, under the names that the adapter has for the last."""

    __slots__ = ("router_logits", "hidden", "gram", "mask", "gates", "slot", "deferred_grads")

    def __init__(self, adapter: Any):
        self.router_logits, self.hidden, self.gram = adapter.router_logits, adapter.hidden, adapter.gram
        self.mask, self.gates, self.slot = adapter.mask, adapter.gates, adapter.slot
        self.deferred_grads: dict[str, Tensor] | None = None
