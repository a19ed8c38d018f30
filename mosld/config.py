"""MoSLDConfig: what `peft.get_peft_model` needs to adapt a model with MoSLD."""

from dataclasses import dataclass, field

from peft.config import PeftConfig
from peft.utils import PeftType

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
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear" and self.layers_to_transform:
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
