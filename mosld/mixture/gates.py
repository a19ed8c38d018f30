"""From a layer's input to its gates, where the fused operator does not compute them: logits, gate function, given gates."""

from dataclasses import dataclass
from typing import Any, Protocol

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

    def routing_input(self, name: str) -> Any: ...


def task_ids(adapter: RoutedAdapter, x: Tensor) -> Tensor:
    """-> [batch], the task of each row of x [batch, ..., D_in]"""
    ids: Tensor | None = adapter.routing_input("task_ids")
    if ids is None:
        raise RuntimeError(
            f"mixing={adapter.mixture.mixing!r} with router={adapter.mixture.router!r} asks for the task of every row: call "
            "mosld.set_routing(model, task_ids=...) before the model; MoSLDTrainer does it with a `task_ids` column"
        )
    return _for_rows("task_ids", ids.to(x.device), x.shape[0] if x.dim() > 1 else 1)


def _for_rows(name: str, values: Tensor, rows: int) -> Tensor:
    """values [batch, ...] -> [rows, ...], each for as many neighbours"""
    if len(values) == rows:
        return values
    if not len(values) or rows % len(values):
        raise ValueError(f"{name} must be for [batch={rows}] rows, or a number that divides it, got {len(values)}")
    return values.repeat_interleave(rows // len(values), dim=0)


def broadcast_per_row(adapter: RoutedAdapter, name: str, beside: Tensor) -> Tensor:
    """What `set_routing` gave under this name, as it broadcasts with `beside` [..., n], in its dtype and on its device."""
    given: Tensor = adapter.routing_input(name)
    values, leading, n = given.to(beside), beside.shape[:-1], beside.shape[-1]
    if values.shape[-1:] != (n,) or values.dim() > max(len(leading), 1) + 1:
        raise ValueError(f"{name} must be [batch, {n}] or [batch, sequence, {n}], got {list(given.shape)}")
    if values.dim() == 1:
        return values
    values = _for_rows(name, values, leading[0] if leading else 1)
    if not leading:
        return values.squeeze(0)
    if values.dim() == 2:
        return values.view(len(values), *[1] * (len(leading) - 1), n)
    if values.shape[1:-1] != leading[1:]:
        raise ValueError(f"{name} must be for tokens {list(leading)}, got {list(given.shape)}")
    return values


def router_logits(adapter: RoutedAdapter, x: Tensor, z: Tensor, logits: Tensor | None) -> Tensor:
    """x [..., D_in], z [..., R_in], the token router's logits [..., n] or None
    -> logits over the temperature [..., n], of every token or with sizes 1 to be broadcast over tokens, in z's dtype"""
    m, router = adapter.mixture, adapter.router
    if logits is None:
        assert router is not None
        weight = router.weight.to(z.dtype)
        if m.router == "hidden":
            logits = z @ weight.t()
        elif m.router == "sequence":
            rows = x if x.dim() > 1 else x.unsqueeze(0)
            # Not mean(), which is NaN where there is no token, and so would be the router's gradient.
            mean = rows.sum(-2, keepdim=True, dtype=z.dtype) / max(rows.shape[-2], 1)
            logits = (mean if x.dim() > 1 else mean.squeeze(0)) @ weight.t()
        else:
            logits = _by_task(adapter, x, weight)
    return logits if m.temperature == 1 else logits / m.temperature


def _by_task(adapter: RoutedAdapter, x: Tensor, weight: Tensor) -> Tensor:
    ids = task_ids(adapter, x)
    # A table [num_tasks, n], or linear on an embedding.
    logits = weight[ids] if adapter.tasks is None else adapter.tasks.weight.to(weight.dtype)[ids] @ weight.t()
    if x.dim() == 1:
        return logits.squeeze(0)
    return logits.view(len(ids), *[1] * (x.dim() - 2), logits.shape[1])


def apply_gate(adapter: RoutedAdapter, logits: Tensor) -> Tensor:
    """logits as `router_logits` returns them -> gates, as the mixing wants them"""
    m = adapter.mixture
    if m.kind.gate is not None:
        return m.kind.gate(logits, adapter)
    if m.gate == "top_p":
        return top_p_gates(logits, m.top_p)
    return gates_from_logits(logits, m.experts_per_token)


def eval_gates(adapter: RoutedAdapter, x: Tensor) -> Tensor:
    """x [..., D_in] -> the gates that the layer gives its tokens in eval mode, as the mixing wants them, in the routing's dtype"""
    m, dtype = adapter.mixture, router_dtype(x.dtype)
    x = x.to(dtype)
    z = F.linear(x, adapter.shared_a.weight.to(dtype))
    if not m.has_logits:
        return gates_without_logits(adapter, x, z)
    logits = F.linear(x, adapter.router.weight.to(dtype)) if m.router == "token" else None
    return apply_gate(adapter, router_logits(adapter, x, z, logits))


def gates_without_logits(adapter: RoutedAdapter, x: Tensor, z: Tensor) -> Tensor:
    """Gates that nobody computes: parameters, the caller's, or ones."""
    m = adapter.mixture
    count = m.kind.gates(m)
    if m.router == "none":
        return z.new_ones(count)
    if m.router == "constant":
        assert adapter.router is not None
        return adapter.router.weight[0].to(z.dtype)
    if adapter.routing_input("gates") is None:
        raise RuntimeError(
            "router='external' takes its gates from the caller: call mosld.set_routing(model, gates=...) before the model"
        )
    return broadcast_per_row(adapter, "gates", z.new_empty(()).expand(*x.shape[:-1], count))
