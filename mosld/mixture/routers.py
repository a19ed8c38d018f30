"""Who decides a token's gates, and the registry of those that have a name.

logits l = route(x, z, W)        then gates = gate function(l / temperature)       routers with logits
gates  g = route(x, z, W)                                                          has_logits=False
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .gates import RoutedAdapter, broadcast_per_row, task_ids

Route = Callable[[Tensor, Tensor, Any, Any], Tensor]


@dataclass(frozen=True)
class Router:
    """Who decides a token's gates. Functions of "m" take the Mixture, which is built on this registry.

    Attributes:
        route: (x [..., in_features], z [..., rows of A], weight or None, the layer's MoSLDAdapter) -> logits [..., n],
            before the temperature; n is `m.num_gates`. Sizes of 1 broadcast over tokens. weight and z are in the
            routing's dtype (float32, or float64 of a float64 layer), x is in the layer's.
        description: What the logits or gates are, in a line.
        weight: (m, in_features) -> shape of its trained weight. None where it has none.
        start: (weight, m) fills a new weight in place. None starts it as `router_std` says.
        has_logits: Whether `route` returns logits. Otherwise it returns the gates themselves, and no gate function
            applies.
        linear: Whether `route` is x W^T. The layer then computes it together with A x, in the fused operator where it
            can.
        tokens_choose: Whether each token is routed by itself, so that load balance and router statistics mean
            something.
        fixed: Whether gates depend on the weight alone. Such gates are exported as they are.
        sums_to_one: (m) -> whether a token's gates sum to one in a new layer, as a softmax makes them.
        needs_tasks: Whether it asks for task ids, and so for `num_tasks`.
        embeds_tasks: Whether `task_dim` may give it a table of task embeddings, `adapter.tasks.weight`.
        check: (m) raises ValueError for what contradicts this router.
    """

    route: Route
    description: str
    weight: Callable[[Any, int], tuple[int, ...]] | None = None
    start: Callable[[Tensor, Any], Any] | None = None
    has_logits: bool = True
    linear: bool = False
    tokens_choose: bool = False
    fixed: bool = False
    sums_to_one: Callable[[Any], bool] = lambda m: True
    needs_tasks: bool = False
    embeds_tasks: bool = False
    check: Callable[[Any], None] = lambda m: None


ROUTERS: dict[str, Router] = {}


def register_router(name: str, **parts: Any) -> Callable:
    """Make the decorated function known as `MoSLDConfig(router=name)`.

    Args:
        name: What configurations call it.
        parts: The attributes of `mosld.mixture.Router` without `route`, which is the decorated function:
            (x, z, weight, adapter) -> logits.

    Returns:
        The decorator, which returns the function as it is.

    Raises:
        ValueError: The name is taken.

    >>> from mosld import MoSLDConfig, register_router
    >>> @register_router(
    ...     "opposed", description="minus a linear router", weight=lambda m, in_features: (m.num_gates, in_features)
    ... )
    ... def opposed(x, z, weight, adapter):  # [..., in_features], [..., R], [E, in_features] -> [..., E]
    ...     return -x.to(z.dtype) @ weight.T
    >>> MoSLDConfig(router="opposed", r=2, num_experts=4).mixture_of("q_proj").shapes(6, 5)
    {'shared_a': (2, 6), 'expert_b': (5, 8), 'router': (4, 6)}
    """

    def register(route: Route) -> Route:
        if name in ROUTERS:
            raise ValueError(f"router {name!r} is registered already")
        ROUTERS[name] = Router(route, **parts)
        return route

    return register


def _on_the_input(m: Any, in_features: int) -> tuple[int, ...]:
    return m.num_gates, in_features


@register_router(
    "token",
    description="linear on the layer's input, token by token",
    weight=_on_the_input,
    linear=True,
    tokens_choose=True,
)
def _token(x: Tensor, z: Tensor, weight: Tensor, adapter: RoutedAdapter) -> Tensor:
    return F.linear(x.to(weight.dtype), weight)


@register_router(
    "hidden",
    description="linear on z, token by token",
    weight=lambda m, in_features: (m.num_gates, m.kind.down(m)),
    tokens_choose=True,
)
def _hidden(x: Tensor, z: Tensor, weight: Tensor, adapter: RoutedAdapter) -> Tensor:
    return z @ weight.t()


@register_router(
    "sequence",
    description="linear on the mean of the layer's input over the sequence",
    weight=_on_the_input,
)
def _sequence(x: Tensor, z: Tensor, weight: Tensor, adapter: RoutedAdapter) -> Tensor:
    rows = x if x.dim() > 1 else x.unsqueeze(0)
    # Not mean(), which is NaN where there is no token, and so would be the router's gradient.
    mean = rows.sum(-2, keepdim=True, dtype=z.dtype) / max(rows.shape[-2], 1)
    return (mean if x.dim() > 1 else mean.squeeze(0)) @ weight.t()


def _by_task_or_embedding(m: Any, in_features: int) -> tuple[int, ...]:
    return (m.num_tasks, m.num_gates) if m.task_dim is None else (m.num_gates, m.task_dim)


@register_router(
    "task",
    description="a table of logits by task id, or linear on an embedding of the task",
    weight=_by_task_or_embedding,
    needs_tasks=True,
    embeds_tasks=True,
)
def _by_task(x: Tensor, z: Tensor, weight: Tensor, adapter: RoutedAdapter) -> Tensor:
    ids = task_ids(adapter, x)
    logits = weight[ids] if adapter.tasks is None else adapter.tasks.weight.to(weight.dtype)[ids] @ weight.t()
    if x.dim() == 1:
        return logits.squeeze(0)
    return logits.view(len(ids), *[1] * (x.dim() - 2), logits.shape[1])


@register_router(
    "external",
    description="gates that the caller gives with mosld.set_routing",
    has_logits=False,
    sums_to_one=lambda m: False,
)
def _external(x: Tensor, z: Tensor, weight: None, adapter: RoutedAdapter) -> Tensor:
    if adapter.routing_input("gates") is None:
        raise RuntimeError(
            "router='external' takes its gates from the caller: call mosld.set_routing(model, gates=...) before the "
            "model"
        )
    return broadcast_per_row(adapter, "gates", z.new_empty(()).expand(*x.shape[:-1], adapter.mixture.num_gates))


@register_router(
    "constant",
    description="gates that are parameters themselves, the same for every token",
    weight=lambda m, in_features: (1, m.num_gates),
    start=lambda weight, m: nn.init.constant_(weight, 1 / m.num_experts),
    has_logits=False,
    fixed=True,
)
def _constant(x: Tensor, z: Tensor, weight: Tensor, adapter: RoutedAdapter) -> Tensor:
    return weight[0]


@register_router(
    "none",
    description="all gates are one and nothing routes",
    has_logits=False,
    fixed=True,
    sums_to_one=lambda m: m.num_experts == 1,
)
def _ones(x: Tensor, z: Tensor, weight: None, adapter: RoutedAdapter) -> Tensor:
    return z.new_ones(adapter.mixture.num_gates)
