"""What must hold before a time means something, each in a process of its own: a fault there stops nothing here.

tests       the test suite's part for GPUs
sanitizer   one small forward and backward under compute-sanitizer, for accesses and for races
trial       one forward and backward of the Triton backend at every size that is measured
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from ..timing.shapes import LayerShape

ROOT = Path(__file__).parents[2]
GPU_TESTS = ROOT / "tests" / "gpu"
# One JSON line a size; a size that fails by an exception lets the next one run, a lost context ends the process.
PROGRAM = """
import json, sys, torch, mosld_kernels
device, backend, sizes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for T, D_in, D_out, R, E, K, dtype in sizes:
    try:
        adapter = dict(shared_a=(R, D_in), expert_b=(D_out, E * R), router_weight=(E, D_in))
        shapes = dict(x=(T, D_in), weight=(D_out, D_in), **adapter)
        tensors = {name: torch.randn(s, device=device).to(getattr(torch, dtype)) for name, s in shapes.items()}
        for name in tensors.keys() - {"weight"}:
            tensors[name].requires_grad_()
        seed = torch.tensor([7], device=device)
        y, logits = mosld_kernels.mosld_linear(
            **tensors, bias=None, top_k=K, scale=0.01, dropout_p=0.1, seed=seed, backend=backend)
        y.sum().backward()
        sums = {name: tensor.grad.float().sum().item() for name, tensor in tensors.items() if tensor.grad is not None}
        for name, value in {"y": y.float().sum().item(), **sums}.items():
            if value - value != 0:
                raise ValueError(f"{name} is not finite")
        print(json.dumps({"state": "ran"}), flush=True)
    except Exception as error:
        print(json.dumps({"state": "failed", "error": f"{type(error).__name__}: {error}".splitlines()[0]}), flush=True)
"""


def run_process(command: Sequence[str], limit_s: float) -> tuple[int | None, str]:
    """-> exit status, None where it ran past `limit_s` seconds and was ended, and what it wrote, both streams."""
    with tempfile.TemporaryFile("w+") as written:
        # A session of its own, so that what the command starts in turn ends with it.
        settings: dict = dict(stdout=written, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        with subprocess.Popen(command, **settings) as process:
            try:
                status = process.wait(limit_s)
            except BaseException as stop:
                os.killpg(process.pid, signal.SIGKILL)
                if not isinstance(stop, subprocess.TimeoutExpired):
                    raise
                status = None
        written.seek(0)
        return status, written.read()


def tests(limit_s: float, folder: Path = GPU_TESTS) -> list[dict]:
    """-> one row with the counts, and one for each test that did not pass.

    raises RuntimeError where a test fails or the run does not end; a folder that is not there is reported as absent.
    """
    if not folder.exists():
        return [{"name": "tests", "state": "absent"}]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "junit.xml")
        command = [sys.executable, "-m", "pytest", str(folder), "-q", "-m", "gpu", f"--junitxml={report}", "-p"]
        status, text = run_process([*command, "no:cacheprovider"], limit_s)
        rows: list[dict] = _junit(report) if report.exists() else [{"name": "tests", "state": "no report"}]
    rows[0].update(exit_status=status)
    if status != 0:
        failed = [row["name"] for row in rows[1:] if row["state"] != "skipped"]
        reason = ", ".join(failed) or text.strip()[-500:]
        raise CheckFailed(f"pytest ended with {'its time' if status is None else status}: {reason}", rows)
    return rows


class CheckFailed(RuntimeError):
    """A check that failed, with the rows that it has nevertheless."""

    def __init__(self, message: str, rows: list[dict]):
        super().__init__(message)
        self.rows = rows


def _junit(report: Path) -> list[dict]:
    suite = ElementTree.parse(report).getroot().find("testsuite")
    if suite is None:
        return [{"name": "tests", "tests": 0, "failures": 0, "errors": 0, "skipped": 0}]
    counts: dict = {"name": "tests"}
    for key in ("tests", "failures", "errors", "skipped"):
        counts[key] = int(suite.get(key, 0))
    rows = [counts]
    for case in suite.iter("testcase"):
        for state in ("failure", "error", "skipped"):
            found = case.find(state)
            if found is not None:
                message = (found.get("message") or "").strip()[:300]
                rows.append({"name": case.get("name", ""), "state": state, "message": message})
    return rows


def sanitizer(limit_s: float, device: str = "cuda", backend: str = "triton") -> list[dict]:
    """-> one row a tool, with its own summary; absent where compute-sanitizer is not on the PATH.

    raises CheckFailed where a tool finds an error, the program fails, or it does not end.
    """
    found = shutil.which("compute-sanitizer")
    if found is None:
        return [{"name": "compute-sanitizer", "state": "absent"}]
    size = json.dumps([[65, 48, 80, 16, 4, 2, "bfloat16"]])
    program = [sys.executable, "-c", PROGRAM, device, backend, size]
    rows = []
    for tool in ("memcheck", "racecheck"):
        status, text = run_process([found, "--tool", tool, "--error-exitcode", "66", *program], limit_s / 2)
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
        if status is None:
            state = "ran out of time"
        elif status == 0 and '"state": "ran"' in text:
            state = "clean"
        else:
            state = "failed"
        rows.append({"name": tool, "state": state, "exit_status": status, "summary": summary or text.strip()[-500:]})
    if any(row["state"] != "clean" for row in rows):
        raise CheckFailed("; ".join(f"{row['name']}: {row['state']}" for row in rows), rows)
    return rows


def trial(
    limit_s: float, sizes: Sequence[tuple[LayerShape, str]], device: str = "cuda", backend: str = "triton"
) -> list[dict]:
    """-> one row a size, (shape, name of its dtype), `state` "ran" or "failed" with its error.

    raises CheckFailed where one did not run.
    """
    arguments = [device, backend, json.dumps([[*shape, dtype] for shape, dtype in sizes])]
    status, text = run_process([sys.executable, "-c", PROGRAM, *arguments], limit_s)
    outcomes = [json.loads(line) for line in text.splitlines() if line.startswith('{"state"')]
    # A process that ended early has left no line for the sizes after that.
    ended = "it ran out of time" if status is None else f"the process ended with {status}"
    missing = {"state": "failed", "error": f"{ended}: {text.strip()[-300:]}"}
    outcomes += [missing] * (len(sizes) - len(outcomes))
    rows = []
    for (shape, dtype), outcome in zip(sizes, outcomes, strict=True):
        rows.append({"name": size_name(shape, dtype), **outcome})
    failed = [row for row in rows if row["state"] != "ran"]
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(rows)} sizes: {failed[0]['error']}", rows)
    return rows


def size_name(shape: LayerShape, dtype: str) -> str:
    """One size as text, the same in every part."""
    return f"{shape}, {dtype}"


def failures(rows: Sequence[Mapping]) -> dict[str, str]:
    """-> size -> error, of the rows of `trial`"""
    return {row["name"]: row["error"] for row in rows if row["state"] == "failed"}
