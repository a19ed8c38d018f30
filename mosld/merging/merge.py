"""One call for every method: task vectors and a base in, the merged model out."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .adaptive import AdaptiveSettings, MergedForward, minimise_entropy
from .channel import NOISES, received
from .concrete import ConcreteSettings, final_masks, train_masks
from .dense import DenseMerge
from .elementwise import TIES_RULES, disjoint_mean, summed, ties
from .factored import FactoredMerge, check_fit
from .methods import METHODS, WIRELESS, Method
from .unlabelled import Unlabelled
from .vectors import MergeError, TaskVector, check_untied, check_whole, deltas, named_tensors


@dataclass(frozen=True)
class MergeSettings:
    """How vectors are merged.

    Args:
        method: A name of METHODS.
        scale: Every coefficient; where the method trains them, their value before the first step. None is the method's.
        keep: The share of a vector's elements that TIES keeps, in (0, 1].
        adaptive: How coefficients are trained. Its `start` follows from `scale` and the method.
        concrete: How masks are trained. Its `start`, `by_layer` and inner step follow from `scale` and the method, its
            `clamp` from that of `adaptive`.
        noise: Of r_mtllmf's channel: "ideal", "isotropic" or "worst".
        snr_db: Ratio of each vector's power to its noise's in that channel, in decibel.
        seed: Decides the noise.
        ties_rule: "paper", or "code" for TIES as its authors' code has it: int(d keep) + 1 of a vector's d elements are
            kept, and where the trimmed vectors add up to exactly zero, the sign of most elements is elected.

    Raises:
        ValueError: For a method, a noise or a rule that is unknown, and a number out of its range.

    >>> from mosld.merging import MergeSettings
    >>> MergeSettings("ties", keep=0.5).start, MergeSettings("task_arithmetic", scale=0.5).start
    (1.0, 0.5)
    >>> MergeSettings("ties", keep=2)
    Traceback (most recent call last):
    ValueError: keep must be in (0, 1], got 2
    """

    method: str
    scale: float | None = None
    keep: float = 0.2
    adaptive: AdaptiveSettings = field(default_factory=AdaptiveSettings)
    concrete: ConcreteSettings = field(default_factory=ConcreteSettings)
    noise: str = "ideal"
    snr_db: float = 10.0
    seed: int = 0
    ties_rule: str = "paper"

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.scale is not None and not torch.isfinite(torch.tensor(float(self.scale))):
            raise ValueError(f"scale must be finite, got {self.scale}")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {self.keep}")
        if self.noise not in NOISES:
            raise ValueError(f"noise must be one of {', '.join(NOISES)}, got {self.noise!r}")
        if self.ties_rule not in TIES_RULES:
            raise ValueError(f"ties_rule must be one of {', '.join(TIES_RULES)}, got {self.ties_rule!r}")

    @property
    def kind(self) -> Method:
        """The entry of METHODS.

        >>> from mosld.merging import MergeSettings
        >>> MergeSettings("adamerging_layer").kind.title, MergeSettings("adamerging_layer").kind.adaptive
        ('AdaMerging, layer-wise', True)
        """
        return METHODS[self.method]

    @property
    def start(self) -> float:
        """Every coefficient at first: `scale`, or the method's own.

        >>> from mosld.merging import MergeSettings
        >>> MergeSettings("task_arithmetic").start, MergeSettings("task_arithmetic", scale=0.5).start
        (0.3, 0.5)
        """
        return self.kind.scale if self.scale is None else self.scale


@dataclass(frozen=True)
class Merged:
    """What `merge` has found.

    Args:
        settings: Those of `merge`.
        vectors: The K task vectors.
        layers: Names of the layers where adapters stayed factored, else of the weights that change.
        coefficients: [K], or [layers, K] in the order of `layers`.
        losses: Of every step, where something was trained.
        masks: Of the Concrete methods, a weight's name -> [*shape].
        factored: Whether the adapters stayed factored, so that their coefficients are the whole merge.

    >>> from copy import deepcopy
    >>> from peft import LoraConfig, get_peft_model
    >>> from torch import nn
    >>> from mosld.merging import Merged, MergeSettings, merge, read_task_vectors
    >>> base = nn.Sequential(nn.Linear(6, 5))
    >>> lora = get_peft_model(deepcopy(base), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    >>> lora.save_pretrained("a")
    >>> merged: Merged = merge(base, read_task_vectors(["a"]), MergeSettings("ties"))
    >>> merged.layers, merged.coefficients, merged.factored
    (['0.weight'], tensor([1.]), False)
    """

    settings: MergeSettings
    vectors: Sequence[TaskVector]
    layers: list[str]
    coefficients: Tensor
    losses: list[float] = field(default_factory=list)
    masks: Mapping[str, Tensor] | None = None
    factored: bool = False

    def updates(self, base: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """A weight's name and what is added to that of `base`, in float32, one whole weight at a time.

        >>> from copy import deepcopy
        >>> from peft import LoraConfig, get_peft_model
        >>> from torch import nn
        >>> from mosld.merging import MergeSettings, merge, read_task_vectors
        >>> base = nn.Sequential(nn.Linear(6, 5))
        >>> lora = get_peft_model(deepcopy(base), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        >>> lora.save_pretrained("a")
        >>> merged = merge(base, read_task_vectors(["a"]), MergeSettings("task_arithmetic", scale=0.5))
        >>> ((name, update),) = merged.updates(base)
        >>> name, update.allclose(0.5 * merged.vectors[0].delta("0.weight", base[0].weight))
        ('0.weight', True)
        """
        names = merged_weights(self)
        by_layer = dict(zip(names, self.coefficients.expand(len(names), len(self.vectors)), strict=True))
        # TIES averages what the trimmed vectors agree on. AdaMerging++ sums the same vectors by its coefficients.
        if self.settings.method == "ties":
            for name, parts in _parts(base, self.vectors, self.settings):
                yield name, by_layer[name][0] * disjoint_mean(parts)
            return
        for name, update in summed(partial(_parts, base, self.vectors, self.settings), by_layer):
            yield name, update if self.masks is None else self.masks[name] * update


def merged_weights(merged: Merged) -> list[str]:
    """The names of the weights that change: `<layer>.weight` for adapters that stayed factored."""
    return [f"{layer}.weight" for layer in merged.layers] if merged.factored else merged.layers


def merge(
    base: nn.Module,
    vectors: Sequence[TaskVector],
    settings: MergeSettings,
    unlabelled: Sequence[Unlabelled] = (),
    folder: str | os.PathLike | None = None,
) -> Merged:
    """Find the coefficients and masks with which `vectors` are merged on `base`, which is left as it is.

    Args:
        base: The model that the vectors were trained on.
        vectors: As `read_task_vectors` reads them.
        settings: The method and its numbers.
        unlabelled: The inputs on which adaptive methods predict, without labels: one entry for each task.
        folder: Keeps the state of what is trained, so that the same call goes on where it was cut off.

    Returns:
        The coefficients and masks. `applied` and the functions `save_...` make a model of them.

    Raises:
        MergeError: For vectors that do not fit `base`, and where nothing is left to merge.
        ValueError: Without the data that the method needs.

    >>> from copy import deepcopy
    >>> from peft import LoraConfig, get_peft_model
    >>> from torch import nn
    >>> from mosld.merging import MergeSettings, merge, read_task_vectors
    >>> base = nn.Sequential(nn.Linear(6, 5))
    >>> for name in ("a", "b"):
    ...     lora = get_peft_model(deepcopy(base), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    ...     lora.save_pretrained(name)
    >>> merged = merge(base, read_task_vectors(["a", "b"]), MergeSettings("task_arithmetic", scale=0.5))
    >>> merged.layers, merged.coefficients, merged.factored
    (['0'], tensor([0.5000, 0.5000]), True)
    """
    folder = None if folder is None else Path(folder)
    if not vectors:
        raise MergeError("merging needs at least one adapter or checkpoint, got none")
    if settings.kind.adaptive and not unlabelled:
        raise ValueError(f"{settings.method} needs unlabelled data of at least one task, got none: give --tasks")
    check_fit(base, vectors)
    check_whole(vectors, named_tensors(base))
    if settings.kind.factored and all(vector.factors is not None for vector in vectors):
        return _merge_factored(base, vectors, settings, unlabelled, folder)
    # Whole matrices are added to the base's weights, so that a tied weight cannot be changed for one layer alone.
    check_untied(vectors, named_tensors(base))
    names = [name for name, _ in _walk(base, vectors, settings.method)]
    if not names:
        raise MergeError("nothing is left to merge: the vectors change no weight of the base model")
    if settings.kind.adaptive:
        return _merge_dense(base, vectors, settings, unlabelled, folder)
    return Merged(settings, vectors, names, torch.full((len(vectors),), settings.start))


def _merge_dense(
    base: nn.Module, vectors: Sequence[TaskVector], settings: MergeSettings, unlabelled: Sequence[Unlabelled],
    folder: Path | None,
) -> Merged:  # fmt: skip
    """What is trained on whole matrices: the mask first, then the coefficients."""
    count = len(vectors)
    dense = DenseMerge(base, _parts(base, vectors, settings))
    masks, losses = None, []
    if settings.kind.masked:
        concrete = _concrete_settings(settings)
        logits, losses = train_masks(dense, unlabelled, count, concrete, folder and folder / "mask")
        masks = final_masks(logits, concrete)
    # Concrete task arithmetic trains its mask alone.
    if settings.kind.masked and not settings.kind.by_layer:
        coefficients = torch.full((count,), settings.start)
    else:
        forward = partial(dense, masks=masks)
        coefficients, more = _train_coefficients(forward, dense.layers, count, settings, unlabelled, folder)
        losses = losses + more
    # They are kept for as long as the result is, so not in the device's memory.
    if masks is not None:
        masks = {name: mask.cpu() for name, mask in masks.items()}
    return Merged(settings, vectors, dense.layers, coefficients, losses, masks)


def _concrete_settings(settings: MergeSettings) -> ConcreteSettings:
    """Those of the mask, with what follows from the method."""
    by_layer = settings.kind.by_layer
    inner_rate = settings.concrete.inner_rate or 1.0
    return replace(
        settings.concrete,
        start=settings.start,
        by_layer=by_layer,
        inner_rate=inner_rate if by_layer else None,
        clamp=settings.adaptive.clamp == "use",
    )


def _merge_factored(
    base: nn.Module, vectors: Sequence[TaskVector], settings: MergeSettings, unlabelled: Sequence[Unlabelled],
    folder: Path | None,
) -> Merged:  # fmt: skip
    """What is merged without making a whole matrix."""
    count = len(vectors)
    model = FactoredMerge(base, vectors)
    try:
        coefficients, losses = torch.full((count,), settings.start), []
        if settings.kind.adaptive:
            coefficients, losses = _train_coefficients(model, model.layers, count, settings, unlabelled, folder)
        return Merged(settings, vectors, model.layers, coefficients, losses, factored=True)
    finally:
        model.unload()


def _train_coefficients(
    merged: MergedForward, layers: Sequence[str], count: int, settings: MergeSettings, unlabelled: Sequence[Unlabelled],
    folder: Path | None,
) -> tuple[Tensor, list[float]]:  # fmt: skip
    """-> coefficients [K], or [layers, K] for a method with one a layer, and the loss of every step"""
    shape = (len(layers), count) if settings.kind.by_layer else (count,)
    adaptive = replace(settings.adaptive, start=settings.start)
    return minimise_entropy(merged, shape, unlabelled, adaptive, folder and folder / "coefficients", settings.method)


def _walk(base: nn.Module, vectors: Sequence[TaskVector], method: str) -> Iterator[tuple[str, Tensor]]:
    """The updates [K, *shape] of every weight that is merged"""
    without = {name for name, _ in base.named_buffers()}
    if method == WIRELESS:  # its users neither train nor send embeddings
        without |= embeddings(base)
    yield from deltas(vectors, named_tensors(base), without)


def _parts(base: nn.Module, vectors: Sequence[TaskVector], settings: MergeSettings) -> Iterator[tuple[str, Tensor]]:
    """Weight's name -> updates [K, *shape] as the method sums them"""
    walk = partial(_walk, base, vectors, settings.method)
    if settings.kind.ties:
        yield from ties(walk, settings.keep, settings.ties_rule)
    elif settings.method == WIRELESS:
        generator = torch.Generator().manual_seed(settings.seed)
        yield from received(walk, settings.noise, settings.snr_db, generator)
    else:
        yield from walk()


def embeddings(model: nn.Module) -> set[str]:
    """The names of the weights of embeddings, and of what is tied to them."""
    tables = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            tables.add(module.weight)
    return {name for name, weight in model.named_parameters(remove_duplicate=False) if weight in tables}
