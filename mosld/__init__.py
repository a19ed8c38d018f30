"""MoSLD (arXiv 2412.08946): mixtures of LoRA experts that share one down-projection.

`MoSLDLinear` is a drop-in for nn.Linear, `MoSLDConfig` a method of Hugging Face PEFT: importing this package registers
it there, so import it before loading an adapter.
"""

from .tuner import register

register()

from . import presets  # noqa: E402  the modules below need the registration
from .balance import balance_loss  # noqa: E402
from .config import MoSLDConfig  # noqa: E402
from .export import export_lora  # noqa: E402
from .fixed_gates import LayerGates  # noqa: E402
from .importing import import_lora  # noqa: E402
from .layer import MoSLDAdapter, MoSLDLinear  # noqa: E402
from .losses import contrastive_loss, localized_balance_loss  # noqa: E402
from .mixture import register_mixing  # noqa: E402
from .router import RouterStats, forget_routing, router_stats  # noqa: E402
from .routing import set_routing  # noqa: E402
from .trainer import MoSLDTrainer, MoSLDTrainerMixin  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "LayerGates",
    "MoSLDAdapter",
    "MoSLDConfig",
    "MoSLDLinear",
    "MoSLDTrainer",
    "MoSLDTrainerMixin",
    "RouterStats",
    "balance_loss",
    "contrastive_loss",
    "export_lora",
    "forget_routing",
    "import_lora",
    "localized_balance_loss",
    "presets",
    "register_mixing",
    "router_stats",
    "set_routing",
]
