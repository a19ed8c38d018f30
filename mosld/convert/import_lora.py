"""From a trained LoRA to a mixture that computes the same: its B goes into every expert, and the gates of a token sum to one."""

import math
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import _get_in_out_features
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..files.adapter_folder import check_weights, read_json
from ..files.safe_regex import check_expressions
from ..tuner.config import MoSLDConfig
from .export import CONFIG, WEIGHTS, adapted_layers, target_modules
from .fixed_gates import PREFIX

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
    """A MoSLD model that computes what `base_model` with a trained LoRA computes: A copied, B in every expert, router new.

    base_model: the model that the LoRA was trained on; adapted in place, as by get_peft_model.
    lora_dir: a folder with PEFT's adapter_config.json and adapter_model.safetensors.
    settings: fields of MoSLDConfig such as num_experts, top_k, dropout; what the LoRA decides cannot be given. Mixtures
        that start as a LoRA are those whose gates sum to one between copies of A, of B or of both: mixing "expand",
        "diagonal" or shared="up".

    raises ValueError for a folder that holds no such LoRA, for one that is more than s B A (DoRA, biases, whole modules,
    several ranks), for layers that the model lacks or that differ in size, and for settings that break MoSLDConfig's rules.

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
    if given := sorted(set(settings) & set(FROM_THE_LORA)):
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
    repeats = _repeats(config)
    model = get_peft_model(base_model, config)
    assert isinstance(model, PeftModel)
    for name, (_, adapter) in adapted_layers(model.get_base_model()).items():
        shared_a, lora_b = weights[name]
        with torch.no_grad():
            copies_a, copies_b = (adapter.num_experts if repeated else 1 for repeated in repeats)
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
            f"router={mixture.router!r} with num_experts={mixture.num_experts} has gates that need not sum to one, so that "
            "the mixture would not start as the LoRA"
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
    default = LoraConfig()
    more = [f.name for f in fields(config) if getattr(config, f.name) != getattr(default, f.name)]
    more = [name for name in more if name not in UNDERSTOOD]
    if config.init_lora_weights not in PLAIN_STARTS:
        more.append("init_lora_weights")
    if more:
        odd = ", ".join(f"{name}={getattr(config, name)!r}" for name in more)
        raise ValueError(f"a mixture can take over a plain LoRA alone, this one has {odd}")
    tensors = load_file(folder / WEIGHTS)
    names = {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in tensors}
    expected = {f"{PREFIX}{name}.lora_{factor}.weight" for name in names for factor in "AB"}
    if tensors.keys() ^ expected or not names:
        raise ValueError(
            f"{folder / WEIGHTS} must hold lora_A and lora_B alone, got {sorted(tensors.keys() ^ expected)}"
        )
    return config, {
        name: (tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"]) for name in names
    }


def _check_sizes(base: nn.Module, r: int, weights: dict[str, tuple[Tensor, Tensor]]) -> None:
    modules = dict(base.named_modules())
    if unknown := sorted(weights.keys() - modules.keys()):
        raise ValueError(f"{type(base).__name__} lacks layers that the LoRA adapts: {', '.join(unknown)}")
    for name, (shared_a, lora_b) in weights.items():
        if not isinstance(modules[name], (nn.Linear, Conv1D)):
            raise ValueError(
                f"MoSLD adapts nn.Linear and Conv1D layers, but {name} is a {type(modules[name]).__name__}"
            )
        in_features, out_features = _get_in_out_features(modules[name])
        shapes = (list(shared_a.shape), list(lora_b.shape))
        if shapes != ([r, in_features], [out_features, r]):
            raise ValueError(
                f"lora_A and lora_B of {name} must be [{r}, {in_features}] and [{out_features}, {r}], got "
                f"{shapes[0]} and {shapes[1]}"
            )
