"""`python -m benchmarks tune`: its options, without Triton, so that the list of verbs needs none."""

import argparse
import os
from pathlib import Path

from ..gpu import device
from ..timing.shapes import LAYERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kernels = "down, up_backward, grad_expert_b, grad_down"
    layers = [name for name in LAYERS if name.startswith("gpu-")]
    dtypes = "of float32, bfloat16, float16 (default: bfloat16)"
    budget = "seconds after which nothing is started (default: 450)"
    parser.add_argument("--kernel", nargs="+", help=f"of {kernels} (default: all)")
    parser.add_argument("--shape", nargs="+", default=layers, help=f"of {', '.join(LAYERS)} (default: gpu-*)")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], help=dtypes)
    parser.add_argument("--budget", type=float, default=450, help=budget)
    parser.add_argument("--out", type=Path, help="also write the rows to this JSON file, which MOSLD_TILES can name")


def run(options: argparse.Namespace) -> int:
    """-> 0 where every case was measured, 1 where one failed or was left out.

    raises ValueError where there is no NVIDIA GPU, where Triton would interpret, and for unknown names.
    """
    on = device.nvidia_gpu()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET=1 interprets the kernels: unset it to measure them")
    from .run import tune  # here, because it imports Triton

    return tune(options, on)
