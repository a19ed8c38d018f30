"""Makes MOSLD a method of PEFT."""

import peft
from peft import PeftType

from .config import MoSLDConfig
from .guards import guard_peft_model
from .layer import PREFIX
from .model import MoSLDModel
from .peft_api import PEFT_TYPE_TO_TUNER_MAPPING, add_peft_type, register_peft_method

NAME = "mosld"


def register() -> None:
    """Make MOSLD a method of PEFT; calling it again changes nothing.

    raises RuntimeError where this version of PEFT does not allow it.
    """
    name = NAME.upper()
    try:
        # `register_peft_method` refuses names that are not in the enumeration PeftType.
        if name not in PeftType.__members__:
            add_peft_type(name)
        if PeftType[name] not in PEFT_TYPE_TO_TUNER_MAPPING:
            register_peft_method(name=NAME, config_cls=MoSLDConfig, model_cls=MoSLDModel, prefix=PREFIX)
        guard_peft_model()
    except Exception as error:
        raise RuntimeError(
            f"MoSLD could not be registered with peft {peft.__version__}; versions from 0.20 are known to work"
        ) from error
