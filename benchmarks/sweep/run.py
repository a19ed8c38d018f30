"""python -m benchmarks sweep: every configuration type of the installed transformers, each in a process of its own.

A type whose process dies or takes too long is a row as well; the others go on.
"""

import argparse
import multiprocessing
import multiprocessing.connection
import os
import resource
import time
from pathlib import Path
from typing import Any, cast

from ..timing import files
from ..timing.machine import machine
from . import checks
from .shrunk import types

OUT = Path("benchmarks/results/sweep.json")
MEMORY = 10 * 2**30
_processes = multiprocessing.get_context("forkserver")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks sweep`."""
    parser.add_argument("--types", nargs="*", help="configuration types of transformers (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time (default: cores)")
    parser.add_argument("--seconds", type=float, default=120.0, help="at most for one type (default: 120)")
    parser.add_argument("--out", type=Path, help=f"the JSON file (default: {OUT} with all types, else none)")


def run(options: argparse.Namespace) -> int:
    """Print a line a type and the counts, write them, and return 1 where LoRA passes and the mixture does not.
    raises ValueError for a type that transformers does not know."""
    known = types()
    names = options.types or known
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"types must be those of the installed transformers, got {', '.join(unknown)}")
    if options.jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {options.jobs}")
    rows = sweep(names, options.jobs, options.seconds)
    result = {"verb": "sweep", "machine": machine(), "counts": counts(rows), "types": rows}
    for what, count in result["counts"].items():
        print(f"{what:40}{count:6}")
    out = options.out or (None if options.types else OUT)
    if out:
        files.write(result, out)
    return 1 if missed(rows) or silent(rows) else 0


def sweep(names: list[str], jobs: int, seconds: float) -> list[dict[str, Any]]:
    """One row a type, in the order of `names`."""
    _processes.set_forkserver_preload([checks.__name__])
    waiting = list(names)
    running: dict[Any, tuple[str, Any, float]] = {}
    rows: dict[str, dict[str, Any]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            here, there = _processes.Pipe(duplex=False)
            process = _processes.Process(target=_work, args=(name, there))
            process.start()
            there.close()  # so that a process that dies is an end of file here
            running[here] = (name, process, time.monotonic() + seconds)
        for ready in multiprocessing.connection.wait(list(running), timeout=1.0):
            pipe = cast(Any, ready)
            name, process, _ = running.pop(pipe)
            try:
                rows[name] = pipe.recv()
            except EOFError:
                process.join()
                rows[name] = {"type": name, "not_built": f"its process ended with exit code {process.exitcode}"}
            process.join()
            print(line(rows[name]), flush=True)
        for pipe, (name, process, end) in list(running.items()):
            if time.monotonic() > end:
                process.kill()
                process.join()
                del running[pipe]
                rows[name] = {"type": name, "not_built": f"more than {seconds:.0f} seconds"}
                print(line(rows[name]), flush=True)
    return [rows[name] for name in names]


def _work(name: str, pipe: Any) -> None:
    # Above what any shrunk model needs: one that asks for more is an error of its own row, not of the machine.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # What other libraries print while they build models is no part of the table.
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    pipe.send(checks.check(name))


def line(row: dict[str, Any]) -> str:
    """What is printed of a type when it is done."""
    if "not_built" in row:
        return f"{row['type']:32}not run: {row['not_built']}"
    said = [f"{row['type']:32}{row['class']:48}"]
    said.append(f"lora {verdict(row['lora'])}")
    said.append(f"mosld {verdict(row['mosld'])}")
    return "  ".join(said)


def verdict(result: dict[str, Any]) -> str:
    """One method's row in words: "passes", or the first thing that did not hold."""
    if "error" in result:
        return result["error"]
    if checks.passes(result):
        return f"passes ({result['adapted']})"
    for what in ("fresh_equal", "reloaded_equal"):
        if not result[what]:
            return f"{what} does not hold"
    if result["still"]:
        return f"{len(result['still'])} trained tensors did not move: {result['still'][0]}"
    return f"{len(result['idle_unsaid'])} layers never ran without a word: {result['idle_unsaid'][0]}"


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """Types that a LoRA manages and the mixture does not."""
    names = []
    for row in rows:
        if "not_built" not in row and lora_manages(row["lora"]) and not checks.passes(row["mosld"]):
            names.append(row["type"])
    return names


def lora_manages(result: dict[str, Any]) -> bool:
    """A LoRA is not asked to name layers that never run, nor for equal bits: PEFT promises neither."""
    return "error" not in result and result["adapted"] > 0


def silent(rows: list[dict[str, Any]]) -> list[str]:
    """Types where something is wrong with the mixture and no error or warning says so."""
    names = []
    for row in rows:
        own = row.get("mosld", {"error": ""})
        if "error" not in own and not checks.passes(own):
            names.append(row["type"])
    return names


def counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    """How many types there are, were run, pass, and fail in which way."""
    ran = [row for row in rows if "not_built" not in row]
    return {
        "types": len(rows),
        "run": len(ran),
        "lora adapts": sum(lora_manages(row["lora"]) for row in ran),
        "mosld passes": sum(checks.passes(row["mosld"]) for row in ran),
        "lora adapts and mosld does not pass": len(missed(rows)),
        "silently wrong": len(silent(rows)),
    }
