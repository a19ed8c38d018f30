"""MoSLD as a method of Hugging Face PEFT: the layer that wraps a linear layer, the model that places it, registration.

PEFT does the rest: matching names, freezing, saving, loading, several adapters, `modules_to_save`.
"""

import contextlib
import difflib
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    PeftType,
    register_peft_method,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mosld_kernels.precision import autocasts

from .adapter_file import AdapterFileError, check_name
from .block import BlockAdapter, check_block, is_block
from .layer import MoSLDAdapter, call_me
from .mixture import BLOCK_PARTS, PARTS, Mixture

NAME = "mosld"
PREFIX = "mosld_"  # transformers builds it as the lower-cased type name and an underscore
NO_ADAPTER_PER_ROW = "MoSLD has no batches with an adapter per row: adapter_names must not be given"


class MoSLDLayer(BaseTunerLayer):
    """What PEFT asks of an adapted layer, for every adapter name.

    PEFT's files name a weight `<container>.weight`, so A, B, router and what else a method trains are registered in a
    container each; `mixtures` holds the MoSLDAdapter that computes with them, unregistered so that no weight has two names.
    """

    parts = PARTS
    adapter_layer_names = tuple(f"{PREFIX}{part}" for part in PARTS)
    other_param_names = ("mixtures",)
    mixtures: dict[str, MoSLDAdapter]

    def running_adapters(self) -> list[MoSLDAdapter]:
        """The adapters that take part in a forward now."""
        if self.disable_adapters:
            return []
        return [self.mixtures[name] for name in self.active_adapters if name in self.mixtures]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "a MoSLD mixture cannot be merged into its base layer: its gates depend on the token. Fix them: "
            "mosld.export_lora(model, folder) writes a plain LoRA, which PEFT loads and merges; unload() gives the base back"
        )

    def unmerge(self) -> None:
        raise ValueError("a MoSLD mixture is never merged, so there is nothing to unmerge")


class MoSLDPeftLayer(nn.Module, MoSLDLayer):
    """A module inside a PEFT model with the mixtures beside it; in_features and out_features are the mixtures' sizes."""

    adapter_class: type[MoSLDAdapter] = MoSLDAdapter

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features, out_features
        for container in self.adapter_layer_names:
            self.register_module(container, nn.ModuleDict())
        self.mixtures = {}
        self.merged_adapters = []

    def update_layer(self, adapter_name: str, inference_mode: bool, **hyperparameters) -> None:
        """Add the adapter `adapter_name`, or begin it anew; `hyperparameters` are those of MoSLDAdapter."""
        mixture = self.adapter_class(self.in_features, self.out_features, **hyperparameters).train(self.training)
        self.mixtures[adapter_name] = mixture
        for part in self.parts:
            container = cast(nn.ModuleDict, getattr(self, f"{PREFIX}{part}"))
            if adapter_name in container:  # of an adapter that is begun anew
                del container[adapter_name]
            if (weight := getattr(mixture, part)) is not None:
                container[adapter_name] = weight
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def mixture_here(self, mixture: Mixture) -> Mixture:
        """What a configuration's mixture is on a module of this kind."""
        return mixture

    def train(self, mode: bool = True) -> "MoSLDPeftLayer":
        for mixture in self.mixtures.values():  # unregistered, so nn.Module.train passes them by
            mixture.train(mode)
        return super().train(mode)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}=({mixture.extra_repr()})" for name, mixture in self.mixtures.items())


