"""Result files: one JSON a run, with `verb`, `machine`, `settings` and `tables`, replaced whole after every table."""

import json
from pathlib import Path


class Writer:
    """Keeps `result` and writes it to `path`, if there is one, whenever a table is added."""

    def __init__(self, result: dict, path: Path | None):
        self.result, self.path = result, path

    def add(self, table: dict) -> None:
        self.result["tables"].append(table)
        if self.path:
            write(self.result, self.path)


def write(result: dict | list, path: Path) -> None:
    """Replace the file in one step, so that an interruption leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    scratch.write_text(json.dumps(result, indent=2) + "\n")
    scratch.replace(path)
