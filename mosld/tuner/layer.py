"""A layer of the base model inside a PEFT model, with its mixtures beside it."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mosld_kernels.precision import autocasts

from ..layers.adapter import MoSLDAdapter
from ..layers.feed_forward import BlockAdapter
from ..layers.forwards import this_thread
from ..layers.host import MixtureHost
from ..layers.linear import disable_encoder_fastpath
from ..mixture.spec import BLOCK_PARTS, PARTS, Mixture
from .peft_api import in_out_features

PREFIX = "mosld_"  # transformers builds it as the lower-cased type name and an underscore
DROPOUTS = f"{PREFIX}dropouts"
NO_ADAPTER_PER_ROW = "MoSLD has no batches with an adapter per row: adapter_names must not be given"


def containers(parts: Sequence[str]) -> tuple[str, ...]:
    """The attributes of a layer that hold its adapters' `parts`."""
    return tuple(f"{PREFIX}{part}" for part in parts)


class MoSLDLayer(BaseTunerLayer, MixtureHost):
    """What PEFT asks of an adapted layer, for every adapter name.

    PEFT's files name a weight `<container>.weight`, so A, B, router and what else a method trains are registered in a
    container each; `mixtures` holds the MoSLDAdapter that computes with them, unregistered so that no weight has two
    names. Its dropouts are registered too: by their flags and rates others govern it.
    """

    parts = PARTS
    adapter_layer_names = containers(PARTS)
    other_param_names = ("mixtures", DROPOUTS)
    mixtures: dict[str, MoSLDAdapter]

    def all_adapters(self) -> list[MoSLDAdapter]:
        """Every adapter of this layer, active or not."""
        return list(self.mixtures.values())

    def running_adapters(self) -> list[MoSLDAdapter]:
        """The adapters that take part in a forward now."""
        if self.disable_adapters:
            return []
        return [self.mixtures[name] for name in self.active_adapters if name in self.mixtures]

    def adapters_of_this_call(self) -> list[MoSLDAdapter]:
        """The running adapters; in a recomputation those that ran in the forward, whatever is active by then."""
        adapters = self.running_adapters()
        if torch.compiler.is_compiling() or this_thread.region is None:
            return adapters
        return list(this_thread.region.same(self, tuple(adapters)))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "a MoSLD mixture cannot be merged into its base layer: its gates depend on the token. Fix them: "
            "mosld.export_lora(model, folder) writes a plain LoRA, which PEFT loads and merges; unload() gives the "
            "base back"
        )

    def unmerge(self) -> None:
        raise ValueError("a MoSLD mixture is never merged, so there is nothing to unmerge")


class MoSLDPeftLayer(nn.Module, MoSLDLayer):
    """A module inside a PEFT model with its mixtures, whose sizes are in_features and out_features, beside it."""

    adapter_class: type[MoSLDAdapter] = MoSLDAdapter

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features, out_features
        for container in (*self.adapter_layer_names, DROPOUTS):
            self.register_module(container, nn.ModuleDict())
        self.mixtures = {}
        self.merged_adapters = []

    def update_layer(self, adapter_name: str, inference_mode: bool, **hyperparameters) -> None:
        """Add the adapter `adapter_name`, or begin it anew; `hyperparameters` are those of MoSLDAdapter."""
        mixture = self.adapter_class(self.in_features, self.out_features, **hyperparameters).train(self.training)
        self.mixtures[adapter_name] = mixture
        cast(nn.ModuleDict, getattr(self, DROPOUTS))[adapter_name] = mixture.dropouts
        for part in self.parts:
            container = cast(nn.ModuleDict, getattr(self, f"{PREFIX}{part}"))
            if adapter_name in container:  # of an adapter that is begun anew
                del container[adapter_name]
            weight = getattr(mixture, part)
            if weight is not None:  # None: this mixture has no such part
                container[adapter_name] = weight
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Any = None) -> None:
        """PEFT's; beside an offloaded base, whose weights are on the meta device, to where the layer computes."""
        super()._move_adapter_to_device_of_base_layer(adapter_name, device or computes_on(self.base_layer))

    def mixture_here(self, mixture: Mixture) -> Mixture:
        """What a configuration's mixture is on a module of this kind."""
        return mixture

    def extra_repr(self) -> str:
        return ", ".join(f"{name}=({mixture.extra_repr()})" for name, mixture in self.mixtures.items())


