#!/usr/bin/env bash
# Triton 3.7.1, TRITON_INTERPRET=1 (kernels run on CPU tensors, as tests without a GPU do): tl.dot of two bfloat16
# tiles is wrong by many orders of magnitude, without an error; float16 and float32 are right.
# Seen: largest error of a 16x16 product of normal data: float16 0.0, float32 0.0, bfloat16 2.4e10.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 triton==3.7.1 numpy==2.4.6
cd "$work"
TRITON_INTERPRET=1 "$work/venv/bin/python" -W ignore - <<'PYTHON'
import pathlib
import runpy

pathlib.Path("kernel.py").write_text("""
import torch
import triton
import triton.language as tl


@triton.jit
def multiply(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def error(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(2, 16, 16).to(dtype).unbind()
    out = torch.empty(16, 16)
    multiply[(1,)](a, b, out, 16)
    return (out - a.float() @ b.float()).abs().max().item()


errors = {str(dtype): error(dtype) for dtype in (torch.float16, torch.float32, torch.bfloat16)}
""")
errors = runpy.run_path("kernel.py")["errors"]
print(errors)
assert errors["torch.float16"] < 1e-2 and errors["torch.float32"] < 1e-4
assert errors["torch.bfloat16"] > 1e3
PYTHON
