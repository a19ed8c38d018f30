"""The load-balance loss, E sum_e f_e P_e per layer, summed over layers.

    f_e = share of the chosen places that expert e got        P_e = mean router probability of expert e

It is 1 per layer when the load is even and E when one expert takes all (for K = 1). The paper's Eq. 4 leaves the
normalisation and the weight open; this is the form of the Switch Transformer, used with MoLA's 1e-3.

Some methods' code takes f and P of several layers' tokens together before it multiplies them: MoLA's of all layers of a
transformer block, which makes one term a block, MixLoRA's (MoE-PEFT) of the whole model, which makes one term in all.

How the gradient arrives under activation checkpointing is `mosld.layers.deferred_grads`'s.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mosld_kernels.gating import top_k_mask

from ..layers.adapter import MoSLDAdapter
from ..layers.deferred_grads import KeptTensors, added
from ..layers.stats import last_routing
from ..tuner.config import BALANCE_POOLS


def balance_loss(
    model: nn.Module, attention_mask: Tensor | None = None, *, recomputed: bool | None = None, pool: str = "layer"
) -> Tensor:
    """The load-balance loss of the last forward, E sum_e f_e P_e per layer, summed over layers.

    Layers with K = E are left out: there every expert is always chosen and the loss is constant.

    Args:
        model: The adapted model, or one layer.
        attention_mask: [batch, sequence], nonzero at real tokens. Without it padding counts like any token.
        recomputed: Whether backward will run the layers again (activation checkpointing). None asks the model's
            modules, as transformers marks them. Say True where layers are checkpointed by hand with
            use_reentrant=True. A layer that runs twice inside one such checkpoint gets a wrong gradient: checkpoint
            its calls apart.
        pool: Over whose tokens f and P are taken, before they are multiplied. "layer": each layer's, a term a layer.
            "block": those of all layers whose names agree up to their first number, as in model.layers.3, a term a
            block. "model": all, one term. Layers in one pool must have equal numbers of experts and of chosen ones.

    Returns:
        A scalar that carries gradients for the routers and their inputs.

    Raises:
        ValueError: As `mosld.layers.stats.last_routing`; for another `pool`, and unequal layers in one.
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
    if pool not in BALANCE_POOLS:
        raise ValueError(f"pool must be one of {', '.join(BALANCE_POOLS)}, got {pool!r}")
    kept = KeptTensors(model, recomputed)
    pools: dict[object, _Pool] = {}
    for place, (name, adapter, _, mask) in enumerate(last_routing(model, attention_mask)):
        if adapter.top_k < adapter.num_experts:
            logits = kept.of(name, adapter, "router_logits", adapter.router.weight)
            own = _of_layer(name, adapter, logits, mask)
            key = {"layer": place, "block": _block(name), "model": None}[pool]
            pools[key] = own if key not in pools else _together(pools[key], own, pool)
    return added([_loss(sums) for sums in pools.values()], model)


class _Pool(NamedTuple):
    """Sums over the tokens of one layer or more."""

    name: str  # of the first layer
    num_experts: int
    top_k: int
    places: Tensor  # [E], how often each expert was chosen
    probability: Tensor  # [E], sum of the router's probabilities
    tokens: Tensor | int


def _block(name: str) -> str:
    """model.layers.3.mlp.up_proj -> model.layers.3; a name without a number stays as it is"""
    found = re.match(r"(.*?(?:^|\.)\d+)(?:\.|$)", name)
    return found[1] if found else name


def _together(pool: _Pool, layer: _Pool, which: str) -> _Pool:
    if (pool.num_experts, pool.top_k) != (layer.num_experts, layer.top_k):
        raise ValueError(
            f"pool={which!r} needs layers with equal num_experts and top_k: {pool.name} has {pool.num_experts} and "
            f"{pool.top_k}, {layer.name} {layer.num_experts} and {layer.top_k}"
        )
    device = pool.places.device
    return pool._replace(
        places=pool.places + layer.places.to(device),
        probability=pool.probability + layer.probability.to(device),
        tokens=pool.tokens + (layer.tokens.to(device) if isinstance(layer.tokens, Tensor) else layer.tokens),
    )


def _loss(pool: _Pool) -> Tensor:
    load = pool.places.to(pool.probability.dtype) / (pool.tokens * pool.top_k)
    return pool.num_experts * (load * pool.probability / pool.tokens).sum()


def _of_layer(name: str, adapter: MoSLDAdapter, logits: Tensor, mask: Tensor | None) -> _Pool:
    """logits [..., E], mask [...] -> sums over the tokens where the mask is not zero

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
    return _Pool(name, adapter.num_experts, adapter.top_k, chosen.sum(0), probability.sum(0), tokens)
