"""`MixtureHost`: the one interface by which others find the mixtures in a model."""

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn

from .adapter import MoSLDAdapter
from .forwards import Forward, begun, in_backward, this_thread
from .masks import reduced
from .unbalanced import watch_balance


class MixtureHost:
    """A module of a model that has mixtures beside it: a `MoSLDLinear`, or a layer inside a PEFT model."""

    def all_adapters(self) -> Iterable[MoSLDAdapter]:
        """Every mixture of this module, active or not."""
        raise NotImplementedError

    def running_adapters(self) -> Iterable[MoSLDAdapter]:
        """The mixtures that take part in a forward now."""
        raise NotImplementedError


def all_adapters(model: nn.Module) -> Iterator[tuple[str, MoSLDAdapter]]:
    """Every mixture in `model`, active or not, with its layer's name."""
    for name, module in model.named_modules():
        if isinstance(module, MixtureHost):
            for adapter in module.all_adapters():
                yield name, adapter


def running_adapters(model: nn.Module) -> Iterator[tuple[str, MoSLDAdapter]]:
    """The mixtures that take part in a forward of `model` now, each with its layer's name."""
    for name, module in model.named_modules():
        if isinstance(module, MixtureHost):
            for adapter in module.running_adapters():
                yield name, adapter


def adapters_below(module: nn.Module) -> Iterator[MoSLDAdapter]:
    """Those that do not run now, too. Not by `modules()`, which takes twice as long: it is done in every forward."""
    if isinstance(module, MoSLDAdapter):
        yield module
    elif isinstance(module, MixtureHost):
        yield from module.all_adapters()
        base_layer = getattr(module, "base_layer", None)  # PEFT's name for what a layer wraps
        if base_layer is not None:
            yield from adapters_below(base_layer)
    else:
        for child in module.children():
            yield from adapters_below(child)


def forget(adapters: Iterable[MoSLDAdapter]) -> None:
    """Each as before its first forward."""
    for adapter in adapters:
        adapter.reset_state()
        adapter.deferred_grads = None


def announce(model: nn.Module) -> None:
    """Let every forward of `model` begin and end one for its mixtures, see `mosld.layers.forwards`.

    To be called again when mixtures are added or removed. Where none is left the hooks are taken away.
    """
    adapters = [adapter for _, adapter in all_adapters(model)]
    for name, adapter in all_adapters(model):
        adapter.layer = name
    stacks = _stacks(model)
    for module in (model, *stacks):
        _unhook(module)
    if not adapters:
        vars(model).pop(_ANNOUNCED, None)
        return
    setattr(model, _ANNOUNCED, Announced(adapters))
    model.register_forward_pre_hook(_begin, with_kwargs=True)
    model.register_forward_hook(_end, always_call=True)
    for stack in stacks:
        stack.register_forward_pre_hook(_enter_stack, with_kwargs=True)
        stack.register_forward_hook(_leave_stack, always_call=True)


def is_announced(model: nn.Module) -> bool:
    """Whether the forwards of `model`, or of a module inside it, begin and end by themselves."""
    return any(_ANNOUNCED in vars(module) for module in model.modules())


_ANNOUNCED = "_mosld_announced"


class Announced:
    """The mixtures of a model whose forwards are announced, so that nobody walks it each time."""

    def __init__(self, adapters: list[MoSLDAdapter]):
        self.adapters = adapters
        self.checked = False  # whether a training forward has shown which of them run

    def __deepcopy__(self, memo: dict) -> "Announced":
        twin = Announced([copy.deepcopy(adapter, memo) for adapter in self.adapters])
        twin.checked = self.checked
        return twin

    def __getstate__(self) -> dict:
        return {"adapters": self.adapters, "checked": self.checked}


def _unhook(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for number, hook in list(hooks.items()):
            if hook in (_begin, _end, _enter_stack, _leave_stack):
                del hooks[number]
                for extra in ("_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"):
                    getattr(module, extra).pop(number, None)


def _stacks(model: nn.Module) -> list[nn.Module]:
    """The encoder and the decoder of a model that has both, as transformers tells them."""
    found = []
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        for getter in ("get_encoder", "get_decoder"):
            stack = getattr(model, getter, lambda: None)()
            if isinstance(stack, nn.Module) and stack is not model:
                found.append(stack)
    return found


def _begin(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        forget(adapters_below(model))
        return
    if in_backward():  # activation checkpointing of the whole model: the forward is the one it was
        return
    announced = cast(Announced, vars(model)[_ANNOUNCED])
    forget(announced.adapters)
    forward = begun(model, args, kwargs)
    forward.outer, this_thread.forward = this_thread.forward, forward


def _end(model: nn.Module, args: tuple, output: Any) -> None:
    if torch.compiler.is_compiling() or in_backward():
        return
    announced = cast(Announced, vars(model)[_ANNOUNCED])
    forward = this_thread.forward
    this_thread.forward = None if forward is None else forward.outer
    if forward is not None:
        forward.outer = None  # layers remember their last forward, and not what it was part of
    # An output of None: the forward ended in an error, which says more.
    if not announced.checked and model.training and torch.is_grad_enabled() and output is not None:
        announced.checked = True
        _tell_idle(model, forward)
        watch_balance(model, running_adapters(model), output)


def _tell_idle(model: nn.Module, forward: Forward | None) -> None:
    """Name the layers that are adapted and were not run: what is never called counts as trainable and never moves."""
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
        return  # compiled layers do not note their forwards
    idle: Counter[str] = Counter()
    total = 0
    for name, adapter in running_adapters(model):
        if any(parameter.requires_grad for parameter in adapter.parameters()):
            total += 1
            if adapter.last_forward is not forward:
                idle[re.sub(r"\d+", "*", name)] += 1
    if not idle:
        return
    texts = [name if count == 1 else f"{name} ({count} layers)" for name, count in idle.items()]
    warnings.warn(
        f"{sum(idle.values())} of {total} adapted layers did not run in the first training forward: {', '.join(texts)}"
        ". What never runs is saved and never trained: leave it out with exclude_modules, unless other inputs reach it",
        stacklevel=3,
    )


def _enter_stack(stack: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    forward = None if torch.compiler.is_compiling() else this_thread.forward
    if forward is not None:
        forward.mask = reduced(kwargs.get("attention_mask"))
        forward.memory = kwargs.get("encoder_hidden_states")
        if forward.memory is not None and forward.mask is None:
            forward.mask = forward.decoder_mask
        forward.memory_mask = reduced(kwargs.get("encoder_attention_mask"))


def _leave_stack(stack: nn.Module, args: tuple, output: Any) -> None:
    forward = None if torch.compiler.is_compiling() else this_thread.forward
    if forward is not None:
        forward.mask = forward.memory = forward.memory_mask = None
