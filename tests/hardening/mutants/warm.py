"""A process that has imported what the tests import, and forks one that runs pytest for each line it reads.

Importing torch, transformers and peft takes longer than most tests. Run as a program, with the names of the modules to
import first. Each line is a JSON object, the arguments of `child`; the answers are the child's process id, and when it
has ended its status as `os.waitpid` gives it. What is tested is imported in the child alone.
"""

import gc
import importlib
import json
import os
import sys
from pathlib import Path

FOREIGN = 70  # exit status of a run that imported another copy of what it should test


def child(tree: str, packages: list[str], log: str, arguments: list[str]) -> int:
    """Run pytest in `tree`, its output in the file `log` -> pytest's exit status, or FOREIGN"""
    os.setsid()
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (written, 1), (written, 2)):
        os.dup2(descriptor, target)
    os.chdir(tree)
    sys.path.insert(0, tree)
    sys.argv = ["pytest", *arguments]
    import pytest

    status = int(pytest.main(arguments))
    files = [(name, getattr(module, "__file__", None)) for name, module in list(sys.modules.items())]
    foreign = [
        f"{name} from {file}"
        for name, file in files
        if name.partition(".")[0] in packages and file and not Path(file).resolve().is_relative_to(tree)
    ]
    if foreign:
        print(f"the tests imported {', '.join(foreign)}")
    sys.stdout.flush()
    return FOREIGN if foreign else status


def main() -> None:
    del sys.path[0]  # this file's folder, whose modules are nobody's
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the imports print is no answer
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()  # the children share this memory
    for line in sys.stdin:
        request = json.loads(line)
        if (process := os.fork()) == 0:
            status = 3  # pytest's own for an error inside
            try:
                status = child(**request)
            finally:
                os._exit(status)
        print(process, file=answers)
        print(os.waitpid(process, 0)[1], file=answers)


if __name__ == "__main__":
    main()
