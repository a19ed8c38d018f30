"""What the routers do: which experts the tokens of the last forward chose, layer by layer."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mosld_kernels.reference import top_k_mask

from .layer import MoSLDAdapter, MoSLDLinear
from .tuner import MoSLDLayer


def running_adapters(model: nn.Module) -> Iterator[tuple[str, MoSLDAdapter]]:
    """The mixtures that take part in a forward of `model` now, each with its layer's name."""
    for name, module in model.named_modules():
        if isinstance(module, MoSLDLinear):
            yield name, module.adapter
        elif isinstance(module, MoSLDLayer):
            for adapter in module.running_adapters():
                yield name, adapter


def routed_tokens(model: nn.Module, attention_mask: Tensor | None = None) -> Iterator[tuple[str, MoSLDAdapter, Tensor]]:
    """Name, adapter and router logits [tokens, E] of every mixture that ran in the last forward, padding left out.

    attention_mask: [batch, sequence], nonzero at real tokens; None keeps every token. Layers that saw something else
        than [batch, sequence] tokens (a pooler, a decoder beside an encoder) keep all of theirs.
    raises ValueError when the model has no mixture or the mask fits none, RuntimeError before the first forward.
    """
    adapters = list(running_adapters(model))
    if not adapters:
        raise ValueError(f"{type(model).__name__} has no active MoSLD layer")
    ran = [(name, adapter, adapter.router_logits) for name, adapter in adapters if adapter.router_logits is not None]
    if not ran:
        raise RuntimeError(
            "no MoSLD layer has run yet: call the model before asking for its routing, with MoSLDAdapter.keep_logits on"
        )
    if attention_mask is not None and all(logits.shape[:-1] != attention_mask.shape for _, _, logits in ran):
        raise ValueError(
            f"attention_mask must have one entry per token: {ran[0][0]} saw {list(ran[0][2].shape[:-1])} tokens, the mask "
            f"has {list(attention_mask.shape)}"
        )
    for name, adapter, logits in ran:
        if attention_mask is not None and logits.shape[:-1] == attention_mask.shape:
            yield name, adapter, logits[attention_mask.to(logits.device).bool()]
        else:
            yield name, adapter, logits.flatten(0, -2)


@dataclass(frozen=True)
class RouterStats:
    """One layer's routing of one set of tokens.

    load: [E], the share of the chosen places (K per token) that each expert got; sums to 1.
    probability: [E], the mean router probability of each expert; sums to 1.
    entropy: mean entropy of the router's distribution over all experts, in nats; log(E) when undecided.
    tokens: how many tokens were counted.
    """

    load: Tensor
    probability: Tensor
    entropy: float
    tokens: int

    @property
    def dead(self) -> list[int]:
        """The experts that no token chose."""
        return (self.load == 0).nonzero().flatten().tolist()


@torch.no_grad()
def router_stats(model: nn.Module, attention_mask: Tensor | None = None) -> dict[str, RouterStats]:
    """Layer name -> RouterStats of the last forward. Arguments and errors as in `routed_tokens`."""
    stats = {}
    for name, adapter, logits in routed_tokens(model, attention_mask):
        tokens = len(logits)
        chosen = top_k_mask(logits, adapter.top_k).sum(0).to(logits.dtype)
        probabilities = logits.softmax(-1)
        entropy = -(probabilities * logits.log_softmax(-1)).sum(-1)
        stats[name] = RouterStats(
            load=chosen / max(tokens * adapter.top_k, 1),
            probability=probabilities.sum(0) / max(tokens, 1),
            entropy=float(entropy.sum() / max(tokens, 1)),
            tokens=tokens,
        )
    return stats


class RouterUse:
    """How often each expert was chosen, summed over many batches and kept apart by group (by task, say)."""

    def __init__(self):
        self._chosen: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def update(self, group: str, model: nn.Module, attention_mask: Tensor | None = None) -> None:
        """Count the last forward of `model`. Arguments and errors as in `routed_tokens`."""
        counts = self._chosen.setdefault(group, {})
        for name, adapter, logits in routed_tokens(model, attention_mask):
            chosen = top_k_mask(logits, adapter.top_k).sum(0).cpu()
            counts[name] = counts[name] + chosen if name in counts else chosen

    def shares(self) -> dict[str, dict[str, list[float]]]:
        """group -> layer name -> each expert's share of the chosen places; shares sum to 1."""
        return {
            group: {name: (chosen / chosen.sum().clamp(min=1)).tolist() for name, chosen in layers.items()}
            for group, layers in self._chosen.items()
        }
