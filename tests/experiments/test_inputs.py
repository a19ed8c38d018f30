"""Which tasks a command line asks for."""

import pytest

from mosld.embedded.tasks import embedded_tasks
from mosld.experiments.inputs import RunInputs, check_quick, chosen_tasks, task_settings
from mosld.tasks.examples import TaskFileError


def test_the_embedded_tasks_are_there_for_any_model_by_their_name():
    asked = chosen_tasks(RunInputs(model="some/model", tasks=["embedded"], split="name"))
    assert (
        asked == chosen_tasks(RunInputs(split="name")) == embedded_tasks(split="name") != embedded_tasks(split="block")
    )
    assert task_settings(RunInputs(tasks=["embedded"])) == task_settings(RunInputs())
    assert task_settings(RunInputs(model="some/model", tasks=["embedded"]))["tasks"] == "embedded"
    assert task_settings(RunInputs(model="some/model"))["tasks"] == []  # a merge that scores nothing


def test_a_model_of_ones_own_needs_tasks():
    with pytest.raises(TaskFileError, match="--model needs at least one --task name=file.jsonl, or --task embedded"):
        chosen_tasks(RunInputs(model="some/model"))


def test_a_quick_run_is_one_of_the_embedded_tasks():
    check_quick(RunInputs(quick=True))
    check_quick(RunInputs(quick=True, tasks=["embedded"]))
    for other in (dict(model="m"), dict(tasks=["a=a.jsonl"]), dict(model="m", tasks=["embedded"])):
        with pytest.raises(ValueError, match="--quick is for the embedded tasks and model"):
            check_quick(RunInputs(quick=True, **other))


def test_the_embedded_tasks_are_not_mixed_with_others(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    mixed = RunInputs(tasks=["embedded", f"own={tmp_path / 'own.jsonl'}"])
    for use in (chosen_tasks, task_settings):
        with pytest.raises(
            TaskFileError, match="--task embedded stands for all embedded tasks, alone; got embedded, own="
        ):
            use(mixed)


def test_a_task_called_embedded_is_read_from_its_file(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    (task,) = chosen_tasks(RunInputs(model="m", tasks=[f"embedded={path}"]))
    assert [example.completion for example in task.train] == ["b"]
    before = task_settings(RunInputs(tasks=[f"embedded={path}"]))
    path.write_text('{"prompt": "a", "completion": "c"}\n')
    assert before != task_settings(RunInputs(tasks=[f"embedded={path}"]))
    assert before["tasks"] == [f"embedded={path}"]
