"""What a saved adapter holds, from its two files alone, and its use of experts by task, from a model that runs.

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
        gives of the experts.

    raises AdapterFileError, naming the file, for a folder that holds no MoSLD adapter, a pickle, or a file that is cut
    off, altered or does not fit the other.
    """
    folder = Path(folder)
    config, unknown = _known_config(folder)
    weights = AdapterWeights(folder / WEIGHTS, config.mixture_of)
    layers = {}
    parameters = 0
    for name, layer in weights.layers.items():
        layers[name] = {**asdict(layer), **expert_numbers(weights.tensors(name), weights.mixtures[name])}
        parameters += layer.parameters
    return {
        "adapter": str(folder),
        "method": "MOSLD",
        "base_model": config.base_model_name_or_path,
        **{name: getattr(config, name) for name in SETTINGS},
        "unknown_fields": unknown,
        "parameters": parameters,
        "others": weights.others,
        "layers": layers,
    }


def _known_config(folder: Path) -> tuple[MoSLDConfig, list[str]]:
    """The configuration, and the names of its fields that this version does not know and has left out."""
    fields = read_config(folder)
    unknown = MoSLDConfig.unknown_fields(fields)
    for name in unknown:
        del fields[name]
    try:
        return MoSLDConfig(**fields), unknown
    except (ValueError, TypeError) as error:
        more = f"; it has fields that this version does not know: {', '.join(unknown)}" if unknown else ""
        raise AdapterFileError(f"{folder / CONFIG} cannot be used: {error}{more}") from error


def expert_numbers(tensors: Mapping[str, Tensor], mixture: Mixture) -> dict[str, Any]:
    """The tensors of one layer, by name -> what its experts have become, computed in float64.

    update_norms: of each expert, the Frobenius norm of its update [out, in] with a gate of 1.
    similarity: the mean cosine between what two experts have behind A (for MoSLD their B), over all pairs that are not
        zero; None without a pair. Of a feed-forward block the three linear layers count together.
    untrained: the experts whose update is zero still. One that has diverged has a norm that is no number.
    All empty where a mixture has no gate of its own for each expert, or another update for each task.
    """
    kind = mixture.kind
    if kind.block is not None:
        return _summary(mixture, *_block_experts(tensors, mixture))
    if not kind.per_expert or kind.per_task:
        return {"update_norms": [], "similarity": None, "untrained": []}
    shared_a, expert_b = tensors["shared_a"].double(), tensors["expert_b"].double()
    mixer = tensors["mixer"].double() if "mixer" in tensors else None
    # With a gate of 1 for one expert alone, the mixture is that expert.
    one_each = torch.eye(kind.gates(mixture), dtype=torch.float64)
    experts = torch.stack([expert_b @ mixture.matrix(gates, mixer) for gates in one_each])  # [E, out, R_in]
    through_a = (experts @ (shared_a @ shared_a.T)).flatten(1)
    flat = experts.flatten(1)
    return _summary(mixture, flat, (through_a * flat).sum(1))


def _block_experts(tensors: Mapping[str, Tensor], mixture: Mixture) -> tuple[Tensor, Tensor]:
    """The three B's of each expert of a feed-forward block [E, ...], and the squares of its updates [E], summed."""
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
    trained = (lengths > 0) & lengths.isfinite()
    unit = flat[trained] / lengths[trained].unsqueeze(1)
    pairs = len(unit) * (len(unit) - 1)
    norms = mixture.scale * squares.clamp(min=0).sqrt()  # rounding may leave a tiny negative square
    # The sum of all cosines but those of an expert with itself, which are the squares on the diagonal.
    cosines = (unit @ unit.T).sum() - unit.square().sum()
    return {
        "update_norms": norms.tolist(),
        "similarity": cosines.item() / pairs if pairs else None,
        "untrained": (lengths == 0).nonzero().flatten().tolist(),
    }


def use_as_json(stats: Mapping[str, Mapping[str, RouterStats]]) -> dict[str, dict[str, dict[str, Any]]]:
    """task -> layer in the base model -> load, gates [E], entropy, dead, tokens; from `RouterUse.stats`."""
    use: dict[str, dict[str, dict[str, Any]]] = {}
    for task, layers in stats.items():
        use[task] = {}
        for name, found in layers.items():
            use[task][name.removeprefix("base_model.model.")] = {
                "load": found.load.tolist(),
                "gates": found.gates.tolist(),
                "entropy": found.entropy,
                "dead": found.dead,
                "tokens": found.tokens,
            }
    return use