def computes_on(module: nn.Module) -> torch.device | None:
    """The device to which accelerate brings the weights of an offloaded layer for its forward; None for others."""
    if not any(parameter.is_meta for parameter in module.parameters()):
        return None
    hook: Any = getattr(module, "_hf_hook", None)
    for own in (hook, *getattr(hook, "hooks", ())):
        device = getattr(own, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


def layers_of(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, MoSLDPeftLayer]]:
    """The layers of `model` that have the adapter, each with its name."""
    for name, module in model.named_modules():
        if isinstance(module, MoSLDPeftLayer) and adapter_name in module.mixtures:
            yield name, module


class MoSLDPeftLinear(MoSLDPeftLayer):
    """A linear layer inside a PEFT model with the mixtures beside it. "Linear" in the name is how PEFT knows it."""

    def __init__(self, base_layer: nn.Module):
        in_features, out_features = in_out_features(base_layer)
        if in_features is None or out_features is None:
            raise ValueError(f"the sizes of a {type(base_layer).__name__} are not known")
        super().__init__(base_layer, in_features, out_features)
        disable_encoder_fastpath(self)

    def mixture_here(self, mixture: Mixture) -> Mixture:
        return mixture.for_linear_layers

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x [..., in_features] -> y [..., out_features]; several active adapters add their updates."""
        adapters = self.adapters_of_this_call()
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(NO_ADAPTER_PER_ROW)
        if adapters and not args and not kwargs and _is_plain_linear(self.base_layer, x):
            out = adapters.pop(0)(x, self.base_layer.weight, self.base_layer.bias)
        else:
            out = self.base_layer(x, *args, **kwargs)
        for adapter in adapters:
            out = out + adapter(x).to(out.dtype)
        return out


def _is_plain_linear(base_layer: nn.Module, x: Tensor) -> bool:
    """Whether reading `weight` and `bias` is the same as calling the layer: no quantisation, hook or offloading."""
    return (
        type(base_layer) is nn.Linear
        and type(base_layer.weight) is nn.Parameter
        and "forward" not in base_layer.__dict__
        and not (base_layer._forward_hooks or base_layer._forward_pre_hooks or base_layer._backward_hooks)
        and (base_layer.weight.dtype == x.dtype or autocasts(x))
    )


class MoSLDPeftBlock(MoSLDPeftLayer):
    """A SwiGLU feed-forward block inside a PEFT model with mixtures of whole blocks beside it, of which one runs."""

    parts = BLOCK_PARTS
    adapter_layer_names = containers(BLOCK_PARTS)
    adapter_class = BlockAdapter

    def __init__(self, base_layer: Any):
        in_features, out_features = in_out_features(base_layer.gate_proj)
        super().__init__(base_layer, cast(int, in_features), cast(int, out_features))

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device=None) -> None:
        """PEFT's asks for the base layer's own weight, which a block has not."""
        weight = cast(Any, self.base_layer).gate_proj.weight
        for name in self.adapter_layer_names:
            own = cast(nn.ModuleDict, getattr(self, name))[adapter_name]
            if not any(p.is_meta for p in own.parameters()):
                own.to(device or weight.device, weight.dtype if weight.is_floating_point() else None)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x [..., hidden size] -> y [..., hidden size]"""
        adapters = self.adapters_of_this_call()
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(NO_ADAPTER_PER_ROW)
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
        if args or kwargs:
            raise ValueError(f"a mixture of feed-forward blocks takes its input alone, got {[*args, *kwargs]} as well")
        if len(adapters) > 1:
            raise ValueError(
                f"mixtures of feed-forward blocks cannot be added up, activate one of {', '.join(self.active_adapters)}"
            )
        return adapters[0](x, self.base_layer)
