"""The auxiliary losses under the path that users import them from; each has a file of its own in `mosld/training`."""

from .training.balance import balance_loss
from .training.contrastive import contrastive_loss
from .training.localized import localized_balance_loss

__all__ = ["balance_loss", "contrastive_loss", "localized_balance_loss"]
