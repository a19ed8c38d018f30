"""Makes MOSLD a method of PEFT."""

from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import (
    PeftType,
    register_peft_method,
)

from .config import MoSLDConfig
from .layer import PREFIX
from .model import MoSLDModel

NAME = "mosld"


def register() -> None:
    """Make MOSLD a method of PEFT; calling it again changes nothing.

    `register_peft_method` refuses names that are not in the enumeration PeftType, and there is no public way to add
    one, so a member is made here as Enum itself makes them.
    raises RuntimeError where this version of PEFT does not allow it.
    """
    try:
        if NAME.upper() not in PeftType.__members__:
            _add_member(PeftType, NAME.upper())
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
