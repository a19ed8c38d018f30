"""What the mixture of one layer is, as formulas: its sizes, its mixing matrix, its router, its gates.

Importing this package makes the known mixings and routers available by name.
"""

from . import known as known  # the mixings register themselves
from .registry import MIXINGS, Mixing, register_mixing
from .routers import ROUTERS, Router, register_router
from .spec import Mixture

__all__ = ["MIXINGS", "ROUTERS", "Mixing", "Mixture", "Router", "register_mixing", "register_router"]
