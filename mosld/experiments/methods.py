"""The methods that `mosld train` and `mosld compare` know by name: PEFT's own LoRA and every preset.

A preset's values hold unless an option was given; an option that the method has no use for is refused, not ignored.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from peft import LoraConfig, PeftConfig
from torch import Tensor, nn

from ..layers.routing import set_routing
from ..layers.stats import RouterUse
from ..mixture.spec import Mixture
from ..presets import PRESETS, preset
from ..tasks.examples import Task
from ..tuner.config import MoSLDConfig

ALL_LINEAR = "all-linear"  # PEFT's word
LORA = "lora"  # PEFT's; the preset of this name computes the same
METHODS = tuple(dict.fromkeys(["mosld", LORA, *PRESETS]))  # these two first
LORA_DEFAULTS = {"r": 8, "alpha": 16, "dropout": 0.1}
NAMES = {
    "base": "frozen base",
    "lora": "LoRA",
    "mosld": "MoSLD",
    "mosl": "MoSL",
    "mosld_up": "MoSLD (matrix B)",
    "hydralora": "HydraLoRA",
    "mola": "MoLA",
    "loramoe": "LoRAMoE",
    "moelora": "MoELoRA",
    "mixlora": "MixLoRA",
    "moelora_medical": "MOELoRA (medical)",
    "malora": "MALoRA",
    "mtl_lora": "MTL-LoRA",
    "mode": "MoDE",
    "mor1e": "MoR1E",
    "mixlora_conditional": "Conditional MixLoRA",
}


def targets(method: str, words: str | None) -> str | list[str]:
    """What `--target-modules` says; unless it is given, the preset's own names (MixLoRA's blocks), or all linear."""
    if words is not None:
        return words if words == ALL_LINEAR else words.split(",")
    preset_names = None if method == LORA else preset(method).target_modules
    return sorted(preset_names) if preset_names else ALL_LINEAR


@dataclass(frozen=True)
class Adapter:
    """Which adapter a stage trains.

    method: of METHODS.
    options: fields of MoSLDConfig that differ from the preset's; of PEFT's LoRA r, alpha and dropout.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    target_modules: str | list[str] = ALL_LINEAR

    @property
    def is_lora(self) -> bool:
        return self.method == LORA

    def config(self, num_tasks: int) -> PeftConfig:
        """raises ValueError for an unknown method, a value that cannot be used, and an option without use."""
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.is_lora:
            return self._lora_config()
        options = dict(self.options)
        if preset(self.method).mixture_of("").wants_tasks:
            options["num_tasks"] = num_tasks
        config = preset(self.method, **options, **self._places)
        _refuse_unused(self, config)
        return config

    @property
    def _places(self) -> dict[str, Any]:
        return {"target_modules": self.target_modules, "task_type": "CAUSAL_LM"}

    def _lora_config(self) -> LoraConfig:
        values = {**LORA_DEFAULTS, **self.options}
        unknown = sorted(values.keys() - LORA_DEFAULTS)
        if unknown:
            raise ValueError(
                f"{_as_given(self.options, unknown)} contradicts method 'lora', which has one expert and no router"
            )
        Mixture(**values)  # checks what LoraConfig takes unseen
        alpha = cast(int, values["alpha"])
        return LoraConfig(r=values["r"], lora_alpha=alpha, lora_dropout=values["dropout"], **self._places)

    def mixture(self, num_tasks: int = 1) -> Mixture | None:
        """What the layers have in common; None of PEFT's LoRA."""
        config = self.config(num_tasks)
        return config.mixture_of("") if isinstance(config, MoSLDConfig) else None


def _refuse_unused(adapter: Adapter, config: MoSLDConfig) -> None:
    """raises ValueError for an option that changes nothing in this method."""
    options = adapter.options
    mixture = config.mixture_of("")
    takes_largest = mixture.gate == "top_k" and mixture.kind.gate is None and mixture.has_logits
    if "top_k" in options and not takes_largest:
        _refuse(adapter, "top_k", "which does not choose the K largest gates")
    if "num_experts" in options:
        one_more = replace(mixture, num_experts=mixture.num_experts + 1)
        if one_more.shapes(8, 8) == mixture.shapes(8, 8):
            _refuse(adapter, "num_experts", "whose sizes do not depend on it")
    if options.get("balance_coef") and not mixture.tokens_choose:
        _refuse(adapter, "balance_coef", "whose tokens do not choose among experts: there is no load to balance")


def _refuse(adapter: Adapter, option: str, reason: str) -> None:
    raise ValueError(f"{_as_given(adapter.options, [option])} contradicts method {adapter.method!r}, {reason}")


def _as_given(options: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{name}={options[name]}" for name in names)


def task_setter(model: nn.Module, tasks: Sequence[Task], mixture: Mixture | None) -> Callable[[Task], None] | None:
    """Sets in `model` whose examples come next, by a task's place in `tasks`; None for methods that do not ask.

    raises ValueError where there are more or fewer tasks than the method was trained on.
    """
    if mixture is None or not mixture.wants_tasks:
        return None
    if mixture.num_tasks != len(tasks):
        raise ValueError(
            f"the adapter routes by task and knows num_tasks={mixture.num_tasks} of them, got {len(tasks)}: give the "
            "tasks that it was trained on, in the same order"
        )
    places = {task.name: place for place, task in enumerate(tasks)}
    return lambda task: set_routing(model, task_ids=places[task.name])


def use_recorder(use: RouterUse, model: nn.Module, mixture: Mixture | None) -> Callable[[Task, Tensor], None] | None:
    """What counts in `use`, batch by batch, the experts that each task's tokens choose; None where tokens do not."""
    if mixture is None or not mixture.tokens_choose:
        return None
    return lambda task, mask: use.update(task.name, model, mask)
