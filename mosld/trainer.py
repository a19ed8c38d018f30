"""The Trainer under the path that users import it from; it lives in `mosld/training/trainer.py`."""

from .training.trainer import MoSLDTrainer, MoSLDTrainerMixin

__all__ = ["MoSLDTrainer", "MoSLDTrainerMixin"]
