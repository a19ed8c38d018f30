"""Whether saved weights fit the model into which they are loaded."""

import re
from collections.abc import Mapping

from torch import Tensor, nn

from ..mixture.spec import BLOCK_PARTS, PARTS
from .layer import PREFIX, MoSLDPeftLayer


def _check_fit(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """raises ValueError, with the first layer and both shapes, where `saved` does not fit the layers of `model`."""
    layers = {_unwrapped(name): m for name, m in model.named_modules() if isinstance(m, MoSLDPeftLayer)}
    saved = {_unwrapped(key): value for key, value in saved.items()}
    for name, layer in layers.items():
        for adapter_name in layer.mixtures:
            down, up = (saved.get(f"{name}.{part}.{adapter_name}.weight") for part in layer.adapter_layer_names[:2])
            if down is None or up is None:
                continue
            sizes = down.shape[-1], up.shape[0]
            if sizes != (layer.in_features, layer.out_features):
                raise ValueError(
                    f"the adapter does not fit the base model: it was trained for {sizes[0]} -> {sizes[1]} features in "
                    f"{name}, which has {layer.in_features} -> {layer.out_features} here"
                )
    for key in saved:
        for part in (PARTS[0], BLOCK_PARTS[0]):
            name, adapter_tensor, _ = key.partition(f".{PREFIX}{part}.")
            if adapter_tensor and name not in layers:
                raise ValueError(
                    f"the adapter does not fit the base model: it was trained for {name}, which is not here"
                )


def _check_whole(model: nn.Module, adapter_name: str, saved: Mapping[str, Tensor]) -> None:
    """raises ValueError, with the first layer, where `saved` has nothing for a layer of the adapter."""
    saved_layers = {_unwrapped(key).partition(f".{PREFIX}")[0] for key in saved if f".{PREFIX}" in key}
    for name, module in model.named_modules():
        if (
            isinstance(module, MoSLDPeftLayer)
            and adapter_name in module.mixtures
            and _unwrapped(name) not in saved_layers
        ):
            raise ValueError(
                f"the adapter does not fit the base model: its configuration adapts {_unwrapped(name)}, and it was saved "
                "without weights for it"
            )


def _is_untrained(model: nn.Module, adapter_name: str) -> bool:
    """Whether the adapter is as it began, every B zero."""
    layers = [m for m in model.modules() if isinstance(m, MoSLDPeftLayer) and adapter_name in m.mixtures]
    weights = [named for layer in layers for named in layer.mixtures[adapter_name].named_parameters()]
    return not any(weight.any() for name, weight in weights if name.endswith("_b.weight") and not weight.is_meta)


def _unwrapped(name: str) -> str:
    """Without what FSDP, activation checkpointing and torch.compile put into modules' names, but not always into keys."""
    return re.sub(r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.", "", name)
