"""Gates that do not depend on the token, where they come from, and what is lost by fixing them.

    c = mean_t g_t                     one set of gates for all tokens
    h_t = M(g_t) z_t                   [R_out]   the routed update of a token is s B h_t
    d_t = h_t - P z_t                  [R_out]   what is lost; P = M(c), for MoSLD c (x) I_R, which stacks c_e I_R
    update_error = |B d| / |B h|                 Frobenius norms over all tokens

The norms need sums over tokens alone: sum d d^T = sum h h^T - P sum z h^T - (P sum z h^T)^T + P (sum z z^T) P^T. So one
pass over the batches gives the mean gates and their error, and no token is kept.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mosld_kernels.precision import router_dtype

from ..files.adapter_folder import PEFT_PREFIX
from ..layers.adapter import MoSLDAdapter
from ..mixture.gates import Routing, eval_gates, gates_without_logits
from ..tuner.layer import MoSLDPeftLinear
from .adapted_layers import Layers

Gates = str | Sequence[float] | Tensor | Mapping[str, Any] | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class LayerGates:
    """The fixed gates of one layer and, where they were taken from tokens, what is lost by fixing them.

    Args:
        gates: One an expert. Of mixings without a gate for each expert all numbers of M that are gates, row by row.
        gate_variance: Variances of the routed gates over the tokens. Their sum is the mean squared distance from
            `gates`.
        update_error: |fixed - routed| / |routed| of the layer's update, Frobenius norms over the tokens.
        output_error: The same difference over the norm of the layer's whole output.
        tokens: How many were counted; 0 for gates that the caller gave.

    >>> from torch import nn
    >>> from mosld import MoSLDLinear, export_lora
    >>> model = nn.Sequential(MoSLDLinear(6, 5, r=2, num_experts=4))
    >>> export_lora(model, "served")["0"]
    LayerGates(gates=[0.25, 0.25, 0.25, 0.25], gate_variance=None, update_error=None, output_error=None, tokens=0)
    """

    gates: list[float]
    gate_variance: list[float] | None = None
    update_error: float | None = None
    output_error: float | None = None
    tokens: int = 0


def fix_gates(model: nn.Module, layers: Layers, gates: Gates, task: int | None = None) -> dict[str, LayerGates]:
    """Layer name -> LayerGates. Forms and errors of `gates` and `task` as in `mosld.export_lora`."""
    if task is not None or any(a.mixture.wants_tasks for _, a in layers.values()):
        return _of_task(layers, gates, task)
    if isinstance(gates, str):
        if gates != "uniform":
            raise ValueError(f"gates must be 'uniform', weights or calibration batches, got {gates!r}")
        return {name: LayerGates(_uniform(adapter)) for name, (_, adapter) in layers.items()}
    if isinstance(gates, Mapping):
        return _by_layer(layers, cast(Mapping[str, Any], gates))
    weights = _as_list(gates)
    if _are_numbers(weights) and weights:
        return _by_layer(layers, dict.fromkeys(layers, weights))
    if not isinstance(weights, Iterable):
        raise ValueError(f"gates must be 'uniform', weights or calibration batches, got {gates!r}")
    return calibrate(model, layers, weights)


def gate_shape(adapter: MoSLDAdapter) -> torch.Size:
    """Of one token's gates as the mixing wants them: (E,), or what a gate function of the mixing's own makes."""
    m = adapter.mixture
    count = m.kind.gates(m)
    if m.kind.gate is None:
        return torch.Size((count,))
    weight = adapter.shared_a.weight
    with torch.no_grad():
        return m.kind.gate(torch.zeros(count, dtype=weight.dtype, device=weight.device), adapter).shape


@torch.no_grad()
def _uniform(adapter: MoSLDAdapter) -> list[float]:
    m = adapter.mixture
    if m.router_kind.fixed:
        weight = adapter.shared_a.weight
        return gates_without_logits(adapter, weight, weight.double()).cpu().tolist()
    if m.mixing in ("dense", "select"):
        raise ValueError(f"mixing={m.mixing!r} has no uniform gates: give calibration batches")
    return [1 / m.num_experts] * gate_shape(adapter).numel()


@torch.no_grad()
def _of_task(layers: Layers, gates: Gates, task: int | None) -> dict[str, LayerGates]:
    """The gates of one task, which are the same for all its tokens."""
    fixed = {}
    for name, (_, adapter) in layers.items():
        m = adapter.mixture
        if not m.wants_tasks:
            raise ValueError(f"task={task} is for methods that route by task; {name} has router={m.router!r}")
        if not m.router_kind.needs_tasks or not (isinstance(gates, str) and gates == "uniform"):
            raise ValueError(
                "a method that routes by task is exported for one task, task=..., with that task's own gates"
            )
        if not isinstance(task, int) or not 0 <= task < (m.num_tasks or 0):
            raise ValueError(
                f"task must be in [0, num_tasks={m.num_tasks}) for a method that routes by task, got {task!r}: each "
                "task is a LoRA of its own"
            )
        before, adapter.routing = adapter.routing, Routing(task_ids=torch.tensor([task]))
        try:
            weight = adapter.shared_a.weight
            any_token = weight.new_zeros(1, weight.shape[1]).double()
            fixed[name] = LayerGates(eval_gates(adapter, any_token)[0].cpu().tolist())
        finally:
            adapter.routing = before
    return fixed


def _by_layer(layers: Layers, given: Mapping[str, Any]) -> dict[str, LayerGates]:
    named = {name.removeprefix(PEFT_PREFIX): weights for name, weights in given.items()}
    if "input_ids" in named:
        raise ValueError("gates is one batch: calibration takes a list of them, [batch]")
    unknown, missing = sorted(named.keys() - layers.keys()), sorted(layers.keys() - named.keys())
    if unknown or missing:
        raise ValueError(
            f"gates must have every adapted layer and no other: unknown are {unknown}, missing are {missing}"
        )
    return {name: LayerGates(_checked(name, named[name], adapter)) for name, (_, adapter) in layers.items()}


def _as_list(values: Any) -> Any:
    """Tensors and arrays as lists, anything else as it is."""
    return values.tolist() if hasattr(values, "tolist") else values


def _are_numbers(values: Any) -> bool:
    return isinstance(values, Sequence) and all(isinstance(value, Real) for value in values)


def _checked(name: str, weights: Any, adapter: MoSLDAdapter) -> list[float]:
    count = gate_shape(adapter).numel()
    values = _as_list(weights)
    if not _are_numbers(values):
        raise ValueError(f"gates of {name} must be a sequence of numbers, got {weights!r}")
    if len(values) != count:
        wanted = f"num_experts={count}" if adapter.mixture.kind.per_expert else str(count)
        raise ValueError(f"gates of {name} must be {wanted} weights, got {len(values)}")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"gates of {name} must be finite, got {list(values)}")
    return list(map(float, values))


@torch.no_grad()
def calibrate(model: nn.Module, layers: Layers, batches: Iterable[Mapping[str, Any]]) -> dict[str, LayerGates]:
    """Layer name -> the mean gates over the real tokens of `batches`, run through the routed model in eval mode.

    batches: the model's keyword arguments, one mapping a batch; tokens where attention_mask [batch, sequence] is zero
        are left out. Layers that see something else than [batch, sequence] tokens keep all of theirs.
    raises ValueError without a batch, for one that is no mapping, for a mask that fits no layer, for layers that saw no
        token, and when another adapter than the one to be exported takes part.
    """
    _check_running_alone(layers)
    moments = {name: _Moments(module, adapter) for name, (module, adapter) in layers.items()}
    seen, was_training = False, model.training
    model.eval()
    try:
        for batch in batches:
            _run(model, batch, list(moments.values()))
            seen = True
    finally:
        for layer in moments.values():
            layer.handle.remove()
        model.train(was_training)
    if not seen:
        raise ValueError("gates must have at least one calibration batch, got none")
    unseen = [name for name, layer in moments.items() if not layer.tokens]
    if unseen:
        raise ValueError(f"the calibration batches bring no token to {', '.join(unseen)}")
    return {name: layer.gates() for name, layer in moments.items()}


def _check_running_alone(layers: Layers) -> None:
    for name, (module, adapter) in layers.items():
        if isinstance(module, MoSLDPeftLinear) and module.running_adapters() != [adapter]:
            active = [] if module.disable_adapters else list(module.active_adapters)
            raise ValueError(
                "calibration runs the model with the exported adapter alone: activate it with set_adapter; in "
                f"{name} the active ones are {active}"
            )


def _run(model: nn.Module, batch: Any, layers: "list[_Moments]") -> None:
    """One forward of the model, which the layers count."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"a calibration batch must be a dict of the model's arguments, got {type(batch).__name__}")
    mask = batch.get("attention_mask")
    for layer in layers:
        layer.mask = mask
        layer.masked = False
    device = next(model.parameters()).device
    arguments = {}
    for key, value in batch.items():
        arguments[key] = value.to(device) if isinstance(value, Tensor) else value
    model(**arguments)
    if mask is not None and not any(layer.masked for layer in layers):
        raise ValueError(f"attention_mask must have one entry per token; {list(mask.shape)} fits no layer")


