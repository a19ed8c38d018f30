"""Task vectors: what fine-tuning added to a base model, weight by weight.

    tau_k = theta_k - theta_0          of an adapter, per layer: s B A, kept as its two factors

An adapter's vectors stay factored: merging several on one linear layer is our operator with constant gates. A method
that needs whole matrices asks for one layer at a time (`TaskVector.delta`). `read` reads vectors from folders.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn


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
    """An update [out_features, in_features] as up @ down, scale included.

    down: [r, in_features]. up: [out_features, r].
    """

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
    """What one folder adds to the base model.

    Args:
        name: The folder's name, or its path where other vectors have the same name.
        folder: That of the adapter or checkpoint.
        base: The model it was trained on, where the folder says so.
        factors: Of an adapter, the name of a layer in the base model -> Factors. None for a full checkpoint, of which
            `delta` takes the difference from the base's tensor.
        files: Of a full checkpoint, a tensor's name -> its file.

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
    files: dict[str, Path] = field(default_factory=dict)

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
            # One tensor at a time is in memory, however large the checkpoint.
            with safe_open(self.files[weight], framework="pt") as file:
                tuned = file.get_tensor(weight)
            self.check(weight, tuned.shape, base.shape)
            delta = tuned.float() - base.float().to(tuned.device)
        else:
            own = self.factors.get(weight.removesuffix(".weight"))
            if own is None:
                return None
            delta = own.whole()
            if delta.shape != base.shape:  # Conv1D stores its weight transposed
                delta = delta.T
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


def all_weights(vectors: Sequence[TaskVector]) -> list[str]:
    """The names of the base's tensors that any of `vectors` changes, each once, in order."""
    names: dict[str, None] = {}
    for vector in vectors:
        names.update(dict.fromkeys(vector.weights()))
    return list(names)


def deltas(
    vectors: Sequence[TaskVector], base: Mapping[str, Tensor], without: Container[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """One weight at a time: its name and the updates [K, *shape] of all vectors in float32, zeros where one has none.

    base: name -> tensor. One with several names (tied weights) is walked once, by the first of them, whichever each
        checkpoint knows it by; adapters alone keep the names of their layers.
    without: names that are left out.
    raises MergeError for a layer that the base has not, and as `TaskVector.delta`.
    """
    for vector in vectors:
        for name in vector.weights():
            if name not in base:
                raise _unknown(vector, name)
    has_checkpoint = any(vector.factors is None for vector in vectors)
    tied = _names_by_tensor(base)
    seen = set()
    for name in all_weights(vectors):
        weight = base[name].detach().cpu()
        # A checkpoint may have a tied weight by any of its names. An adapter of a tied layer is that layer's alone.
        known = tied[id(base[name])] if has_checkpoint else [name]
        if not weight.is_floating_point() or known[0] in without or known[0] in seen:
            continue
        seen.add(known[0])
        yield known[0], torch.stack([_delta_by_any_name(vector, known, weight) for vector in vectors])


def _names_by_tensor(tensors: Mapping[str, Tensor]) -> dict[int, list[str]]:
    """A tensor's `id` -> all its names"""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    return names


def _delta_by_any_name(vector: TaskVector, names: Sequence[str], base: Tensor) -> Tensor:
    """The update of `base` by the first of its `names` under which `vector` has one; zeros without one."""
    for name in names:
        delta = vector.delta(name, base)
        if delta is not None:
            return delta
    return torch.zeros(base.shape)


def check_untied(vectors: Sequence[TaskVector], base: Mapping[str, Tensor]) -> None:
    """raises MergeError for an adapter of a layer whose weight has another name too.

    Its update is the layer's alone, and no weight of the base can hold it. base: `named_tensors` of it.
    """
    tied = _names_by_tensor(base)
    for vector in vectors:
        if vector.factors is None:
            continue
        for name in vector.weights():
            others = [other for other in tied[id(base[name])] if other != name]
            if others:
                raise MergeError(
                    f"{vector.folder} adapts {name.removesuffix('.weight')}, whose weight is also "
                    f"{', '.join(others)}: merge it by task_arithmetic, adamerging_task or adamerging_layer as a lora "
                    "or mosld"
                )


def check_whole(vectors: Sequence[TaskVector], base: Mapping[str, Tensor]) -> None:
    """raises MergeError for a full checkpoint that has not the base's weights, no more and no fewer, in their shapes.

    It may have a tied weight by any of its names. Only the files' headers are read. base: `named_tensors` of it.
    """
    for vector in vectors:
        if vector.factors is not None:
            continue
        missing = _missing_weights(vector, base)
        if missing:
            raise MergeError(
                f"{vector.folder} lacks {', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}"
            )
        for name, path in vector.files.items():
            if name not in base:
                raise _unknown(vector, name)
            with open_safetensors(path) as file:
                vector.check(name, file.get_slice(name).get_shape(), base[name].shape)


def _missing_weights(vector: TaskVector, base: Mapping[str, Tensor]) -> list[str]:
    """The base's parameters that a full checkpoint has by none of their names; buffers are not always saved."""
    known = {id(base[name]) for name in vector.files if name in base}
    missing = []
    for name, weight in base.items():
        if isinstance(weight, nn.Parameter) and id(weight) not in known:
            missing.append(name)
    return missing


def open_safetensors(path: Path) -> Any:
    """raises MergeError, naming the file, where it is damaged or of another kind"""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise MergeError(f"{path} is cut off, altered or no safetensors file: {error}") from error


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of `model`, tied ones by each of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _unknown(vector: TaskVector, name: str) -> MergeError:
    return MergeError(f"{vector.folder} changes {name}, which the base model has not")
