"""A saved adapter as its two files tell it: `adapter_config.json` and `adapter_model.safetensors`. No pickle is opened.

<layer>.mosld_shared_a.weight [r, in]     <layer>.mosld_expert_b.weight [out, E r]     <layer>.mosld_router.weight [E, in]

and for other mixtures than MoSLD's what `Mixture.shapes` tells. A feed-forward block's begin with mosld_gate_a, mosld_gate_b.
Beside them is `adapter_model.sha256`, a checksum of the weights in the form of `sha256sum`, and in a comment one of what the
configuration computes with; adapters without it are taken as they are.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .at_once import write_at_once
from .mixture import BLOCK_PARTS, PARTS, Mixture

CONFIG, WEIGHTS, DIGEST = "adapter_config.json", "adapter_model.safetensors", "adapter_model.sha256"
PICKLES = ("adapter_model.bin", "adapter_model.pt")  # pickles, which may run anything when opened
PEFT_PREFIX = "base_model.model."
# Fields of the configuration that change nothing of what is computed, so that the checksum leaves them out.
TOLD = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version", "inference_mode")
# Control characters but for line feeds and tabs, and those that turn the direction of writing.
COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
MAX_KEY = 300  # characters of a tensor's name
_KEY = re.compile(rf"(.+)\.mosld_({'|'.join({**dict.fromkeys(PARTS), **dict.fromkeys(BLOCK_PARTS)})})\.weight")


class AdapterFileError(ValueError):
    """A saved adapter that cannot be used as it is; the message names the file."""


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of `adapter_config.json`, of a folder that also holds the weights.

    raises AdapterFileError, naming the file, for one that is missing, unreadable or of another method.
    """
    if not (folder / CONFIG).is_file():
        raise AdapterFileError(f"{folder} is not a saved adapter: {CONFIG} is missing")
    fields = read_json(folder / CONFIG)
    if (method := fields.get("peft_type")) != "MOSLD":
        raise AdapterFileError(f"{folder / CONFIG} is of no MoSLD adapter: its peft_type is {method!r}")
    check_weights(folder)
    return fields


def check_weights(folder: Path, only_pickles: bool = False) -> None:
    """raises AdapterFileError where `folder` lacks its safetensors file, with the name of a pickle that is there instead.

    only_pickles: whether a folder with neither passes.
    """
    if (folder / WEIGHTS).is_file():
        return
    pickles = [name for name in PICKLES if (folder / name).is_file()]
    if pickles or not only_pickles:
        more = f", and {pickles[0]}, a pickle, is not opened" if pickles else ""
        raise AdapterFileError(f"{folder} is not a saved adapter: {WEIGHTS} is missing{more}")


def read_json(path: Path) -> dict[str, Any]:
    """raises AdapterFileError, naming the file, where it holds no JSON object, or texts that would command a terminal."""
    try:
        fields = json.loads(path.read_text())
    except OSError as error:
        raise AdapterFileError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise AdapterFileError(f"{path} must hold an object, got {type(fields).__name__}: its peft_type is None")
    for text in (*fields, *(value for value in fields.values() if isinstance(value, str))):
        if COMMANDS.search(text):
            raise AdapterFileError(f"{path} has {text!r:.100}, with characters that command a terminal")
    return fields


def check_name(adapter: str) -> None:
    """raises ValueError for an adapter's name that is no folder's: PEFT saves every adapter but the default one in its own."""
    refused = "/\\:" if os.name == "nt" else "/\\"
    if not adapter or adapter in (".", "..") or set(adapter) & set(f"{refused}\0"):
        raise ValueError(
            f"an adapter's name becomes that of its folder, without {' '.join(refused)} and NUL, got {adapter!r}"
        )


@dataclass(frozen=True)
class SavedLayer:
    """Sizes of one adapted layer; of a feed-forward block its hidden and its intermediate size."""

    in_features: int
    out_features: int
    r: int
    num_experts: int
    parameters: int


class AdapterWeights:
    """The tensors of `path`, whose sizes have all been checked, and none of which has been read yet.

    layers: name in the base model -> SavedLayer. mixtures: name -> Mixture. others: name -> shape of what was saved beside
    them (modules_to_save).
    raises AdapterFileError when the file is cut off or no safetensors file, for a name that no layer has, when a layer lacks a tensor or has one that no
    mixture has, when a size is not what `mixture_of` (a layer's name -> its Mixture) says, for weights that are no
    floating-point numbers, or as `check_digest`.
    """

    def __init__(self, path: Path, mixture_of: Callable[[str], Mixture]):
        self.path = path
        self._file = _open(path)
        keys = sorted(self._file.keys(), key=_in_order)
        if odd := next((key for key in keys if len(key) > MAX_KEY or not key.isprintable()), None):
            raise AdapterFileError(
                f"{path} holds {odd!r:.100}, which is no name of a tensor: it has {len(odd)} characters, of at most {MAX_KEY}, "
                "all of which must be printable"
            )
        slices = {key: self._file.get_slice(key) for key in keys}
        shapes = {key: list(own.get_shape()) for key, own in slices.items()}
        self._keys: dict[str, dict[str, str]] = {}
        self.others: dict[str, list[int]] = {}
        for key, shape in shapes.items():
            match = _KEY.fullmatch(key)
            if match is None and ".mosld_" in key:
                raise AdapterFileError(f"{path} holds {key}, which is no tensor that this version of mosld knows")
            elif match is None:
                self.others[key.removeprefix(PEFT_PREFIX)] = shape
            elif not (kind := str(slices[key].get_dtype())).startswith(("F", "BF")):
                raise AdapterFileError(f"{path} holds {key} in {kind}: weights must be floating-point numbers")
            else:
                self._keys.setdefault(match[1].removeprefix(PEFT_PREFIX), {})[match[2]] = key
        if not self._keys:
            raise AdapterFileError(f"{path} holds no tensor of a MoSLD adapter")
        self.mixtures = {
            name: mixture_of(name).of_linear if keys.keys() & {"shared_a", "expert_b"} else mixture_of(name)
            for name, keys in self._keys.items()
        }
        self.layers = {
            name: _checked(path, name, {part: shapes[key] for part, key in keys.items()}, self.mixtures[name])
            for name, keys in self._keys.items()
        }
        check_digest(path)

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """-> shared_a, expert_b and what else the layer has, by name, as saved"""
        return {part: self._file.get_tensor(key) for part, key in self._keys[layer].items()}


