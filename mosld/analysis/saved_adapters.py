"""What a saved adapter holds, from its two files alone, and which experts it uses for which task, from a model that runs.

    update of expert e:  s U_e A, for MoSLD U_e = B_e
    <s U_e A, s U_f A> = s^2 <U_e A A^T, U_f>        |s U_e A| = sqrt of that with f = e

The products need A A^T [r, r] and never an update [out, in].
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.adapter_folder import CONFIG, WEIGHTS, AdapterFileError, read_config
from ..layers.stats import RouterStats
from ..mixture.spec import Mixture
from ..tuner.config import MoSLDConfig
from ..tuner.weights import AdapterWeights

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
    weights = AdapterWeights(folder / WEIGHTS, config.mixture_of)
    layers = {
        name: {**asdict(layer), **expert_numbers(weights.tensors(name), weights.mixtures[name])}
        for name, layer in weights.layers.items()
    }
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


def expert_numbers(tensors: Mapping[str, Tensor], mixture: Mixture) -> dict[str, Any]:
    """The tensors of one layer, by name -> what its experts have become, computed in float64.

    update_norms: of each expert, the Frobenius norm of its update [out, in] with a gate of 1.
    similarity: the mean cosine between what two experts have behind A (for MoSLD their B), over all pairs that are not
        zero; None without a pair. Of a feed-forward block the three linear layers count together.
    untrained: the experts whose update is zero still.
    All empty where a mixture has no gate of its own for each expert, or another update for each task.
    """
    kind = mixture.kind
    if kind.block is not None:
        return _summary(mixture, *_block_experts(tensors, mixture))
    if not kind.per_expert or kind.per_task:
        return {"update_norms": [], "similarity": None, "untrained": []}
    shared_a, expert_b = tensors["shared_a"].double(), tensors["expert_b"].double()
    mixer = tensors["mixer"].double() if "mixer" in tensors else None
    one_each = torch.eye(kind.gates(mixture), dtype=torch.float64)
    experts = torch.stack([expert_b @ mixture.matrix(gates, mixer) for gates in one_each])  # [E, out, R_in]
    through_a = (experts @ (shared_a @ shared_a.T)).flatten(1)
    flat = experts.flatten(1)
    return _summary(mixture, flat, (through_a * flat).sum(1))


def _block_experts(tensors: Mapping[str, Tensor], mixture: Mixture) -> tuple[Tensor, Tensor]:
    """The three B's of each expert of a feed-forward block [E, ...], and its updates' squares [E], the three together."""
    flat, squares = [], torch.zeros(mixture.num_experts, dtype=torch.float64)
    for linear in ("gate", "up", "down"):
        a = tensors[f"{linear}_a"].double().unflatten(0, (mixture.num_experts, -1))  # [E, R, in]
        b = tensors[f"{linear}_b"].double().unflatten(1, (mixture.num_experts, -1)).transpose(0, 1)  # [E, out, R]
        squares += ((a @ a.mT) * (b.mT @ b)).sum((1, 2))
        flat.append(b.flatten(1))
    return torch.cat(flat, dim=1), squares


def _summary(mixture: Mixture, flat: Tensor, squares: Tensor) -> dict[str, Any]:
    """What is behind A, an expert a row, and the squares of the updates' norms over the scale -> `expert_numbers`"""
    lengths = flat.norm(dim=1)
    trained = lengths > 0
    unit = flat[trained] / lengths[trained].unsqueeze(1)
    pairs = len(unit) * (len(unit) - 1)
    return {
        "update_norms": (
            mixture.scale * squares.clamp(min=0).sqrt()
        ).tolist(),  # rounding may leave a tiny negative square
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
        f"{min(norms):.3g} to {max(norms):.3g}" if norms else "",
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
