"""Auxiliary losses of the sibling methods, of the last forward, summed over layers; the balance loss is `mosld.training.balance`'s.

    localized_balance_loss   LoRAMoE    var(Z) / mean(Z)^2,  Z[row, e] = sum of e's gates over the row's tokens, weighted by kind
    contrastive_loss         MoELoRA    -mean_i log( sum_{i+} exp(<q_i, q_i+> / t) / sum_j exp(<q_i, q_j> / t) ),  q = s B_e z_e

Their gradients arrive as those of the balance loss do, under accumulation and activation checkpointing too (`mosld.layers.deferred_grads`).
"""

import torch
from torch import Tensor, nn

from mosld_kernels.gating import largest
from mosld_kernels.precision import no_autocast

from ..layers.adapter import MoSLDAdapter
from ..layers.deferred_grads import KeptTensors, added
from ..layers.stats import last_routing


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
