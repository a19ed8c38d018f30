"""What belongs to one forward of a model with mixtures, and how a recomputation of it gets the same again.

A mixture reads more than its input: the routing that the caller gave, which adapters are active, dropout's rates and
seed, the scale. All of that may have changed when activation checkpointing runs a layer again in backward. So each
checkpointed region keeps what its layers read (`Region`), and reads it from there when it is run again.

And it tells more than its output: which experts its tokens chose, of which some are padding. What the layers of one
forward keep belongs together (`Forward`): hooks on the model begin it and end it, and note the mask and the number of
rows that this very forward was called with.

All of it is per thread. `docs/design/forward_state.md` tells how it travels.
"""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from .masks import reduced


class _ThisThread(threading.local):
    """Of the thread that asks: the running forward, the checkpointed region inside it, what `mosld.routing` gave."""

    forward: "Forward | None" = None
    region: "Region | None" = None
    scope: Mapping[Any, Any] | None = None


this_thread = _ThisThread()
IGNORED = -100  # torch's and transformers' label for what no loss is asked of


class Forward:
    """One forward of a model: how many rows it has, and which of the tokens that its layers see are real.

    rows: of the batch that the model was called with, None where it cannot be told. length: tokens of each row.
    images: whether pixels alone came in, so that a layer's rows are windows of one image after the other.
    """

    __slots__ = (
        "rows",
        "length",
        "images",
        "mask",
        "decoder_mask",
        "memory",
        "memory_mask",
        "shorter",
        "strange",
        "ids",
        "outer",
    )

    def __init__(self, rows: int | None = None, length: int | None = None, images: bool = False):
        self.rows, self.length, self.images = rows, length, images
        self.mask: Tensor | None = None  # [rows, tokens] of the stack that runs
        self.decoder_mask: Tensor | None = None  # of a decoder that is given none: where there are labels
        self.memory: Tensor | None = None  # what a decoder's cross-attention reads: the encoder's output
        self.memory_mask: Tensor | None = None
        self.shorter: Callable[[Tensor], Tensor] | None = None  # lengths before a model's convolutions -> after them
        self.strange: str | None = None  # a mask that does not tell which tokens are real, in words
        self.ids: Tensor | None = None  # input_ids that came without a mask
        self.outer: Forward | None = None  # of a model around this one, while this one runs

    def mask_of(self, x: Tensor) -> Tensor | None:
        """The mask of the tokens x [rows, tokens, ...], nonzero where they are real, or None where none is known."""
        mask = self.memory_mask if x is self.memory else self.mask
        if mask is None or x.dim() < 3:
            return None
        if mask.shape == x.shape[:-1]:
            return mask
        if self.shorter is not None and mask.dim() == 2 and x.dim() == 3 and len(mask) == len(x):
            lengths = self.shorter((mask != 0).sum(1)).to(x.device)
            return torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)
        return None


class Region:
    """What the layers of one checkpointed region read, in the order in which they read it.

    `entered(again=False)` around the forward keeps it, `entered(again=True)` around a recomputation gives it back. The
    region of a checkpoint inside another's recomputation is fed by the outer one.
    """

    def __init__(self):
        self._outer = this_thread.region
        self._read: dict[Any, list[Any]] = {}
        self._position: dict[Any, int] | None = None  # None while it keeps

    def same(self, key: Any, value: Any) -> Any:
        """`value`, or in a recomputation what stood there in the forward. key: who reads, a hashable object."""
        if self._position is not None:
            position = self._position.get(key, 0)
            self._position[key] = position + 1
            known = self._read.get(key, ())
            return known[position] if position < len(known) else value
        if self._outer is not None:
            value = self._outer.same(key, value)
        self._read.setdefault(key, []).append(value)
        return value

    @contextlib.contextmanager
    def entered(self, again: bool) -> Iterator[None]:
        outside, position = this_thread.region, self._position
        this_thread.region, self._position = self, {} if again else None
        try:
            yield
        finally:
            this_thread.region, self._position = outside, position


