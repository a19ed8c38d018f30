"""Task vectors: what fine-tuning added to a base model, weight by weight.

    tau_k = theta_k - theta_0          of an adapter, per layer: s B A, kept as its two factors

An adapter's vectors stay factored: merging several on one linear layer is our operator with constant gates. A method that
needs whole matrices asks for one layer at a time (`TaskVector.delta`).
"""

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..files.adapter_folder import CONFIG, PEFT_PREFIX, WEIGHTS, check_weights, read_config, read_json
from ..files.model_folder import INDEX, files_of
from ..files.safe_regex import check_expressions
from ..tuner.config import MoSLDConfig
from ..tuner.peft_api import get_pattern_key
from ..tuner.weights import AdapterWeights

CHECKPOINT = "model.safetensors"


class MergeError(ValueError):
    """Task vectors that cannot be read or merged; the message names the folder and the layer.

    >>> from mosld.merging import MergeError, read_task_vectors
    >>> try:
    ...     read_task_vectors(["nowhere"])
    ... except MergeError as error:
    ...     print(error)
    nowhere holds neither adapter_config.json nor model.safetensors: it is no adapter and no checkpoint
    """


@dataclass(frozen=True)
class Factors:
    """An update [out_features, in_features] as up @ down: down [r, in_features], up [out_features, r], scale included."""

    down: Tensor
    up: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def whole(self) -> Tensor:
        """-> the update in float32"""
        return (self.up.double() @ self.down.double()).float()


@dataclass
class TaskVector:
    """What one folder adds to the base. name: the folder's. base: the model it was trained on, where recorded.

    factors: of an adapter, layer name in the base model -> Factors. Of a full checkpoint it is None, and `delta` takes the
    difference from the base's tensor.

    >>> from copy import deepcopy
    >>> from peft import LoraConfig, get_peft_model
    >>> from torch import nn
    >>> from mosld.merging import TaskVector, read_task_vectors
    >>> base = nn.Sequential(nn.Linear(6, 5))
    >>> lora = get_peft_model(deepcopy(base), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    >>> lora.save_pretrained("a")
    >>> vector: TaskVector = read_task_vectors(["a"])[0]
    >>> vector.name, vector.factors["0"].shape, vector.factors["0"].down.shape
    ('a', (5, 6), torch.Size([2, 6]))
    """

    name: str
    folder: Path
    base: str | None = None
    factors: dict[str, Factors] | None = None
    files: dict[str, Path] = field(default_factory=dict)  # of a full checkpoint: tensor's name -> its file

    def weights(self) -> list[str]:
        """The names of the base's tensors that differ: `<layer>.weight` for an adapter.

        >>> import torch
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> from mosld.merging import read_task_vectors
        >>> Path("full").mkdir()
        >>> save_file({"0.weight": torch.ones(5, 6), "0.bias": torch.ones(5)}, "full/model.safetensors")
        >>> sorted(read_task_vectors(["full"])[0].weights())
        ['0.bias', '0.weight']
        """
        return list(self.files) if self.factors is None else [f"{layer}.weight" for layer in self.factors]

    def delta(self, weight: str, base: Tensor) -> Tensor | None:
        """The update of the base's tensor `weight`, whose value is `base`, in float32 and its shape; None without one.

        raises MergeError, naming folder and tensor, for another shape and for values that are not finite.

        >>> import torch
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> from mosld.merging import read_task_vectors
        >>> Path("full").mkdir()
        >>> save_file({"0.bias": torch.tensor([1.0, 2.0, 3.0])}, "full/model.safetensors")
        >>> read_task_vectors(["full"])[0].delta("0.bias", base=torch.tensor([1.0, 1.0, 1.0]))
        tensor([0., 1., 2.])
        """
        if self.factors is None:
            if weight not in self.files:
                return None
            with safe_open(self.files[weight], framework="pt") as file:
                tuned = file.get_tensor(weight)
            self.check(weight, tuned.shape, base.shape)
            delta = tuned.float() - base.float().to(tuned.device)
        else:
            own = self.factors.get(weight.removesuffix(".weight"))
            if own is None:
                return None
            delta = own.whole()
            delta = delta if delta.shape == base.shape else delta.T  # Conv1D stores its weight transposed
            self.check(weight, delta.shape, base.shape)
        if not torch.isfinite(delta).all():
            raise MergeError(f"{self.folder} holds values that are not finite in {weight}")
        return delta

    def check(self, weight: str, shape: Sequence[int], base: Sequence[int]) -> None:
        """raises MergeError where `shape`, of what the folder has for `weight`, is not the base's.

        >>> from pathlib import Path
        >>> from mosld.merging import TaskVector
        >>> TaskVector("a", Path("runs/a")).check("0.bias", shape=[4], base=[3])
        Traceback (most recent call last):
        mosld.merging.vectors.MergeError: runs/a has [4] for 0.bias, the base model [3]
        """
        if tuple(shape) != tuple(base):
            raise MergeError(f"{self.folder} has {list(shape)} for {weight}, the base model {list(base)}")


