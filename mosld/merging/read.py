"""Task vectors from folders: LoRA and MoSLD adapters, and full checkpoints."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor

from ..files.adapter_folder import CONFIG, PEFT_PREFIX, WEIGHTS, check_weights, read_config, read_json
from ..files.model_folder import INDEX, files_of
from ..files.safe_regex import check_expressions
from ..mixture.gates import saved_fixed_gates
from ..tuner.config import MoSLDConfig
from ..tuner.peft_api import get_pattern_key
from ..tuner.weights import AdapterWeights
from .vectors import Factors, MergeError, TaskVector, open_safetensors

CHECKPOINT = "model.safetensors"


def read_task_vectors(folders: Sequence[str | Path], gates: str = "uniform") -> list[TaskVector]:
    """Read adapters (PEFT LoRA or MoSLD, of any ranks and targets) or full checkpoints.

    Args:
        folders: One for each task.
        gates: How the gates of a MoSLD adapter are fixed. "uniform" is 1 / E.

    Returns:
        A vector for each folder, in their order.

    Raises:
        MergeError: Without a folder; for a folder that is none of these, naming it; for adapters of different bases;
            and for values that are not finite, naming the folder and the layer.

    >>> from copy import deepcopy
    >>> from peft import LoraConfig, get_peft_model
    >>> from torch import nn
    >>> from mosld.merging import read_task_vectors
    >>> base = nn.Sequential(nn.Linear(6, 5))
    >>> lora = get_peft_model(deepcopy(base), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    >>> lora.save_pretrained("a")
    >>> [(vector.name, vector.weights()) for vector in read_task_vectors(["a"])]
    [('a', ['0.weight'])]
    """
    if not folders:
        raise MergeError("merging needs at least one adapter or checkpoint, got none")
    vectors = [_read(Path(folder)) for folder in folders]
    bases = {vector.base: vector.folder for vector in vectors if vector.base is not None}
    if len(bases) > 1:
        listed = "; ".join(f"{folder} is of {base}" for base, folder in bases.items())
        raise MergeError(f"the adapters are of different bases: {listed}")
    names = [vector.name for vector in vectors]
    for vector in vectors:
        # runs/a/adapter and runs/b/adapter have one name.
        if names.count(vector.name) > 1:
            vector.name = str(vector.folder)
    return vectors


def _read(folder: Path) -> TaskVector:
    if (folder / CONFIG).is_file():
        fields = read_json(folder / CONFIG)
        method = fields.get("peft_type")
        if method == "MOSLD":
            return _read_mosld(folder)
        if method == "LORA":
            check_weights(folder)
            check_expressions(fields, folder / CONFIG)
            return _read_lora(folder)
        raise MergeError(f"{folder / CONFIG} is of peft_type {method!r}; LORA and MOSLD adapters can be merged")
    files = _checkpoint_files(folder)
    if not files:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        more = f", and {pickles[0]}, a pickle, is not opened" if pickles else ""
        raise MergeError(f"{folder} holds neither {CONFIG} nor {CHECKPOINT}: it is no adapter and no checkpoint{more}")
    return TaskVector(folder.name, folder, files=files)


def _checkpoint_files(folder: Path) -> dict[str, Path]:
    """A tensor's name -> the safetensors file that has it; nothing where the folder is no checkpoint"""
    if (folder / INDEX).is_file():
        return files_of(folder)
    if not (folder / CHECKPOINT).is_file():
        return {}
    with open_safetensors(folder / CHECKPOINT) as file:
        return dict.fromkeys(file.keys(), folder / CHECKPOINT)


def _read_lora(folder: Path) -> TaskVector:
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    _check_lora(config, folder)
    with open_safetensors(folder / WEIGHTS) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
    factors: dict[str, Factors] = {}
    for key, down in tensors.items():
        layer, is_down, _ = key.removeprefix(PEFT_PREFIX).partition(".lora_A.")
        if not is_down:
            continue
        up = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if up is None:
            raise MergeError(f"{folder / WEIGHTS} has no lora_B beside the lora_A of {layer}")
        scaled = _in_float32(up.double() * _lora_scale(config, layer), like=up)
        factors[layer] = _checked_finite(folder, layer, Factors(down, scaled))
    if not factors:
        raise MergeError(f"{folder / WEIGHTS} holds no tensor of a LoRA")
    return TaskVector(folder.name, folder, config.base_model_name_or_path, factors)


def _check_lora(config: LoraConfig, folder: Path) -> None:
    """raises MergeError for a LoRA whose update is not s B A alone"""
    for name in ("use_dora", "modules_to_save", "lora_bias"):
        if getattr(config, name, None):
            raise MergeError(f"{folder} is more than s B A: it has {name}={getattr(config, name)!r}")
    if config.bias != "none":
        raise MergeError(f"{folder} is more than s B A: it has bias={config.bias!r}")


def _lora_scale(config: LoraConfig, layer: str) -> float:
    """alpha / r, or alpha / sqrt(r), with the layer's own values where a pattern has them"""
    rank = _of_layer(config.rank_pattern or {}, layer, config.r)
    alpha = _of_layer(config.alpha_pattern or {}, layer, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _of_layer(pattern: Mapping[str, Any], layer: str, value: Any) -> Any:
    return pattern.get(get_pattern_key(list(pattern), layer), value)


def _read_mosld(folder: Path) -> TaskVector:
    read_config(folder)
    config = MoSLDConfig.from_pretrained(str(folder))
    assert isinstance(config, MoSLDConfig)
    weights, factors = AdapterWeights(folder / WEIGHTS, config.mixture_of), {}
    for layer in weights.layers:
        mixture, tensors = config.mixture_of(layer), weights.tensors(layer)
        if not mixture.kind.per_expert or mixture.wants_tasks:
            raise MergeError(
                f"{folder} has mixing={mixture.mixing!r}: export a LoRA of it with `mosld export` and merge that"
            )
        mixer = tensors["mixer"].double() if "mixer" in tensors else None
        # With fixed gates the mixture is linear: its B, gates and mixer are one matrix.
        matrix = mixture.matrix(_fixed_gates(mixture, tensors), mixer)
        up = mixture.scale * tensors["expert_b"].double() @ matrix
        own = Factors(tensors["shared_a"], up.to(tensors["expert_b"].dtype))
        factors[layer] = _checked_finite(folder, layer, own)
    return TaskVector(folder.name, folder, config.base_model_name_or_path, factors)


def _fixed_gates(mixture: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    """-> [E], float64: the trained gates of a constant router, ones without a router, else 1 / E"""
    if mixture.router_kind.fixed:
        return saved_fixed_gates(mixture, tensors.get("router"), like=tensors["shared_a"].double())
    return torch.full((mixture.num_experts,), 1 / mixture.num_experts).double()


def _in_float32(values: Tensor, like: Tensor) -> Tensor:
    """float64 values in float32; they stay where `like`, of which they come, is float64"""
    return values.to(like.dtype if like.dtype == torch.float64 else torch.float32)


def _checked_finite(folder: Path, layer: str, factors: Factors) -> Factors:
    """`factors`; raises MergeError, naming folder and layer, where one holds a value that is not finite"""
    if not (torch.isfinite(factors.down).all() and torch.isfinite(factors.up).all()):
        raise MergeError(f"{folder} holds values that are not finite in {layer}")
    return factors
