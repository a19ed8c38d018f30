"""Auxiliary losses of the sibling methods, of the last forward, summed over layers; the balance loss is `mosld.balance`'s.

    localized_balance_loss   LoRAMoE    var(Z) / mean(Z)^2,  Z[row, e] = sum of e's gates over the row's tokens, weighted by kind
    contrastive_loss         MoELoRA    -mean_i log( sum_{i+} exp(<q_i, q_i+> / t) / sum_j exp(<q_i, q_j> / t) ),  q = s B_e z_e

Their gradients arrive as those of the balance loss do, under accumulation and activation checkpointing too (`mosld.owed`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mosld_kernels.gating import largest
from mosld_kernels.precision import no_autocast

from .layer import MoSLDAdapter
from .owed import KeptTensors, added
from .router import last_routing
from .routing import gates_of


def localized_balance_loss(
    model: nn.Module,
    kinds: Tensor | Sequence[int],
    attention_mask: Tensor | None = None,
    *,
    delta: float = 0.1,
    groups: Sequence[int] | None = None,
    recomputed: bool | None = None,
) -> Tensor:
    """LoRAMoE's localised balance loss of the last forward: even within a group of experts, uneven between the groups.

    Z[b, e] = I[b, e] sum_t g[b, t, e], with I = 1 + delta where expert e is of row b's kind and 1 - delta elsewhere; the
    loss of a layer is var(Z) / mean(Z)^2 over all rows and experts, with the unbiased variance, as in the method's code.

    kinds: integers [batch], the kind of task of each row (in the paper 0 and 1: world knowledge, and the others).
    attention_mask: [batch, sequence], nonzero at real tokens; without it padding counts, as it does in the method's code.
    delta: in [0, 1); the code's blc_alpha.
    groups: one kind an expert; None makes the first half of each layer's experts 0 and the second half 1. (In the code
        the first half is that of task type 1. Names of kinds mean nothing.)
    recomputed: as in `balance_loss`.

    Layers with one expert are left out. Rows are compared as they are: a row with more tokens has larger Z.
    raises ValueError for a wrong number of kinds or groups and for delta out of range, and otherwise as `balance_loss`.

    >>> import torch
    >>> from torch import nn
    >>> from mosld import MoSLDLinear, localized_balance_loss
    >>> layer = MoSLDLinear(6, 5, num_experts=2)
    >>> _ = nn.init.zeros_(layer.router.weight)  # Z is 1.1 for the expert of a row's kind, 0.9 for the other
    >>> _ = layer(torch.randn(2, 2, 6))
    >>> round(localized_balance_loss(layer, kinds=[0, 1]).item(), 4)
    0.0133
    """
    if not 0 <= delta < 1:
        raise ValueError(f"delta must be in [0, 1), got {delta}")
    kinds = torch.as_tensor(kinds)
    if kinds.dim() != 1 or kinds.is_floating_point():
        raise ValueError(f"kinds must be integers [batch], got {kinds.dtype} {list(kinds.shape)}")
    kept, losses = KeptTensors(model, recomputed), []
    for name, adapter, logits, mask in last_routing(model, attention_mask):
        if adapter.num_experts == 1:
            continue
        if logits.dim() < 2 or len(logits) != len(kinds):
            raise ValueError(f"kinds must be one a row: {name} saw {list(logits.shape[:-1])} tokens, got {len(kinds)}")
        of_expert = _groups(name, adapter.num_experts, groups)
        logits = kept.of(name, adapter, "router_logits", adapter.router.weight)
        own = kinds.to(logits.device).unsqueeze(1) == of_expert.to(logits.device)  # [batch, E]
        losses.append(_variation(adapter, logits, mask, own, delta))
    return added(losses, model)


def _groups(name: str, experts: int, groups: Sequence[int] | None) -> Tensor:
    if groups is None:
        return (torch.arange(experts) >= experts // 2).long()
    if len(groups) != experts:
        raise ValueError(f"groups must be one kind an expert: {name} has {experts} experts, got {len(groups)}")
    return torch.as_tensor(groups)


def _variation(adapter: MoSLDAdapter, logits: Tensor, mask: Tensor | None, own: Tensor, delta: float) -> Tensor:
    """logits [batch, ..., E], mask [batch, ...], own bool [batch, E] -> var(Z) / mean(Z)^2"""
    real = None if mask is None else (mask.to(logits.device) != 0).unsqueeze(-1)
    # Set to zero before and after, not multiplied: padding may be NaN.
    gates = gates_of(adapter, logits if real is None else torch.where(real, logits, 0.0))
    if real is not None:
        gates = torch.where(real, gates, 0.0)
    weights = gates.new_full(own.shape, 1 - delta).masked_fill(own, 1 + delta)
    importance = weights * gates.reshape(len(gates), -1, gates.shape[-1]).sum(1)
    return importance.var() / (importance.mean().square() + torch.finfo(importance.dtype).tiny)  # no token: zero


def contrastive_loss(
    model: nn.Module,
    attention_mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    tokens: int = 256,
    recomputed: bool | None = None,
) -> Tensor:
    """MoELoRA's contrastive loss between experts, of the last forward: an expert's outputs are alike, those of others not.

    For every chosen (token, expert) i of a layer, q_i = s B_e z_e, the expert's output before its gate. Positives of i are
    the same expert's outputs on other tokens, negatives the outputs of other experts, on its own token too:

        -log( sum over positives of exp(<q_i, q> / temperature) / sum over positives and negatives of the same )

    in the mean over those i that have a positive. Inner products are taken in rank space, <B_e z, B_f z'> = z^T (B_e^T B_f) z',
    so nothing of the size [tokens, K, D_out] is made.

    We have not read the paper's body and know of no code. Taken from memory, with little confidence: what is positive
    and negative, and InfoNCE. Our choices: the scale s inside q and no gate, no normalisation of q (B starts at zero, where
    a direction has no gradient), the mean, the temperature 1, and that B's own dropout is left out. The loss trains A and B;
    whom the router chose is not differentiable.

    attention_mask: [batch, sequence], nonzero at real tokens; padding is not compared.
    tokens: how many tokens of a layer are compared, drawn without replacement with torch's generator on its device; work
        and memory grow with (tokens K)^2. All of them, and nothing drawn, where a layer saw no more.
    recomputed: as in `balance_loss`.

    Set `mosld.MoSLDAdapter.keep_hidden = True` before the forward. Layers without a B of their own behind z for each expert
    (mixings other than "expand" and "diagonal") are left out.
    raises ValueError for a temperature or number that is not positive, RuntimeError where no layer kept z, and otherwise as
        `balance_loss`.

    >>> import math
    >>> import torch
    >>> from torch import nn
    >>> from mosld import MoSLDLinear, contrastive_loss
    >>> layer = MoSLDLinear(6, 5, num_experts=4, top_k=2)
    >>> _ = nn.init.zeros_(layer.router.weight)  # all tokens choose experts 0 and 1
    >>> layer.adapter.keep_hidden = True
    >>> _ = layer(torch.randn(3, 6))
    >>> loss = contrastive_loss(layer)  # B is zero, so all of the 6 are alike: 2 of the 5 others are positives
    >>> round(loss.item(), 4), round(-math.log(2 / 5), 4)
    (0.9163, 0.9163)
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}")
    kept, losses = KeptTensors(model, recomputed), []
    for name, adapter, logits, mask in last_routing(model, attention_mask):
        if adapter.hidden is None:
            continue
        hidden = kept.of(name, adapter, "hidden", adapter.shared_a.weight)
        gram = kept.of(name, adapter, "gram", adapter.expert_b.weight)
        with no_autocast(hidden.device.type):
            places = _sample(logits, mask, tokens)
            losses.append(_contrast(adapter, logits.detach(), hidden, gram, *places, temperature))
    if not losses:
        raise RuntimeError(
            "no layer kept what its experts compute with: set mosld.MoSLDAdapter.keep_hidden = True before the forward; "
            "mixings other than 'expand' and 'diagonal' never do"
        )
    return added(losses, model)


