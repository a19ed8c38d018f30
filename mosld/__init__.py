"""MoSLD (arXiv 2412.08946): mixtures of LoRA experts that share one down-projection.

`MoSLDLinear` is a drop-in for nn.Linear, `MoSLDConfig` a method of Hugging Face PEFT: importing this package registers
it there, so import it before loading an adapter.
"""

from .tuner.register import register

register()

from . import presets  # noqa: E402  the modules below need the registration
from .convert.export import export_lora  # noqa: E402
from .convert.fixed_gates import LayerGates  # noqa: E402
from .convert.import_lora import import_lora  # noqa: E402
from .files.version import __version__ as __version__  # noqa: E402
from .layers.adapter import MoSLDAdapter  # noqa: E402
from .layers.linear import MoSLDLinear  # noqa: E402
from .layers.routing import forget_routing, routing, set_routing  # noqa: E402
from .layers.stats import RouterStats, router_stats  # noqa: E402
from .mixture.registry import register_mixing  # noqa: E402
from .mixture.routers import register_router  # noqa: E402
from .training.balance import balance_loss  # noqa: E402
from .training.contrastive import contrastive_loss  # noqa: E402
from .training.localized import localized_balance_loss  # noqa: E402
from .training.parameter_groups import parameter_groups  # noqa: E402
from .training.trainer import MoSLDTrainer, MoSLDTrainerMixin  # noqa: E402
from .tuner.config import MoSLDConfig  # noqa: E402

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
    "parameter_groups",
    "presets",
    "register_mixing",
    "register_router",
    "router_stats",
    "routing",
    "set_routing",
]
