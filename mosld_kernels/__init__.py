"""Tensors in, tensors out: a frozen linear layer with a routed mixture of LoRA experts that share one A.

`mosld_linear` is the operator, `mosld_delta` its update alone, `keep_mask` the dropout mask it draws, and
`reference` the formula itself. Depends on torch alone.
"""

from . import reference
from .dispatch import mosld_delta, mosld_linear
from .dropout import keep_mask

__all__ = ["keep_mask", "mosld_delta", "mosld_linear", "reference"]