def read_task_vectors(folders: Sequence[str | Path], gates: str = "uniform") -> list[TaskVector]:
    """Read adapters (PEFT LoRA or MoSLD, of any ranks and targets) or full checkpoints, one folder a task.

    gates: how the gates of a MoSLD adapter are fixed; "uniform" is 1 / E.
    raises MergeError for fewer than one folder, for a folder that is none of these, for adapters of different bases, and
    for values that are not finite, naming the folder and the layer.

    >>> from copy import deepcopy
    >>> from peft import LoraConfig, get_peft_model
    >>> from torch import nn
    >>> from mosld.merging import read_task_vectors
    >>> base = nn.Sequential(nn.Linear(6, 5))
    >>> lora = get_peft_model(deepcopy(base), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    >>> lora.save_pretrained("a")
    >>> [(vector.name, vector.weights()) for vector in read_task_vectors(["a"])]
    [('a', ['0.weight'])]
    """
    if not folders:
        raise MergeError("merging needs at least one adapter or checkpoint, got none")
    vectors = [_read(Path(folder)) for folder in folders]
    bases = {vector.base: vector.folder for vector in vectors if vector.base is not None}
    if len(bases) > 1:
        told = "; ".join(f"{folder} is of {base}" for base, folder in bases.items())
        raise MergeError(f"the adapters are of different bases: {told}")
    names = [vector.name for vector in vectors]
    for vector in vectors:  # runs/a/adapter and runs/b/adapter
        if names.count(vector.name) > 1:
            vector.name = str(vector.folder)
    return vectors


def _read(folder: Path) -> TaskVector:
    if (folder / CONFIG).is_file():
        fields = read_json(folder / CONFIG)
        method = fields.get("peft_type")
        if method == "MOSLD":
            return _read_mosld(folder)
        if method == "LORA":
            check_weights(folder)
            check_expressions(fields, folder / CONFIG)
            return _read_lora(folder)
        raise MergeError(f"{folder / CONFIG} is of peft_type {method!r}; LORA and MOSLD adapters can be merged")
    files = _checkpoint_files(folder)
    if not files:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        more = f", and {pickles[0]}, a pickle, is not opened" if pickles else ""
        raise MergeError(f"{folder} holds neither {CONFIG} nor {CHECKPOINT}: it is no adapter and no checkpoint{more}")
    return TaskVector(folder.name, folder, files=files)


def _checkpoint_files(folder: Path) -> dict[str, Path]:
    """tensor's name -> the safetensors file that has it"""
    if (folder / INDEX).is_file():
        return files_of(folder)
    if not (folder / CHECKPOINT).is_file():
        return {}
    with _opened(folder / CHECKPOINT) as file:
        return dict.fromkeys(file.keys(), folder / CHECKPOINT)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise MergeError(f"{path} is cut off, altered or no safetensors file: {error}") from error


def _read_lora(folder: Path) -> TaskVector:
    config = PeftConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    for name in ("use_dora", "modules_to_save", "lora_bias"):
        if getattr(config, name, None):
            raise MergeError(f"{folder} is more than s B A: it has {name}={getattr(config, name)!r}")
    if config.bias != "none":
        raise MergeError(f"{folder} is more than s B A: it has bias={config.bias!r}")
    with _opened(folder / WEIGHTS) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
    factors: dict[str, Factors] = {}
    for key, down in tensors.items():
        layer, is_down, _ = key.removeprefix(PEFT_PREFIX).partition(".lora_A.")
        if not is_down:
            continue
        up = tensors.get(key.replace(".lora_A.", ".lora_B."))
        if up is None:
            raise MergeError(f"{folder / WEIGHTS} has no lora_B beside the lora_A of {layer}")
        rank, alpha = (
            pattern.get(get_pattern_key(list(pattern), layer), value)
            for pattern, value in (
                (config.rank_pattern or {}, config.r),
                (config.alpha_pattern or {}, config.lora_alpha),
            )
        )
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        factors[layer] = _finite(folder, layer, Factors(down, _scaled(up, scale)))
    if not factors:
        raise MergeError(f"{folder / WEIGHTS} holds no tensor of a LoRA")
    return TaskVector(folder.name, folder, config.base_model_name_or_path, factors)


