"""The rows of a comparison: methods by name, LoRA of the reference's size, and a method at each value of a sweep."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .methods import LORA, METHODS, NAMES, Adapter, targets
from .stages import count_trained

EQUAL = "lora_equal"  # PEFT's LoRA of the rank whose parameters come nearest to those of the reference
REFERENCE = "mosld"
KNOWN = (*METHODS[:2], EQUAL, *METHODS[2:])
DEFAULT = (LORA, EQUAL, "hydralora", "mola", "mosl", REFERENCE)
RATE = "learning_rate"
SWEEPS = ("rank", "experts", "dropout", RATE)


@dataclass(frozen=True)
class Row:
    """rate: the learning rate where it is not the method's own."""

    name: str
    title: str
    adapter: Adapter
    rate: str | None = None


def make_rows(
    names: Sequence[str],
    base: PreTrainedModel,
    target_words: str | None,
    rates: Mapping[str, str],
    sweep: str | None,
    num_tasks: int,
) -> list[Row]:
    """The methods `names`, or where there is a sweep each of them at each of its values.

    raises ValueError for a sweep that a method cannot take and for targets that the model has not.
    """
    rows = []
    for name in names:
        if name == EQUAL:
            adapter = _equal_lora(base, targets(LORA, target_words), num_tasks)
            title = f"LoRA, rank {adapter.options['r']}"
        else:
            adapter = Adapter(name, {}, targets(name, target_words))
            title = NAMES.get(name, name)
        row = Row(name, title, adapter, rates.get(name))
        rows += _swept(row, sweep, base) if sweep else [row]
    # Counted on the real layers, so that a target that is not there is known before any training.
    for row in rows:
        count_trained(base, row.adapter, num_tasks)
    return rows


def _equal_lora(base: PreTrainedModel, places: str | list[str], num_tasks: int) -> Adapter:
    """LoRA with MoSLD's number of parameters, or the nearest to it; alpha / r as in every LoRA here."""
    of_rank_1 = count_trained(base, Adapter(LORA, {"r": 1}, places), num_tasks)
    wanted = count_trained(base, Adapter(REFERENCE, {}, places), num_tasks)
    # A LoRA's parameters are proportional to its rank.
    rank = max(1, round(wanted / of_rank_1))
    return Adapter(LORA, {"r": rank, "alpha": 2.0 * rank}, places)


def check_known(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    """raises ValueError, with those that there are, for names of `what` that are not among `known`."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{what} must be of {', '.join(known)}, got {', '.join(unknown)}")


def positive_number(what: str, text: str) -> str:
    """`text`, as it was given, where it is a number above 0; raises ValueError where it is not."""
    try:
        usable = 0 < float(text) < float("inf")
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"{what} must be positive and finite numbers, got {text!r}")
    return text


def _swept(row: Row, sweep: str, base: PreTrainedModel) -> list[Row]:
    """ "rank=2,4" -> a row of the method for each value."""
    what, _, text = sweep.partition("=")
    values = text.split(",")
    if what not in SWEEPS or not all(values):
        raise ValueError(f"sweep must be {'=..., '.join(SWEEPS)}=..., with values after commas, got {sweep!r}")
    if len(set(values)) < len(values):
        raise ValueError(f"values of a sweep must differ, got {sweep!r}")
    rows = []
    for value in values:
        name, title = f"{row.name}-{what}{value}", f"{row.title}, {what.replace('_', ' ')} {value}"
        if what == RATE:
            rate = positive_number("learning rates of a sweep", value)
            rows.append(Row(name, title, row.adapter, rate))
        else:
            adapter = replace(row.adapter, options=swept_options(row.adapter.method, what, value, base))
            rows.append(Row(name, title, adapter, row.rate))
    return rows


def swept_options(method: str, what: str, value: str, base: PreTrainedModel) -> dict[str, Any]:
    """A sweep's value -> the fields of the method's configuration."""
    try:
        if what == "dropout":
            return {"dropout": float(value)}
        if what == "rank":
            mixture = Adapter(method).mixture()
            scale = 2.0 if mixture is None else mixture.scale
            return {"r": int(value), "alpha": int(value) * scale}
        counts = list(map(int, value.split("-")))
    except ValueError:
        raise ValueError(f"{what} of a sweep must be numbers, got {value!r}") from None
    if len(counts) == 1:
        return {"num_experts": counts[0]}
    return {"num_experts": max(counts), "num_experts_pattern": _experts_by_part(counts, value, base)}


def _experts_by_part(counts: Sequence[int], value: str, base: PreTrainedModel) -> dict[str, int]:
    """Expression for the layers of each of `counts` equal parts -> its experts"""
    home, layers = layer_list(base)
    parts = len(counts)
    if parts > layers:
        raise ValueError(
            f"experts={value} has {parts} parts of the layers, and the model has {layers} layers: give at most as many"
        )
    numbers: list[list[str]] = [[] for _ in counts]
    for layer in range(layers):
        # Parts differ by one layer at most where their number does not divide that of the layers.
        numbers[layer * parts // layers].append(str(layer))
    pattern = {}
    for count, own in zip(counts, numbers, strict=True):
        pattern[rf"{re.escape(home)}\.({'|'.join(own)})\..*"] = count
    return pattern


def layer_list(base: PreTrainedModel) -> tuple[str, int]:
    """Name and length of the list of the model's layers."""
    count = base.config.get_text_config().num_hidden_layers
    for name, module in base.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, count
    raise ValueError(
        f"experts by parts of the layers need a list of {count} layers, which {type(base).__name__} has not"
    )
