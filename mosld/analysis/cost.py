"""`mosld inspect --config ... --model NAME`: what a method trains and costs, counted on its real modules before any training.

The model is built on the meta device, PEFT adapts it there, and what requires a gradient is counted. Cost is that of one
adapted layer of each kind, run on meta tensors, less that of the frozen layer in it: the multiplications of matrix products,
and the storage that autograd keeps. Both are differences between two lengths of one sequence, so what falls once a sequence
or once a call is left out.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..mixture.gates import Routing
from ..presets import PRESETS
from ..tuner.config import MoSLDConfig
from ..tuner.model import MoSLDModel
from . import known_models
from .config_text import read_config, split_names

# One layer's trained tensor in an adapted model: <prefix><layer>.mosld_<part>.<adapter>.weight
_TRAINED = re.compile(r"(?:base_model\.model\.)?(.+?)\.mosld_(\w+)\.")
LENGTHS = (64, 128)


def count(model_name: str, configs: Sequence[str] = (), targets: str | None = None, quick: bool = False) -> dict:
    """What each method trains on the model of this name, in plain numbers and strings.

    model_name, quick: as in `known_models.build`. configs: as in `config_text.read_config`; every preset without one.
    targets: module names with commas between, or "all-linear", instead of each configuration's own.

    model, parameters: of the base. methods: for each configuration
        config, trained, share (trained over the base's parameters), parts (shared_a, expert_b, router, tasks, mixer, and
        others for modules_to_save -> parameters), layers, experts ([fewest, most] of a layer), and of all layers together
        multiplications: of the adapters over those of the frozen layers adapted, forward, per token.
        saved_bytes: kept for backward per token beyond what the frozen layers and their inputs are, in bfloat16.
        kinds: the same for layers that are alike: name, in_features, out_features, layers, experts, and of one layer
        trained, parts, saved_bytes and, per token and not as ratios, multiplications and frozen_multiplications.

    raises ValueError for models, presets, fields and target modules that do not exist, listing those that do.
    """
    if not configs:
        configs = tuple(PRESETS)
    base = known_models.build(model_name, quick)
    total = sum(p.numel() for p in base.parameters())
    methods = []
    for text in configs:
        config = read_config(text, depth_of(base))
        if targets is not None:
            config.target_modules = split_names(targets)
        elif config.target_modules is None:
            _check_default_targets(base, model_name)
        methods.append({"config": text, **_count_one(known_models.build(model_name, quick), config, total)})
    return {"model": model_name, "parameters": total, "methods": methods}


def count_config(model_name: str, config: MoSLDConfig) -> dict:
    """`config` on the model of this name -> one of the `methods` of `count`, without its name"""
    base = known_models.build(model_name)
    return _count_one(base, config, sum(p.numel() for p in base.parameters()))


def _check_default_targets(base: nn.Module, model_name: str) -> None:
    kind = getattr(getattr(base, "config", None), "model_type", None)
    if kind not in MoSLDModel.target_module_mapping:
        names = dict.fromkeys(name.rpartition(".")[2] for name, m in base.named_modules() if isinstance(m, nn.Linear))
        raise ValueError(
            f"PEFT knows no modules to adapt in {model_name} by itself: give --target-modules; its linear layers are called "
            f"{', '.join(names)}"
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
    parts: dict[str, int] = {}
    layers: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        match = _TRAINED.match(name)
        part = match[2] if match else "others"
        parts[part] = parts.get(part, 0) + parameter.numel()
        if match:
            own = layers.setdefault(match[1], {})
            own[part] = own.get(part, 0) + parameter.numel()
    kinds = list(_kinds(model.base_model.model, layers))  # pyright: ignore
    trained = sum(parts.values())
    experts = [kind["experts"] for kind in kinds]
    whole = {key: sum(kind["layers"] * kind[key] for kind in kinds) for key in COSTS}
    return {
        "trained": trained,
        "share": trained / total,
        "parts": parts,
        "layers": len(layers),
        "experts": [min(experts), max(experts)],
        "multiplications": whole["multiplications"] / whole["frozen_multiplications"],
        "saved_bytes": whole["saved_bytes"],
        "kinds": kinds,
    }


def _kinds(model: nn.Module, layers: dict[str, dict[str, int]]) -> Iterator[dict[str, Any]]:
    """Layers with the same last name, sizes and mixture, counted and measured once."""
    groups: dict[tuple, list[str]] = {}
    for name, parts in layers.items():
        layer: Any = model.get_submodule(name)
        (adapter,) = layer.mixtures.values()
        key = (
            name.rpartition(".")[2],
            layer.in_features,
            layer.out_features,
            repr(adapter.mixture),
            tuple(parts.items()),
        )
        groups.setdefault(key, []).append(name)
    for (name, d_in, d_out, _, parts), names in groups.items():
        layer = model.get_submodule(names[0])
        (adapter,) = layer.mixtures.values()
        yield {
            "name": name,
            "in_features": d_in,
            "out_features": d_out,
            "layers": len(names),
            "experts": adapter.num_experts,
            "trained": sum(size for _, size in parts),
            "parts": dict(parts),
            **dict(zip(COSTS, cost_per_token(layer), strict=True)),
        }


COSTS = ("multiplications", "frozen_multiplications", "saved_bytes")


def cost_per_token(layer: Any) -> tuple[float, float, float]:
    """COSTS of an adapted layer of a PEFT model, in bfloat16: what the adapter adds to the frozen layer, and that layer's own.

    Experts are counted as they are computed on a GPU: all of them in one product, where the method has one.
    """
    (adapter,) = layer.mixtures.values()
    device, m = next(layer.parameters()).device, adapter.mixture
    gates = torch.empty(1, m.num_gates, device=device)  # for routers that take them from the caller
    given, adapter.routing = adapter.routing, Routing(torch.zeros(1, dtype=torch.long, device=device), gates)
    try:
        ends = [(_cost(layer, layer.in_features, n), _cost(layer.base_layer, layer.in_features, n)) for n in LENGTHS]
    finally:
        adapter.routing = given
    (whole, frozen) = (
        [(long - short) / (LENGTHS[1] - LENGTHS[0]) for short, long in zip(*lengths, strict=True)]
        for lengths in zip(*ends, strict=True)
    )
    return whole[0] - frozen[0], frozen[0], whole[1] - frozen[1]


def _cost(module: nn.Module, in_features: int, length: int) -> tuple[float, float]:
    """Multiplications and bytes kept of one forward, without the input's."""
    weight = next(module.parameters())
    x = torch.empty(1, length, in_features, dtype=torch.bfloat16, device=weight.device, requires_grad=True)
    kept: dict[int, Tensor] = {}  # one a storage, alive so that no other storage takes its place

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(_storage(tensor), tensor)
        return tensor

    in_place = {
        torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]
    }  # which the counter does not know
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with torch.enable_grad(), counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x)
    kept.pop(_storage(x), None)
    return counter.get_total_flops() / 2, sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # tensors on the meta device have no address


