"""Every bad line of a task file is one fault with its number, whatever it holds, and takes bounded memory."""

import json
import os
import random
import re
import subprocess
import sys
import tracemalloc

import pytest

from mosld.tasks import examples
from mosld.tasks.examples import MAX_CHOICES, MAX_NAME, MAX_REPORTED, TaskFileError, parse_task, read_tasks
from mosld.tasks.jsonl import MAX_LINE, read_lines
from tests.hardening.security import hostile_lines
from tests.hardening.security.hostile_lines import CHOICE, COMMON, GOOD, LARGE, TEXT

BAD = 10_000


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A file of BAD bad lines with good and blank ones among them, and line number -> what is to be said of it."""
    path, r = tmp_path_factory.mktemp("hostile") / "bad.jsonl", random.Random(1)
    expected, number = {}, 0
    with open(path, "wb") as file:
        for line, said in hostile_lines.lines(BAD):
            for other in [r.choice(GOOD)] * r.choice([1, 0, 0, 2]) + [b"", b" \t\r"] * (r.random() < 0.1):
                file.write(other + b"\n")
                number += 1
            file.write(line + r.choice([b"\n", b"\r\n"]))
            number += 1
            expected[number] = said
    return path, expected


def faults_of(path) -> tuple[str, ...]:
    with pytest.raises(TaskFileError) as raised:
        read_tasks([f"t={path}"])
    return raised.value.faults


def test_ten_thousand_hostile_lines_are_ten_thousand_faults(hostile):
    path, expected = hostile
    faults = faults_of(path)
    found = [re.fullmatch(rf"{re.escape(str(path))}:(\d+): (.+)", fault, re.DOTALL) for fault in faults]
    assert len(expected) == BAD and all(found)
    assert [int(match[1]) for match in found] == list(expected)
    wrong = [
        (match[0][-200:], said) for match, said in zip(found, expected.values(), strict=True) if said not in match[2]
    ]
    assert wrong == []
    assert all(fault.isprintable() and len(fault) < 1000 for fault in faults)


def test_the_message_lists_the_first_and_counts_the_rest(hostile):
    with pytest.raises(TaskFileError) as raised:
        read_tasks([f"t={hostile[0]}"])
    head, *listed, last = str(raised.value).split("\n")
    assert head == "the task files cannot be used:" and last == f"... and {BAD - MAX_REPORTED} more"
    assert listed == list(raised.value.faults[:MAX_REPORTED])


def test_the_command_line_says_it_and_ends_with_2(hostile, tmp_path):
    words = ["eval", "--model", "nowhere", "--task", f"t={hostile[0]}", "--output", str(tmp_path / "out.json")]
    result = subprocess.run([sys.executable, "-m", "mosld", *words], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == "" and "Traceback" not in result.stderr
    said = result.stderr[result.stderr.index("mosld eval:") :].splitlines()
    assert len(said) == MAX_REPORTED + 2 and said[-1] == f"... and {BAD - MAX_REPORTED} more"
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("kind", [*COMMON, *LARGE], ids=lambda kind: kind.__name__)
def test_each_kind_alone(kind, tmp_path):
    path = tmp_path / "bad.jsonl"
    for seed in range(12):
        line, said = kind(random.Random(seed))
        path.write_bytes(b"\n".join([GOOD[0], line, GOOD[1]]))
        (fault,) = faults_of(path)
        assert fault.startswith(f"{path}:2: ") and said in fault, (line[:200], fault)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_a_line_of_the_greatest_length_is_read(end, tmp_path):
    path = tmp_path / "long.jsonl"
    room = MAX_LINE - len(GOOD[0]) - (end == b"\r\n")
    exactly = GOOD[0].replace(b"Say", b"Say" + b"y" * room)
    path.write_bytes(exactly + end)
    (task,) = read_tasks([f"t={path}"])
    assert len(task.train[0].prompt) == len(TEXT["prompt"]) + room
    path.write_bytes(exactly.replace(b"Say", b"Sayy") + end + (b"{" if end else b""))
    faults = faults_of(path)
    assert faults[0] == f"{path}:1: longer than {MAX_LINE} bytes"
    assert len(faults) == (2 if end else 1) and (not end or faults[1].startswith(f"{path}:2: not JSON"))


def test_a_line_of_any_length_takes_little_memory(tmp_path):
    path = tmp_path / "endless.jsonl"
    path.write_bytes(GOOD[0] + b"\n")
    os.truncate(path, 100 * MAX_LINE)
    tracemalloc.start()
    try:
        assert [(number, len(line)) for number, line in read_lines(path)] == [(1, len(GOOD[0])), (2, MAX_LINE + 1)]
        assert tracemalloc.get_traced_memory()[1] < 8 * MAX_LINE
    finally:
        tracemalloc.stop()


def test_as_many_choices_as_there_may_be(tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text(json.dumps({**CHOICE, "choices": [str(i) for i in range(MAX_CHOICES)]}))
    assert len(read_tasks([f"t={path}"])[0].train[0].choices) == MAX_CHOICES


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD[0] + b"\r\n" + GOOD[1] + b"\r\n{\r\n")
    assert faults_of(path)[0].startswith(f"{path}:3: not JSON") and len(faults_of(path)) == 1
    path.write_bytes(b"\xef\xbb\xbf" + GOOD[0] + b"\r\n")
    assert read_tasks([f"t={path}"])[0].train[0].prompt == TEXT["prompt"]
    path.write_bytes(b"\xef\xbb\xbf\n")
    assert faults_of(path) == (f"{path}: no examples",)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_another_encoding_is_named_once(encoding, tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_bytes("".join(json.dumps(CHOICE) + "\n" for _ in range(9)).encode(encoding))
    assert faults_of(path) == (f"{path}: {encoding[:6].upper()} text, where UTF-8 is needed",)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(kind, tmp_path):
    path = {"pipe": tmp_path / "pipe", "device": "/dev/zero", "folder": tmp_path}[kind]
    if kind == "pipe":
        os.mkfifo(path)
    assert faults_of(path) == (f"{path}: not a regular file",)


def test_a_file_of_another_kind_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "MAX_FAULTS", 5)
    path, other = tmp_path / "other.jsonl", tmp_path / "second.jsonl"
    path.write_bytes((GOOD[0] + b"\n{\n") * 9)
    other.write_bytes(b"{\n")
    with pytest.raises(TaskFileError) as raised:
        read_tasks([f"t={path}:{other}"])
    assert len(raised.value.faults) == 7 and raised.value.faults[6].startswith(f"{other}:1: not JSON")
    assert raised.value.faults[5] == f"{path}: not read beyond line 10, the last of 5 bad ones"


def test_an_error_of_one_fault_has_it_as_well():
    with pytest.raises(TaskFileError) as raised:
        parse_task("nonsense")
    assert raised.value.faults == (str(raised.value),)


@pytest.mark.parametrize("name", ["a" * (MAX_NAME + 1), "é" * (MAX_NAME // 2 + 1)])
def test_a_name_too_long_for_a_file_is_refused(name):
    with pytest.raises(TaskFileError, match=f"at most {MAX_NAME} bytes, got"):
        parse_task(f"{name}=file")
    assert parse_task(f"{name[: MAX_NAME // 2]}=file")[0] == name[: MAX_NAME // 2]
