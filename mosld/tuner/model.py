"""The tuner that places MoSLD in a model, and takes it out again where placing or loading failed.

PEFT does the rest: matching names, freezing, saving, loading, several adapters, `modules_to_save`.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..files.adapter_folder import AdapterFileError, check_name
from ..layers.feed_forward import check_block, is_block
from ..layers.host import announce
from .layer import (
    NO_ADAPTER_PER_ROW,
    PREFIX,
    MoSLDLayer,
    MoSLDPeftBlock,
    MoSLDPeftLayer,
    MoSLDPeftLinear,
    computes_on,
    layers_of,
)
from .load import check_fit, check_whole, is_untrained, saved_layers
from .names import check_excluded, check_patterns, unmatched_targets
from .peft_api import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    adapters_of_wrapper,
    include_all_linear,
)
from .reach import all_linear, out_of_reach, unsupported


class MoSLDModel(BaseTuner):
    """Places a MoSLDPeftLinear around every linear layer (nn.Linear, Conv1D) that the MoSLDConfig names, and with
    mixing="block" a MoSLDPeftBlock around every feed-forward block.

    Why each method of PEFT's is replaced stands in `peft_api.OVERRIDDEN`.
    """

    prefix = PREFIX
    tuner_layer_cls = MoSLDLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
        """PEFT enters this around every forward and generation, with its arguments, whatever the kind of PeftModel."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(NO_ADAPTER_PER_ROW)
        yield

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """PEFT's, but a name in target_modules that no module has is reported with the nearest names there are.

        warns where some names match, raises PEFT's error (a ValueError) where none does.
        """
        try:
            check_name(adapter_name)
            if hasattr(nn.ModuleDict, adapter_name):
                raise ValueError(f"an adapter's name must not be that of a method of modules, got {adapter_name!r}")
            check_excluded(self.peft_config[adapter_name], model)
        except ValueError:
            self.peft_config.pop(adapter_name, None)
            raise
        own_config = cast(Any, self.peft_config[adapter_name])
        targets = own_config.target_modules
        if isinstance(targets, str) and targets.lower() == "all-linear":
            include_all_linear(own_config, model)  # in place
            own_config.target_modules = all_linear(model, own_config.target_modules)
        hints = unmatched_targets(model, targets)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ValueError as error:
            undo_injection(self, adapter_name)
            asked = 1 if isinstance(targets, str) else len(targets or [])
            if not hints or len(hints) < asked:  # some name matched, so the hints are not what went wrong
                raise
            raise type(error)(f"{error} {'; '.join(hints)}") from error
        wants_block = cast(Any, self.peft_config[adapter_name]).mixing == "block"
        if wants_block and not any(isinstance(layer, MoSLDPeftBlock) for _, layer in layers_of(model, adapter_name)):
            undo_injection(self, adapter_name)
            raise ValueError(
                "mixing='block' found no feed-forward block: target_modules must name one, such as 'mlp', "
                f"got {targets}"
            )
        if hints and not isinstance(targets, str):
            warnings.warn(f"some of target_modules match nothing: {'; '.join(hints)}", stacklevel=2)
        adapted = [name for name, _ in layers_of(model, adapter_name)]
        try:
            check_patterns(own_config, model, adapted)
        except ValueError:
            # Of a saved adapter that has layers which are not here, loading says more, and refuses it.
            if own_config.saved is None or saved_layers(own_config.saved) <= set(adapted):
                undo_injection(self, adapter_name)
                raise
        announce(model)
        left = out_of_reach(model, adapted)
        if left:
            warnings.warn(left, stacklevel=2)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # PEFT 0.20 calls the model's `forward`, past the hooks by which its forwards begin and end.
        return self.model(*args, **kwargs)

    def unload(self) -> nn.Module:
        base = super().unload()
        announce(base)
        return base

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
        if is_new:
            layer.training = target.training  # a model in eval mode stays in it
        mixture = layer.mixture_here(peft_config.mixture_of(current_key))
        layer.update_layer(adapter_name, inference_mode=peft_config.inference_mode, **vars(mixture))
        if is_new:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        # Unloading: PEFT's would ask a block for a weight of its own. Offloaded: it would bring the adapter to the meta
        # device, where the base's weight is, and its values would be lost.
        if isinstance(child, MoSLDPeftBlock) or computes_on(child) is not None:
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """PEFT calls it with what a file holds; an adapter that does not fit is not left there without its weights."""
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        tuner = getattr(model, "base_model", None)
        if not isinstance(tuner, MoSLDModel):
            return remapped
        saved = _without_prefix(remapped, "base_model.model.")
        path = getattr(config, "saved", None)
        try:
            check_fit(tuner.model, saved)
            check_whole(tuner.model, adapter_name, saved)
        except ValueError as error:
            if path is None:
                raise
            if is_untrained(tuner.model, adapter_name):  # it was placed a moment ago, for these weights
                undo_injection(tuner, adapter_name)
            raise AdapterFileError(f"{path} cannot be used: {error}") from error
        return remapped

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        check_fit(self.model, _without_prefix(state_dict, f"{prefix}model."))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_block(self, peft_config, target: nn.Module, name: str) -> None:
        check_block(target, name)
        both = []
        for own, _ in target.named_modules(prefix=name):
            # PEFT returns an object that is neither True nor False for a module that is excluded.
            if own != name and self._check_target_module_exists(peft_config, own) is True:
                both.append(own)
        if both:
            raise ValueError(f"{name} cannot be adapted together with {', '.join(both)} inside it: name one of them")

    @staticmethod
    def _check_supported(target: nn.Module, parent: nn.Module, name: str) -> None:
        why = unsupported(target, parent, name)
        if why is not None:
            hint = "leave it out with exclude_modules; target_modules='all-linear' does so by itself"
            raise ValueError(why if "MoSLD adapts" in why else f"{why}: {hint}")


def _without_prefix(tensors: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def undo_injection(tuner: BaseTuner, adapter_name: str) -> None:
    """As if the adapter had not been placed: what was wrapped for it alone is unwrapped."""
    # At the end, so that hooks are gone with the last mixture.
    try:
        _unwrap(tuner, adapter_name)
    finally:
        announce(tuner.model)


def _unwrap(tuner: BaseTuner, adapter_name: str) -> None:
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
        elif isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in adapters_of_wrapper(module):
            if len(adapters_of_wrapper(module)) > 1:
                module.delete_adapter(adapter_name, new_active_adapters=tuner.active_adapters)
            else:
                setattr(tuner.model.get_submodule(parent), child, module.original_module)
