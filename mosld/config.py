"""MoSLDConfig: what `peft.get_peft_model` needs to adapt a model with MoSLD."""

import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

from peft.config import PeftConfig
from peft.utils import PeftType
from peft.utils.other import get_pattern_key

from .adapter_file import CONFIG, DIGEST, WEIGHTS, AdapterFileError, AdapterWeights, write_digest
from .at_once import folder_beside
from .layer import check_hyperparameters


@dataclass
class MoSLDConfig(PeftConfig):
    """Configuration of a MoSLD adapter (arXiv 2412.08946); the defaults are the paper's where it gives one.

    r: rank of the shared down-projection A and of every expert's B.
    alpha: the update is scaled by alpha / r.
    num_experts: experts per adapted layer, E. num_experts_pattern: per-layer exceptions, from a layer name or regular
        expression to a number, matched as PEFT matches `rank_pattern`.
    top_k: experts chosen per token, in [1, E] of every layer.
    dropout: probability in [0, 1] of dropping an element of A in training.
    balance_coef: weight of the load-balance loss that `MoSLDTrainer` adds.
    input_dropout: dropout on the layer's input; only 0.0 in this version.
    shared: which factor the experts share; only "down" in this version.
    target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in PEFT's LoraConfig;
        without target_modules, the layers that PEFT's LoRA picks for the architecture (q and v, as in the paper).

    Saved with its weights, as PEFT does, it writes the folder's model card too (`mosld.card`) and the weights' checksum.
    Loaded from a local folder, fields that this version does not know are named in a warning and left out, and the
    weights beside it are checked before anything is built: see AdapterWeights in `mosld.adapter_file`.

    raises ValueError for a value that cannot be used, with the rule and the value.
    """

    r: int = 8
    alpha: float = 16
    num_experts: int = 8
    top_k: int = 2
    dropout: float = 0.1
    input_dropout: float = 0.0
    balance_coef: float = 1e-3
    shared: str = "down"
    num_experts_pattern: dict[str, int] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType["MOSLD"]  # added to the enumeration by `register` in tuner.py
        for name in ("target_modules", "exclude_modules"):  # PEFT works on sets and saves lists
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        if (
            isinstance(self.target_modules, str)
            and self.target_modules != "all-linear"
            and self.layers_to_transform is not None
        ):
            raise ValueError(
                "layers_to_transform chooses among listed target_modules; with the regular expression "
                f"{self.target_modules!r}, name the layers in it"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform, which is None")
        for experts in (self.num_experts, *self.num_experts_pattern.values()):
            check_hyperparameters(
                r=self.r, alpha=self.alpha, num_experts=experts, top_k=self.top_k, dropout=self.dropout
            )
        if self.balance_coef < 0:
            raise ValueError(f"balance_coef must be at least 0, got {self.balance_coef}")
        if self.shared != "down":
            raise ValueError(f"shared must be 'down' in this version, got {self.shared!r}")
        if self.input_dropout != 0:
            raise ValueError(f"input_dropout must be 0.0 in this version, got {self.input_dropout}")

    def experts_of(self, layer: str) -> int:
        """How many experts the layer of this name has."""
        return self.num_experts_pattern.get(get_pattern_key(list(self.num_experts_pattern), layer), self.num_experts)

    @classmethod
    def unknown_fields(cls, names: Iterable[str]) -> list[str]:
        """Those of `names` that are no field of this version."""
        return sorted(set(names) - {own.name for own in fields(cls)})

    @classmethod
    def check_kwargs(cls, **kwargs):
        """Leaves out what this version does not know, and says so: PEFT would advise to upgrade PEFT."""
        unknown = cls.unknown_fields(kwargs)
        if kwargs.get("peft_type", "MOSLD") != "MOSLD":  # PEFT makes the configuration that this name asks for
            return super().check_kwargs(**kwargs)
        if unknown:
            warnings.warn(
                f"{CONFIG} has fields that this version of mosld does not know and leaves out: {', '.join(unknown)}. A "
                "newer version may have saved it",
                stacklevel=2,
            )
        return super().check_kwargs(**{name: value for name, value in kwargs.items() if name not in unknown})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        weights = Path(pretrained_model_name_or_path, subfolder or "", WEIGHTS)
        if isinstance(config, MoSLDConfig) and weights.is_file():
            AdapterWeights(weights, config.r, config.experts_of)
        return config

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        folder = Path(save_directory)
        saved_by_peft = "auto_mapping_dict" in kwargs  # which saves the weights first; transformers saves them later
        if not saved_by_peft:
            (folder / DIGEST).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        with folder_beside(folder / CONFIG) as aside:
            super().save_pretrained(str(aside), **kwargs)
            (aside / CONFIG).replace(folder / CONFIG)
            # Until here the old checksum refuses PEFT's new weights, which would be a mixture with the old configuration.
            (folder / DIGEST).unlink(missing_ok=True)
        if not saved_by_peft:
            return
        from .card import write_card  # needs this module

        try:
            write_card(folder)
        except AdapterFileError as error:
            # The files are saved as they are, and a card is no reason to stop a training.
            warnings.warn(f"the saved adapter cannot be loaded again: {error}", stacklevel=2)
        if (folder / WEIGHTS).is_file():
            write_digest(folder)
