"""Which modules of a model a mixture can be placed on, and what share of the model's weights is out of reach."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Collection, Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .layer import PREFIX

# Methods that touch a layer's weight without computing with it.
_PREPARING = ("__init__", "_init_weights", "reset_parameters", "init_weights", "extra_repr")


def unsupported(target: nn.Module, parent: nn.Module, name: str) -> str | None:
    """Why no mixture can stand beside `target`, a module of `parent`, as a sentence; or None. name: within the model.

    A mixture adds to what a layer returns when it is called. So it must be called, and return x W^T.
    """
    base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(base_layer, (nn.Linear, Conv1D)):
        return f"MoSLD adapts nn.Linear and Conv1D layers, but {name} is a {type(base_layer).__name__}"
    child = name.rpartition(".")[2]
    if any(part.startswith(PREFIX) for part in name.split(".")):
        # PEFT finds a weight's place in a file by this beginning, and would look for it in the layer's own name.
        return f"{name} cannot be adapted: names that begin with {PREFIX!r} are those of an adapter's weights"
    if isinstance(parent, nn.MultiheadAttention) or child in _read_never_called(type(parent)):
        owner = "nn.MultiheadAttention" if isinstance(parent, nn.MultiheadAttention) else type(parent).__name__
        return f"{name} cannot be adapted: {owner} reads its weight and never calls it"
    if not _computes_linear(base_layer):
        return f"{name} cannot be adapted: a {type(base_layer).__name__} does not return what a linear layer returns"
    return None


def all_linear(model: nn.Module, names: Collection[str]) -> set[str]:
    """Of the modules that PEFT takes for "all-linear", those that a mixture can stand beside."""
    kept = set()
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        if unsupported(model.get_submodule(name), parent, name) is None:
            kept.add(name)
    return kept


@torch.no_grad()
def _computes_linear(layer: nn.Module) -> bool:
    """Whether the layer's output is one row of out_features for each row of x, as far as it can be asked.

    Routers of mixture-of-experts models are subclasses of nn.Linear that return a tuple, and grouped linear layers are
    such that return other sizes. Quantised layers are subclasses, too, and right.
    """
    if type(layer).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    weight = layer.weight
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.dim() != 2:
        return True
    if weight.is_meta or not weight.numel():  # it cannot be asked: those of transformers' own models are no linear ones
        return not type(layer).__module__.startswith("transformers.models.")
    out_features, in_features = weight.shape
    x = torch.zeros(2, 3, in_features, dtype=weight.dtype, device=weight.device)
    try:
        out = layer(x)
    except (RuntimeError, ValueError, TypeError):
        return False
    return isinstance(out, torch.Tensor) and out.shape == (2, 3, out_features)


@functools.cache
def _read_never_called(parent: type[nn.Module]) -> frozenset[str]:
    """The attributes whose weight or bias a module's code reads while it calls them nowhere.

    Found in the source, as there is no other sign of it: such a layer counts as trainable, is saved and never moves.
    """
    read: set[str] = set()
    used: set[str] = set()
    for own in parent.__mro__:
        if own is nn.Module:
            break
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(own)))
        except (OSError, TypeError, SyntaxError):  # built elsewhere than in a file: nothing is known
            return frozenset()
        for method in ast.walk(tree):
            if isinstance(method, ast.FunctionDef) and method.name not in _PREPARING:
                for name, how in _uses(method):
                    (read if how in ("weight", "bias") else used).add(name)
    return frozenset(read - used)


def _uses(method: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    """What a method does with `self.name`: the attribute that it takes of it, or "" for the module as a whole."""
    parts: set[int] = set()
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and _is_of_self(node.value):
            parts.add(id(node.value))
            yield node.value.attr, node.attr  # pyright: ignore[reportAttributeAccessIssue]
    for node in ast.walk(method):
        if _is_of_self(node) and id(node) not in parts:
            yield node.attr, ""  # pyright: ignore[reportAttributeAccessIssue]


def _is_of_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def fused_experts(model: nn.Module) -> dict[str, int]:
    """Modules that hold the weights of a base model's experts in one tensor [E, ., .] -> how many numbers these are."""
    found = {}
    for name, module in model.named_modules():
        if "expert" not in f"{name} {type(module).__name__}".lower():
            continue
        count = 0
        for parameter in module.parameters(recurse=False):
            count += parameter.numel() if parameter.dim() == 3 else 0
        if count:
            found[name] = count
    return found


def out_of_reach(model: nn.Module, adapted: Collection[str]) -> str | None:
    """One line on the weights that no adapter reaches though somebody may think so, or None.

    That is where a layer was adapted inside a block whose experts are fused ("all-linear", or names that shared experts
    have); who adapts attention alone did not ask for them.
    """
    experts = fused_experts(model)
    if not experts:
        return None
    blocks = tuple({name.rpartition(".")[0] + "." for name in experts})
    if not any(name.startswith(blocks) for name in adapted):
        return None
    total = 0
    for name, parameter in model.named_parameters():
        total += 0 if PREFIX in name else parameter.numel()  # of the base alone
    first = next(iter(experts))
    return (
        f"{sum(experts.values()) / total:.0%} of the model's weights are fused experts ({first} and "
        f"{len(experts) - 1} more), which no adapter of linear layers reaches: they stay frozen"
    )
