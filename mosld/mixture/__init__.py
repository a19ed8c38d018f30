"""What the mixture of one layer is, as formulas: its sizes, its mixing matrix, its router, its gates.

Importing this package makes the known mixings and routers available by name.
"""

from . import known as known  # the mixings register themselves
from .registry import MIXINGS, Mixing, register_mixing
from .routers import ROUTERS
from .spec import Mixture

__all__ = ["MIXINGS", "ROUTERS", "Mixing", "Mixture", "register_mixing"]
