"""The results of the runs, as `benchmarks/results/mutants.json` holds it: a row a fault, written after each."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing.files import write
from benchmarks.timing.machine import installed, machine
from tests.hardening.mutants.fault import Fault
from tests.hardening.mutants.runner import Outcome, key

LEAST_SHARE = 0.95
Row = dict[str, Any]


class Results:
    """The rows in `path`, of the faults that there are and that have not changed since, by name.

    areas: area -> its faults; the file has them in this order.
    """

    def __init__(self, path: Path, root: Path, areas: Mapping[str, Sequence[Fault]]):
        self.path, self.areas = path, areas
        self.machine = {**machine(), "pytest": installed("pytest")}
        self.rows: dict[str, Row] = {}
        kept = json.loads(path.read_text())["rows"] if path.is_file() else []
        # Of the files as they are now, when the runner copies them: they may be worked on while it runs.
        self.keys = {fault.name: key(root, fault) for faults in areas.values() for fault in faults}
        for row in kept:
            if row["key"] == self.keys.get(row["name"]):
                self.rows[row["name"]] = row

    def add(self, fault: Fault, outcome: Outcome) -> None:
        area = next(area for area, faults in self.areas.items() if fault in faults)
        self.rows[fault.name] = {
            "name": fault.name, "area": area, "file": fault.file, "how": outcome.how, "caught_by": outcome.test,
            "seconds": round(outcome.seconds, 1), "key": self.keys[fault.name], "harm": fault.harm,
        }  # fmt: skip
        write(self.report(), self.path)

    def report(self) -> dict[str, Any]:
        rows = [self.rows[f.name] for faults in self.areas.values() for f in faults if f.name in self.rows]
        caught = [row for row in rows if row["how"] != "passed"]
        return {
            "verb": "mutants",
            "machine": self.machine,
            "faults": len(rows),
            "caught": len(caught),
            "share": round(len(caught) / len(rows), 4) if rows else None,
            "hangs": sum(row["how"] == "hang" for row in rows),
            "areas": {
                area: {"faults": sum(r["area"] == area for r in rows), "caught": sum(r["area"] == area for r in caught)}
                for area in self.areas
            },
            "rows": rows,
        }

    def survivors(self) -> list[Fault]:
        return [f for own in self.areas.values() for f in own if self.rows.get(f.name, {}).get("how") == "passed"]