class _Remembered:
    """The function of a reentrant checkpoint: the first call is the forward, the others are recomputations."""

    def __init__(self, function: Callable):
        self._function, self._region, self._ran = function, Region(), False

    def __call__(self, *args: Any) -> Any:
        again, self._ran = self._ran, True
        with self._region.entered(again):
            return self._function(*args)


def remember_checkpoints() -> None:
    """Let torch's activation checkpointing, of both kinds, keep what the mixtures in it read.

    torch has a place for it in one kind (`context_fn`), which belongs to the caller, and none in the other. So the two
    functions behind `torch.utils.checkpoint.checkpoint` are wrapped, once, when the first mixture is made; whoever
    imported `checkpoint` before has it too. What others gave as context_fn runs as before.
    """
    module: Any = torch.utils.checkpoint
    if hasattr(module, "_mosld_remembers"):
        return
    module._mosld_remembers = True
    original = module.CheckpointFunction

    class Reentrant:
        """In the place of torch's function, of which `apply` alone is used."""

        @staticmethod
        def apply(function: Callable, *args: Any) -> Any:
            return original.apply(_Remembered(function), *args)

    generator = module._checkpoint_without_reentrant_generator
    names = list(inspect.signature(generator).parameters)
    place = names.index("context_fn")

    def not_reentrant(*args: Any, **kwargs: Any) -> Any:
        contexts = args[place]
        if torch.compiler.is_compiling():
            return generator(*args, **kwargs)
        return generator(*args[:place], lambda: _with_region(contexts), *args[place + 1 :], **kwargs)

    module.CheckpointFunction = Reentrant
    module._checkpoint_without_reentrant_generator = not_reentrant


def _with_region(context_fn: Callable) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    forward, again = context_fn()
    region = Region()
    return _Both(forward, lambda: region.entered(False)), _Both(again, lambda: region.entered(True))


class _Both(contextlib.AbstractContextManager):
    """The caller's context, and ours inside it; a recomputation may be entered more than once."""

    def __init__(self, theirs: contextlib.AbstractContextManager, ours: Callable):
        self._theirs, self._ours = theirs, ours
        self._open: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        stack = contextlib.ExitStack()
        stack.enter_context(self._theirs)
        stack.enter_context(self._ours())
        self._open.append(stack)

    def __exit__(self, *error: Any) -> None:
        self._open.pop().__exit__(*error)


def in_backward() -> bool:
    """Whether this thread is inside backward, where layers run only to be recomputed."""
    return torch._C._current_graph_task_id() != -1


def begun(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Forward:
    """The forward that a model is called for with these arguments."""
    given = _by_name(module, args, kwargs)
    own = Forward()
    for name in ("input_ids", "inputs_embeds", "decoder_input_ids", "pixel_values", "input_features", "input_values"):
        tensor = given.get(name)
        if isinstance(tensor, Tensor) and tensor.dim() > 0:
            own.rows = len(tensor)
            own.images = name == "pixel_values"
            own.length = tensor.shape[1] if tensor.dim() in (2, 3) and not own.images else None
            break
    else:
        first = next((value for value in args if isinstance(value, Tensor)), None)
        if first is not None and first.dim() > 1:
            own.rows, own.length = first.shape[0], first.shape[1] if first.dim() == 3 else None
    mask, labels = given.get("attention_mask"), given.get("labels")
    own.mask = reduced(mask)
    if mask is None:
        own.ids = given.get("input_ids")
    elif own.mask is None:
        own.strange = f"{list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    if isinstance(labels, Tensor) and labels.dim() == 2:
        own.decoder_mask = labels != IGNORED
    lengths = getattr(module, "_get_feat_extract_output_lengths", None)
    if lengths is not None and ("input_values" in given or "input_features" in given):
        own.shorter = cast(Callable[[Tensor], Tensor], lengths)
    return own


def _by_name(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    if not args:
        return kwargs
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}
