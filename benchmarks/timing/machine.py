"""What a result depends on beside the code: processor, GPU, threads, versions and the commit."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
# What a measurement runs; results and documents may differ from the commit.
CODE = ("mosld", "mosld_kernels", ":(glob)benchmarks/**/*.py")


def machine() -> dict[str, object]:
    """Everything but the GPU, as result files hold it."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA", "not set"),
        "python": platform.python_version(),
        "torch": installed("torch"),
        "peft": installed("peft"),
        "transformers": installed("transformers"),
        "mosld": installed("mosld"),
        "commit": _commit(),
    }


def gpu() -> dict[str, object]:
    """What a GPU's result depends on beside the code and the host."""
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "triton": installed("triton"),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def installed(package: str) -> str:
    """The package's version, also where the library runs from its folder without an installation."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _processor() -> str:
    names = []
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                names.append(line.partition(":")[2].strip())
        # AMX multiplies bfloat16 several times as fast, so a result without this word cannot be read.
        flags = " with AMX" if torch.cpu._is_amx_tile_supported() else ""
        return f"{names[0]}, {len(names)} logical cores{flags}"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit that is measured, marked when the code differs from it; results and documents may differ."""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *CODE], capture_output=True).returncode
        return commit.stdout.strip() + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
