"""Which layers of a model have the mixtures that are exported, and whether one LoRA can hold them."""

from collections.abc import Iterable, Mapping

from torch import nn

from ..layers.adapter import MoSLDAdapter
from ..layers.linear import MoSLDLinear
from ..tuner.config import MoSLDConfig
from ..tuner.layer import MoSLDPeftBlock, MoSLDPeftLayer, MoSLDPeftLinear, layers_of

Layers = Mapping[str, tuple[nn.Module, MoSLDAdapter]]  # by name in the base model


def adapted_layers(base: nn.Module, adapter_name: str | None = None) -> Layers:
    """Layer name in `base` -> the layer and its mixture, of one adapter.

    raises ValueError when there is none, for an adapter with mixtures of feed-forward blocks, when adapter_name is
    unknown, or is needed to choose among active adapters.
    """
    by_hand: dict[str, tuple[nn.Module, MoSLDAdapter]] = {}
    by_peft: list[MoSLDPeftLayer] = []
    for name, module in base.named_modules():
        if isinstance(module, MoSLDLinear):
            by_hand[name] = (module, module.adapter)
        elif isinstance(module, MoSLDPeftLayer):
            by_peft.append(module)
    if "" in by_hand or (by_hand and by_peft):
        raise ValueError("a LoRA needs layers inside a model, all adapted by hand or all through PEFT")
    if by_hand:
        if adapter_name is not None:
            raise ValueError(f"layers adapted by hand have no adapter name, got {adapter_name!r}")
        return by_hand
    if not by_peft:
        raise ValueError(f"{type(base).__name__} has no MoSLD layer")
    chosen = _chosen(by_peft, adapter_name)
    layers = dict(layers_of(base, chosen))
    for name, layer in layers.items():
        if isinstance(layer, MoSLDPeftBlock):
            raise ValueError(
                f"no LoRA equals a mixture of feed-forward blocks, such as the one on {name}: there is a nonlinearity "
                "between its layers, so not even with fixed gates"
            )
    return {name: (layer, layer.mixtures[chosen]) for name, layer in layers.items()}


def _chosen(layers: Iterable[MoSLDPeftLayer], adapter_name: str | None) -> str:
    """`adapter_name`, or the only active adapter."""
    known, active = set(), set()
    for layer in layers:
        known |= layer.mixtures.keys()
        active |= layer.mixtures.keys() & set(layer.active_adapters)
    if adapter_name is None:
        if len(active) != 1:
            raise ValueError(
                f"adapter_name must be one of {sorted(known)}, since the active adapters are {sorted(active)}"
            )
        return active.pop()
    if adapter_name not in known:
        raise ValueError(f"adapter_name must be one of {sorted(known)}, got {adapter_name!r}")
    return adapter_name


def origin_of(model: nn.Module, layers: Layers) -> MoSLDConfig | None:
    """The configuration that placed `layers`, where PEFT did."""
    layer, adapter = next(iter(layers.values()))
    if not isinstance(layer, MoSLDPeftLinear):
        return None
    configs = getattr(model, "peft_config", None) or {}
    for name, mixture in layer.mixtures.items():
        if mixture is adapter:
            return configs.get(name)
    return None


def check_one_lora(layers: Layers, origin: MoSLDConfig | None) -> None:
    """raises ValueError for mixtures that one LoRA cannot hold."""
    sizes = sorted({(adapter.r, adapter.alpha) for _, adapter in layers.values()})
    if len(sizes) > 1:
        raise ValueError(f"the layers of one LoRA must have one r and one alpha, got (r, alpha) in {sizes}")
    if origin is not None and origin.modules_to_save:
        raise ValueError(
            f"modules_to_save must be empty, got {sorted(origin.modules_to_save)}: a LoRA for serving holds no whole "
            "modules"
        )
