"""From a layer's input to its gates, where the fused operator does not compute them: logits, gate function, gates."""

from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor
from torch.nn import functional as F

from mosld_kernels.gating import gates_from_logits, top_p_gates
from mosld_kernels.precision import router_dtype


@dataclass(frozen=True)
class Routing:
    """What the caller decides about the next forwards; see `set_routing`."""

    task_ids: Tensor | None = None
    gates: Tensor | None = None
    prior: Tensor | None = None


class RoutedAdapter(Protocol):
    """What these functions read of a layer's adapter; `mosld.layers.adapter.MoSLDAdapter` is one."""

    mixture: Any  # its Mixture, which is built on the routers below
    shared_a: Any
    router: Any  # a Weight, None where nobody routes
    tasks: Any  # a Weight, None where tasks are not embedded
    layer: str  # its layer's name

    def routing_input(self, name: str) -> Any: ...

    def running_forward(self) -> Any: ...

    @property
    def training(self) -> bool: ...


def task_ids(adapter: RoutedAdapter, x: Tensor) -> Tensor:
    """-> [batch], the task of each row of x [batch, ..., D_in]"""
    ids: Tensor | None = adapter.routing_input("task_ids")
    if ids is None:
        raise RuntimeError(
            f"mixing={adapter.mixture.mixing!r} with router={adapter.mixture.router!r} asks for the task of every row: "
            "call mosld.set_routing(model, task_ids=...) before the model; MoSLDTrainer does it with a `task_ids` "
            "column"
        )
    return _for_rows(adapter, "task_ids", ids.to(x.device), x.shape[:-1])


def _for_rows(adapter: RoutedAdapter, name: str, values: Tensor, leading: tuple[int, ...]) -> Tensor:
    """values [batch, ...] -> [rows, ...] for a layer that sees tokens [rows, ...] = leading"""
    rows = leading[0] if leading else 1
    forward = adapter.running_forward()
    if len(values) == 1:
        return values.expand(rows, *values.shape[1:])
    if forward is None or forward.rows is None:  # nothing is known but the layer's own input
        return _for_neighbours(name, values, rows)
    if len(values) != forward.rows and adapter.training:
        raise ValueError(
            f"{name} must be for each of the {forward.rows} rows that the model was called with, got {len(values)}"
        )
    values = _for_neighbours(name, values, forward.rows)
    is_gathered = len(leading) == 1 and "expert" in adapter.layer
    flattened = forward.length is not None and len(leading) == 1 and rows == forward.rows * forward.length
    if flattened or (rows == forward.rows and not is_gathered) or (forward.images and not rows % forward.rows):
        return _for_neighbours(name, values, rows)
    raise ValueError(
        f"{name} cannot be told for {adapter.layer or 'a layer'}: it sees {list(leading)} tokens of {forward.rows} "
        "rows in an order that is not known. Adapt other layers, or route by the token"
    )


def _for_neighbours(name: str, values: Tensor, rows: int) -> Tensor:
    """values [batch, ...] -> [rows, ...], each for as many neighbours"""
    if len(values) == rows:
        return values
    if not len(values) or rows % len(values):
        raise ValueError(f"{name} must be for [batch={rows}] rows, or a number that divides it, got {len(values)}")
    return values.repeat_interleave(rows // len(values), dim=0)


def broadcast_per_row(adapter: RoutedAdapter, name: str, beside: Tensor, given: Tensor | None = None) -> Tensor:
    """What `set_routing` gave under this name, as it broadcasts with `beside` [..., n], in its dtype, on its device.

    given: the same in another form, instead.
    """
    if given is None:
        given = cast(Tensor, adapter.routing_input(name))
    values, leading, n = given.to(beside), beside.shape[:-1], beside.shape[-1]
    if values.shape[-1:] != (n,) or values.dim() > max(len(leading), 1) + 1:
        raise ValueError(f"{name} must be [batch, {n}] or [batch, sequence, {n}], got {list(given.shape)}")
    if values.dim() == 1:
        return values
    values = _for_rows(adapter, name, values, leading)
    if not leading:
        return values.squeeze(0)
    if values.dim() == 2:
        return values.view(len(values), *[1] * (len(leading) - 1), n)
    if values.shape[1:-1] != leading[1:]:
        raise ValueError(f"{name} must be for tokens {list(leading)}, got {list(given.shape)}")
    return values


def router_logits(adapter: RoutedAdapter, x: Tensor, z: Tensor, logits: Tensor | None = None) -> Tensor:
    """x [..., D_in], z [..., R_in], the logits of a linear router [..., n] where the products brought them along
    -> logits over the temperature [..., n], of every token or with sizes 1 to be broadcast over tokens, in z's dtype"""
    if logits is None:
        logits = _route(adapter, x, z)
    temperature = adapter.mixture.temperature
    return logits if temperature == 1 else logits / temperature


def gates_without_logits(adapter: RoutedAdapter, x: Tensor, z: Tensor) -> Tensor:
    """x [..., D_in], z [..., R_in] -> gates that no gate function makes, [n] or [..., n]."""
    return _route(adapter, x, z)


def _route(adapter: RoutedAdapter, x: Tensor, z: Tensor) -> Tensor:
    weight = None if adapter.router is None else adapter.router.weight.to(z.dtype)
    return adapter.mixture.router_kind.route(x, z, weight, adapter)


@dataclass(frozen=True)
class _SavedRouter:
    """As much of an adapter as a router with fixed gates reads."""

    mixture: Any
    shared_a: None = None
    router: None = None
    tasks: None = None
    layer: str = ""

    def routing_input(self, name: str) -> None:
        return None

    def running_forward(self) -> None:
        return None

    training: bool = False


def saved_fixed_gates(mixture: Any, weight: Tensor | None, like: Tensor) -> Tensor:
    """The fixed gates [n] of a saved layer, of its router's weight or None, in `like`'s dtype and on its device."""
    return mixture.router_kind.route(like, like, None if weight is None else weight.to(like), _SavedRouter(mixture))


def apply_gate(adapter: RoutedAdapter, logits: Tensor) -> Tensor:
    """logits as `router_logits` returns them -> gates, as the mixing wants them"""
    m = adapter.mixture
    if m.kind.gate is not None:
        return m.kind.gate(logits, adapter)
    if m.gate == "top_p":
        return top_p_gates(logits, m.top_p)
    return gates_from_logits(logits, m.experts_per_token)


def eval_gates(adapter: RoutedAdapter, x: Tensor) -> Tensor:
    """x [..., D_in] -> the gates of its tokens in eval mode, as the mixing wants them, in the routing's dtype"""
    dtype = router_dtype(x.dtype)
    x = x.to(dtype)
    z = F.linear(x, adapter.shared_a.weight.to(dtype))
    if not adapter.mixture.has_logits:
        return gates_without_logits(adapter, x, z)
    return apply_gate(adapter, router_logits(adapter, x, z))
