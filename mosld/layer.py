"""Layer and adapter under the path that users import them from; they live in `mosld/layers`."""

from .layers.adapter import MoSLDAdapter
from .layers.linear import MoSLDLinear

__all__ = ["MoSLDAdapter", "MoSLDLinear"]
