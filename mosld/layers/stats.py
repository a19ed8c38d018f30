"""What the routers do: which experts the tokens of the last forward chose, layer by layer."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mosld_kernels.gating import largest

from .adapter import EarlierCall, MoSLDAdapter
from .host import running_adapters


class Ran(NamedTuple):
    """One call of one layer in the last forward.

    kept: who keeps its tensors (`router_logits`, `hidden`, `gram`), the adapter or an earlier call.
    logits: [..., E]. mask: [...], nonzero at real tokens, or None where all count.
    """

    name: str
    adapter: MoSLDAdapter
    kept: MoSLDAdapter | EarlierCall
    logits: Tensor
    mask: Tensor | None


def last_routing(model: nn.Module, attention_mask: Tensor | None = None) -> Iterator[Ran]:
    """Every call of every mixture that ran in the last forward.

    attention_mask: [batch, sequence], nonzero at real tokens. A layer that saw something else than [batch, sequence]
        tokens (a pooler, a decoder beside an encoder) gets no mask and keeps all of its tokens. None takes the masks
        that the forward itself was called with, each stack its own, and every token where it was called without.
    raises ValueError when the model has no mixture, none in which tokens choose among experts, or the mask fits none,
    RuntimeError before the first forward.
    """
    adapters = list(running_adapters(model))
    if not adapters:
        raise ValueError(f"{type(model).__name__} has no active MoSLD layer")
    if not any(adapter.mixture.tokens_choose for _, adapter in adapters):
        raise ValueError(f"there is {no_choice(adapters[0][1])}")
    ran: list[Ran] = []
    compiling = torch.compiler.is_compiling()  # compiled layers keep their last call, and no mask
    for name, adapter in adapters:
        for kept in (adapter,) if compiling else (*adapter.earlier, adapter):
            if kept.router_logits is not None:
                ran.append(Ran(name, adapter, kept, kept.router_logits, None if compiling else kept.mask))
    if not ran:
        raise RuntimeError(
            "no MoSLD layer has run yet: call the model before asking for its routing, with MoSLDAdapter.keep_logits on"
        )
    if attention_mask is None:
        forward = None if compiling else ran[-1].adapter.last_forward
        if forward is not None and forward.strange is not None:
            raise ValueError(
                f"the model was called with an attention_mask ({forward.strange}) that does not tell which tokens are "
                "padding: give the loss one [batch, sequence] as attention_mask, or leave it out with balance_coef=0"
            )
        yield from ran
        return
    if all(own.logits.shape[:-1] != attention_mask.shape for own in ran):
        raise ValueError(
            f"attention_mask must have one entry per token: {ran[0].name} saw {list(ran[0].logits.shape[:-1])} tokens, "
            f"the mask has {list(attention_mask.shape)}. Give one [batch, sequence], or leave the balance loss out "
            "with balance_coef=0"
        )
    for own in ran:
        yield own._replace(mask=attention_mask if own.logits.shape[:-1] == attention_mask.shape else None)


def no_choice(adapter: MoSLDAdapter) -> str:
    """Why there is neither balance loss nor statistics, as the end of an error message."""
    m = adapter.mixture
    return (
        f"no load to balance and none to tell of: mixing={m.mixing!r} with router={m.router!r} and gate={m.gate!r} "
        "lets no token choose among experts"
    )


@dataclass(frozen=True)
class RouterStats:
    """One layer's routing of one set of tokens.

    Attributes:
        load: [E], the share of the chosen places (K per token) that each expert got; sums to 1.
        gates: [E], the mean gate of each expert, counting zero where it is not chosen; sums to 1 where a token's do.
        probability: [E], the mean router probability of each expert; sums to 1.
        entropy: Mean entropy of the router's distribution over all experts, in nats; log(E) when undecided.
        tokens: How many tokens were counted.

    >>> import torch
    >>> from torch import nn
    >>> from mosld import MoSLDLinear, RouterStats, router_stats
    >>> layer = MoSLDLinear(6, 5, num_experts=4, top_k=1)
    >>> _ = nn.init.zeros_(layer.router.weight)  # an undecided router
    >>> _ = layer(torch.randn(3, 6))
    >>> stats: RouterStats = router_stats(layer)[""]
    >>> stats.load, stats.probability, round(stats.entropy, 4), stats.tokens
    (tensor([1., 0., 0., 0.]), tensor([0.2500, 0.2500, 0.2500, 0.2500]), 1.3863, 3)
    """

    load: Tensor
    gates: Tensor
    probability: Tensor
    entropy: float
    tokens: int

    @property
    def dead(self) -> list[int]:
        """The experts that no token chose.

        >>> import torch
        >>> from mosld import RouterStats
        >>> even, load = torch.full((4,), 0.25), torch.tensor([0.5, 0.0, 0.5, 0.0])
        >>> RouterStats(load, gates=load, probability=even, entropy=1.3863, tokens=2).dead
        [1, 3]
        """
        return (self.load == 0).nonzero().flatten().tolist()


@torch.no_grad()
def router_stats(model: nn.Module, attention_mask: Tensor | None = None) -> dict[str, RouterStats]:
    """What the routers did in the last forward.

    Args:
        model: A model with mixtures that has run.
        attention_mask: [batch, sequence], nonzero at real tokens. A layer that saw something else than [batch,
            sequence] tokens counts all of its tokens. None takes the mask that the forward was called with.

    Returns:
        Layer name -> RouterStats. Where several adapters run in one layer, the second is called `<layer> (2)`.

    Raises:
        ValueError: The model has no mixture, none in which tokens choose among experts, or the mask fits none.
        RuntimeError: No mixture has run yet.

    >>> import torch
    >>> from torch import nn
    >>> from mosld import MoSLDLinear, router_stats
    >>> model = nn.Sequential(nn.Linear(6, 6), MoSLDLinear(6, 5, num_experts=4, top_k=2))
    >>> _ = model(torch.randn(2, 7, 6))
    >>> stats = router_stats(model, attention_mask=torch.tensor([[1] * 7, [1] * 4 + [0] * 3]))
    >>> list(stats), stats["1"].tokens
    (['1'], 11)
    """
    return {name: _stats(sums) for name, sums in _summed(model, attention_mask)}


class RouterUse:
    """RouterStats over many batches, kept apart by group (by task, say).

    `update` only adds tensors on the device of each layer; the host waits for them in `stats` and `shares`.
    """

    def __init__(self):
        self._sums: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def update(self, group: str, model: nn.Module, attention_mask: Tensor | None = None) -> None:
        """Count the last forward of `model`. Arguments and errors as in `last_routing`, names as in `router_stats`."""
        own = self._sums.setdefault(group, {})
        for name, sums in _summed(model, attention_mask):
            own[name] = own[name] + sums if name in own else sums

    def stats(self) -> dict[str, dict[str, RouterStats]]:
        """group -> layer name -> RouterStats of everything counted so far."""
        by_group: dict[str, dict[str, RouterStats]] = {}
        for group, own in self._sums.items():
            by_group[group] = {name: _stats(sums) for name, sums in own.items()}
        return by_group

    def shares(self) -> dict[str, dict[str, list[float]]]:
        """group -> layer name -> each expert's share of the chosen places; shares sum to 1."""
        by_group: dict[str, dict[str, list[float]]] = {}
        for group, layers in self.stats().items():
            by_group[group] = {name: own.load.tolist() for name, own in layers.items()}
        return by_group