HEADS = (
    "method", "trained", "% of base", "A", "B", "router", "mixer", "layers", "experts", "multiplied, %", "saved, B/token",
)  # fmt: skip
KIND_HEADS = ("method", "layer", "in -> out", "layers", "experts", "each", "A", "B", "router", "mixer", "multiplied, %", "saved, B/token")  # fmt: skip


def as_text(report: dict[str, Any]) -> str:
    """A report of `count` as text for people."""
    methods = report["methods"]
    lines = [
        f"{report['model']}: {report['parameters']:,} parameters",
        "",
        *_columns([HEADS, *map(_method_row, methods)]),
        "",
        *_columns([KIND_HEADS, *(_kind_row(method["config"], kind) for method in methods for kind in method["kinds"])]),
        "",
        "trained: what requires a gradient. multiplied: multiplications of the adapters in percent of those of the frozen",
        "layers that they adapt, forward, per token. saved: kept for backward beyond what the frozen layers keep, in bfloat16.",
    ]
    if others := [f"{m['parts']['others']:,} with {m['config']}" for m in methods if "others" in m["parts"]]:
        lines.append(f"trained as well, by modules_to_save: {', '.join(others)}")
    return "\n".join(lines)


def _method_row(method: dict[str, Any]) -> tuple[str, ...]:
    ratio, saved, experts = method["multiplications"], method["saved_bytes"], method["experts"]
    return (
        method["config"],
        f"{method['trained']:,}",
        f"{100 * method['share']:.3f}",
        *(f"{size:,}" for size in sizes_by_role(method["parts"])),
        str(method["layers"]),
        " to ".join(map(str, dict.fromkeys(experts))),
        f"{100 * ratio:.2f}",
        f"{saved:,.0f}",
    )


def _kind_row(config: str, kind: dict[str, Any]) -> tuple[str, ...]:
    return (
        config,
        kind["name"],
        f"{kind['in_features']} -> {kind['out_features']}",
        str(kind["layers"]),
        str(kind["experts"]),
        f"{kind['trained']:,}",
        *(f"{size:,}" for size in sizes_by_role(kind["parts"])),
        f"{100 * kind['multiplications'] / kind['frozen_multiplications']:.2f}",
        f"{kind['saved_bytes']:,.0f}",
    )


def sizes_by_role(parts: dict[str, int]) -> tuple[int, int, int, int]:
    """Parameters of A, of B, of the router, and of the mixing."""

    def all_of(*ends: str) -> int:
        return sum(size for part, size in parts.items() if part.endswith(ends))

    return all_of("_a"), all_of("_b"), all_of("router", "tasks"), all_of("mixer")


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Names to the left, numbers to the right: one column of names for methods, three for kinds of layers."""
    names = 1 if rows[0] == HEADS else 3
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
