"""The model and tasks of a command, as its command line says them, and what of them decides a run's results."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..embedded.base_model import EMBEDDED
from ..embedded.tasks import embedded_tasks
from ..merging.merge import MergeSettings
from ..merging.unlabelled import Unlabelled, without_labels
from ..tasks.encode import Encoder
from ..tasks.examples import Task, TaskFileError, parse_task, read_tasks
from ..tasks.scoring import candidates
from .run_folder import file_digest

LONGEST = 2048  # tokens, where the model allows more and --max-length says nothing
QUICK_SIZES = {"train": 200, "test": 40}  # examples of each embedded task with --quick


@dataclass(frozen=True)
class RunInputs:
    """What every command line may say of its model and its tasks.

    model: a folder or hub name; None is the embedded model.
    tasks: name=file of each task, or "embedded" alone.
    quick: whether the embedded model and tasks are the small ones.
    split: of the embedded tasks, "block" or "name".
    max_length: of an input, in tokens; None is the model's.
    eval_batch_size: choices scored together.
    """

    model: str | None = None
    tasks: Sequence[str] = ()
    quick: bool = False
    split: str = "block"
    max_length: int | None = None
    eval_batch_size: int = 64


def chosen_tasks(inputs: RunInputs, only_test: bool = False) -> list[Task]:
    """The named tasks; the embedded ones by that name, and where none is named for the embedded model.

    only_test: without training examples, and a task of one file has it for its test.

    raises TaskFileError for files that cannot be used, and for a model of one's own without tasks.
    """
    if inputs.tasks and not _asks_for_embedded(inputs):
        tasks = read_tasks(list(inputs.tasks))
        return [_only_test(task) for task in tasks] if only_test else tasks
    if inputs.model and not inputs.tasks:
        raise TaskFileError("--model needs at least one --task name=file.jsonl, or --task embedded")
    sizes = QUICK_SIZES if inputs.quick else {}
    return embedded_tasks(**sizes, split=inputs.split)


def _only_test(task: Task) -> Task:
    if task.test:
        return Task(task.name, task.train, task.test)
    return Task(task.name, [], task.train)


def check_examples(tasks: Sequence[Task], side: str, purpose: str) -> None:
    """raises TaskFileError where a task has no examples on this side, "train" or "test", for this purpose."""
    empty = [task.name for task in tasks if not getattr(task, side)]
    if empty:
        raise TaskFileError(f"nothing to {purpose} for {', '.join(empty)}")


def names_of(tasks: Sequence[Task]) -> list[str]:
    return [task.name for task in tasks]


def questions_for(
    merging: MergeSettings, encoder: Encoder, tasks: Sequence[Task], count: int | None = None
) -> list[Unlabelled]:
    """The unlabelled questions that a merge adapts to, the first `count` of each task; none where it adapts to nothing.

    raises ValueError for a task that it cannot predict on.
    """
    if not merging.kind.adaptive:
        return []
    return [without_labels(encoder, task, count) for task in tasks]


def hold_out(task: Task, share: float) -> Task:
    """A part of the training examples in the place of the test items, the same part in every run."""
    count = len(task.train)
    # The name decides, and no seed of the run: every process and every seed holds out the same examples.
    order = Random(f"validation/{task.name}").sample(range(count), count)
    held = set(order[: round(share * count)])
    train, test = [], []
    for place, example in enumerate(task.train):
        (test if place in held else train).append(example)
    return Task(task.name, train, test)


def check_quick(inputs: RunInputs) -> None:
    """raises ValueError for --quick with a model or tasks of one's own."""
    own_tasks = list(inputs.tasks) not in ([], [EMBEDDED])
    if inputs.quick and (inputs.model or own_tasks):
        raise ValueError("--quick is for the embedded tasks and model; it goes with neither --model nor other tasks")


def task_settings(inputs: RunInputs) -> dict[str, object]:
    """What decides which tasks a run has: names, files with their digests, and the split of the embedded ones."""
    embedded = _asks_for_embedded(inputs)
    digests = {} if embedded else _digests(inputs.tasks)
    if not (inputs.tasks or inputs.model):
        embedded = True  # the embedded model's default; another model without tasks is a merge that scores nothing
    return {
        "tasks": EMBEDDED if embedded else list(inputs.tasks),
        "task_files": digests,
        "quick": inputs.quick,
        "split": inputs.split,
    }


def _digests(specs: Sequence[str]) -> dict[str, str]:
    """File -> its digest, of the training and test file of every name=file."""
    digests = {}
    for spec in specs:
        _, train, test = parse_task(spec)
        for path in (train, test):
            if path:
                digests[str(path)] = file_digest(path)
    return digests


def model_state(name: str | None) -> dict[str, list[int]]:
    """Sizes and times of a local model's files, so that a run does not go on with other weights; {} for a hub name."""
    if not name or not Path(name).is_dir():
        return {}
    state = {}
    for path in sorted(Path(name).glob("*.safetensors")):
        found = path.stat()
        state[path.name] = [found.st_size, found.st_mtime_ns]
    return state


def _asks_for_embedded(inputs: RunInputs) -> bool:
    """raises TaskFileError where they would be mixed with others: two scores in one average that nobody asked for."""
    if EMBEDDED in inputs.tasks and len(inputs.tasks) > 1:
        raise TaskFileError(f"--task {EMBEDDED} stands for all embedded tasks, alone; got {', '.join(inputs.tasks)}")
    return list(inputs.tasks) == [EMBEDDED]


def task_encoder(
    inputs: RunInputs, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]
) -> Encoder:
    """The encoder of these tasks for this model.

    raises ValueError for a length that the model has not, and TaskFileError for an answer that does not fit.
    """
    encoder = Encoder(tokenizer, longest_input(inputs, model))
    _check_answers_fit(encoder, tasks)
    return encoder


def longest_input(inputs: RunInputs, model: PreTrainedModel) -> int:
    asked = inputs.max_length
    longest = getattr(model.config, "max_position_embeddings", None) or LONGEST
    if asked is not None and not 2 <= asked <= longest:
        raise ValueError(f"max-length must be in [2, {longest}], the model's longest input, got {asked}")
    return asked or min(longest, LONGEST)


def _check_answers_fit(encoder: Encoder, tasks: Sequence[Task]) -> None:
    """Every answer fits, before hours of training end at one that does not."""
    for task in tasks:
        try:
            for example in task.train:
                encoder.training_row(example)
            for example in task.test:
                for text in candidates(example):
                    encoder.pair(example.prompt, text)
        except TaskFileError as error:
            raise TaskFileError(f"task {task.name}: {error}") from None
