"""How often each task is seen in training: one list of examples, mixed by proportions."""

import random
from collections.abc import Mapping, Sequence

from .examples import Example, Task


def parse_proportions(text: str, names: Sequence[str]) -> dict[str, float] | str:
    """ "proportional", "equal" or "name=weight,name=weight" -> the proportions that `mix` takes.

    raises ValueError for an unknown task, a task left out, or a weight that is not a number of at least 0.
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
    """As many training examples as the tasks have together, in the wanted proportions; see `mix_with_tasks`."""
    return [example for _, example in mix_with_tasks(tasks, proportions, seed)]


def mix_with_tasks(
    tasks: Sequence[Task], proportions: Mapping[str, float] | str = "proportional", seed: int = 0
) -> list[tuple[int, Example]]:
    """As many training examples as the tasks have together, in the wanted proportions, each with its task's place.

    "proportional" is every example once. Otherwise a task's examples are repeated whole as often as they fit, and the
    rest is drawn without replacement; the sampler of the Trainer then mixes the tasks within every batch.
    """
    if proportions == "proportional":
        return [(place, example) for place, task in enumerate(tasks) for example in task.train]
    weights = {task.name: 1.0 for task in tasks} if isinstance(proportions, str) else dict(proportions)
    total, weight_sum = sum(len(task.train) for task in tasks), sum(weights.values())
    generator = random.Random(seed)
    mixed: list[tuple[int, Example]] = []
    for place, task in enumerate(tasks):
        wanted = round(total * weights[task.name] / weight_sum)
        whole, rest = divmod(wanted, len(task.train))
        mixed += [(place, example) for example in task.train * whole + generator.sample(task.train, rest)]
    return mixed
