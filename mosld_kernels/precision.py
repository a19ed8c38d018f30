"""Which dtype each part of a call runs in: products in x's or in autocast's, routing never below float32."""

import contextlib

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
AUTOCAST_FLOATS = FLOATS[1:]  # what autocast casts; it leaves float64 alone
# Asked once: Dynamo of torch 2.11 cannot trace the question, and a device type does not gain autocast later.
_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "xla", "mtia", "ipu", "maia", "privateuseone")
AUTOCAST_DEVICES = frozenset(device for device in _DEVICES if torch.amp.is_autocast_available(device))


def router_dtype(dtype: torch.dtype) -> torch.dtype:
    """Routing is done in float32, or in float64 where x is float64.

    >>> import torch
    >>> from mosld_kernels.precision import router_dtype
    >>> router_dtype(torch.bfloat16), router_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device; devices without it, such as meta, have none."""
    device = x.device.type
    return device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def product_dtype(x: Tensor) -> torch.dtype:
    """Under autocast the base layer runs in the autocast dtype, as torch.nn.functional.linear does; float64 is left."""
    autocast = autocasts(x) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


def castable_dtypes(x: Tensor, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes that the base layer may have where products run in `dtype`: x's own, or what autocast casts."""
    return AUTOCAST_FLOATS if dtype != torch.float64 and autocasts(x) else (x.dtype,)


def no_autocast(device: str) -> contextlib.AbstractContextManager:
    """Routing and the gradients of the adapter keep their dtypes inside the user's autocast, too."""
    if device not in AUTOCAST_DEVICES:  # the meta device, for one
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)
