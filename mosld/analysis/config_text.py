"""A method's configuration as a command line has it: `mosld:r=8,top_k=2`, a JSON file, or an adapter's folder."""

import json
import re
from pathlib import Path
from typing import Any

from ..files.adapter_folder import CONFIG
from ..mixture.registry import MIXINGS
from ..presets import PRESETS, experts_by_depth, preset
from ..tuner.config import MoSLDConfig

NAMES = ("target_modules", "exclude_modules", "modules_to_save")  # lists of modules' names
PYTHON_WORDS = {"True": True, "False": False, "None": None}


def parse_config(text: str, depth: int | None = None) -> MoSLDConfig:
    """The configuration that `text` means.

    mosld:r=8,top_k=2     a preset, and fields of MoSLDConfig. A value is JSON, or else the word as it stands; names of
                          modules have commas between, options of the preset's mixing are fields as well
                          (`malora:r_up=16`), and num_experts=8/6/4/2 are the numbers of equal parts of the model's
                          `depth` blocks, from the first.
    settings.json         an object of the same fields; "preset" says which they override, without it MoSLDConfig's
                          defaults.
    runs/mine/adapter     a folder with adapter_config.json.

    raises ValueError for what is none of these, and for fields and presets that do not exist, listing those that do.
    """
    name, colon, rest = text.partition(":")
    if name in PRESETS:
        return _make_config(text, name, _pairs(rest) if colon else {}, depth)
    path, fields_given = _read_file(text)
    base = fields_given.pop("preset", None)
    if base is not None and base not in PRESETS:
        raise ValueError(f"{path}: preset must be one of {', '.join(PRESETS)}, got {base!r}")
    return _make_config(str(path), base, fields_given, depth)


def _read_file(text: str) -> tuple[Path, dict[str, Any]]:
    """The JSON file that is meant, and the fields in it."""
    path = Path(text)
    if path.is_dir():
        path = path / CONFIG
    if not path.is_file():
        missing = f"{path.parent} has no {CONFIG}" if path.name == CONFIG else "there is no such file"
        raise ValueError(
            f"config must be one of {', '.join(PRESETS)}, a JSON file or an adapter's folder, got {text!r}: {missing}"
        )
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold an object of a configuration's fields, got {type(found).__name__}")
    method = found.get("peft_type", "MOSLD")
    if method != "MOSLD":
        raise ValueError(f"{path} is of no MoSLD adapter: its peft_type is {method!r}")
    return path, found


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
        return split_names(text) if name in NAMES else PYTHON_WORDS.get(text, text)


def _make_config(source: str, base: str | None, given: dict[str, Any], depth: int | None) -> MoSLDConfig:
    """source: what a message names. base: the preset that the fields `given` override; None: MoSLDConfig's defaults."""
    options = _options_of(_mixing(base, given))
    _gather_mixing_options(given, options)
    unknown = MoSLDConfig.unknown_fields(given)
    if unknown:
        known = sorted(MoSLDConfig.__dataclass_fields__)
        raise ValueError(
            f"{source}: there is no field {', '.join(unknown)}; there are: {', '.join([*known, *options])}"
        )
    # A number came as JSON; text such as 8/6/4/2 stands for one number for each part of the model.
    experts = given.get("num_experts")
    if isinstance(experts, str):
        given |= _by_depth(source, experts, depth)
    try:
        return MoSLDConfig(**given) if base is None else preset(base, **given)
    except TypeError as error:  # a word where a number belongs
        raise ValueError(f"{source}: a field has a value of the wrong type: {error}") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _mixing(base: str | None, given: dict[str, Any]) -> Any:
    """The name that the fields give the mixing, or the preset's, or the default."""
    named = given.get("mixing")
    if named:
        return named
    if given.get("shared") == "up":
        return "reduce"
    return (PRESETS[base]().mixing if base else None) or "expand"


def _options_of(mixing: Any) -> list[str]:
    """Names of the mixing's options; none where there is no such mixing, which MoSLDConfig reports."""
    known = isinstance(mixing, str) and mixing in MIXINGS
    return [*MIXINGS[mixing].options] if known else []


def _gather_mixing_options(given: dict[str, Any], options: list[str]) -> None:
    """Move options of the mixing that stand among the fields into `mixing_options`."""
    together = given.get("mixing_options", {})
    if not isinstance(together, dict):
        return  # MoSLDConfig refuses it
    for name in options:
        if name in given:
            together = {**together, name: given.pop(name)}
            given["mixing_options"] = together


def _by_depth(source: str, experts: str, depth: int | None) -> dict[str, Any]:
    if not re.fullmatch(r"\d+(/\d+)+", experts):
        raise ValueError(f"{source}: num_experts must be an integer, or several such as 8/6/4/2, got {experts!r}")
    if depth is None:
        raise ValueError(f"{source}: num_experts={experts} needs a model that says how many blocks it has")
    numbers = list(map(int, experts.split("/")))
    return {"num_experts": max(numbers), "num_experts_pattern": experts_by_depth(depth, *numbers)}
