"""How a layer comes to its gates where the fused operator does not decide it: logits, gate function, and what the caller gives.

A method that routes by task, or by gates from outside, is told so once before a forward:

    mosld.set_routing(model, task_ids=batch["task_ids"])
    out = model(input_ids=batch["input_ids"], ...)

It stays until it is set again, because activation checkpointing runs layers again after the forward. MoSLDTrainer does it
with a `task_ids` column of the data.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mosld_kernels.gating import gates_from_logits, top_p_gates
from mosld_kernels.precision import router_dtype

if TYPE_CHECKING:
    from .layer import MoSLDAdapter


@dataclass(frozen=True)
class Routing:
    """What the caller decides about the next forwards; see `set_routing`."""

    task_ids: Tensor | None = None
    gates: Tensor | None = None
    prior: Tensor | None = None


def set_routing(
    model: nn.Module,
    *,
    task_ids: Any = None,
    gates: Tensor | Mapping[str, Tensor] | None = None,
    prior: Tensor | None = None,
) -> None:
    """Tell every mixture in `model` what it cannot see in its input, until it is told anew; None takes it back.

    task_ids: integers [batch], or one for all rows, in [0, num_tasks): for methods that route by task.
    gates: [n], [batch, n] or [batch, sequence, n], for router="external", one gate an expert; or layer name -> such a tensor.
        They carry gradients to where they come from.
    prior: of the same shapes, the prior on the matrix of mixing="dense", [r_up, r] row by row.

    Where a layer sees a multiple of the rows that were given, each stands for as many neighbours: so lie the beams of
    `generate`, the windows of an image, and tokens that a model flattened into rows.

    raises ValueError for a model without mixtures, ids that are no integers or out of range, and unknown layers.

    >>> import torch
    >>> from torch import nn
    >>> from mosld import MoSLDLinear, set_routing
    >>> layer = MoSLDLinear(6, 5, num_experts=2, router="external")
    >>> _ = nn.init.normal_(layer.expert_b.weight)
    >>> x, outputs = torch.randn(3, 6), []
    >>> for gates in ([1.0, 0.0], [0.0, 1.0], [0.5, 0.5]):
    ...     set_routing(layer.eval(), gates=torch.tensor(gates))
    ...     outputs.append(layer(x))
    >>> torch.allclose(outputs[2], (outputs[0] + outputs[1]) / 2, atol=1e-5)
    True
    """
    adapters = list(all_adapters(model))
    if not adapters:
        raise ValueError(f"{type(model).__name__} has no MoSLD layer")
    ids = None if task_ids is None else _checked_ids(task_ids, [adapter for _, adapter in adapters])
    by_layer = gates if isinstance(gates, Mapping) else dict.fromkeys((name for name, _ in adapters), gates)
    if unknown := sorted(by_layer.keys() - {name for name, _ in adapters}):
        raise ValueError(f"gates name layers that are not adapted: {', '.join(unknown)}")
    for name, adapter in adapters:
        device = next(adapter.parameters()).device  # a block has no shared_a
        own = ids if ids is None or device.type == "meta" else ids.to(device)  # once, and not in every forward
        adapter.routing = Routing(own, by_layer.get(name), prior)


def all_adapters(model: nn.Module) -> "Iterator[tuple[str, MoSLDAdapter]]":
    """Every mixture in `model`, active or not, with its layer's name."""
    from .layer import MoSLDLinear
    from .tuner import MoSLDLayer

    for name, module in model.named_modules():
        if isinstance(module, MoSLDLinear):
            yield name, module.adapter
        elif isinstance(module, MoSLDLayer):
            for adapter in module.mixtures.values():
                yield name, adapter


def _checked_ids(task_ids: Any, adapters: "list[MoSLDAdapter]") -> Tensor:
    ids = torch.as_tensor(task_ids)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() > 1:
        raise ValueError(f"task_ids must be integers, one or [batch], got {ids.dtype} {list(ids.shape)}")
    ids = ids.reshape(-1).long()
    for tasks in {adapter.mixture.num_tasks for adapter in adapters if adapter.mixture.num_tasks is not None}:
        # On a GPU the embedding says so by itself, and nobody waits for it here.
        if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < tasks:
            raise ValueError(f"task_ids must be in [0, num_tasks={tasks}), got {ids.tolist()}")
    return ids


def task_ids(adapter: "MoSLDAdapter", x: Tensor) -> Tensor:
    """-> [batch], the task of each row of x [batch, ..., D_in]"""
    ids: Tensor | None = adapter.given("task_ids")
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


def by_row(adapter: "MoSLDAdapter", name: str, beside: Tensor) -> Tensor:
    """What `set_routing` gave under this name, as it broadcasts with `beside` [..., n], in its dtype and on its device."""
    given: Tensor = adapter.given(name)
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


def route(adapter: "MoSLDAdapter", x: Tensor, z: Tensor, logits: Tensor | None) -> Tensor:
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


def _by_task(adapter: "MoSLDAdapter", x: Tensor, weight: Tensor) -> Tensor:
    ids = task_ids(adapter, x)
    # A table [num_tasks, n], or linear on an embedding.
    logits = weight[ids] if adapter.tasks is None else adapter.tasks.weight.to(weight.dtype)[ids] @ weight.t()
    if x.dim() == 1:
        return logits.squeeze(0)
    return logits.view(len(ids), *[1] * (x.dim() - 2), logits.shape[1])


def gates_of(adapter: "MoSLDAdapter", logits: Tensor) -> Tensor:
    """logits as `route` returns them -> gates, as the mixing wants them"""
    m = adapter.mixture
    if m.kind.gate is not None:
        return m.kind.gate(logits, adapter)
    if m.gate == "top_p":
        return top_p_gates(logits, m.top_p)
    return gates_from_logits(logits, m.chosen)


def gates_for(adapter: "MoSLDAdapter", x: Tensor) -> Tensor:
    """x [..., D_in] -> the gates that the layer gives its tokens in eval mode, as the mixing wants them, in the routing's dtype"""
    m, dtype = adapter.mixture, router_dtype(x.dtype)
    x = x.to(dtype)
    z = F.linear(x, adapter.shared_a.weight.to(dtype))
    if not m.routes:
        return given_gates(adapter, x, z)
    logits = F.linear(x, adapter.router.weight.to(dtype)) if m.router == "token" else None
    return gates_of(adapter, route(adapter, x, z, logits))


def given_gates(adapter: "MoSLDAdapter", x: Tensor, z: Tensor) -> Tensor:
    """Gates that nobody computes: parameters, the caller's, or ones."""
    m = adapter.mixture
    count = m.kind.gates(m)
    if m.router == "none":
        return z.new_ones(count)
    if m.router == "constant":
        assert adapter.router is not None
        return adapter.router.weight[0].to(z.dtype)
    if adapter.given("gates") is None:
        raise RuntimeError(
            "router='external' takes its gates from the caller: call mosld.set_routing(model, gates=...) before the model"
        )
    return by_row(adapter, "gates", z.new_empty(()).expand(*x.shape[:-1], count))
