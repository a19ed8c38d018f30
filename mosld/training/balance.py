"""The load-balance loss, E sum_e f_e P_e per layer, summed over layers.

    f_e = share of the chosen places that expert e got        P_e = mean router probability of expert e

It is 1 per layer when the load is even and E when one expert takes all (for K = 1). The paper's Eq. 4 leaves the
normalisation and the weight open; this is the form of the Switch Transformer, used with MoLA's 1e-3.

Some methods' code takes f and P of several layers' tokens together before it multiplies them: MoLA's of all layers of a
transformer block, which makes one term a block, MixLoRA's (MoE-PEFT) of the whole model, which makes one term in all.

How the gradient arrives under activation checkpointing is `mosld.layers.deferred_grads`'s.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mosld_kernels.gating import top_k_mask

from ..layers.adapter import MoSLDAdapter
from ..layers.deferred_grads import KeptTensors, added
from ..layers.stats import Ran, last_routing
from ..layers.unbalanced import note_balanced
from ..tuner.config import BALANCE_POOLS


def balance_loss(
    model: nn.Module, attention_mask: Tensor | None = None, *, recomputed: bool | None = None, pool: str = "layer"
) -> Tensor:
    """The load-balance loss of the last forward, E sum_e f_e P_e per layer, summed over layers.

    Layers with K = E are left out: there every expert is always chosen and the loss is constant. Where a mixing has a
    gate function of its own, the chosen are the experts whose gate is not zero.

    Args:
        model: The adapted model, or one layer.
        attention_mask: [batch, sequence], nonzero at real tokens. None takes the mask that the forward was called
            with, an encoder's and a decoder's each for its own layers; where it was called with none, padding counts
            like any token.
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
    losses = []
    for ran in together(last_routing(model, attention_mask), pool):
        calls = []
        for own in ran:
            logits = kept.of(own.name, own.kept, "router_logits", own.adapter.router.weight)
            calls.append((logits, own.mask, own.kept.gates))
            note_balanced(own.adapter)
        losses.append(_of_pool(ran[0].adapter, calls))
    return added(losses, model)


def together(ran: Iterable[Ran], pool: str) -> list[list[Ran]]:
    """The calls of each pool, as one list each: a layer's tokens are those of all its calls in the forward."""
    pools: dict[object, list[Ran]] = {}
    for own in ran:
        adapter = own.adapter
        if adapter.top_k < adapter.num_experts or own.kept.gates is not None:
            key = {"layer": adapter, "block": _block(own.name), "model": None}[pool]
            pools.setdefault(key, []).append(own)
    for calls in pools.values():
        _check_equal(calls, pool)
    return list(pools.values())


def _block(name: str) -> str:
    """model.layers.3.mlp.up_proj -> model.layers.3; a name without a number stays as it is"""
    found = re.match(r"(.*?(?:^|\.)\d+)(?:\.|$)", name)
    return found[1] if found else name


def _check_equal(calls: list[Ran], pool: str) -> None:
    first = calls[0]
    for own in calls:
        sizes, others = (first.adapter.num_experts, first.adapter.top_k), (own.adapter.num_experts, own.adapter.top_k)
        if sizes != others:
            raise ValueError(
                f"pool={pool!r} needs layers with equal num_experts and top_k: {first.name} has {sizes[0]} and "
                f"{sizes[1]}, {own.name} {others[0]} and {others[1]}"
            )


def _of_pool(adapter: MoSLDAdapter, calls: list[tuple[Tensor, Tensor | None, Tensor | None]]) -> Tensor:
    """logits [..., E], mask [...], gates [..., E] or None of each call -> E sum_e f_e P_e over all tokens where the
    mask is not zero. The chosen are the top_k of the logits, or where gates are given those whose gate is not zero.

    Padding is set to zero, not left out: the host need not know how much there is. Set, not multiplied, as it may be
    NaN.
    """
    places, probabilities, tokens = [], [], []
    for logits, mask, gates in calls:
        logits = logits.reshape(-1, logits.shape[-1])  # a single vector is one token
        if mask is None:
            tokens.append(torch.full((), float(len(logits)), dtype=logits.dtype, device=logits.device))
            places.append(_chosen(logits, gates, adapter.top_k).sum(0))
            probabilities.append(logits.softmax(-1).sum(0))
            continue
        real = (mask.to(logits.device) != 0).flatten().unsqueeze(-1)  # [T, 1]
        logits = torch.where(real, logits, 0.0)
        tokens.append(real.sum().to(logits.dtype))
        places.append((_chosen(logits, gates, adapter.top_k) & real).sum(0))
        probabilities.append((logits.softmax(-1) * real).sum(0))
    count = _sum(tokens).clamp(min=1)
    chosen = _sum(places).to(count.dtype)
    load = chosen / (count * adapter.top_k if calls[0][2] is None else chosen.sum().clamp(min=1))
    return adapter.num_experts * (load * _sum(probabilities) / count).sum()


def _chosen(logits: Tensor, gates: Tensor | None, top_k: int) -> Tensor:
    """-> bool [T, E]"""
    return top_k_mask(logits, top_k) if gates is None else gates.reshape(logits.shape) != 0


def _sum(terms: list[Tensor]) -> Tensor:
    return terms[0] if len(terms) == 1 else torch.stack([term.to(terms[0].device) for term in terms]).sum(0)