def _sample(logits: Tensor, mask: Tensor | None, tokens: int) -> tuple[Tensor | None, Tensor | None]:
    """-> indices [n] of tokens without replacement, real ones first, or None for all of them; and which are real, or None"""
    count = logits.shape[:-1].numel()
    real = None if mask is None else (mask.to(logits.device) != 0).flatten()
    if count <= tokens:
        return None, real
    order = torch.rand(count, device=logits.device)
    if real is not None:
        order = torch.where(real, order, 2.0)
    index = order.topk(tokens, largest=False).indices
    return index, None if real is None else real[index]


def _contrast(
    adapter: MoSLDAdapter,
    logits: Tensor,
    hidden: Tensor,
    gram: Tensor,
    index: Tensor | None,
    real: Tensor | None,
    temperature: float,
) -> Tensor:
    """logits [..., E], hidden [..., rows of A], gram [E R, E R], index and real [n] as `_sample` returns them"""
    experts, rank = adapter.num_experts, adapter.r
    logits, hidden = (values.reshape(-1, values.shape[-1]) for values in (logits, hidden))
    if index is not None:
        logits, hidden = logits[index], hidden[index]
    if real is None:
        real = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    logits, hidden = (torch.where(real.unsqueeze(-1), values, 0.0) for values in (logits, hidden))
    _, chosen = largest(logits, adapter.top_k)  # [n, K]
    one_hot = torch.zeros(*chosen.shape, experts, dtype=hidden.dtype, device=hidden.device)
    one_hot = one_hot.scatter(-1, chosen.unsqueeze(-1), 1.0)
    own = hidden.view(len(hidden), -1, rank).unsqueeze(1)  # [n, 1, 1 or E, R]
    spread = (one_hot.unsqueeze(-1) * own).flatten(0, 1).flatten(1)  # [n K, E R], zero but for the expert's z
    scores = (adapter.scale**2 / temperature) * (spread @ gram @ spread.t())

    expert, real = chosen.flatten(), real.repeat_interleave(adapter.top_k)
    compared = real & ~torch.eye(len(expert), dtype=torch.bool, device=expert.device)
    positive = compared & (expert == expert.unsqueeze(1))
    nothing = torch.finfo(scores.dtype).min / 4  # not -inf, of whose sum the gradient is NaN
    all_of, alike = (scores.masked_fill(~which, nothing).logsumexp(1) for which in (compared, positive))
    counted = real & positive.any(1)
    return torch.where(counted, all_of - alike, 0.0).sum() / counted.sum().clamp(min=1)
