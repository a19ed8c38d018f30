"""From a trained LoRA to a mixture that computes the same.

sum_e g_e s B A = s B A, as the gates g of a token sum to one: B goes into every expert
"""

import math
import os
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..files.adapter_folder import CONFIG, PEFT_PREFIX, WEIGHTS, check_weights, read_json
from ..files.safe_regex import check_expressions
from ..tuner.config import MoSLDConfig
from ..tuner.peft_api import in_out_features
from .adapted_layers import adapted_layers
from .export import target_modules

# What may differ from a LoraConfig's default in a LoRA that a mixture can compute.
UNDERSTOOD = {
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "lora_dropout", "fan_in_fan_out", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "init_lora_weights", "eva_config",
}  # fmt: skip
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # the others take something out of the base weights
FROM_THE_LORA = (
    "r",
    "alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "task_type",
)


def import_lora(base_model: nn.Module, lora_dir: str | os.PathLike, **settings: Any) -> PeftModel:
    """A MoSLD model that computes what a trained LoRA computes: A copied, B in every expert, router new.

    Args:
        base_model: The model that the LoRA was trained on. Adapted in place, as by get_peft_model.
        lora_dir: A folder with PEFT's adapter_config.json and adapter_model.safetensors.
        settings: Fields of MoSLDConfig such as num_experts, top_k, dropout. What the LoRA decides cannot be given.
            Mixtures that start as a LoRA are those whose gates sum to one between copies of A, of B or of both: mixing
            "expand", "diagonal" or shared="up".

    Returns:
        The adapted model, a PeftModel.

    Raises:
        ValueError: For a folder that holds no such LoRA, for one that is more than s B A (DoRA, biases, whole modules,
            several ranks), for layers that the model lacks or that differ in size, and for settings that break
            MoSLDConfig's rules.

    >>> import torch
    >>> from copy import deepcopy
    >>> from peft import LoraConfig, get_peft_model
    >>> from torch import nn
    >>> from mosld import import_lora
    >>> base, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
    >>> lora = get_peft_model(deepcopy(base), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    >>> lora.save_pretrained("lora")
    >>> model = import_lora(base, "lora", num_experts=4, dropout=0.0)
    >>> torch.allclose(model(x), lora(x), atol=1e-6)
    True
    """
    given = sorted(set(settings) & set(FROM_THE_LORA))
    if given:
        raise ValueError(f"{', '.join(given)} comes from the LoRA and cannot be given")
    lora, weights = _read_lora(Path(lora_dir))
    _check_sizes(base_model, lora.r, weights)
    config = MoSLDConfig(
        r=lora.r,
        alpha=lora.lora_alpha * (math.sqrt(lora.r) if lora.use_rslora else 1),
        target_modules=target_modules(base_model, weights),
        task_type=lora.task_type,
        **settings,
    )
    repeat_a, repeat_b = _repeats(config)
    model = get_peft_model(base_model, config)
    assert isinstance(model, PeftModel)
    for name, (_, adapter) in adapted_layers(model.get_base_model()).items():
        shared_a, lora_b = weights[name]
        with torch.no_grad():
            copies_a = adapter.num_experts if repeat_a else 1
            copies_b = adapter.num_experts if repeat_b else 1
            adapter.shared_a.weight.copy_(shared_a.repeat(copies_a, 1))
            adapter.expert_b.weight.copy_(lora_b.repeat(1, copies_b))
    return model


def _repeats(config: MoSLDConfig) -> tuple[bool, bool]:
    """Whether A and B are repeated for every expert; raises ValueError for a mixture that does not start as a LoRA."""
    mixture = config.mixture_of("")
    repeats = {"expand": (False, True), "diagonal": (True, True), "reduce": (True, False)}.get(mixture.mixing)
    if repeats is None:
        raise ValueError(
            f"a LoRA becomes a mixture with mixing 'expand', 'diagonal' or 'reduce', got {mixture.mixing!r}"
        )
    if not mixture.router_kind.sums_to_one(mixture):
        raise ValueError(
            f"router={mixture.router!r} with num_experts={mixture.num_experts} has gates that need not sum to one, so "
            "that the mixture would not start as the LoRA"
        )
    return repeats


def _read_lora(folder: Path) -> tuple[LoraConfig, dict[str, tuple[Tensor, Tensor]]]:
    """The configuration, and layer name -> A [R, D_in] and B [D_out, R]; raises ValueError for all but a plain LoRA."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is not a saved LoRA: {CONFIG} is missing")
    check_weights(folder)
    check_expressions(read_json(folder / CONFIG), folder / CONFIG)
    config = PeftConfig.from_pretrained(str(folder))
    if type(config) is not LoraConfig:
        raise ValueError(f"{folder} must hold a LoRA, got {config.peft_type}")
    odd = _beyond_a_plain_lora(config)
    if odd:
        raise ValueError(f"a mixture can take over a plain LoRA alone, this one has {', '.join(odd)}")
    return config, _read_factors(folder / WEIGHTS)


def _beyond_a_plain_lora(config: LoraConfig) -> list[str]:
    """The settings, as `name=value`, that make it more than s B A."""
    default = LoraConfig()
    odd = []
    for own in fields(config):
        value = getattr(config, own.name)
        if value != getattr(default, own.name) and own.name not in UNDERSTOOD:
            odd.append(f"{own.name}={value!r}")
    if config.init_lora_weights not in PLAIN_STARTS:
        odd.append(f"init_lora_weights={config.init_lora_weights!r}")
    return odd


def _read_factors(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> A [R, D_in] and B [D_out, R]"""
    tensors = load_file(path)
    keys = {}  # layer -> the keys of A and B
    for key in tensors:
        layer = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0]
        keys[layer] = f"{PEFT_PREFIX}{layer}.lora_A.weight", f"{PEFT_PREFIX}{layer}.lora_B.weight"
    odd = tensors.keys() ^ set(chain.from_iterable(keys.values()))
    if odd or not keys:
        raise ValueError(f"{path} must hold lora_A and lora_B alone, got {sorted(odd)}")
    return {name: (tensors[key_a], tensors[key_b]) for name, (key_a, key_b) in keys.items()}


def _check_sizes(base: nn.Module, r: int, weights: dict[str, tuple[Tensor, Tensor]]) -> None:
    modules = dict(base.named_modules())
    unknown = sorted(weights.keys() - modules.keys())
    if unknown:
        raise ValueError(f"{type(base).__name__} lacks layers that the LoRA adapts: {', '.join(unknown)}")
    for name, (shared_a, lora_b) in weights.items():
        if not isinstance(modules[name], (nn.Linear, Conv1D)):
            raise ValueError(
                f"MoSLD adapts nn.Linear and Conv1D layers, but {name} is a {type(modules[name]).__name__}"
            )
        in_features, out_features = in_out_features(modules[name])
        if shared_a.shape != (r, in_features) or lora_b.shape != (out_features, r):
            raise ValueError(
                f"lora_A and lora_B of {name} must be [{r}, {in_features}] and [{out_features}, {r}], got "
                f"{list(shared_a.shape)} and {list(lora_b.shape)}"
            )
