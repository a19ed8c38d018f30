"""How often each task is seen in training: one list of examples, mixed by proportions."""

import itertools
import random
from collections.abc import Mapping, Sequence

from .examples import Example, Task


def parse_proportions(text: str, names: Sequence[str]) -> dict[str, float] | str:
    """The proportions that `mix` takes.

    Args:
        text: "proportional", "equal" or "name=weight,name=weight".
        names: Of all tasks.

    Returns:
        One of the two words, or a weight for each name.

    Raises:
        ValueError: For an unknown task, a task left out, or a weight that is not a number of at least 0.
    """
    if text in ("proportional", "equal"):
        return text
    weights = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise ValueError(f"proportions must be 'proportional', 'equal' or name=weight,..., got {part!r}") from None
    if set(weights) != set(names):
        raise ValueError(f"proportions must name every task once ({', '.join(names)}), got {', '.join(weights)}")
    if min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise ValueError(f"weights must be at least 0 and not all 0, got {text}")
    return weights


def mix(tasks: Sequence[Task], proportions: Mapping[str, float] | str = "proportional", seed: int = 0) -> list[Example]:
    """The examples of `mix_with_tasks`, without the places of their tasks."""
    return [example for _, example in mix_with_tasks(tasks, proportions, seed)]


def mix_with_tasks(
    tasks: Sequence[Task], proportions: Mapping[str, float] | str = "proportional", seed: int = 0
) -> list[tuple[int, Example]]:
    """As many training examples as the tasks have together, in the wanted proportions.

    Otherwise than "proportional", a task's examples are repeated whole as often as they fit, and the rest is drawn
    without replacement. The sampler of the Trainer mixes the tasks within every batch.

    Args:
        tasks: Give their training examples.
        proportions: "proportional" is every example once, "equal" as many of each task; or a weight for each name.
        seed: Decides which examples are drawn.

    Returns:
        For each example its task's place among `tasks`, and the example.
    """
    mixed: list[tuple[int, Example]] = []
    if proportions == "proportional":
        for place, task in enumerate(tasks):
            mixed += zip(itertools.repeat(place), task.train)
        return mixed
    weights = dict.fromkeys((task.name for task in tasks), 1.0)
    if not isinstance(proportions, str):
        weights = dict(proportions)
    total, weight_sum = sum(len(task.train) for task in tasks), sum(weights.values())
    generator = random.Random(seed)
    for place, task in enumerate(tasks):
        wanted = round(total * weights[task.name] / weight_sum)
        whole, rest = divmod(wanted, len(task.train))
        drawn = task.train * whole + generator.sample(task.train, rest)
        mixed += zip(itertools.repeat(place), drawn)
    return mixed
