"""The tasks that a command line asks for: `--task`, `--split`, `--quick`, and what of them decides a run's results."""

import argparse

from ..embedded.base_model import EMBEDDED
from ..embedded.tasks import embedded_tasks
from ..tasks.examples import Task, TaskFileError, parse_task, read_tasks
from .run_folder import file_digest


def chosen_tasks(options: argparse.Namespace, only_test: bool = False) -> list[Task]:
    """Those of --task; the embedded ones by that name, and without --task for the embedded model.

    raises TaskFileError for files that cannot be used, and for a model of one's own without tasks.
    """
    if options.task and not _embedded(options):
        tasks = read_tasks(options.task)
        return [Task(t.name, t.train if t.test else [], t.test or t.train) for t in tasks] if only_test else tasks
    if options.model and not options.task:
        raise TaskFileError("--model needs at least one --task name=file.jsonl, or --task embedded")
    sizes = {"train": 200, "test": 40} if options.quick else {}
    return embedded_tasks(**sizes, split=options.split)


def check_quick(options: argparse.Namespace) -> None:
    """raises ValueError for --quick with a model or tasks of one's own."""
    if options.quick and (options.model or options.task not in ([], [EMBEDDED])):
        raise ValueError("--quick is for the embedded tasks and model; it goes with neither --model nor other tasks")


def task_settings(options: argparse.Namespace) -> dict[str, object]:
    """What decides which tasks a run has: names, files with their digests, and the split of the embedded ones."""
    files = [] if _embedded(options) else [path for spec in options.task for path in parse_task(spec)[1:] if path]
    return {
        "tasks": EMBEDDED if _embedded(options) or not (options.task or options.model) else options.task,
        "task_files": {str(path): file_digest(path) for path in files},
        "quick": options.quick,
        "split": options.split,
    }


def _embedded(options: argparse.Namespace) -> bool:
    """raises TaskFileError where they would be mixed with others: two scores in one average that nobody asked for."""
    if EMBEDDED in options.task and len(options.task) > 1:
        raise TaskFileError(f"--task {EMBEDDED} stands for all embedded tasks, alone; got {', '.join(options.task)}")
    return options.task == [EMBEDDED]
