"""What a method trains and costs, counted on its real modules before any training (`mosld inspect --model NAME`).

The model is built on the meta device, PEFT adapts it there, and what requires a gradient is counted. Cost is that of
one adapted layer of each kind, run on meta tensors, less that of the frozen layer in it: the multiplications of matrix
products, and the storage that autograd keeps. Both are differences between two lengths of one sequence, so what falls
once a sequence or once a call is left out.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..mixture.gates import Routing
from ..presets import PRESETS
from ..tuner.config import MoSLDConfig
from ..tuner.model import MoSLDModel
from . import known_models
from .config_text import parse_config, split_names

# One layer's trained tensor in an adapted model: <prefix><layer>.mosld_<part>.<adapter>.weight
_TRAINED = re.compile(r"(?:base_model\.model\.)?(.+?)\.mosld_(\w+)\.")
LENGTHS = (64, 128)  # of the two sequences whose costs are subtracted
COSTS = ("multiplications", "frozen_multiplications", "saved_bytes")  # in the order of `cost_per_token`


def count(model_name: str, configs: Sequence[str] = (), targets: str | None = None, quick: bool = False) -> dict:
    """What each method trains on the model of this name, in plain numbers and strings.

    model_name, quick: as in `known_models.build`. configs: as in `config_text.parse_config`; every preset without one.
    targets: module names with commas between, or "all-linear", instead of each configuration's own.

    model, parameters: of the base.
    methods: for each configuration
        config, trained, share (trained over the base's parameters), layers, experts ([fewest, most] of a layer)
        parts: shared_a, expert_b, router, tasks, mixer, and others for modules_to_save -> parameters
        multiplications: of all layers' adapters over those of the frozen layers adapted, forward, per token.
        saved_bytes: kept for backward per token beyond what the frozen layers and their inputs are, in bfloat16.
        kinds: the same for layers that are alike: name, in_features, out_features, layers, experts, and of one layer
        trained, parts, saved_bytes and, per token and not as ratios, multiplications and frozen_multiplications.

    raises ValueError for models, presets, fields and target modules that do not exist, listing those that do.
    """
    base = known_models.build(model_name, quick)
    total = _parameters(base)
    methods = []
    for text in configs or tuple(PRESETS):
        config = parse_config(text, depth_of(base))
        if targets is not None:
            config.target_modules = split_names(targets)
        elif config.target_modules is None:
            _check_default_targets(base, model_name)
        # PEFT changes the model that it adapts, so each method gets one of its own.
        methods.append({"config": text, **_count_one(known_models.build(model_name, quick), config, total)})
    return {"model": model_name, "parameters": total, "methods": methods}


def count_config(model_name: str, config: MoSLDConfig) -> dict:
    """`config` on the model of this name -> one of the `methods` of `count`, without its name"""
    base = known_models.build(model_name)
    return _count_one(base, config, _parameters(base))


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _check_default_targets(base: nn.Module, model_name: str) -> None:
    """raises ValueError, with the names that there are, where PEFT does not know which modules to adapt."""
    family = getattr(getattr(base, "config", None), "model_type", None)
    if family in MoSLDModel.target_module_mapping:
        return
    names: dict[str, None] = {}  # a set that keeps the order
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear):
            names[name.rpartition(".")[2]] = None
    raise ValueError(
        f"PEFT knows no modules to adapt in {model_name} by itself: give --target-modules; its linear layers are "
        f"called {', '.join(names)}"
    )


def depth_of(model: nn.Module) -> int | None:
    """How many blocks the model says it has."""
    return getattr(getattr(model, "config", None), "num_hidden_layers", None)


def adapted(base: nn.Module, config: MoSLDConfig) -> nn.Module:
    """The base with a trainable adapter, on the base's device: for the meta device no memory is taken."""
    # A saved adapter says that it is for inference, and what its task adds to the model is none of its parameters.
    config.inference_mode, config.task_type = False, None
    with next(base.parameters()).device:
        return get_peft_model(base, config)  # pyright: ignore[reportArgumentType]  any module will do


def _count_one(base: nn.Module, config: MoSLDConfig, total: int) -> dict[str, Any]:
    model = adapted(base, config).train()
    parts, layers = _trained_parts(model)
    kinds = list(_kinds(model.base_model.model, layers))  # pyright: ignore
    trained = sum(parts.values())
    experts = []
    whole = dict.fromkeys(COSTS, 0)
    for kind in kinds:
        experts.append(kind["experts"])
        for cost in COSTS:
            whole[cost] += kind["layers"] * kind[cost]
    return {
        "trained": trained,
        "share": trained / total,
        "parts": dict(parts),
        "layers": len(layers),
        "experts": [min(experts), max(experts)],
        "multiplications": whole["multiplications"] / whole["frozen_multiplications"],
        "saved_bytes": whole["saved_bytes"],
        "kinds": kinds,
    }


def _trained_parts(model: nn.Module) -> tuple[Counter[str], dict[str, Counter[str]]]:
    """Part of a mixture -> its trained parameters, in the whole model and by adapted layer."""
    parts: Counter[str] = Counter()
    layers: dict[str, Counter[str]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        match = _TRAINED.match(name)
        part = match[2] if match else "others"
        parts[part] += parameter.numel()
        if match:
            layers.setdefault(match[1], Counter())[part] += parameter.numel()
    return parts, layers


class _Kind(NamedTuple):
    """What layers must share to be counted and measured as one."""

    name: str
    in_features: int
    out_features: int
    mixture: str
    parts: tuple[tuple[str, int], ...]


def _kinds(model: nn.Module, layers: dict[str, Counter[str]]) -> Iterator[dict[str, Any]]:
    """Layers with the same last name, sizes and mixture, counted and measured once."""
    alike: dict[_Kind, list[str]] = {}
    for name, parts in layers.items():
        layer: Any = model.get_submodule(name)
        mixture = repr(_adapter_of(layer).mixture)
        sizes = (layer.in_features, layer.out_features)
        kind = _Kind(name.rpartition(".")[2], *sizes, mixture, tuple(parts.items()))
        alike.setdefault(kind, []).append(name)
    for kind, names in alike.items():
        layer = model.get_submodule(names[0])
        parts = dict(kind.parts)
        yield {
            "name": kind.name,
            "in_features": kind.in_features,
            "out_features": kind.out_features,
            "layers": len(names),
            "experts": _adapter_of(layer).num_experts,
            "trained": sum(parts.values()),
            "parts": parts,
            **dict(zip(COSTS, cost_per_token(layer), strict=True)),
        }


def _adapter_of(layer: Any) -> Any:
    (adapter,) = layer.mixtures.values()
    return adapter


def cost_per_token(layer: Any) -> tuple[float, float, float]:
    """COSTS of an adapted layer of a PEFT model, in bfloat16: what the adapter adds to the frozen layer, and its own.

    Experts are counted as they are computed on a GPU: all of them in one product, where the method has one.
    """
    adapter = _adapter_of(layer)
    mixture = adapter.mixture
    device = next(layer.parameters()).device
    gates = torch.empty(1, mixture.num_gates, device=device)  # for routers that take them from the caller
    # Methods that route by task need one, and it is the same for all tokens: the cost is that of any task.
    given = adapter.routing
    adapter.routing = Routing(torch.zeros(1, dtype=torch.long, device=device), gates)
    try:
        multiplications, saved = _per_token(layer, layer.in_features)
        frozen_multiplications, frozen_saved = _per_token(layer.base_layer, layer.in_features)
    finally:
        adapter.routing = given
    return multiplications - frozen_multiplications, frozen_multiplications, saved - frozen_saved


def _per_token(module: nn.Module, in_features: int) -> tuple[float, float]:
    """Multiplications and bytes kept that a sequence longer by a token has more of."""
    short, long = (_cost(module, in_features, length) for length in LENGTHS)
    tokens = LENGTHS[1] - LENGTHS[0]
    return (long[0] - short[0]) / tokens, (long[1] - short[1]) / tokens


def _cost(module: nn.Module, in_features: int, length: int) -> tuple[float, float]:
    """Multiplications and bytes kept of one forward, without the input's."""
    weight = next(module.parameters())
    x = torch.empty(1, length, in_features, dtype=torch.bfloat16, device=weight.device, requires_grad=True)
    kept: dict[int, Tensor] = {}  # one a storage, alive so that no other storage takes its place

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(_storage(tensor), tensor)
        return tensor

    # The counter does not know the product in place.
    in_place = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with torch.enable_grad(), counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x)
    kept.pop(_storage(x), None)
    return counter.get_total_flops() / 2, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # tensors on the meta device have no address


def sizes_by_role(parts: dict[str, int]) -> tuple[int, int, int, int]:
    """Parameters of A, of B, of the router, and of the mixing."""

    def all_of(*ends: str) -> int:
        return sum(size for part, size in parts.items() if part.endswith(ends))

    return all_of("_a"), all_of("_b"), all_of("router", "tasks"), all_of("mixer")