def _in_order(key: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10, which the file does not."""
    return [(len(part), part) if part.isdecimal() else (0, part) for part in key.split(".")]


def _open(path: Path) -> safe_open:
    """Opening compares the length of the file with what its header announces."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path} is cut off, altered or no safetensors file: {error}") from error


def _checked(path: Path, name: str, shapes: dict[str, list[int]], mixture: Mixture) -> SavedLayer:
    into, out_of = ("gate_a", "gate_b") if mixture.kind.block else ("shared_a", "expert_b")
    sizes = sum(shapes.get(into, [])[1:2]), sum(shapes.get(out_of, [])[:1])
    expected = {part: list(shape) for part, shape in mixture.shapes(*sizes).items()}
    if lacking := [part for part in expected if part not in shapes]:
        raise AdapterFileError(f"{path} was altered: {name} lacks {' and '.join(f'mosld_{part}' for part in lacking)}")
    if unknown := [part for part in shapes if part not in expected]:
        raise AdapterFileError(f"{path} does not fit its {CONFIG}: {name} has a mosld_{unknown[0]}, its mixture none")
    for part, shape in expected.items():
        if shapes[part] != shape:
            raise AdapterFileError(
                f"{path} does not fit its {CONFIG}: mosld_{part} of {name} has shape {shapes[part]} where r={mixture.r} and "
                f"{mixture.num_experts} experts make {shape}"
            )
    if 0 in sizes:
        raise AdapterFileError(f"{path} was altered: {name} has {sizes[0]} -> {sizes[1]} features")
    return SavedLayer(*sizes, mixture.r, mixture.num_experts, mixture.parameters(*sizes))


def write_digest(folder: Path) -> None:
    """Record the checksum of the weights in `folder`, as they are now, and of its configuration.

    `sha256sum` passes comments over. The configuration has no line of its own, for its model may move and be called anew.
    """
    lines = [f"{sha256(folder / WEIGHTS)}  {WEIGHTS}"]
    if (folder / CONFIG).is_file():
        lines.append(f"# {_config_digest(folder / CONFIG)}  {CONFIG}")
    write_at_once(folder / DIGEST, "".join(f"{line}\n" for line in lines))


def check_digest(weights: Path) -> None:
    """raises AdapterFileError when weights or configuration are not those whose checksums lie beside them; without, all are.

    `weights`: the file, which is read to its end.
    """
    record = weights.with_name(DIGEST)
    try:
        lines = [line.split() for line in record.read_text().splitlines()]
    except FileNotFoundError:
        return
    except UnicodeDecodeError:
        lines = []
    recorded = next((line[0] for line in lines if line[1:] in ([WEIGHTS], [f"*{WEIGHTS}"])), None)
    if recorded is None:
        raise AdapterFileError(f"{record} holds no checksum of {WEIGHTS}: delete it to load the weights unchecked")
    if recorded.lower() != sha256(weights):
        raise AdapterFileError(
            f"{weights} is not what {DIGEST} beside it was written for: its numbers were altered, or saving over it was "
            f"cut off. Save or copy it again; where another program changed it on purpose, delete {record}"
        )
    config = weights.with_name(CONFIG)
    told = next((line[1] for line in lines if len(line) == 3 and line[::2] == ["#", CONFIG]), None)
    if told is not None and told.lower() != _config_digest(config):
        raise AdapterFileError(
            f"{config} is not what {DIGEST} beside it was written for: a field that decides what is computed was altered. "
            f"Save or copy it again; where you changed it on purpose, delete {record}"
        )


def _config_digest(path: Path) -> str:
    """Of all fields but those in TOLD, whatever their order."""
    fields = {name: value for name, value in read_json(path).items() if name not in TOLD}
    for name, value in fields.items():
        if isinstance(value, list):
            fields[name] = sorted(map(str, value))  # PEFT saves its sets in any order
    # Of two patterns for numbers of experts the first counts.
    patterns = fields.get("num_experts_pattern")
    text = json.dumps([fields, list(patterns) if isinstance(patterns, dict) else None], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256(path: Path) -> str:
    """Of a file of any size, read piece by piece."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
