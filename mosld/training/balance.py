"""The load-balance loss, E sum_e f_e P_e per layer, summed over layers.

    f_e = share of the chosen places that expert e got        P_e = mean router probability of expert e

It is 1 per layer when the load is even and E when one expert takes all (for K = 1). The paper's Eq. 4 leaves the
normalisation and the weight open; this is the form of MoLA and the Switch Transformer, used with 1e-3.

How the gradient arrives under activation checkpointing is `mosld.layers.deferred_grads`'s.
"""

import torch
from torch import Tensor, nn

from mosld_kernels.gating import top_k_mask

from ..layers.adapter import MoSLDAdapter
from ..layers.deferred_grads import KeptTensors, added
from ..layers.stats import last_routing


def balance_loss(model: nn.Module, attention_mask: Tensor | None = None, *, recomputed: bool | None = None) -> Tensor:
    """The load-balance loss of the last forward, E sum_e f_e P_e per layer, summed over layers.

    Layers with K = E are left out: there every expert is always chosen and the loss is constant.

    Args:
        model: The adapted model, or one layer.
        attention_mask: [batch, sequence], nonzero at real tokens. Without it padding counts like any token.
        recomputed: Whether backward will run the layers again (activation checkpointing). None asks the model's
            modules, as transformers marks them. Say True where layers are checkpointed by hand with
            use_reentrant=True. A layer that runs twice inside one such checkpoint gets a wrong gradient: checkpoint
            its calls apart.

    Returns:
        A scalar that carries gradients for the routers and their inputs.

    Raises:
        ValueError: As `mosld.layers.stats.last_routing`.
        RuntimeError: As `last_routing`; when the last forward kept no gradient for a router that is being trained and
            nothing will be recomputed (torch.no_grad); and in backward where an expected recomputation did not come.

    >>> import torch
    >>> from torch import nn
    >>> from mosld import MoSLDLinear, balance_loss
    >>> layer = MoSLDLinear(6, 5, num_experts=4, top_k=1)
    >>> _ = nn.init.zeros_(layer.router.weight)  # an undecided router
    >>> _ = layer(torch.randn(3, 6))
    >>> balance_loss(layer).item()
    1.0
    """
    kept = KeptTensors(model, recomputed)
    losses = []
    for name, adapter, _, mask in last_routing(model, attention_mask):
        if adapter.top_k < adapter.num_experts:
            logits = kept.of(name, adapter, "router_logits", adapter.router.weight)
            losses.append(_of_layer(adapter, logits, mask))
    return added(losses, model)


def _of_layer(adapter: MoSLDAdapter, logits: Tensor, mask: Tensor | None) -> Tensor:
    """logits [..., E], mask [...] -> E sum_e f_e P_e over the tokens where the mask is not zero

    Padding is set to zero, not left out: the host need not know how much there is. Set, not multiplied, as it may be
    NaN.
    """
    logits = logits.reshape(-1, logits.shape[-1])  # a single vector is one token
    real = None if mask is None else (mask.to(logits.device) != 0).flatten().unsqueeze(-1)  # [T, 1]
    if real is not None:
        logits = torch.where(real, logits, 0.0)
    chosen, probability = top_k_mask(logits, adapter.top_k), logits.softmax(-1)
    if real is not None:
        chosen, probability = chosen & real, probability * real
    tokens = max(len(logits), 1) if real is None else real.sum().clamp(min=1)
    load = chosen.sum(0).to(logits.dtype) / (tokens * adapter.top_k)
    return adapter.num_experts * (load * probability.sum(0) / tokens).sum()
