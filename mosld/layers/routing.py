"""What a caller tells the mixtures of a model before a forward, and what they keep of the last one.

A method that routes by task, or by gates from outside, is told so around a forward:

    with mosld.routing(model, task_ids=batch["task_ids"]):
        out = model(input_ids=batch["input_ids"], ...)
    out.loss.backward()

`mosld.set_routing` tells it for all forwards to come, in every thread. A forward keeps what it was told: activation
checkpointing runs its layers again with the same. MoSLDTrainer tells it with a `task_ids` column of the data.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..mixture.gates import Routing
from .adapter import MoSLDAdapter
from .forwards import in_backward, this_thread
from .host import adapters_below, all_adapters, forget


def set_routing(
    model: nn.Module,
    *,
    task_ids: Any = None,
    gates: Tensor | Mapping[str, Tensor] | None = None,
    prior: Tensor | None = None,
) -> None:
    """Give every mixture in `model` what it cannot see in its input. It stays until it is set again; None removes it.

    It holds in every thread; `routing` does the same around some forwards of one thread.

    The rows are those of the batch that the model is called with. In eval mode there may be a multiple of them, each
    standing for as many neighbours: so lie the beams of `generate`. Tokens that a model flattened into rows, and the
    windows of images where pixels are its only input, are told apart by themselves. A layer whose rows cannot be told
    apart (experts that get gathered tokens, several images a row) refuses by its name.

    Args:
        model: Any module with mixtures.
        task_ids: Integers [batch], or one for all rows, in [0, num_tasks): for methods that route by task.
        gates: [n], [batch, n] or [batch, sequence, n], one gate an expert, for router="external"; or layer name -> such
            a tensor. They carry gradients to where they come from.
        prior: The prior on the matrix of mixing="dense". As a matrix, [r_up, r], [batch, r_up, r] or [batch, sequence,
            r_up, r], whose layout a layer checks when it runs; or its rows one after the other, in the shapes of gates.
            With mixing_options slow_index="r" the matrix is [r, r_up], as in T-REX's code.

    Raises:
        ValueError: The model has no mixture, ids are no integers or out of range, or a layer is unknown.

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
    for adapter, own in _told(model, task_ids, gates, prior).items():
        adapter.routing = own


@contextlib.contextmanager
def routing(
    model: nn.Module,
    *,
    task_ids: Any = None,
    gates: Tensor | Mapping[str, Tensor] | None = None,
    prior: Tensor | None = None,
) -> Iterator[None]:
    """`set_routing` for the forwards inside this block, in this thread alone.

    Backward may come after the block, and activation checkpointing then runs the layers again with what they were told.

    Args:
        model, task_ids, gates, prior: As of `set_routing`.

    Raises:
        ValueError: As `set_routing`.

    >>> import torch
    >>> from torch import nn
    >>> from mosld import MoSLDLinear, routing
    >>> layer = MoSLDLinear(6, 5, num_experts=2, router="external").eval()
    >>> _ = nn.init.normal_(layer.expert_b.weight)
    >>> x = torch.randn(3, 6)
    >>> with routing(layer, gates=torch.tensor([0.0, 0.0])):
    ...     frozen = layer(x)
    >>> torch.equal(frozen, nn.functional.linear(x, layer.weight, layer.bias))
    True
    """
    outside = this_thread.scope
    this_thread.scope = {**(outside or {}), **_told(model, task_ids, gates, prior)}
    try:
        yield
    finally:
        this_thread.scope = outside


def _told(model: nn.Module, task_ids: Any, gates: Any, prior: Tensor | None) -> dict[MoSLDAdapter, Routing]:
    adapters = list(all_adapters(model))
    if not adapters:
        raise ValueError(f"{type(model).__name__} has no MoSLD layer")
    names = [name for name, _ in adapters]
    ids = None if task_ids is None else _checked_ids(task_ids, adapters)
    by_layer = gates if isinstance(gates, Mapping) else dict.fromkeys(names, gates)
    if unknown := sorted(by_layer.keys() - set(names)):
        raise ValueError(f"gates name layers that are not adapted: {', '.join(unknown)}")
    told = {}
    for name, adapter in adapters:
        adapter.layer = name
        device = next(adapter.parameters()).device  # a block has no shared_a
        own = ids if ids is None or device.type == "meta" else ids.to(device)  # once, and not in every forward
        told[adapter] = Routing(own, _usable(by_layer.get(name)), _usable(prior))
    return told


def _usable(values: Tensor | None) -> Tensor | None:
    """Tensors of inference mode cannot be saved for a backward that comes later."""
    if values is None or not values.is_inference():
        return values
    with torch.inference_mode(False):
        return values.clone()


def _checked_ids(task_ids: Any, adapters: list[tuple[str, MoSLDAdapter]]) -> Tensor:
    ids = torch.as_tensor(task_ids)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() > 1:
        raise ValueError(f"task_ids must be integers, one or [batch], got {ids.dtype} {list(ids.shape)}")
    ids = cast(Tensor, _usable(ids.reshape(-1).long()))
    for tasks in {a.mixture.num_tasks for _, a in adapters if a.mixture.num_tasks is not None}:
        # On a GPU the embedding says so by itself, and nobody waits for it here.
        if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < tasks:
            raise ValueError(f"task_ids must be in [0, num_tasks={tasks}), got {ids.tolist()}")
    return ids


def forget_routing(model: nn.Module) -> None:
    """Every mixture of `model` as before its first forward: what the next forward skips (layerdrop, conditional
    computation) then counts for nothing in `balance_loss` and the statistics.

    Models adapted through PEFT or transformers' `add_adapter` do this by themselves whenever they are called, and so
    does what MoSLDTrainer trains. With layers placed by hand call it before each forward that may skip layers.
    Inside backward, where activation checkpointing runs the same forward again, it does nothing.

    Args:
        model: Any module; its mixtures are found.

    >>> import torch
    >>> from torch import nn
    >>> from mosld import MoSLDLinear, forget_routing, router_stats
    >>> model = nn.ModuleList([MoSLDLinear(6, 6), MoSLDLinear(6, 6)])
    >>> x = model[1](model[0](torch.randn(3, 6)))
    >>> forget_routing(model)
    >>> x = model[0](torch.randn(3, 6))  # the second layer is skipped
    >>> list(router_stats(model))
    ['0']
    """
    if torch.compiler.is_compiling() or not in_backward():
        forget(adapters_below(model))
