"""What a run trains: its stages, and the recipe of each."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from .methods import LORA, Adapter

SINGLE, MERGED = "-single", "-merged"  # ends of labels: one model a task, and the LoRAs of these made one
# What the Trainer gets, as words of its command line, before what the user says.
COMMON_TRAINER = ["--logging_steps", "10", "--save_strategy", "epoch", "--dataloader_pin_memory", "false"]
OWN_TRAINER = ["--learning_rate", "3e-4", "--num_train_epochs", "3", "--warmup_steps", "0.05"]  # for a user's model


@dataclass(frozen=True)
class Recipe:
    """Everything a stage needs beside model and tasks: by `Stage.method`, the adapter and the Trainer's arguments."""

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
        task = [self.task] if self.task else []
        return "-".join([self.label, *task, f"seed{self.seed}"])


def single_stages(method: str, seed: int, task_names: Sequence[str]) -> list[Stage]:
    """One adapter a task."""
    return [Stage(f"{method}{SINGLE}", method, seed, task) for task in task_names]


def plan_training(
    method: str, *, beside_lora: bool, single: bool, seeds: int, task_names: Sequence[str]
) -> list[Stage]:
    """LoRA beside the method unless it is the method, then one model a task where wanted; every seed of each."""
    stages = []
    for seed in range(seeds):
        if beside_lora and method != LORA:
            stages.append(Stage(LORA, LORA, seed))
        stages.append(Stage(method, method, seed))
        if single:
            stages += single_stages(method, seed, task_names)
    return stages


def plan_comparison(rows: Sequence[str], settings: Sequence[str], seeds: int, task_names: Sequence[str]) -> list[Stage]:
    """A whole seed of a setting after the other, so that what is finished early compares all methods."""
    stages = []
    for setting in settings:
        for seed in range(seeds):
            for row in rows:
                stages += [Stage(row, row, seed)] if setting == "mixture" else single_stages(row, seed, task_names)
    return stages


def plan_merges(labels: Sequence[str], seeds: int) -> list[Stage]:
    """The merges of each seed's single LoRAs."""
    stages = []
    for seed in range(seeds):
        for label in labels:
            stages.append(Stage(label, LORA, seed))
    return stages
