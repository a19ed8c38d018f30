"""Gradients for what a layer keeps of its last forward, such as router logits, under any activation checkpointing.

A loss over kept tensors goes through them into the layers, by itself, where the forward kept a graph. Under reentrant
checkpointing it kept none, and tensors that carry a gradient are made only while backward recomputes the layer, of
which nothing but the layer's output is asked. So there the loss works on stand-ins, each of which stores the gradient
that arrives for it at its adapter, and the recomputation takes it along (`attach`). That works because autograd goes
through what was made last first: the loss before the layers.
"""

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd import Variable


class DeferredGrads(Protocol):
    """An adapter that keeps tensors of its last forward, and gradients for them until it is run again."""

    deferred_grads: dict[str, Tensor] | None


class KeptTensors:
    """The kept tensors of one forward of `model`, to be used by one loss.

    recomputed: whether backward will run the layers again (activation checkpointing); None asks the model's modules, as
        transformers marks them.
    """

    def __init__(self, model: nn.Module, recomputed: bool | None = None):
        if recomputed is None:
            recomputed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        self._recomputed = recomputed
        # Each stand-in's layer, its adapter, and whether the way to it is trained.
        self._stand_ins: list[tuple[str, DeferredGrads, bool]] = []

    def of(self, layer: str, adapter: Any, what: str, through: Tensor) -> Tensor:
        """`adapter`'s kept tensor called `what`, or a stand-in that carries its gradient to the recomputation.

        adapter: the adapter, or one of its earlier calls. A call inside a checkpointed region that remembers has a
            `slot` of its own for its gradients; otherwise they wait at the adapter for whatever is run next.

        through: a weight on the tensor's way; while it is trained a gradient must arrive.
        raises RuntimeError where it cannot: the forward kept none and nothing will be recomputed. Where a recomputation
        was expected and did not come, backward raises it.
        """
        tensor: Tensor = getattr(adapter, what)
        if tensor.requires_grad or not torch.is_grad_enabled():
            return tensor
        slot: DeferredGrads | None = adapter.slot
        if self._recomputed or slot is not None:
            waits = adapter if slot is None else slot
            self._stand_ins.append((layer, waits, through.requires_grad))
            return cast(Tensor, _StandIn.apply(tensor.detach().requires_grad_(), waits, what, self._expect_recomputed))
        if through.requires_grad:
            part = "router" if what == "router_logits" else "experts"
            raise RuntimeError(
                f"the last forward kept no gradient for the {part} of {layer}: run it with gradients, or say "
                "recomputed=True where reentrant activation checkpointing will run it again"
            )
        return tensor

    def _expect_recomputed(self) -> None:
        missed = []
        for layer, adapter, trained in self._stand_ins:
            if adapter.deferred_grads is not None and trained:
                missed.append(layer)
        for _, adapter, _ in self._stand_ins:
            adapter.deferred_grads = None
        if missed:
            raise RuntimeError(
                f"the loss waited for {missed[0]} to be run again in backward, which did not happen: its last forward "
                "kept no gradient and was no part of activation checkpointing"
            )


class _StandIn(torch.autograd.Function):
    """Forward is the tensor as it is; backward stores the gradient that arrives at the adapter."""

    @staticmethod
    def forward(ctx, tensor: Tensor, adapter: DeferredGrads, what: str, expect_recomputed) -> Tensor:
        ctx.adapter, ctx.what, ctx.expect_recomputed = adapter, what, expect_recomputed
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *grad: Tensor) -> tuple[None, None, None, None]:
        deferred = ctx.adapter.deferred_grads or {}
        earlier = deferred.get(ctx.what)
        ctx.adapter.deferred_grads = {**deferred, ctx.what: grad[0] if earlier is None else earlier + grad[0]}
        Variable._execution_engine.queue_callback(ctx.expect_recomputed)  # when the whole backward has ended
        return None, None, None, None


def attach(adapter: DeferredGrads, out: Tensor, kept: Mapping[str, Tensor | None]) -> Tensor:
    """A layer's output, whose backward takes the deferred gradients into what this forward `kept`, by name."""
    deferred, adapter.deferred_grads = adapter.deferred_grads, None
    # A gradient that is deferred outside backward is left from one that broke off. A compiled layer cannot ask whether
    # it is inside; there, `forget_routing` takes away what is left.
    if deferred is None or not (torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1):
        return out
    tensors, grads = [], []
    for name, tensor in kept.items():
        if name in deferred and tensor is not None and tensor.requires_grad:
            tensors.append(tensor)
            grads.append(deferred[name])
    if not tensors:
        return out
    return cast(Tensor, _AttachGrads.apply(out, tuple(grads), *tensors))


class _AttachGrads(torch.autograd.Function):
    """out unchanged; backward gives each of `tensors` its gradient as well."""

    @staticmethod
    def forward(ctx, out: Tensor, grads: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*grads)
        return out.clone()  # no view: what comes next may work in place

    @staticmethod
    def backward(ctx, *dout: Tensor) -> tuple[Tensor | None, ...]:
        return dout[0], None, *ctx.saved_tensors


def added(losses: list[Tensor], model: nn.Module) -> Tensor:
    """The layers' losses, one number each on the layer's device -> their sum; zero without any."""
    if not losses:
        return torch.zeros((), device=next(model.parameters()).device)
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()