def _summed(model: nn.Module, attention_mask: Tensor | None) -> Iterator[tuple[str, Tensor]]:
    """Unique layer name and sums over the tokens of all its calls [3 E + 2]: places, gates, probabilities, entropy,
    tokens.

    Padding is set to zero instead of left out, for the host would have to wait for the number of real tokens.
    """
    sums: dict[MoSLDAdapter, Tensor] = {}
    names: dict[MoSLDAdapter, str] = {}
    for own in last_routing(model, attention_mask):
        one = _sums(own.logits, own.adapter, own.mask, own.kept.gates)
        sums[own.adapter] = sums[own.adapter] + one if own.adapter in sums else one
        names[own.adapter] = own.name
    seen: Counter[str] = Counter()
    for adapter, name in names.items():
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name} ({seen[name]})", sums[adapter]


def _sums(logits: Tensor, adapter: MoSLDAdapter, mask: Tensor | None, gates: Tensor | None) -> Tensor:
    """logits [..., E], mask [...], gates [..., E] where no top-k made them -> [3 E + 2]

    Tokens go across: on a CPU that is ten times faster than a handful of experts.
    """
    logits = logits.detach().reshape(-1, logits.shape[-1])
    log_probability = logits.T.log_softmax(0)  # [E, T]
    probability = log_probability.exp()
    if gates is None:
        values, chosen = largest(logits, adapter.top_k)
        of_chosen = values.T.softmax(0) if adapter.mixture.renormalises else probability.gather(0, chosen.T)
        empty = torch.zeros_like(probability)
        places, shares = empty.scatter(0, chosen.T, 1.0), empty.scatter_add(0, chosen.T, of_chosen)
    else:
        shares = gates.reshape(-1, gates.shape[-1]).T.to(probability.dtype)
        places = (shares != 0).to(probability.dtype)
    terms = (
        places,
        shares,
        probability,
        -(probability * log_probability).sum(0, keepdim=True),
        torch.ones_like(probability[:1]),
    )
    table = torch.cat(terms)  # [3 E + 2, T]
    if mask is not None:
        table = table.masked_fill(mask.to(table.device).flatten() == 0, 0.0)
    return table.sum(1)


def _stats(sums: Tensor) -> RouterStats:
    experts = (len(sums) - 2) // 3
    places, gates, probability, (entropy, tokens) = sums.split((experts, experts, experts, 2))
    return RouterStats(
        load=places / places.sum().clamp(min=1),
        gates=gates / tokens.clamp(min=1),
        probability=probability / tokens.clamp(min=1),
        entropy=float(entropy / tokens.clamp(min=1)),
        tokens=int(tokens),
    )
