#!/usr/bin/env bash
# torch 2.13.0, CPU: under no_grad, F.linear of a transposed [tokens, batch, features] input gives other last bits when
# the weight's requires_grad is set: the product is folded into one matrix then, and done batch by batch otherwise. So
# freezing a model's weights, which changes no value, changes its outputs. Contiguous inputs are not affected.
# Seen: equal for a contiguous input True, for a transposed one False, largest difference 2.7e-05.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.nn.functional import linear

torch.manual_seed(0)
weight, bias = torch.randn(128, 128), torch.randn(128)
batch_first = torch.randn(2, 512, 128)


def equal_with_and_without(x):
    with torch.no_grad():
        frozen = linear(x, weight.requires_grad_(False), bias)
        trained = linear(x, weight.requires_grad_(True), bias)
    return torch.equal(frozen, trained), (frozen - trained).abs().max().item()


contiguous = equal_with_and_without(batch_first.transpose(0, 1).contiguous())
transposed = equal_with_and_without(batch_first.transpose(0, 1))
print(f"contiguous: {contiguous}, transposed: {transposed}")
assert contiguous == (True, 0.0)
assert not transposed[0] and transposed[1] < 1e-4
PYTHON
