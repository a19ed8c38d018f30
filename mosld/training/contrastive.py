"""MoELoRA's contrastive loss between experts, of the last forward, summed over layers.

    -mean_i log( sum_{i+} exp(<q_i, q_i+> / t) / sum_j exp(<q_i, q_j> / t) )        q = s B_e z_e

Its gradients arrive as those of the balance loss do, under accumulation and activation checkpointing too
(`mosld.layers.deferred_grads`).
"""

from typing import NamedTuple

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
    """MoELoRA's contrastive loss, of the last forward: an expert's outputs are alike, those of others not.

    For every chosen (token, expert) i of a layer, q_i = s B_e z_e, the expert's output before its gate. Positives of i
    are the same expert's outputs on other tokens, negatives the outputs of other experts, on its own token too:

        -log( sum over positives of exp(<q_i, q> / temperature) / sum over positives and negatives of the same )

    in the mean over those i that have a positive. Inner products are taken in rank space,
    <B_e z, B_f z'> = z^T (B_e^T B_f) z', so nothing of the size [tokens, K, D_out] is made.

    We have not read the paper's body and know of no code. Taken from memory, with little confidence: what is positive
    and negative, and InfoNCE. Our choices: the scale s inside q and no gate, no normalisation of q (B starts at zero,
    where a direction has no gradient), the mean, the temperature 1, and that B's own dropout is left out. The loss
    trains A and B; whom the router chose is not differentiable.

    Set `mosld.MoSLDAdapter.keep_hidden = True` before the forward. Layers without a B of their own behind z for each
    expert (mixings other than "expand" and "diagonal") are left out.

    Args:
        model: The adapted model, or one layer.
        attention_mask: [batch, sequence], nonzero at real tokens. Padding is not compared.
        temperature: Inner products are divided by it.
        tokens: How many tokens of a layer are compared, drawn without replacement with torch's generator on its
            device. Work and memory grow with (tokens K)^2. All of them, and nothing drawn, where a layer saw no more.
        recomputed: As in `balance_loss`.

    Returns:
        A scalar that carries gradients for A and B, summed over layers.

    Raises:
        ValueError: For a temperature or number that is not positive, and as `balance_loss`.
        RuntimeError: Where no layer kept z, and as `balance_loss`.

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
    kept = KeptTensors(model, recomputed)
    losses = []
    for name, adapter, call, logits, mask in last_routing(model, attention_mask):
        if call.hidden is None:
            continue
        hidden = kept.of(name, call, "hidden", adapter.shared_a.weight)
        gram = kept.of(name, call, "gram", adapter.expert_b.weight)
        with no_autocast(hidden.device.type):
            sample = _sample(logits, mask, tokens)
            losses.append(_contrast(adapter, logits.detach(), hidden, gram, sample, temperature))
    if not losses:
        raise RuntimeError(
            "no layer kept what its experts compute with: set mosld.MoSLDAdapter.keep_hidden = True before the "
            "forward; mixings other than 'expand' and 'diagonal' never do"
        )
    return added(losses, model)


class Sample(NamedTuple):
    """index: of the tokens that are compared, [n]; None for all. real: which of them are no padding, bool [n]."""

    index: Tensor | None
    real: Tensor

    def of(self, values: Tensor) -> Tensor:
        """values [..., F] -> [n, F], padding set to zero: it may be NaN"""
        values = values.reshape(-1, values.shape[-1])
        if self.index is not None:
            values = values[self.index]
        return torch.where(self.real.unsqueeze(-1), values, 0.0)


def _sample(logits: Tensor, mask: Tensor | None, tokens: int) -> Sample:
    """Tokens without replacement, real ones first."""
    count = logits.shape[:-1].numel()
    if mask is None:
        real = torch.ones(count, dtype=torch.bool, device=logits.device)
    else:
        real = (mask.to(logits.device) != 0).flatten()
    if count <= tokens:
        return Sample(None, real)
    # Random numbers lie below 1, so padding comes after every real token.
    order = torch.where(real, torch.rand(count, device=logits.device), 2.0)
    index = order.topk(tokens, largest=False).indices
    return Sample(index, real[index])


def _contrast(
    adapter: MoSLDAdapter, logits: Tensor, hidden: Tensor, gram: Tensor, sample: Sample, temperature: float
) -> Tensor:
    """logits [..., E], hidden [..., rows of A], gram [E R, E R] -> the loss of one layer"""
    experts, rank = adapter.num_experts, adapter.r
    logits = sample.of(logits)
    hidden = sample.of(hidden)
    _, chosen = largest(logits, adapter.top_k)  # [n, K]
    one_hot = torch.zeros(*chosen.shape, experts, dtype=hidden.dtype, device=hidden.device)
    one_hot = one_hot.scatter(-1, chosen.unsqueeze(-1), 1.0)
    own = hidden.view(len(hidden), -1, rank).unsqueeze(1)  # [n, 1, 1 or E, R]
    spread = (one_hot.unsqueeze(-1) * own).flatten(0, 1).flatten(1)  # [n K, E R], zero but for the expert's z
    scores = (adapter.scale**2 / temperature) * (spread @ gram @ spread.t())

    expert = chosen.flatten()  # [n K]
    real = sample.real.repeat_interleave(adapter.top_k)
    compared = real & ~torch.eye(len(expert), dtype=torch.bool, device=expert.device)
    positive = compared & (expert == expert.unsqueeze(1))
    nothing = torch.finfo(scores.dtype).min / 4  # not -inf, of whose sum the gradient is NaN
    all_of = scores.masked_fill(~compared, nothing).logsumexp(1)
    alike = scores.masked_fill(~positive, nothing).logsumexp(1)
    counted = real & positive.any(1)
    return torch.where(counted, all_of - alike, 0.0).sum() / counted.sum().clamp(min=1)
