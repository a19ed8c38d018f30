"""The load-balance loss, E sum_e f_e P_e per layer, summed over layers.

    f_e = share of the chosen places that expert e got        P_e = mean router probability of expert e

It is 1 per layer when the load is even and E when one expert takes all (for K = 1). The paper's Eq. 4 leaves the
normalisation and the weight open; this is the form of MoLA and the Switch Transformer, used with 1e-3.

Under reentrant activation checkpointing the forward keeps no gradient, and the logits that carry one are made only while
backward recomputes the layer, of which nothing but the layer's output is asked. So there the loss hands each layer the
gradient that it owes it, times what arrives for the loss itself, and the recomputation takes it along (`layer._WithOwed`).
That works because autograd goes through what was made last first: the loss before the layers.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from mosld_kernels.reference import top_k_mask

from .layer import MoSLDAdapter
from .router import last_routing, running_adapters


def balance_loss(model: nn.Module, attention_mask: Tensor | None = None, *, recomputed: bool | None = None) -> Tensor:
    """The load-balance loss of the last forward, a scalar that carries gradients for the routers and their inputs.

    attention_mask: [batch, sequence], nonzero at real tokens; without it padding counts like any token.
    recomputed: whether backward will run the layers again (activation checkpointing); None asks the model's modules, as
        transformers marks them. Say True where layers are checkpointed by hand with use_reentrant=True. A layer that
        runs twice inside one such checkpoint gets a wrong gradient: checkpoint its calls apart.
    Layers with K = E are left out: there every expert is always chosen and the loss is constant.
    raises ValueError and RuntimeError as `last_routing`, and RuntimeError when the last forward kept no gradient for
    a router that is being trained and nothing will be recomputed (torch.no_grad). Where a recomputation was expected
    and did not come, backward raises it.
    """
    owed = _without_gradient(model, recomputed) if torch.is_grad_enabled() else []
    for _, adapter in owed:
        adapter.router_logits = cast(Tensor, adapter.router_logits).detach().requires_grad_()
    losses, later, total = [], [], None
    for name, adapter, logits, mask in last_routing(model, attention_mask):
        if adapter.top_k < adapter.num_experts:
            (later if (name, adapter) in owed else losses).append(_of_layer(adapter, logits, mask))
    if losses:
        total = torch.stack([loss.to(losses[0].device) for loss in losses]).sum()
    if later:
        paid = _pay_later(torch.stack([loss.to(later[0].device) for loss in later]).sum(), owed)
        total = paid if total is None else total + paid.to(total.device)
    return torch.zeros((), device=next(model.parameters()).device) if total is None else total


def _of_layer(adapter: MoSLDAdapter, logits: Tensor, mask: Tensor | None) -> Tensor:
    """logits [..., E], mask [...] -> E sum_e f_e P_e over the tokens where the mask is not zero

    Padding is set to zero, not left out: the host need not know how much there is. Set, not multiplied, as it may be NaN.
    """
    logits = logits.flatten(0, -2)
    real = None if mask is None else (mask.to(logits.device) != 0).flatten().unsqueeze(-1)  # [T, 1]
    if real is not None:
        logits = torch.where(real, logits, 0.0)
    chosen, probability = top_k_mask(logits, adapter.top_k), logits.softmax(-1)
    if real is not None:
        chosen, probability = chosen & real, probability * real
    tokens = max(len(logits), 1) if real is None else real.sum().clamp(min=1)
    load = chosen.sum(0).to(logits.dtype) / (tokens * adapter.top_k)
    return adapter.num_experts * (load * probability.sum(0) / tokens).sum()


Owed = list[tuple[str, MoSLDAdapter]]  # layers' names beside their mixtures


def _without_gradient(model: nn.Module, recomputed: bool | None) -> Owed:
    """The mixtures whose last forward kept no gradient because it will be run again."""
    lacking = [
        (name, adapter)
        for name, adapter in running_adapters(model)
        if adapter.router_logits is not None and not _carries_gradient(adapter.router_logits)
    ]
    if recomputed is None:
        recomputed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    trained = [name for name, adapter in lacking if adapter.router.weight.requires_grad]
    if trained and not recomputed:
        raise RuntimeError(
            f"the last forward kept no gradient for the router of {trained[0]}: run it with gradients, or say "
            "recomputed=True where reentrant activation checkpointing will run it again"
        )
    return lacking if recomputed else []


def _carries_gradient(logits: Tensor) -> bool:
    # A leaf that requires one is our own, of an earlier call. torch.compile knows no grad_fn and no reentrant checkpoint.
    return logits.requires_grad if torch.compiler.is_compiling() else logits.grad_fn is not None


def _pay_later(loss: Tensor, owed: Owed) -> Tensor:
    """The loss, whose backward hands every layer in `owed` the gradient of its logits."""
    owed = [(name, adapter) for name, adapter in owed if adapter.top_k < adapter.num_experts]
    grads = torch.autograd.grad(loss, [cast(Tensor, adapter.router_logits) for _, adapter in owed])
    # Something must ask for a gradient, or backward would not come by.
    asks = torch.zeros_like(loss, requires_grad=True)
    return cast(Tensor, _PaidLater.apply(asks, loss.detach(), owed, grads))


class _PaidLater(torch.autograd.Function):
    """Forward is the loss as it is; backward leaves each adapter its logits' gradient, times what arrives."""

    @staticmethod
    def forward(ctx, asks: Tensor, loss: Tensor, owed: Owed, grads: Sequence[Tensor]) -> Tensor:
        ctx.owed, ctx.grads = owed, grads
        return loss.clone()

    @staticmethod
    def backward(ctx, *dloss: Tensor) -> tuple[None, None, None, None]:
        owed = ctx.owed
        for (_, adapter), grad in zip(owed, ctx.grads, strict=True):
            own = dloss[0].to(grad.device) * grad
            adapter.owed = own if adapter.owed is None else adapter.owed + own
        Variable._execution_engine.queue_callback(lambda: _expect_paid(owed))  # when the whole backward has ended
        return None, None, None, None


def _expect_paid(owed: Owed) -> None:
    unpaid = [(name, adapter) for name, adapter in owed if adapter.owed is not None]
    for _, adapter in unpaid:
        adapter.owed = None
    trained = [name for name, adapter in unpaid if adapter.router.weight.requires_grad]
    if trained:
        raise RuntimeError(
            f"the balance loss waited for {trained[0]} to be run again in backward, which did not happen: its last "
            "forward kept no gradient and was no part of activation checkpointing"
        )
