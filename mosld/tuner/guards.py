"""What PEFT does with a whole model without asking its method: checked before it begins.

PEFT calls nothing of a tuner's where it loads weights into an adapter that exists, or writes files. So two methods of
PeftModel are wrapped, once, when the method is registered; models without a MoSLD adapter go straight through.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers.utils.hub import cached_file

from ..files.adapter_folder import CONFIG, PEFT_PREFIX, AdapterFileError
from ..files.json_object import read_json_object
from .card import README, readable_card
from .config import MoSLDConfig


def guard_peft_model() -> None:
    """Wrap `PeftModel.load_adapter` and `PeftModel.save_pretrained`; calling it again changes nothing."""
    methods: Any = PeftModel
    if not hasattr(methods.load_adapter, "_mosld_guards"):
        methods.load_adapter = _guarded(methods.load_adapter, _before_loading)
        methods.save_pretrained = _guarded(methods.save_pretrained, _before_saving)


def _guarded(method: Callable, check: Callable) -> Callable:
    @functools.wraps(method)
    def guarded(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        check(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    cast(Any, guarded)._mosld_guards = True
    return guarded


def _before_loading(
    model: PeftModel, model_id: Any = None, adapter_name: Any = None, *args: Any, **kwargs: Any
) -> None:
    """raises AdapterFileError where the file's configuration computes something else than the adapter that is there.

    PEFT loads the weights into it and leaves the file's configuration aside.
    """
    live = model.peft_config.get(adapter_name)
    if isinstance(live, MoSLDConfig):
        _check_configuration(live, model_id, adapter_name, kwargs)


def _check_configuration(live: MoSLDConfig, model_id: Any, adapter_name: str, options: dict[str, Any]) -> None:
    saved = _configuration(str(model_id), options)
    if saved is None:
        raise AdapterFileError(f"{model_id} is no adapter of MoSLD's, and {adapter_name!r} is one")
    different = differences(live, saved)
    if different:
        raise AdapterFileError(
            f"{model_id} was saved with another configuration than the adapter {adapter_name!r} has here: "
            f"{'; '.join(different)}. Its weights would compute something else. Give the adapter the file's "
            f"configuration, or take the file's: model.delete_adapter({adapter_name!r}) before load_adapter"
        )


def load_into(model: nn.Module, adapter_name: str, folder: Path) -> None:
    """Load the saved adapter in `folder` into one that the model has, trainable as it is.

    raises AdapterFileError where its configuration computes something else.
    """
    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), adapter_name, is_trainable=True)
        return
    live: Any = cast(Any, model).peft_config[adapter_name]
    _check_configuration(live, folder, adapter_name, {})
    saved = {}
    for name, tensor in load_peft_weights(str(folder), device="cpu").items():
        saved[name.removeprefix(PEFT_PREFIX)] = tensor
    set_peft_model_state_dict(model, saved, adapter_name=adapter_name)


def _configuration(model_id: str, options: dict[str, Any]) -> MoSLDConfig | None:
    """What an adapter was saved with, None for one of another method. Its weights are PEFT's to look at, later."""
    path = Path(model_id, options.get("subfolder") or "", CONFIG)
    if not path.is_file():
        own = {name: options[name] for name in ("subfolder", "revision", "cache_dir", "token") if name in options}
        path = Path(cast(str, cached_file(model_id, CONFIG, **own)))
    fields = read_json_object(path, AdapterFileError)
    if fields.get("peft_type") != "MOSLD":
        return None
    known = {name: value for name, value in fields.items() if not MoSLDConfig.unknown_fields([name])}
    return MoSLDConfig(**{name: value for name, value in known.items() if name != "peft_type"})


# What trains an adapter and does not change what it computes afterwards.
_OF_TRAINING = frozenset(
    ("dropout", "input_dropout", "up_dropout", "hidden_dropout", "balance_coef", "down_std", "router_std")
)


def differences(live: MoSLDConfig, saved: MoSLDConfig) -> list[str]:
    """One text for each field in which two configurations compute something else, with both values."""
    found = []
    for name in MoSLDConfig.computing_fields():
        here, there = getattr(live, name), getattr(saved, name)
        if name not in _OF_TRAINING and here != there:
            found.append(f"{name}={here!r} here, {there!r} in the file")
    return found


def _before_saving(
    model: PeftModel, save_directory: Any, safe_serialization: bool = True, selected_adapters: Any = None, **more: Any
) -> None:
    """raises ValueError where PEFT would write a pickle, before anything is written.

    Beside an older save the pickle would be passed over, and the old weights loaded under the new configuration.
    """
    names = model.peft_config if selected_adapters is None else selected_adapters
    if not any(isinstance(model.peft_config.get(name), MoSLDConfig) for name in names):
        return
    if not safe_serialization:
        raise ValueError(
            "safe_serialization=False writes a pickle, which mosld never loads: leave it out, and the adapter is "
            "saved as safetensors"
        )
    readable_card(Path(save_directory) / README)
