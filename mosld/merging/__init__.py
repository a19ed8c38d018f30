"""One multi-task model out of separately trained ones: task vectors, and the methods that merge them.

vectors = read_task_vectors([...])  ->  merged = merge(model, vectors, MergeSettings("ties"))  ->  save_checkpoint(...)

>>> from mosld.merging import METHODS, MergeSettings
>>> [name for name, method in METHODS.items() if not method.adaptive]
['task_arithmetic', 'ties', 'r_mtllmf']
>>> METHODS["ties"].scale == MergeSettings("ties").start
True
"""

from .adaptive import AdaptiveSettings
from .concrete import ConcreteSettings
from .merge import Merged, MergeSettings, merge
from .methods import METHODS
from .read import read_task_vectors
from .realign import RealignSettings, realign
from .save import applied, save_checkpoint, save_lora, save_mixture
from .unlabelled import Inputs, Questions, without_labels
from .vectors import MergeError, TaskVector

__all__ = [
    "METHODS",
    "AdaptiveSettings",
    "ConcreteSettings",
    "Inputs",
    "MergeError",
    "MergeSettings",
    "Merged",
    "Questions",
    "RealignSettings",
    "TaskVector",
    "applied",
    "merge",
    "read_task_vectors",
    "realign",
    "save_checkpoint",
    "save_lora",
    "save_mixture",
    "without_labels",
]
