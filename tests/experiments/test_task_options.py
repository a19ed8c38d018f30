"""Which tasks a command line asks for."""

from argparse import Namespace

import pytest

from mosld.embedded.tasks import embedded_tasks
from mosld.experiments.task_options import check_quick, chosen_tasks, task_settings
from mosld.tasks.examples import TaskFileError


def options(**own) -> Namespace:
    return Namespace(**{"model": None, "task": [], "quick": False, "split": "block", **own})


def test_the_embedded_tasks_are_there_for_any_model_by_their_name():
    asked = chosen_tasks(options(model="some/model", task=["embedded"], split="name"))
    assert asked == chosen_tasks(options(split="name")) == embedded_tasks(split="name") != embedded_tasks(split="block")
    assert task_settings(options(task=["embedded"])) == task_settings(options())
    assert task_settings(options(model="some/model", task=["embedded"]))["tasks"] == "embedded"
    assert task_settings(options(model="some/model"))["tasks"] == []  # a merge that scores nothing


def test_a_model_of_ones_own_needs_tasks():
    with pytest.raises(TaskFileError, match="--model needs at least one --task name=file.jsonl, or --task embedded"):
        chosen_tasks(options(model="some/model"))


def test_a_quick_run_is_one_of_the_embedded_tasks():
    check_quick(options(quick=True))
    check_quick(options(quick=True, task=["embedded"]))
    for other in (dict(model="m"), dict(task=["a=a.jsonl"]), dict(model="m", task=["embedded"])):
        with pytest.raises(ValueError, match="--quick is for the embedded tasks and model"):
            check_quick(options(quick=True, **other))


def test_the_embedded_tasks_are_not_mixed_with_others(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    mixed = options(task=["embedded", f"own={tmp_path / 'own.jsonl'}"])
    for use in (chosen_tasks, task_settings):
        with pytest.raises(
            TaskFileError, match="--task embedded stands for all embedded tasks, alone; got embedded, own="
        ):
            use(mixed)


def test_a_task_called_embedded_is_read_from_its_file(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    (task,) = chosen_tasks(options(model="m", task=[f"embedded={path}"]))
    assert [example.completion for example in task.train] == ["b"]
    before = task_settings(options(task=[f"embedded={path}"]))
    path.write_text('{"prompt": "a", "completion": "c"}\n')
    assert before != task_settings(options(task=[f"embedded={path}"]))
    assert before["tasks"] == [f"embedded={path}"]
