"""What a run trains: its stages, and the recipe of each."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .methods import LORA, Adapter


@dataclass(frozen=True)
class Recipe:
    """Everything a stage needs beside the model and the tasks: by `Stage.method`, the adapter and the Trainer's arguments."""

    adapters: dict[str, Adapter] = field(default_factory=dict)
    trainer: dict[str, list[str]] = field(default_factory=dict)
    proportions: dict[str, float] | str = "proportional"
    eval_batch_size: int = 64


@dataclass(frozen=True)
class Stage:
    """One adapter to train, on all tasks or on one. `label` names the column in the results, `method` the recipe."""

    label: str
    method: str
    seed: int
    task: str | None = None

    @property
    def name(self) -> str:
        return "-".join([self.label, *([self.task] if self.task else []), f"seed{self.seed}"])


def plan(method: str, *, compare_lora: bool, single: bool, seeds: int, task_names: Sequence[str]) -> list[Stage]:
    """LoRA beside the method unless it is the method, then one model a task where that is wanted; every seed of each."""
    stages = []
    for seed in range(seeds):
        if compare_lora and method != LORA:
            stages.append(Stage(LORA, LORA, seed))
        stages.append(Stage(method, method, seed))
        if single:
            stages += [Stage(f"{method}-single", method, seed, name) for name in task_names]
    return stages
