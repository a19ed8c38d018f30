"""Every part of the GPU benchmark on CPU at toy size, run as a program under TRITON_INTERPRET=1; prints its parts."""

import json
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu import measurements
from benchmarks.gpu import run as gpu
from benchmarks.timing.timers import interleaved


def main() -> None:
    once = partial(interleaved, rounds=2)
    measurements.launches.__defaults__ = (True, 3)
    sizes = ((40, 64, 48),)
    scale = gpu.Scale(once, once, once, once, torch.float32, sizes, (("toy", "float32"),), copied_bytes=4096, side=16)
    # The tests of tests/gpu skip themselves here and would only take time.
    parts = [part for part in gpu.parts(torch.device("cpu"), scale) if part.name != "tests"]
    result: dict = {"parts": []}
    with tempfile.TemporaryDirectory() as folder:
        gpu.run_parts(parts, result, Path(folder, "gpu.json"), 600.0, lost=lambda: False)
    print(json.dumps(result["parts"]))


if __name__ == "__main__":
    main()
