"""Names and patterns in a configuration that match nothing in the model: an error with the nearest that there are.

A misspelt name passes in silence elsewhere, and a layer keeps the default number of experts, or a head its old weights.
"""

import difflib
import re
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .layer import MoSLDPeftLayer
from .peft_api import get_pattern_key


def unmatched_targets(model: nn.Module, targets: Collection[str] | str | None) -> list[str]:
    """One sentence for each of `targets` (names as in MoSLDConfig, or an expression) that no module matches."""
    names, linears = [], []
    for name, module in model.named_modules():
        names.append(name)
        if isinstance(module, (nn.Linear, Conv1D, MoSLDPeftLayer)):
            linears.append(name)
    if isinstance(targets, str):
        if targets == "all-linear" or any(re.fullmatch(targets, name) for name in names):
            return []
        return [f"the regular expression {targets!r} matches none of the modules, such as {', '.join(linears[:3])}"]
    sentences = []
    for target in sorted(targets or []):
        if not any(name == target or name.endswith(f".{target}") for name in names):
            sentences.append(f"no module is called {target!r}, {_nearest(target, linears)}")
    return sentences


def check_patterns(config: Any, model: nn.Module, adapted: Collection[str]) -> None:
    """raises ValueError for what a configuration names beside target_modules and the model has not.

    adapted: the names of the layers that were adapted.
    """
    _check_modules_to_save(config, model)
    _check_experts(config, adapted)
    _check_layers(config, adapted)


def _check_modules_to_save(config: Any, model: nn.Module) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for wanted in config.modules_to_save or ():
        if not any(name.endswith(wanted) for name in names):  # as PEFT finds them
            raise ValueError(f"modules_to_save names {wanted!r}, and no module is called so: {_nearest(wanted, names)}")


def _check_experts(config: Any, adapted: Collection[str]) -> None:
    keys = list(config.num_experts_pattern)
    used = {get_pattern_key(keys, name) for name in adapted}
    for key in keys:
        # A pattern after one that matches the same layers is never asked: that is the caller's order.
        if key not in used and not any(get_pattern_key([key], name) == key for name in adapted):
            raise ValueError(
                f"num_experts_pattern names {key!r}, which matches none of the adapted layers: a pattern must reach "
                f"the end of a layer's name, {_nearest(key, adapted)}"
            )


def _check_layers(config: Any, adapted: Collection[str]) -> None:
    wanted = config.layers_to_transform
    if wanted is None:
        return
    numbers = {int(number) for name in adapted for number in re.findall(r"(?:^|\.)(\d+)(?=\.)", name)}
    for number in [wanted] if isinstance(wanted, int) else wanted:
        if number not in numbers:
            there = f"adapted are {', '.join(map(str, sorted(numbers)))}" if numbers else "no layer has a number"
            raise ValueError(f"layers_to_transform names layer {number}, in which nothing matches: {there}")


def check_excluded(config: Any, model: nn.Module) -> None:
    """raises ValueError for a name or an expression in exclude_modules that no module matches."""
    excluded = config.exclude_modules
    names = [name for name, _ in model.named_modules() if name]
    if isinstance(excluded, str):
        if not any(re.fullmatch(excluded, name) for name in names):
            raise ValueError(
                f"exclude_modules={excluded!r} matches none of the modules: an expression must match a whole name, "
                f"such as {', '.join(names[1:4])}"
            )
        return
    for name in excluded or ():
        if not any(own == name or own.endswith(f".{name}") for own in names):
            raise ValueError(f"exclude_modules names {name!r}, and no module is called so: {_nearest(name, names)}")


def _nearest(target: str, names: Iterable[str]) -> str:
    """Which endings of the layers' names, of as many parts as `target` has, come near to it; or which there are."""
    parts = target.count(".") + 1
    endings = [*dict.fromkeys(".".join(name.split(".")[-parts:]) for name in names)]
    nearest = difflib.get_close_matches(target, endings, n=3)
    return f"the nearest are {', '.join(nearest)}" if nearest else f"there are {', '.join(endings[:12])}"
