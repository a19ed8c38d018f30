"""The reports of `mosld inspect` as text for people."""

import math
from collections.abc import Mapping
from typing import Any

import numpy

from ..analysis.cost import sizes_by_role
from ..experiments.tables import aligned_lines, percent
from ..files.adapter_folder import CONFIG

ROLES = ("A", "B", "router", "mixer")
COST = ("multiplied, %", "saved, B/token")
METHOD_HEADS = ("method", "trained", "% of base", *ROLES, "layers", "experts", *COST)
KIND_HEADS = ("method", "layer", "in -> out", "layers", "experts", "each", *ROLES, *COST)
LAYER_HEADS = ("layer", "in -> out", "experts", "parameters", "norm of the updates", "similarity", "untrained")
USE_HEADS = ("layer", "entropy", "load of each expert, %", "mean gate, %", "dead")
COST_NOTE = (
    "trained: what requires a gradient. multiplied: multiplications of the adapters in percent of those of the frozen\n"
    "layers that they adapt, forward, per token. saved: kept for backward beyond what the frozen layers keep, in "
    "bfloat16."
)


def cost_text(report: dict[str, Any]) -> str:
    """A report of `cost.count`: a table of the methods, and one of the kinds of layers of each."""
    methods = report["methods"]
    by_kind: list[tuple[str, ...]] = [KIND_HEADS]
    others = []
    for method in methods:
        by_kind += [_kind_row(method["config"], kind) for kind in method["kinds"]]
        if "others" in method["parts"]:
            others.append(f"{method['parts']['others']:,} with {method['config']}")
    lines = [
        f"{report['model']}: {report['parameters']:,} parameters",
        "",
        *aligned_lines([METHOD_HEADS, *map(_method_row, methods)]),
        "",
        *aligned_lines(by_kind, words=(0, 1, 2)),
        "",
        COST_NOTE,
    ]
    if others:
        lines.append(f"trained as well, by modules_to_save: {', '.join(others)}")
    return "\n".join(lines)


def _method_row(method: dict[str, Any]) -> tuple[str, ...]:
    return (
        method["config"],
        f"{method['trained']:,}",
        f"{100 * method['share']:.3f}",
        *_role_cells(method["parts"]),
        str(method["layers"]),
        _range(*method["experts"]),
        f"{100 * method['multiplications']:.2f}",
        f"{method['saved_bytes']:,.0f}",
    )


def _kind_row(config: str, kind: dict[str, Any]) -> tuple[str, ...]:
    return (
        config,
        kind["name"],
        _sizes(kind),
        str(kind["layers"]),
        str(kind["experts"]),
        f"{kind['trained']:,}",
        *_role_cells(kind["parts"]),
        f"{100 * kind['multiplications'] / kind['frozen_multiplications']:.2f}",
        f"{kind['saved_bytes']:,.0f}",
    )


def _role_cells(parts: dict[str, int]) -> list[str]:
    return list(map("{:,}".format, sizes_by_role(parts)))


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def _sizes(layer: Mapping[str, Any]) -> str:
    return f"{layer['in_features']} -> {layer['out_features']}"


def adapter_text(report: Mapping[str, Any]) -> str:
    """A report of `inspect_adapter`, with `use` and `tasks` where a model has run."""
    layers = report["layers"]
    rows: list[tuple[str, ...]] = [LAYER_HEADS]
    for name, layer in layers.items():
        rows.append(_layer_row(name, layer))
    lines = [*_summary(report), "", *_words_only(rows)]
    for task, use in report.get("use", {}).items():
        score = report.get("tasks", {}).get(task)
        heading = f"{task}, accuracy {percent(score['accuracy'])} %" if score else task
        rows = [USE_HEADS]
        for name, layer in use.items():
            rows.append(_use_row(name, layer))
        lines += ["", heading, "", *_words_only(rows)]
    return "\n".join(lines)


def _summary(report: Mapping[str, Any]) -> list[str]:
    """What the adapter is, without its layers."""
    layers = report["layers"]
    experts = [layer["num_experts"] for layer in layers.values()]
    lines = [
        f"{report['method']} adapter of {report['base_model'] or 'a base model that is not recorded'}",
        f"r {report['r']}, alpha {report['alpha']:g}, experts per layer {_range(min(experts), max(experts))}, "
        f"chosen per token {report['top_k']}, dropout {report['dropout']:g}",
        f"{report['parameters']:,} parameters in {len(layers)} layers",
    ]
    if report["others"]:
        lines.append(f"saved beside the adapter: {', '.join(report['others'])}")
    if report["unknown_fields"]:
        lines.append(f"fields of {CONFIG} that this version does not know: {', '.join(report['unknown_fields'])}")
    return lines


def _layer_row(name: str, layer: Mapping[str, Any]) -> tuple[str, ...]:
    norms, similarity = layer["update_norms"], layer["similarity"]
    return (
        name,
        _sizes(layer),
        str(layer["num_experts"]),
        f"{layer['parameters']:,}",
        _norms(norms),
        "" if similarity is None else f"{similarity:.3f}",
        _numbers(layer["untrained"]),
    )


def _norms(norms: list[float]) -> str:
    if not all(math.isfinite(norm) for norm in norms):
        return "not finite: it has diverged"
    return f"{min(norms):.3g} to {max(norms):.3g}" if norms else ""


def _use_row(name: str, layer: Mapping[str, Any]) -> tuple[str, ...]:
    loads, gates = _percents(layer["load"]), _percents(layer["gates"])
    return name, f"{layer['entropy']:.2f}", loads, gates, _numbers(layer["dead"])


def _percents(shares: list[float]) -> str:
    return " ".join(map("{:3.0f}".format, 100 * numpy.array(shares)))


def _numbers(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _words_only(rows: list[tuple[str, ...]]) -> list[str]:
    return aligned_lines(rows, words=range(len(rows[0])))