def _read_mosld(folder: Path) -> TaskVector:
    read_config(folder)
    config = MoSLDConfig.from_pretrained(str(folder))
    assert isinstance(config, MoSLDConfig)
    weights, factors = AdapterWeights(folder / WEIGHTS, config.mixture_of), {}
    for layer in weights.layers:
        mixture, tensors = config.mixture_of(layer), weights.tensors(layer)
        if not mixture.kind.per_expert or mixture.wants_tasks:
            raise MergeError(
                f"{folder} has mixing={mixture.mixing!r}: export a LoRA of it with `mosld export` and merge that"
            )
        mixer = tensors["mixer"].double() if "mixer" in tensors else None
        matrix = mixture.matrix(_fixed_gates(mixture, tensors), mixer)
        up = mixture.scale * tensors["expert_b"].double() @ matrix
        factors[layer] = _finite(folder, layer, Factors(tensors["shared_a"], up.to(tensors["expert_b"].dtype)))
    return TaskVector(folder.name, folder, config.base_model_name_or_path, factors)


def _fixed_gates(mixture: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    if mixture.router == "constant":
        return tensors["router"][0].double()
    return torch.full((mixture.num_experts,), 1.0 if mixture.router == "none" else 1 / mixture.num_experts).double()


def _scaled(up: Tensor, scale: float) -> Tensor:
    return (up.double() * scale).to(up.dtype if up.dtype == torch.float64 else torch.float32)


def _finite(folder: Path, layer: str, factors: Factors) -> Factors:
    if not (torch.isfinite(factors.down).all() and torch.isfinite(factors.up).all()):
        raise MergeError(f"{folder} holds values that are not finite in {layer}")
    return factors


def all_weights(vectors: Sequence[TaskVector]) -> list[str]:
    """The names of the base's tensors that any of `vectors` changes, each once, in order."""
    return list(dict.fromkeys(name for vector in vectors for name in vector.weights()))


def deltas(
    vectors: Sequence[TaskVector], base: Mapping[str, Tensor], without: Container[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """One weight at a time: its name and the updates [K, *shape] of all vectors in float32, zeros where one has none.

    base: name -> tensor. One with several names (tied weights) is walked once, by the first of them, whichever each checkpoint
        knows it by; adapters alone keep the names of their layers. without: names that are left out.
    raises MergeError for a layer that the base has not, and as `TaskVector.delta`.
    """
    names: dict[int, list[str]] = {}  # of each tensor
    for name, tensor in base.items():
        names.setdefault(id(tensor), []).append(name)
    whole, seen = any(vector.factors is None for vector in vectors), set()
    for name in all_weights(vectors):
        if name not in base:
            raise _unknown(next(vector for vector in vectors if name in vector.weights()), name)
        own, known = base[name].detach().cpu(), names[id(base[name])] if whole else [name]
        if not own.is_floating_point() or known[0] in without or known[0] in seen:
            continue
        seen.add(known[0])
        found = [next((d for n in known if (d := vector.delta(n, own)) is not None), None) for vector in vectors]
        yield known[0], torch.stack([torch.zeros(own.shape) if delta is None else delta for delta in found])


def check_untied(vectors: Sequence[TaskVector], base: Mapping[str, Tensor]) -> None:
    """raises MergeError for an adapter of a layer whose weight has another name too: its update is the layer's alone, and no
    weight of the base can hold it. base: `named_tensors` of it."""
    for vector in vectors:
        for name in vector.weights() if vector.factors is not None else ():
            if others := [other for other, tensor in base.items() if other != name and tensor is base[name]]:
                raise MergeError(
                    f"{vector.folder} adapts {name.removesuffix('.weight')}, whose weight is also {', '.join(others)}: merge it "
                    "by task_arithmetic, adamerging_task or adamerging_layer as a lora or mosld"
                )


def check_whole(vectors: Sequence[TaskVector], base: Mapping[str, Tensor]) -> None:
    """raises MergeError for a full checkpoint without one of the base's weights, which it may have under a tied name, and for
    one of another shape or that the base has not. Only the files' headers are read.

    base: `named_tensors` of it.
    """
    for vector in vectors:
        if vector.factors is not None:
            continue
        known = {id(base[name]) for name in vector.files if name in base}
        missing = [
            name
            for name, weight in base.items()
            if isinstance(weight, nn.Parameter) and name not in vector.files and id(weight) not in known
        ]  # buffers are not always saved
        if missing:
            raise MergeError(
                f"{vector.folder} lacks {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}"
            )
        for name, path in vector.files.items():
            if name not in base:
                raise _unknown(vector, name)
            with _opened(path) as file:
                vector.check(name, file.get_slice(name).get_shape(), base[name].shape)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Its parameters and buffers, tied ones by each of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _unknown(vector: TaskVector, name: str) -> MergeError:
    return MergeError(f"{vector.folder} changes {name}, which the base model has not")
