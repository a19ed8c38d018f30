"""A method's configuration as one writes it on a command line: `mosld:r=8,top_k=2`, a JSON file, an adapter's folder."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..files.adapter_folder import CONFIG
from ..mixture.registry import MIXINGS
from ..presets import PRESETS, experts_by_depth, preset
from ..tuner.config import MoSLDConfig

NAMES = ("target_modules", "exclude_modules", "modules_to_save")  # lists of modules' names


def read_config(text: str, depth: int | None = None) -> MoSLDConfig:
    """What `text` says:

    mosld:r=8,top_k=2     a preset, and fields of MoSLDConfig. A value is JSON, or else the word as it stands; modules' names
                          have commas between, options of the preset's mixing are fields as well (`malora:r_up=16`), and
                          num_experts=8/6/4/2 are the numbers of equal parts of the model's `depth` blocks, from the first.
    settings.json         an object of the same fields; "preset" says which they override, without it MoSLDConfig's defaults.
    runs/mine/adapter     a folder with adapter_config.json.

    raises ValueError for what is none of these, and for fields and presets that do not exist, listing those that do.
    """
    name, colon, rest = text.partition(":")
    if name in PRESETS:
        return _made(text, name, _pairs(rest) if colon else {}, depth)
    path = Path(text)
    if path.is_dir():
        path = path / CONFIG
    if not path.is_file():
        missing = f"{path.parent} has no {CONFIG}" if path.name == CONFIG else "there is no such file"
        raise ValueError(
            f"config must be one of {', '.join(PRESETS)}, a JSON file or an adapter's folder, got {text!r}: {missing}"
        )
    try:
        own = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(own, dict):
        raise ValueError(f"{path} must hold an object of a configuration's fields, got {type(own).__name__}")
    if (method := own.get("peft_type", "MOSLD")) != "MOSLD":
        raise ValueError(f"{path} is of no MoSLD adapter: its peft_type is {method!r}")
    base = own.pop("preset", None)
    if base is not None and base not in PRESETS:
        raise ValueError(f"{path}: preset must be one of {', '.join(PRESETS)}, got {base!r}")
    return _made(str(path), base, own, depth)


def split_names(text: str) -> list[str] | str:
    """Names with commas between -> a list; "all-linear" as it is."""
    return text if text == "all-linear" else text.split(",")


def _pairs(text: str) -> dict[str, Any]:
    pairs = {}
    for pair in re.split(r",(?=\s*\w+\s*=)", text):  # a comma that no field follows belongs to a value
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"a preset's fields are written name=value, with commas between, got {pair!r}")
        pairs[name.strip()] = _value(name.strip(), value.strip())
    return pairs


def _value(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return split_names(text) if name in NAMES else {"True": True, "False": False, "None": None}.get(text, text)


def _made(text: str, base: str | None, own: dict[str, Any], depth: int | None) -> MoSLDConfig:
    mixing = _mixing(base, own)
    if isinstance(mixing, str) and mixing in MIXINGS and isinstance(own.get("mixing_options", {}), dict):
        of_mixing = {name: own.pop(name) for name in list(own) if name in MIXINGS[mixing].options}
        if of_mixing:
            own["mixing_options"] = {**own.get("mixing_options", {}), **of_mixing}
    if unknown := MoSLDConfig.unknown_fields(own):
        options = [*MIXINGS[mixing].options] if isinstance(mixing, str) and mixing in MIXINGS else []
        known = ", ".join([*sorted(field.name for field in fields(MoSLDConfig)), *options])
        raise ValueError(f"{text}: there is no field {', '.join(unknown)}; there are: {known}")
    if isinstance(experts := own.get("num_experts"), str):
        own |= _by_depth(text, experts, depth)
    try:
        return MoSLDConfig(**own) if base is None else preset(base, **own)
    except TypeError as error:  # a word where a number belongs
        raise ValueError(f"{text}: a field has a value of the wrong type: {error}") from error
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from error


def _mixing(base: str | None, own: dict[str, Any]) -> str | None:
    given = own.get("mixing") or ("reduce" if own.get("shared") == "up" else None)
    return given or (PRESETS[base]().mixing if base else None) or "expand"


def _by_depth(text: str, experts: str, depth: int | None) -> dict[str, Any]:
    if not re.fullmatch(r"\d+(/\d+)+", experts):
        raise ValueError(f"{text}: num_experts must be an integer, or several such as 8/6/4/2, got {experts!r}")
    if depth is None:
        raise ValueError(f"{text}: num_experts={experts} needs a model that says how many blocks it has")
    numbers = [int(number) for number in experts.split("/")]
    return {"num_experts": max(numbers), "num_experts_pattern": experts_by_depth(depth, *numbers)}
