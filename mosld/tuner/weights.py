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
_KEY = re.compile(rf"(.+)\.mosld_({'|'.join(dict.fromkeys((*PARTS, *BLOCK_PARTS)))})\.weight")


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

    layers: name in the base model -> SavedLayer. mixtures: name -> Mixture. others: name -> shape of what was saved
    beside them (modules_to_save).

    Args:
        path: The file of the weights.
        mixture_of: A layer's name -> its Mixture, as MoSLDConfig.mixture_of.

    Raises:
        AdapterFileError: When the file is cut off or no safetensors file, for a name that no layer has, when a layer
            lacks a tensor or has one that no mixture has, when a size is not what `mixture_of` makes, for weights that
            are no floating-point numbers, or as `check_digest`.
    """

    def __init__(self, path: Path, mixture_of: Callable[[str], Mixture]):
        self.path = path
        self._file = _open(path)
        self._keys: dict[str, dict[str, str]] = {}  # layer -> part -> key in the file
        self.layers: dict[str, SavedLayer] = {}
        self.mixtures: dict[str, Mixture] = {}
        self.others: dict[str, list[int]] = {}
        shapes = self._read_header()
        if not shapes:
            raise AdapterFileError(f"{path} holds no tensor of a MoSLD adapter")
        for name, parts in shapes.items():
            mixture = mixture_of(name)
            if "shared_a" in parts or "expert_b" in parts:
                mixture = mixture.for_linear_layers
            self.mixtures[name] = mixture
            self.layers[name] = _check_layer(path, name, parts, mixture)
        check_digest(path)

    def _read_header(self) -> dict[str, dict[str, list[int]]]:
        """-> layer -> part -> shape; fills `_keys` and `others`"""
        shapes: dict[str, dict[str, list[int]]] = {}
        keys = sorted(self._file.keys(), key=_in_order)
        _check_keys(self.path, keys)
        for key in keys:
            tensor = self._file.get_slice(key)
            shape = list(tensor.get_shape())
            match = _KEY.fullmatch(key)
            if match is None:
                if ".mosld_" in key:
                    raise AdapterFileError(
                        f"{self.path} holds {key}, which is no tensor that this version of mosld knows"
                    )
                self.others[key.removeprefix(PEFT_PREFIX)] = shape
                continue
            kind = str(tensor.get_dtype())
            if not kind.startswith(("F", "BF")):
                raise AdapterFileError(f"{self.path} holds {key} in {kind}: weights must be floating-point numbers")
            layer, part = match[1].removeprefix(PEFT_PREFIX), match[2]
            self._keys.setdefault(layer, {})[part] = key
            shapes.setdefault(layer, {})[part] = shape
        return shapes

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


def _check_keys(path: Path, keys: list[str]) -> None:
    """Names go into messages and tables, so a terminal must be able to show them."""
    for key in keys:
        if len(key) > MAX_KEY or not key.isprintable():
            raise AdapterFileError(
                f"{path} holds {key!r:.100}, which is no name of a tensor: it has {len(key)} characters, of at most "
                f"{MAX_KEY}, all of which must be printable"
            )


def _check_layer(path: Path, name: str, shapes: dict[str, list[int]], mixture: Mixture) -> SavedLayer:
    """shapes: part -> shape. raises AdapterFileError where they are not those of `mixture`."""
    into, out_of = ("gate_a", "gate_b") if mixture.kind.block else ("shared_a", "expert_b")
    # The sizes that the tensors claim. One that is not there or has too few dimensions counts 0, and is refused below.
    in_features = sum(shapes.get(into, [])[1:2])
    out_features = sum(shapes.get(out_of, [])[:1])
    expected = mixture.shapes(in_features, out_features)
    lacking = [f"mosld_{part}" for part in expected if part not in shapes]
    if lacking:
        raise AdapterFileError(f"{path} was altered: {name} lacks {' and '.join(lacking)}")
    for part in shapes:
        if part not in expected:
            raise AdapterFileError(f"{path} does not fit its {CONFIG}: {name} has a mosld_{part}, its mixture none")
    for part, sizes in expected.items():
        shape = list(sizes)
        if shapes[part] != shape:
            raise AdapterFileError(
                f"{path} does not fit its {CONFIG}: mosld_{part} of {name} has shape {shapes[part]} where "
                f"r={mixture.r} and {mixture.num_experts} experts make {shape}"
            )
    if 0 in (in_features, out_features):
        raise AdapterFileError(f"{path} was altered: {name} has {in_features} -> {out_features} features")
    parameters = mixture.parameters(in_features, out_features)
    return SavedLayer(in_features, out_features, mixture.r, mixture.num_experts, parameters)