class _Moments:
    """Sums over the real tokens that one layer sees, in float64 on the CPU."""

    def __init__(self, module: nn.Module, adapter: MoSLDAdapter):
        self.adapter, self.tokens = adapter, 0
        self.sums: tuple[Tensor, ...] = ()
        self.mask: Tensor | None = None  # of the batch that is running
        self.masked = False  # whether it fitted here
        self.handle = module.register_forward_hook(self._add)

    def _add(self, module: nn.Module, args: tuple, out: Tensor) -> None:
        adapter, m, x = self.adapter, self.adapter.mixture, args[0]
        wide = router_dtype(x.dtype)
        hidden = F.linear(x.to(wide), adapter.shared_a.weight.to(wide))  # [..., R_in]
        gates = eval_gates(adapter, x)
        mixer = None if adapter.mixer is None else adapter.mixer.weight.to(wide)
        mixed = self._real(m.kind.mix(hidden, gates, mixer))  # [tokens, R_out]
        hidden = self._real(hidden)
        inner = len(gate_shape(adapter))
        gates = gates.expand(*x.shape[:-1], *gates.shape[-inner:]).flatten(-inner)
        gates = self._real(gates)  # [tokens, n]
        # In the order in which `gates` takes them: sums of g, g^2, h h^T, z h^T, z z^T and y^2 over the tokens.
        new = (
            gates.sum(0),
            gates.square().sum(0),
            mixed.T @ mixed,
            hidden.T @ mixed,
            hidden.T @ hidden,
            self._real(out).square().sum(),
        )
        self.tokens += len(gates)
        self.sums = tuple(map(torch.add, self.sums, new)) if self.sums else new

    def _real(self, values: Tensor) -> Tensor:
        """values [..., n] -> [tokens, n], padding left out"""
        if self.mask is not None and values.shape[:-1] == self.mask.shape:
            self.masked = True
            values = values[self.mask.to(values.device).bool()]
        return values.reshape(-1, values.shape[-1]).cpu().double()

    def gates(self) -> LayerGates:
        gates, squares, mixed, cross, hidden, out = self.sums
        mean = gates / self.tokens
        spread = fixed_matrix(self.adapter, mean)  # P [R_out, R_in]
        crossed = spread @ cross
        lost = mixed - crossed - crossed.T + spread @ hidden @ spread.T
        expert_b = self.adapter.scale * self.adapter.expert_b.weight.detach().cpu().double()
        gram = expert_b.T @ expert_b
        error = _norm(gram, lost)
        update = _norm(gram, mixed)
        return LayerGates(
            gates=mean.tolist(),
            gate_variance=(squares / self.tokens - mean.square()).clamp(min=0).tolist(),
            update_error=_ratio(error, update),
            output_error=_ratio(error, float(out.sqrt())),
            tokens=self.tokens,
        )


def fixed_matrix(adapter: MoSLDAdapter, gates: Tensor, task: int | None = None) -> Tensor:
    """gates, as many as LayerGates has -> M [R_out, R_in] in float64 on the CPU"""
    mixer = None if adapter.mixer is None else adapter.mixer.weight.detach().cpu().double()
    if mixer is not None and adapter.mixture.kind.per_task:
        mixer = mixer[task]
    return adapter.mixture.matrix(gates.double().view(gate_shape(adapter)), mixer)


def _norm(gram: Tensor, moment: Tensor) -> float:
    """|B d| over all tokens, of B^T B and sum d d^T; rounding may leave a zero slightly negative."""
    return float((gram * moment).sum().clamp(min=0).sqrt())


def _ratio(error: float, norm: float) -> float:
    return error / norm if norm else 0.0  # an update of zero is exact with any gates
