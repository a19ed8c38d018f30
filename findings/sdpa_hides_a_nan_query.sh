#!/usr/bin/env bash
# torch 2.13.0, CPU: scaled_dot_product_attention with a query row of NaN. The math backend returns NaN for that row;
# the flash backend, which is the default, returns zeros: a NaN that arose upstream is gone behind the attention, and
# the logits are finite and wrong. A NaN in a key comes through (but for a row of the causal mask that sees the key).
# Seen: rows with NaN, flash [F, F, F, F], math [F, T, F, F].
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

torch.manual_seed(0)
query, key, value = torch.randn(3, 1, 1, 4, 8).unbind()
query[0, 0, 1] = float("nan")


def attend():
    return scaled_dot_product_attention(query, key, value)[0, 0]


with sdpa_kernel(SDPBackend.MATH):
    math = attend()
with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
    flash = attend()
rows = {"math": math.isnan().any(-1).tolist(), "flash": flash.isnan().any(-1).tolist()}
print(f"rows with NaN: {rows}; the row of the NaN query by flash: {flash[1].tolist()}")
assert rows == {"math": [False, True, False, False], "flash": [False] * 4}
assert not flash[1].any()
assert torch.equal(attend(), flash)  # which the default is
PYTHON