class MoSLDPeftLinear(MoSLDPeftLayer):
    """A linear layer inside a PEFT model with the mixtures beside it. "Linear" in the name is how PEFT knows it."""

    def __init__(self, base_layer: nn.Module):
        in_features, out_features = _get_in_out_features(base_layer)
        if in_features is None or out_features is None:
            raise ValueError(f"the sizes of a {type(base_layer).__name__} are not known")
        super().__init__(base_layer, in_features, out_features)
        call_me(self)

    def mixture_here(self, mixture: Mixture) -> Mixture:
        return mixture.of_linear

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x [..., in_features] -> y [..., out_features]; several active adapters add their updates."""
        adapters = self.running_adapters()
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
    adapter_layer_names = tuple(f"{PREFIX}{part}" for part in BLOCK_PARTS)
    adapter_class = BlockAdapter

    def __init__(self, base_layer: Any):
        super().__init__(base_layer, *_get_in_out_features(base_layer.gate_proj))  # pyright: ignore

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device=None) -> None:
        """PEFT's asks for the base layer's own weight, which a block has not."""
        weight = cast(Any, self.base_layer).gate_proj.weight
        for name in self.adapter_layer_names:
            own = cast(nn.ModuleDict, getattr(self, name))[adapter_name]
            if not any(p.is_meta for p in own.parameters()):
                own.to(device or weight.device, weight.dtype if weight.is_floating_point() else None)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """x [..., hidden size] -> y [..., hidden size]"""
        adapters = self.running_adapters()
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


class MoSLDModel(BaseTuner):
    """Places a MoSLDPeftLinear around every linear layer (nn.Linear, Conv1D) that the MoSLDConfig names, and with
    mixing="block" a MoSLDPeftBlock around every feed-forward block.
    """

    prefix = PREFIX
    tuner_layer_cls = MoSLDLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        """PEFT enters this around every forward and generation, with its arguments, whatever the kind of PeftModel."""
        from .router import forget_routing  # which needs the layers above

        if kwargs.get("adapter_names") is not None:
            raise ValueError(NO_ADAPTER_PER_ROW)
        forget_routing(self.model)
        yield

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """PEFT's, but a name in target_modules that no module has is reported with the nearest names there are.

        warns where some names match, raises PEFT's error (a ValueError) where none does.
        """
        check_name(adapter_name)
        targets = cast(Any, self.peft_config[adapter_name]).target_modules
        hints = unmatched_targets(model, targets)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ValueError as error:
            take_back(self, adapter_name)
            if len(hints) < (1 if isinstance(targets, str) else len(targets or [])) or not hints:
                raise
            raise type(error)(f"{error} {'; '.join(hints)}") from error
        if cast(Any, self.peft_config[adapter_name]).mixing == "block" and not any(
            isinstance(module, MoSLDPeftBlock) and adapter_name in module.mixtures for module in model.modules()
        ):
            take_back(self, adapter_name)
            raise ValueError(
                f"mixing='block' found no feed-forward block: target_modules must name one, such as 'mlp', got {targets}"
            )
        if hints and not isinstance(targets, str):
            warnings.warn(f"some of target_modules match nothing: {'; '.join(hints)}", stacklevel=2)

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        is_new = not isinstance(target, MoSLDPeftLayer)
        if not is_new:
            layer = target
        elif peft_config.mixing == "block" and is_block(target):
            self._check_block(peft_config, target, current_key)
            layer = MoSLDPeftBlock(target)
        else:
            self._check_supported(target, parent, current_key)
            layer = MoSLDPeftLinear(target)
        layer.update_layer(
            adapter_name,
            inference_mode=peft_config.inference_mode,
            **vars(layer.mixture_here(peft_config.mixture_of(current_key))),
        )
        if is_new:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        if isinstance(child, MoSLDPeftBlock):  # unloading: PEFT's would ask the block for a weight of its own
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Which PEFT calls with what a file holds; an adapter that does not fit is not left there without its weights."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tuner = getattr(model, "base_model", None)
        if isinstance(tuner, MoSLDModel):
            saved = {name.removeprefix("base_model.model."): value for name, value in remapped.items()}
            path = getattr(config, "saved", None)
            try:
                _check_fit(tuner.model, saved)
                _check_whole(tuner.model, adapter_name, saved)
            except ValueError as error:
                if path is None:
                    raise
                if _is_untrained(tuner.model, adapter_name):  # it was placed a moment ago, for these weights
                    take_back(tuner, adapter_name)
                raise AdapterFileError(f"{path} cannot be used: {error}") from error
        return remapped

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        _check_fit(self.model, {name.removeprefix(f"{prefix}model."): value for name, value in state_dict.items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_block(self, peft_config, target: nn.Module, name: str) -> None:
        check_block(target, name)
        inside = [f"{name}.{own}" for own, _ in target.named_modules() if own]
        if both := [own for own in inside if self._check_target_module_exists(peft_config, own) is True]:
            raise ValueError(f"{name} cannot be adapted together with {', '.join(both)} inside it: name one of them")

    @staticmethod
    def _check_supported(target: nn.Module, parent: nn.Module, name: str) -> None:
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(f"{name} cannot be adapted: nn.MultiheadAttention reads its weight and never calls it")
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base_layer, (nn.Linear, Conv1D)):
            raise ValueError(f"MoSLD adapts nn.Linear and Conv1D layers, but {name} is a {type(base_layer).__name__}")


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


def take_back(tuner: BaseTuner, adapter_name: str) -> None:
    """As if the adapter had not been placed: what was wrapped for it alone is unwrapped."""
    tuner.peft_config.pop(adapter_name, None)
    if not tuner.peft_config:
        vars(tuner.model).pop("peft_config", None)
    for name, module in list(tuner.model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, MoSLDPeftLayer) and adapter_name in module.mixtures:
            if len(module.mixtures) > 1:
                module.delete_adapter(adapter_name)
            else:
                setattr(tuner.model.get_submodule(parent), child, module.base_layer)
        elif isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in module._adapters:
            if len(module._adapters) > 1:
                module.delete_adapter(adapter_name, new_active_adapters=tuner.active_adapters)
            else:
                setattr(tuner.model.get_submodule(parent), child, module.original_module)


def _unwrapped(name: str) -> str:
    """Without what FSDP, activation checkpointing and torch.compile put into modules' names, but not always into keys."""
    return re.sub(r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.", "", name)


def unmatched_targets(model: nn.Module, targets: Collection[str] | str | None) -> list[str]:
    """One sentence for each of `targets` (names as in MoSLDConfig, or one regular expression) that no module matches."""
    modules = dict(model.named_modules())
    linears = [name for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D, MoSLDPeftLayer))]
    if isinstance(targets, str):
        if targets == "all-linear" or any(re.fullmatch(targets, name) for name in modules):
            return []
        return [f"the regular expression {targets!r} matches none of the modules, such as {', '.join(linears[:3])}"]
    sentences = []
    for target in sorted(targets or []):
        if not any(name == target or name.endswith(f".{target}") for name in modules):
            parts = target.count(".") + 1
            names = dict.fromkeys(".".join(name.split(".")[-parts:]) for name in linears)
            nearest = difflib.get_close_matches(target, names, n=3)
            known = f"the nearest are {', '.join(nearest)}" if nearest else f"there are {', '.join([*names][:12])}"
            sentences.append(f"no module is called {target!r}, {known}")
    return sentences


def register() -> None:
    """Make MOSLD a method of PEFT; calling it again changes nothing.

    `register_peft_method` refuses names that are not in the enumeration PeftType, and there is no public way to add
    one, so a member is made here as Enum itself makes them.
    raises RuntimeError where this version of PEFT does not allow it.
    """
    try:
        if NAME.upper() not in PeftType.__members__:
            _add_member(PeftType, NAME.upper())
        from .config import MoSLDConfig  # its default values need the member

        if PeftType[NAME.upper()] not in PEFT_TYPE_TO_TUNER_MAPPING:
            register_peft_method(name=NAME, config_cls=MoSLDConfig, model_cls=MoSLDModel, prefix=PREFIX)
    except Exception as error:
        import peft

        raise RuntimeError(
            f"MoSLD could not be registered with peft {peft.__version__}; versions from 0.20 are known to work"
        ) from error


def _add_member(enumeration: Any, name: str) -> None:
    member = str.__new__(enumeration, name)
    member._name_, member._value_ = name, name
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[name] = member
    enumeration._member_names_.append(name)
    type.__setattr__(enumeration, name, member)
