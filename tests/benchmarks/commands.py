"""The command line of the benchmarks, called in the test's own process."""

import sys

from benchmarks import __main__ as command


def run(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["python -m benchmarks", *map(str, arguments)])
    return command.main()
