"""A saved adapter is a folder of `adapter_config.json` and `adapter_model.safetensors`. No pickle is opened.

<layer>.mosld_shared_a.weight [r, in]    <layer>.mosld_expert_b.weight [out, E r]    <layer>.mosld_router.weight [E, in]

and for other mixtures than MoSLD's the tensors of `Mixture.shapes`. Those of a feed-forward block begin with
mosld_gate_a, mosld_gate_b. Beside them is `adapter_model.sha256`, a checksum of the weights in the form of `sha256sum`,
and in a comment one of the fields that decide what is computed; an adapter without this file is loaded unchecked.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from .atomic import write_text_atomic
from .json_object import read_json_object

CONFIG, WEIGHTS, DIGEST = "adapter_config.json", "adapter_model.safetensors", "adapter_model.sha256"
# Opening a pickle may run any program.
PICKLES = ("adapter_model.bin", "adapter_model.pt")
PEFT_PREFIX = "base_model.model."
# Fields of the configuration that change nothing of what is computed, so that the checksum leaves them out.
DESCRIPTIVE_FIELDS = (
    "base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "inference_mode",
)  # fmt: skip
# Control characters but for line feeds and tabs, and those that turn the direction of writing.
TERMINAL_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class AdapterFileError(ValueError):
    """A saved adapter that cannot be used as it is; the message names the file."""


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of `adapter_config.json`, of a folder that also holds the weights.

    raises AdapterFileError, naming the file, where one is missing, unreadable or of another method.
    """
    if not (folder / CONFIG).is_file():
        raise AdapterFileError(f"{folder} is not a saved adapter: {CONFIG} is missing")
    fields = read_json(folder / CONFIG)
    if (method := fields.get("peft_type")) != "MOSLD":
        raise AdapterFileError(f"{folder / CONFIG} is of no MoSLD adapter: its peft_type is {method!r}")
    check_weights(folder)
    return fields


def check_weights(folder: Path, only_pickles: bool = False) -> None:
    """raises AdapterFileError where `folder` has no safetensors file; the message names a pickle that is there instead.

    only_pickles: accept a folder that has neither.
    """
    if (folder / WEIGHTS).is_file():
        return
    pickles = [name for name in PICKLES if (folder / name).is_file()]
    if pickles or not only_pickles:
        more = f", and {pickles[0]}, a pickle, is not opened" if pickles else ""
        raise AdapterFileError(f"{folder} is not a saved adapter: {WEIGHTS} is missing{more}")


def read_json(path: Path) -> dict[str, Any]:
    """The fields of a configuration.

    raises AdapterFileError, naming the file, where it holds no JSON object, or texts that would command a terminal.
    """
    fields = read_json_object(path, AdapterFileError, hint=": its peft_type is None")
    for text in (*fields, *fields.values()):
        if isinstance(text, str) and TERMINAL_CONTROL.search(text):
            raise AdapterFileError(f"{path} has {text!r:.100}, with characters that command a terminal")
    return fields


def check_name(adapter: str) -> None:
    """raises ValueError for a name that cannot be a folder's: PEFT saves every adapter but "default" in its own."""
    refused = "/\\:" if os.name == "nt" else "/\\"
    if not adapter or adapter in (".", "..") or set(adapter) & set(f"{refused}\0"):
        raise ValueError(
            f"an adapter's name becomes that of its folder, without {' '.join(refused)} and NUL, got {adapter!r}"
        )
    if "." in adapter.strip("."):
        raise ValueError(f"an adapter's name is part of its weights' names, where a dot divides, got {adapter!r}")


def write_digest(folder: Path) -> None:
    """Record the checksum of the weights in `folder`, as they are now, and of its configuration.

    The configuration's checksum is a comment, which `sha256sum` passes over: the file itself may change, since its base
    model may move and be called anew.
    """
    text = f"{sha256(folder / WEIGHTS)}  {WEIGHTS}\n"
    if (folder / CONFIG).is_file():
        text += f"# {_config_digest(folder / CONFIG)}  {CONFIG}\n"
    write_text_atomic(folder / DIGEST, text)


def check_digest(weights: Path) -> None:
    """raises AdapterFileError when weights or configuration are not those whose checksums lie beside them.

    A folder without checksums passes. weights: the file, which is read to its end.
    """
    record = weights.with_name(DIGEST)
    try:
        text = record.read_text()
    except FileNotFoundError:
        return
    except UnicodeDecodeError:
        text = ""
    recorded, config_recorded = _recorded_digests(text)
    if recorded is None:
        raise AdapterFileError(f"{record} holds no checksum of {WEIGHTS}: delete it to load the weights unchecked")
    if recorded.lower() != sha256(weights):
        raise AdapterFileError(
            f"{weights} is not what {DIGEST} beside it was written for: its numbers were altered, or saving over it "
            f"was cut off. Save or copy it again; where another program changed it on purpose, delete {record}"
        )
    config = weights.with_name(CONFIG)
    if config_recorded is not None and config_recorded.lower() != _config_digest(config):
        raise AdapterFileError(
            f"{config} is not what {DIGEST} beside it was written for: a field that decides what is computed was "
            f"altered. Save or copy it again; where you changed it on purpose, delete {record}"
        )


def _recorded_digests(text: str) -> tuple[str | None, str | None]:
    """-> the first checksum of the weights in a checksum file's text, and the first of the configuration"""
    weights, config = None, None
    for line in text.splitlines():
        match line.split():
            # `sha256sum --binary` puts an asterisk before the name.
            case [digest, name] if weights is None and name in (WEIGHTS, f"*{WEIGHTS}"):
                weights = digest
            case ["#", digest, name] if config is None and name == CONFIG:
                config = digest
    return weights, config


def _config_digest(path: Path) -> str:
    """The checksum of all fields but DESCRIPTIVE_FIELDS, whatever their order."""
    fields = read_json(path)
    for name in DESCRIPTIVE_FIELDS:
        fields.pop(name, None)
    for name, value in fields.items():
        if isinstance(value, list):
            fields[name] = sorted(map(str, value))  # PEFT saves its sets in any order
    # Of two patterns for numbers of experts the first counts.
    patterns = fields.get("num_experts_pattern")
    text = json.dumps([fields, list(patterns) if isinstance(patterns, dict) else None], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """The checksum of a file of any size, read piece by piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
