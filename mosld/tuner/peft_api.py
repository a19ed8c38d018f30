"""Every private or undocumented name of PEFT that mosld uses, and what for: the one file to read beside a new PEFT.

Seen in PEFT 0.20.0 to 0.21.2. Four kinds:

    FUNCTIONS    functions that PEFT's documentation leaves out
    tables and classes that it leaves out
        PEFT_TYPE_TO_TUNER_MAPPING   PeftType -> tuner: whether a method is registered already
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING   model_type -> the layers that LoRA adapts by default
        AuxiliaryTrainingWrapper     wraps a module of `modules_to_save`, where an adapter that could not be placed is
                                     removed again
    CALLED       methods of PEFT's classes that mosld calls
    OVERRIDDEN   methods of PEFT's classes that mosld's replace, which PEFT calls with these parameters

tests/tuner/test_peft_api.py compares all of them with the installed PEFT, and looks for others anywhere in mosld.
What PEFT documents (`peft.__all__`, BaseTuner, BaseTunerLayer) is imported from PEFT wherever it is needed.
"""

from collections.abc import Callable
from typing import Any

from peft import PeftModel, PeftType
from peft.config import PeftConfigMixin
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.tuners.tuners_utils import _get_in_out_features as in_out_features
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as include_all_linear
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    register_peft_method,
)
from peft.utils.other import get_pattern_key

__all__ = [
    "CALLED", "FUNCTIONS", "LAYERS_PATTERN", "MODULES_TO_SAVE_PATTERN", "NUM_EXPERTS_PATTERN", "OVERRIDDEN",
    "PEFT_TYPE_TO_TUNER_MAPPING", "SAVED_BY_PEFT_MODEL", "SEEN", "SINCE",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", "AuxiliaryTrainingWrapper", "add_peft_type",
    "adapters_of_wrapper", "get_pattern_key", "in_out_features", "include_all_linear", "register_peft_method",
]  # fmt: skip

SEEN = ("0.20.0", "0.21.2")  # the oldest and the newest version whose source was compared with this file

# The regular expressions that PEFT builds around entries of a configuration, where {} stands for the entry.
MODULES_TO_SAVE_PATTERN = r"(^|.*\.){}($|\..*)"
LAYERS_PATTERN = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
NUM_EXPERTS_PATTERN = r"(.*\.)?({})$"  # get_pattern_key's

# PeftModel.save_pretrained gives the configuration's save_pretrained this argument, and has saved the weights before.
# transformers' save_pretrained does not, and saves them afterwards.
SAVED_BY_PEFT_MODEL = "auto_mapping_dict"

FUNCTIONS: dict[Callable, tuple[str, ...]] = {  # function -> its parameters
    # The sizes of a layer of any kind, quantised ones included, or (None, None).
    in_out_features: ("module",),
    # The names that target_modules="all-linear" stands for, of which some layers are then left out.
    include_all_linear: ("peft_config", "model"),
    # Which entry of `rank_pattern` a layer's name matches: `num_experts_pattern` works alike.
    get_pattern_key: ("pattern_keys", "key_to_match"),
    # Adds a method to PEFT, if its name is a member of PeftType.
    register_peft_method: ("name", "config_cls", "model_cls", "prefix"),
}

Methods = dict[type, dict[str, tuple[str, ...]]]  # class -> name -> its parameters

CALLED: Methods = {
    BaseTuner: {
        # Whether a configuration names a module: a block is not adapted together with a layer inside it.
        "_check_target_module_exists": ("peft_config", "key"),
    },
    BaseTunerLayer: {
        # Brings a new adapter's weights to the device and dtype of the layer.
        "_move_adapter_to_device_of_base_layer": ("self", "adapter_name", "device"),
    },
    AuxiliaryTrainingWrapper: {
        "delete_adapter": ("self", "adapter_name", "new_active_adapters"),
    },
}

OVERRIDDEN: Methods = {
    BaseTuner: {
        # Refuses names that no folder can have, and says which names come near to one that matches nothing.
        "inject_adapter": ("self", "model", "adapter_name"),
        # Calls the model and not its `forward`, so that its hooks run.
        "forward": ("self", "args", "kwargs"),
        # Gives the base back without our hooks.
        "unload": ("self",),
        # Wraps one module; every tuner must have it.
        "_create_and_replace": (
            "self", "peft_config", "adapter_name", "target", "target_name", "parent", "current_key",
        ),
        # Unloading: PEFT's asks every wrapped module for a weight, which a feed-forward block has not.
        "_replace_module": ("self", "parent", "child_name", "new_module", "child"),
        # Compares loaded weights with the model. PEFT 0.20 has none and never calls it.
        "_remap_adapter_state_dict_for_load": ("cls", "model", "config", "adapter_name", "state_dict"),
    },
    # PeftModel enters its tuner's method of this name around every forward and generation, if there is one.
    PeftModel: {
        "_enable_peft_forward_hooks": ("self",),
        # Wrapped in `guards`, which check before PEFT begins.
        "load_adapter": ("self", "model_id", "adapter_name"),
        "save_pretrained": ("self", "save_directory", "safe_serialization", "selected_adapters"),
    },
    BaseTunerLayer: {
        # PEFT's takes the base layer's own weight, which a feed-forward block has not.
        "_move_adapter_to_device_of_base_layer": ("self", "adapter_name", "device"),
        "merge": ("self", "safe_merge", "adapter_names"),
        "unmerge": ("self",),
    },
    PeftConfigMixin: {
        # Called by from_pretrained with what the file holds.
        "check_kwargs": ("cls",),
    },
}  # fmt: skip
# The first version that has the method, of those that are younger than the oldest version in SEEN.
SINCE = {"_remap_adapter_state_dict_for_load": "0.21.0"}


def adapters_of_wrapper(wrapper: AuxiliaryTrainingWrapper) -> set[str]:
    """The names of the adapters for which `wrapper` holds a copy of its module."""
    return wrapper._adapters


def add_peft_type(name: str) -> None:
    """Make `name` a member of the enumeration PeftType, as Enum itself makes them.

    There is no public way to add one, and `register_peft_method` takes no name that is not there.
    """
    enumeration: Any = PeftType
    member = str.__new__(enumeration, name)
    member._name_, member._value_ = name, name
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[name] = member
    enumeration._member_names_.append(name)
    type.__setattr__(enumeration, name, member)
