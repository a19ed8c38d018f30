#!/usr/bin/env bash
# PEFT 0.21.2: model.load_adapter(folder, name) over an adapter of that name, which the model has already, loads the
# weights and keeps the configuration that is there; the folder's own adapter_config.json is passed over, without a
# word. This is what transformers' Trainer does on resume and for the best model, so a changed lora_alpha changes the
# function.
# Seen: trained with lora_alpha 64 (scaling 32), loaded into lora_alpha 2: scaling stays 1.0, outputs differ.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import tempfile
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


def adapted(alpha):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 4))
    return get_peft_model(base, LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False))


folder = tempfile.mkdtemp()
trained = adapted(64)
trained.save_pretrained(folder)
other = adapted(2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    other.load_adapter(folder, "default")
x = torch.ones(1, 4)
scaling = other.base_model.model[0].scaling["default"]
difference = (trained(x) - other(x)).abs().max().item()
print(f"saved with scaling 32.0, after loading {scaling}, outputs differ by {difference:.3f}, warnings {len(caught)}")
assert scaling == 1.0 and difference > 0.01
assert not any("alpha" in str(warning.message) for warning in caught)
PYTHON
