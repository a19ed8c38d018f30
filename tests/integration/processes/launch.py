"""torchrun, for tests: a script of this folder as two processes on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[3]
ALONE = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def torchrun(
    *words: str, processes: int = 2, timeout_s: float = 240, fails: bool = False, **environment: str
) -> subprocess.CompletedProcess:
    """So many processes of `-m *words`, one thread each.

    raises AssertionError with what they printed when one fails, or when none does where one should (`fails`).
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", "-m", *words]  # a port of its own for every run
    own = {name: value for name, value in os.environ.items() if name not in ALONE}
    own |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=timeout_s)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done


def both(folder: Path, name: str) -> list[dict[str, Tensor]]:
    """What the two processes kept under this name."""
    return [load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1)]


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], share: float = 1e-5) -> None:
    """The same names, and no tensor further from the expected one than this share of its norm."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        off = torch.linalg.vector_norm(actual[name].double() - tensor.double())
        assert off <= share * torch.linalg.vector_norm(tensor.double()), name
