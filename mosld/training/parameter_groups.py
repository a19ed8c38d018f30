"""Learning rates by what a weight is, for any optimiser of torch's kind."""

from typing import Any

from torch import nn

from ..layers.host import all_adapters


def parameter_groups(
    model: nn.Module, lr: float, *, b_ratio: float = 16.0, router_ratio: float = 1.0, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The trained parameters of `model` in groups, as torch's optimisers take them.

    LoRA+ (arXiv 2402.12354) learns B faster than A: lr_B = b_ratio * lr. PEFT's helpers for it and for LoRA-FA look for
    weights called `lora_B` and `lora_A`, of which a mixture has none: with them it would be trained by a plain AdamW.

    Args:
        model: Any module with mixtures.
        lr: The learning rate of A, and of what is trained beside the mixtures (modules_to_save, say).
        b_ratio: The learning rate of every B over `lr`; LoRA+ finds 16 a good one where B starts at zero.
        router_ratio: The same of routers and of what else routes: tasks' embeddings, mixing tensors.
        weight_decay: Of matrices; vectors such as biases and norms have none.

    Returns:
        Groups with "name", "params", "lr" and "weight_decay": "a", "b", "router", "other", those of vectors apart, as
        they do not decay. Empty ones are left out. Each trained parameter is in one of them.

    Raises:
        ValueError: The model has no mixture, or a number is not positive (a weight_decay negative).

    >>> import torch
    >>> from torch import nn
    >>> from mosld import MoSLDLinear, parameter_groups
    >>> model = nn.Sequential(MoSLDLinear(6, 5), nn.LayerNorm(5))
    >>> groups = parameter_groups(model, 1e-4, b_ratio=16, weight_decay=0.01)
    >>> [(group["name"], group["lr"], group["weight_decay"]) for group in groups]
    [('a', 0.0001, 0.01), ('b', 0.0016, 0.01), ('router', 0.0001, 0.01), ('other', 0.0001, 0.0)]
    >>> optimizer = torch.optim.AdamW(groups)
    """
    for name, value in {"lr": lr, "b_ratio": b_ratio, "router_ratio": router_ratio}.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
    kinds: dict[int, str] = {}
    for _, adapter in all_adapters(model):
        for part in adapter.parts:
            own: Any = getattr(adapter, part)
            if own is not None:
                kinds[id(own.weight)] = _kind(part)
    if not kinds:
        raise ValueError(f"{type(model).__name__} has no MoSLD layer")
    rates = {"a": lr, "b": b_ratio * lr, "router": router_ratio * lr, "other": lr}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = kinds.get(id(parameter), "other"), parameter.dim() > 1
            groups.setdefault(key, []).append(parameter)
    ordered = []
    for kind, rate in rates.items():
        for decays in (True, False):
            if (kind, decays) in groups:
                decay = weight_decay if decays else 0.0
                ordered.append({"name": kind, "params": groups[kind, decays], "lr": rate, "weight_decay": decay})
    return ordered


def _kind(part: str) -> str:
    if part.endswith("_a"):
        return "a"
    return "b" if part.endswith("_b") else "router"
