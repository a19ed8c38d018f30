"""Whether saved weights fit the model into which they are loaded."""

import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from ..files.adapter_folder import PEFT_PREFIX
from ..mixture.spec import BLOCK_PARTS, PARTS
from .layer import PREFIX, MoSLDPeftLayer, layers_of

# What FSDP, activation checkpointing and torch.compile put into modules' names, but not always into keys.
WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def check_fit(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """raises ValueError, with the first layer and both shapes, where `saved` does not fit the layers of `model`."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, MoSLDPeftLayer):
            layers[unwrapped(name)] = module
    saved = {unwrapped(key): value for key, value in saved.items()}
    for name, layer in layers.items():
        for adapter_name in layer.mixtures:
            _check_sizes(name, layer, adapter_name, saved)
    for key in saved:
        for part in (PARTS[0], BLOCK_PARTS[0]):
            name, adapter_tensor, _ = key.partition(f".{PREFIX}{part}.")
            if adapter_tensor and name not in layers:
                raise ValueError(
                    f"the adapter does not fit the base model: it was trained for {name}, which is not here"
                )


def _check_sizes(name: str, layer: MoSLDPeftLayer, adapter_name: str, saved: Mapping[str, Tensor]) -> None:
    into, out_of = layer.adapter_layer_names[:2]
    down = saved.get(f"{name}.{into}.{adapter_name}.weight")
    up = saved.get(f"{name}.{out_of}.{adapter_name}.weight")
    if down is None or up is None:
        return
    sizes = down.shape[-1], up.shape[0]
    if sizes != (layer.in_features, layer.out_features):
        raise ValueError(
            f"the adapter does not fit the base model: it was trained for {sizes[0]} -> {sizes[1]} features in "
            f"{name}, which has {layer.in_features} -> {layer.out_features} here"
        )


def check_whole(model: nn.Module, adapter_name: str, saved: Mapping[str, Tensor]) -> None:
    """raises ValueError, with the first layer, where `saved` has nothing for a layer of the adapter."""
    saved_layers = {unwrapped(key).partition(f".{PREFIX}")[0] for key in saved if f".{PREFIX}" in key}
    for name, _ in layers_of(model, adapter_name):
        if unwrapped(name) not in saved_layers:
            raise ValueError(
                f"the adapter does not fit the base model: its configuration adapts {unwrapped(name)}, and it was "
                "saved without weights for it"
            )


def saved_layers(path: Path) -> set[str]:
    """The layers of the base model that a file of weights is for."""
    with safe_open(path, framework="pt") as file:
        keys = list(file.keys())
    return {key.removeprefix(PEFT_PREFIX).partition(f".{PREFIX}")[0] for key in keys if f".{PREFIX}" in key}


def is_untrained(model: nn.Module, adapter_name: str) -> bool:
    """Whether the adapter is as it began, every B zero."""
    for _, layer in layers_of(model, adapter_name):
        for name, weight in layer.mixtures[adapter_name].named_parameters():
            if name.endswith("_b.weight") and not weight.is_meta and weight.any():
                return False
    return True


def unwrapped(name: str) -> str:
    """The name of a module without what wraps it."""
    return WRAPPERS.sub("", name)
