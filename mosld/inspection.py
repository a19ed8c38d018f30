"""What a saved adapter holds, from its two files alone, and which experts it uses for which task, from a model that runs.

    update of expert e:  s B_e A        <s B_e A, s B_f A> = s^2 <B_e A A^T, B_f>        |s B_e A| = sqrt of that with f = e

The products need A A^T [r, r] and never an update [out, in].
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from .adapter_file import CONFIG, WEIGHTS, AdapterFileError, AdapterWeights, read_config
from .config import MoSLDConfig
from .router import RouterStats

SETTINGS = ("r", "alpha", "top_k", "dropout", "balance_coef", "task_type")


def inspect_adapter(folder: str | Path) -> dict[str, Any]:
    """The adapter saved in `folder`, in plain numbers and strings, as `mosld inspect --json` prints it.

    method, base_model, r, alpha, top_k, dropout, balance_coef, task_type: from its configuration.
    unknown_fields: fields of the configuration that this version does not know, and leaves out when it loads it.
    parameters: of all layers together. others: name -> shape of tensors saved beside the adapter (modules_to_save).
    layers: name in the base model -> in_features, out_features, r, num_experts, parameters, and what `expert_numbers`
        tells of the experts.

    raises AdapterFileError, naming the file, for a folder that holds no MoSLD adapter, a pickle, or a file that is cut
    off, altered or does not fit the other.
    """
    folder = Path(folder)
    fields = read_config(folder)
    unknown = MoSLDConfig.unknown_fields(fields)
    try:
        config = MoSLDConfig(**{name: value for name, value in fields.items() if name not in unknown})
    except (ValueError, TypeError) as error:
        more = f"; it has fields that this version does not know: {', '.join(unknown)}" if unknown else ""
        raise AdapterFileError(f"{folder / CONFIG} cannot be used: {error}{more}") from error
    weights = AdapterWeights(folder / WEIGHTS, config.r, config.experts_of)
    layers = {}
    for name, layer in weights.layers.items():
        shared_a, expert_b, _ = weights.tensors(name)
        numbers = expert_numbers(shared_a, expert_b, layer.num_experts, config.alpha / config.r)
        layers[name] = {**asdict(layer), "parameters": layer.parameters, **numbers}
    return {
        "adapter": str(folder),
        "method": "MOSLD",
        "base_model": config.base_model_name_or_path,
        **{name: getattr(config, name) for name in SETTINGS},
        "unknown_fields": unknown,
        "parameters": sum(layer.parameters for layer in weights.layers.values()),
        "others": weights.others,
        "layers": layers,
    }


def expert_numbers(shared_a: Tensor, expert_b: Tensor, num_experts: int, scale: float) -> dict[str, Any]:
    """shared_a [r, in], expert_b [out, E r] -> what a layer's experts have become, computed in float64.

    update_norms: of each expert, the Frobenius norm of its update `scale` B_e A [out, in].
    similarity: the mean cosine between the B of two experts, over all pairs whose B is not zero; None without a pair.
    untrained: the experts whose B is zero still.
    """
    shared_a = shared_a.double()
    experts = expert_b.double().unflatten(1, (num_experts, -1)).transpose(0, 1)  # [E, out, r]
    through_a = (experts @ (shared_a @ shared_a.T)).flatten(1)
    flat = experts.flatten(1)
    squares = (through_a * flat).sum(1)
    lengths = flat.norm(dim=1)
    trained = lengths > 0
    unit = flat[trained] / lengths[trained].unsqueeze(1)
    pairs = len(unit) * (len(unit) - 1)
    return {
        "update_norms": (scale * squares.clamp(min=0).sqrt()).tolist(),  # rounding may leave a tiny negative square
        "similarity": ((unit @ unit.T).sum() - unit.square().sum()).item() / pairs if pairs else None,
        "untrained": (~trained).nonzero().flatten().tolist(),
    }


def use_as_json(stats: Mapping[str, Mapping[str, RouterStats]]) -> dict[str, dict[str, dict[str, Any]]]:
    """task -> layer in the base model -> load, gates [E], entropy, dead, tokens; from `RouterUse.stats`."""
    return {
        task: {
            name.removeprefix("base_model.model."): {
                "load": own.load.tolist(),
                "gates": own.gates.tolist(),
                "entropy": own.entropy,
                "dead": own.dead,
                "tokens": own.tokens,
            }
            for name, own in layers.items()
        }
        for task, layers in stats.items()
    }


def as_text(report: Mapping[str, Any]) -> str:
    """A report of `inspect_adapter`, with `use` and `tasks` where a model has run, as text for people."""
    layers = report["layers"]
    experts = sorted({layer["num_experts"] for layer in layers.values()})
    lines = [
        f"{report['method']} adapter of {report['base_model'] or 'a base model that is not recorded'}",
        f"r {report['r']}, alpha {report['alpha']:g}, experts per layer {' to '.join(map(str, dict.fromkeys((experts[0], experts[-1]))))}, "
        f"chosen per token {report['top_k']}, dropout {report['dropout']:g}",
        f"{report['parameters']:,} parameters in {len(layers)} layers",
    ]
    if report["others"]:
        lines.append(f"saved beside the adapter: {', '.join(report['others'])}")
    if report["unknown_fields"]:
        lines.append(f"fields of {CONFIG} that this version does not know: {', '.join(report['unknown_fields'])}")
    lines += ["", *_columns([_LAYER_HEADS, *[_layer_row(name, layer) for name, layer in layers.items()]])]
    for task, own in report.get("use", {}).items():
        score = report.get("tasks", {}).get(task)
        lines += ["", task + (f", accuracy {100 * score['accuracy']:.1f} %" if score else ""), ""]
        lines += _columns([_USE_HEADS, *[_use_row(name, layer) for name, layer in own.items()]])
    return "\n".join(lines)


_LAYER_HEADS = ("layer", "in -> out", "experts", "parameters", "norm of the updates", "similarity", "untrained")
_USE_HEADS = ("layer", "entropy", "load of each expert, %", "mean gate, %", "dead")


def _layer_row(name: str, layer: Mapping[str, Any]) -> tuple[str, ...]:
    norms = layer["update_norms"]
    return (
        name,
        f"{layer['in_features']} -> {layer['out_features']}",
        str(layer["num_experts"]),
        f"{layer['parameters']:,}",
        f"{min(norms):.3g} to {max(norms):.3g}",
        "" if layer["similarity"] is None else f"{layer['similarity']:.3f}",
        _numbers(layer["untrained"]),
    )


def _use_row(name: str, layer: Mapping[str, Any]) -> tuple[str, ...]:
    loads, gates = (" ".join(f"{100 * share:3.0f}" for share in layer[key]) for key in ("load", "gates"))
    return name, f"{layer['entropy']:.2f}", loads, gates, _numbers(layer["dead"])


def _numbers(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
