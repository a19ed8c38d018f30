#!/usr/bin/env bash
# PEFT 0.21.2: saving an adapter with safe_serialization=False into a folder that holds an earlier safetensors save
# writes adapter_model.bin beside it and leaves adapter_model.safetensors. Loading the folder takes the safetensors
# file: the OLD weights come back, without a word.
# Seen: saved 1.0, then 2.0; both files are there; loaded 1.0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import os
import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn


def adapter_with(value):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    nn.init.constant_(model.base_model.model[0].lora_B["default"].weight, value)
    return model


folder = tempfile.mkdtemp()
adapter_with(1.0).save_pretrained(folder)
adapter_with(2.0).save_pretrained(folder, safe_serialization=False)
files = sorted(name for name in os.listdir(folder) if name.startswith("adapter_model"))
loaded = PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), folder)
value = loaded.base_model.model[0].lora_B["default"].weight.unique().tolist()
print(f"saved 1.0, then 2.0; files {files}; loaded {value}")
assert files == ["adapter_model.bin", "adapter_model.safetensors"]
assert value == [1.0]
PYTHON
