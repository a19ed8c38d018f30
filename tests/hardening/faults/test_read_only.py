"""A folder where this process may not write is refused before the model is loaded."""

import ctypes
import sys
from pathlib import Path

import pytest

from mosld.cli.main import main
from tests.hardening.faults.disk import to_file
from tests.hardening.faults.fifty_kills import compare_folders
from tests.hardening.faults.moments import attempt
from tests.helpers.cli_data import FAST, words, write_data
from tests.helpers.kills import TIMEOUT_S, killed_at, processes

MORE = ["--no-lora", "--r", "2", *FAST, "--max_steps", "2"]


def without_rights(own: list[str], printed: Path) -> tuple[int, str]:
    """-> exit status and what was printed by `mosld *own` in a process that file permissions hold for, even root's."""
    process = processes.Process(target=_run, args=(own, printed))
    process.start()
    process.join(TIMEOUT_S)
    return process.exitcode, printed.read_text()


def _run(own: list[str], printed: Path) -> None:
    to_file(printed)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # _LINUX_CAPABILITY_VERSION_3
    if ctypes.CDLL(None, use_errno=True).capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")
    sys.exit(main(own))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "data"
    process = processes.Process(target=write_data, args=(folder,))
    process.start()
    process.join()
    return folder


@pytest.fixture
def locked(tmp_path):
    """A folder that can be read and not written."""
    folder = tmp_path / "locked"
    folder.mkdir()
    yield folder
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)


def command(verb: str, data: Path, output: Path) -> list[str]:
    if verb == "merge":
        return [
            "merge",
            "--method",
            "ties",
            "--base",
            str(data / "model"),
            str(data / "model"),
            "--output",
            str(output),
        ]
    return words(data, output, *(MORE if verb == "train" else FAST), command=verb)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "compare", "merge"])
def test_a_read_only_folder_is_refused_before_the_model_is_loaded(verb, data, locked, tmp_path):
    locked.chmod(0o555)
    for output in (locked / "runs" / "mine", locked):
        code, said = without_rights(command(verb, data, output), tmp_path / "printed.txt")
        assert code == 2 and f"mosld {verb}: {output} cannot be written" in said, said
        assert f"may not write to {locked}" in said and "choose another --output" in said
        assert "Loading weights" not in said and "Traceback" not in said
        assert list(locked.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("part", ["stages", "lock"])
def test_an_unfinished_run_with_a_part_that_cannot_be_written_is_refused_and_goes_on_later(
    part, data, locked, tmp_path
):
    own = words(data, locked / "run", *MORE)
    killed_at(r"open .*/\.results\.json", main, own)
    (locked / "run" / part).chmod(0o555 if part == "stages" else 0o444)
    before = {path: path.stat().st_mtime_ns for path in locked.rglob("*")}
    code, said = without_rights(own, tmp_path / "printed.txt")
    assert code == 2 and f"may not write to {locked / 'run' / part}" in said and "Loading weights" not in said, said
    assert {path: path.stat().st_mtime_ns for path in locked.rglob("*")} == before
    (locked / "run" / part).chmod(0o755)
    assert attempt(own, tmp_path / "printed.txt").exit_code == 0
    assert attempt(words(data, tmp_path / "whole", *MORE), tmp_path / "printed.txt").exit_code == 0
    assert compare_folders(tmp_path / "whole", locked / "run")[0] == []


@pytest.mark.slow
def test_a_folder_that_becomes_read_only_while_it_trains_is_told_with_the_file(data, tmp_path, monkeypatch, capsys):
    from mosld.experiments import train

    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(tmp_path / "run" / "stages"))

    monkeypatch.setattr(train, "finish", refuse)
    assert main(words(data, tmp_path / "run", *MORE)) == 1
    assert f"{tmp_path / 'run' / 'stages'} cannot be written or read: Permission denied" in capsys.readouterr().err
