"""`MixtureHost`: the one interface by which others find the mixtures in a model."""

from collections.abc import Iterable, Iterator

from torch import nn

from .adapter import MoSLDAdapter


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
