"""Task files: both forms are read, and everything wrong with any of them is said at once."""

import json

import pytest

from mosld.tasks.examples import Example, TaskFileError, parse_example, parse_task, read_tasks

CHOICE = {"prompt": "2 + 2 =", "choices": ["three", "four"], "answer": 1}
TEXT = {"prompt": "Say hello.", "completion": "hello"}


def write(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return path


def test_both_forms_are_read(tmp_path):
    train, test = write(tmp_path / "a.jsonl", CHOICE, "", TEXT), write(tmp_path / "b.jsonl", CHOICE)
    (task,) = read_tasks([f"sums={train}:{test}"])
    assert task.name == "sums"
    assert task.train == [Example("2 + 2 =", "four", ("three", "four"), 1), Example("Say hello.", "hello")]
    assert task.test == [Example("2 + 2 =", "four", ("three", "four"), 1)]


def test_a_line_separator_inside_a_text_does_not_split_the_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a\u2028b", "completion": "c"}\n', encoding="utf-8")
    assert read_tasks([f"t={path}"])[0].train[0].prompt == "a\u2028b"


@pytest.mark.parametrize("spec", ["", "name", "=file", "name=", "name=file:", "name=:file"])
def test_a_bad_task_specification_says_what_one_looks_like(spec):
    with pytest.raises(TaskFileError, match="a task is name=train.jsonl"):
        parse_task(spec)


@pytest.mark.parametrize("name", ["a/b", "../a", "a b", ".hidden"])
def test_a_name_that_is_no_file_name_is_refused(name):
    with pytest.raises(TaskFileError, match="a task's name has letters"):
        parse_task(f"{name}=file")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "must be a JSON object, got list"),
        ({}, '"prompt" must be a text, got None'),
        ({"prompt": "x"}, 'needs "completion", or "choices" and "answer"'),
        ({"prompt": 3, "completion": "x"}, '"prompt" must be a text, got 3'),
        ({"prompt": "x", "completion": " "}, '"completion" must be a non-empty text'),
        ({**CHOICE, "completion": "x"}, "not both"),
        ({**CHOICE, "choices": ["one"]}, "at least two texts"),
        ({**CHOICE, "choices": ["one", 2]}, "at least two texts"),
        ({**CHOICE, "choices": ["one", ""]}, "at least two texts"),
        ({**CHOICE, "choices": ["one", "one"]}, "must differ"),
        ({**CHOICE, "answer": 2}, "index into the 2 choices, got 2"),
        ({**CHOICE, "answer": -1}, "index into the 2 choices, got -1"),
        ({**CHOICE, "answer": "1"}, "index into the 2 choices, got '1'"),
        ({**CHOICE, "answer": True}, "index into the 2 choices, got True"),
        ({"prompt": "x", "choices": ["a", "b"]}, "got None"),
    ],
)
def test_a_bad_line_names_the_field(record, message):
    with pytest.raises(TaskFileError) as raised:
        parse_example(record)
    assert message in str(raised.value)


def test_all_bad_lines_of_all_files_are_in_one_report(tmp_path):
    first = write(tmp_path / "first.jsonl", CHOICE, "{not json", {"prompt": "x"})
    second = write(tmp_path / "second.jsonl", {**CHOICE, "answer": 7})
    empty = write(tmp_path / "empty.jsonl")
    with pytest.raises(TaskFileError) as raised:
        read_tasks([f"a={first}:{second}", f"b={tmp_path / 'missing.jsonl'}", f"c={empty}", f"a={first}", "nonsense"])
    report = str(raised.value)
    assert f"{first}:2: not JSON" in report and f'{first}:3: a line needs "completion"' in report
    assert f'{second}:1: "answer" must be an index' in report
    assert "missing.jsonl: No such file or directory" in report and f"{empty}: no examples" in report
    assert "task name 'a' is given 2 times" in report and "got 'nonsense'" in report
    assert "json" not in report.split("\n")[0].lower() or "task files" in report.split("\n")[0]


def test_a_long_report_is_cut_and_counted(tmp_path):
    path = write(tmp_path / "bad.jsonl", *["{"] * 50)
    with pytest.raises(TaskFileError, match="and 30 more"):
        read_tasks([f"a={path}"])
