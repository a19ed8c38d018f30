"""The tensors of a saved adapter, by layer, read from its header and checked against its configuration."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files.adapter_folder import CONFIG, PEFT_PREFIX, AdapterFileError, check_digest
from ..mixture.spec import BLOCK_PARTS, PARTS, Mixture

MAX_KEY = 300  # characters of a tensor's name
_KEY = re.compile(rf"(.+)\.mosld_({'|'.join({**dict.fromkeys(PARTS), **dict.fromkeys(BLOCK_PARTS)})})\.weight")


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
            name: mixture_of(name).for_linear_layers if keys.keys() & {"shared_a", "expert_b"} else mixture_of(name)
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
