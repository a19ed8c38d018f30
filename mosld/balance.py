"""The load-balance loss, E sum_e f_e P_e per layer, summed over layers.

    f_e = share of the chosen places that expert e got        P_e = mean router probability of expert e

It is 1 per layer when the load is even and E when one expert takes all (for K = 1). The paper's Eq. 4 leaves the
normalisation and the weight open; this is the form of MoLA and the Switch Transformer, used with 1e-3.
"""

import torch
from torch import Tensor, nn

from mosld_kernels.reference import top_k_mask

from .router import routed_tokens


def balance_loss(model: nn.Module, attention_mask: Tensor | None = None) -> Tensor:
    """The load-balance loss of the last forward, a scalar that carries gradients for the routers and their inputs.

    attention_mask: [batch, sequence], nonzero at real tokens; without it padding counts like any token.
    Layers with K = E are left out: there every expert is always chosen and the loss is constant.
    raises ValueError and RuntimeError as `routed_tokens`, and RuntimeError when the last forward kept no gradient for
    a router that is being trained (torch.no_grad, or reentrant activation checkpointing).
    """
    losses = []
    for name, adapter, logits in routed_tokens(model, attention_mask):
        if torch.is_grad_enabled() and adapter.router.weight.requires_grad and not logits.requires_grad:
            raise RuntimeError(
                f"the last forward kept no gradient for the router of {name}: run it with gradients, and with "
                "use_reentrant=False where activation checkpointing is on"
            )
        if adapter.top_k == adapter.num_experts:
            continue
        tokens = max(len(logits), 1)
        load = top_k_mask(logits, adapter.top_k).sum(0).to(logits.dtype) / (tokens * adapter.top_k)
        losses.append(adapter.num_experts * (load * logits.softmax(-1).sum(0) / tokens).sum())
    if not losses:
        return torch.zeros((), device=next(model.parameters()).device)
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()
