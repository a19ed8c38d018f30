"""What one mixing matrix M(x) is, and the registry of those that have a name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Size = Callable[[Any], int]  # of a Mixture, which is built on this registry and so is not named here


@dataclass(frozen=True)
class Mixing:
    """One mixing matrix M(x).

    mix: (z [..., down], gates, mixer as below or None) -> h [..., up]; gates are [..., gates], of every token or
        broadcast over tokens, or what `gate` returns. See `mosld_kernels.mixing`.
    down, up, gates: rows of A, columns of B, logits of a token, each a function of the Mixture.
    mixer: (Mixture, in_features) -> shape of what the mixing itself trains; None for nothing. per_task: its first size
        is num_tasks, and `mix` gets [batch, ...], that of each row's task (of one vector [...]). start: fills a new
        one, in place.
    gate: (logits [..., gates], the layer's MoSLDAdapter) -> gates, instead of the Mixture's gate function.
    options: the names that `mixing_options` may have, with their defaults. check: raises ValueError for what is wrong.
    per_expert: whether there is one gate an expert, so that load balance and router statistics mean something.
    block: of a mixture of whole feed-forward blocks, not of linear layers: (Mixture, hidden, intermediate size) ->
        shapes of what a block trains, by the names of BLOCK_PARTS; `mosld.layers.feed_forward` computes it, and `mix`
        is not called.
    """

    mix: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    down: Size
    up: Size
    gates: Size = lambda m: m.num_experts
    mixer: Callable[[Any, int], tuple[int, ...] | None] | None = None
    per_task: bool = False
    start: Callable[[Tensor], Any] = nn.init.zeros_
    gate: Callable[[Tensor, Any], Tensor] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Any], None] = lambda m: None
    per_expert: bool = True
    block: Callable[[Any, int, int], dict[str, tuple[int, ...]]] | None = None


MIXINGS: dict[str, Mixing] = {}


def register_mixing(name: str, **parts: Any) -> Callable:
    """Make the decorated function, mix(z, gates, mixer), known as `MoSLDConfig(mixing=name)`.

    Args:
        name: What configurations call it.
        parts: The other fields of `mosld.mixture.Mixing`.

    Returns:
        The decorator, which returns the function as it is.

    Raises:
        ValueError: The name is taken.

    >>> from mosld import MoSLDConfig, register_mixing
    >>> @register_mixing("summed", down=lambda m: m.r, up=lambda m: m.r)
    ... def summed(z, gates, mixer):  # [..., r], [..., E], None -> [..., r]
    ...     return gates.sum(-1, keepdim=True) * z
    >>> MoSLDConfig(mixing="summed", r=2, num_experts=4).mixture_of("q_proj").shapes(6, 5)
    {'shared_a': (2, 6), 'expert_b': (5, 2), 'router': (4, 6)}
    """

    def register(mix: Callable) -> Callable:
        if name in MIXINGS:
            raise ValueError(f"mixing {name!r} is registered already")
        MIXINGS[name] = Mixing(mix=mix, **parts)
        return mix

    return register
