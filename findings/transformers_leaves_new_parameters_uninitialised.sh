#!/usr/bin/env bash
# transformers 5.23.0: a subclass of a model that adds a module with a plain nn.Parameter, loaded by from_pretrained
# from a checkpoint of the parent class. The module's own __init__ set the parameter to zero; the model is built on the
# meta device and what the checkpoint lacks and _init_weights does not know is left as memory is found, not as __init__
# had set it. The loading report lists the key as newly initialised.
# Seen: five loads of a parameter that __init__ sets to zero: values up to 1e37, NaN among them.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import tempfile

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class Gate(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(size, size))

    def forward(self, x):
        return x + x @ self.scale


class WithGate(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.gate = Gate(config.hidden_size)


config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2,
)
assert not WithGate(config).gate.scale.any()  # built directly, it is zero
folder = tempfile.mkdtemp()
LlamaForCausalLM(config).save_pretrained(folder)
loaded = []
for _ in range(5):
    used = [torch.full((32, 32), 7.0) for _ in range(1000)]
    del used  # memory as a program leaves it
    loaded.append(WithGate.from_pretrained(folder).gate.scale.detach().abs().max().item())
print(f"largest value of a parameter that __init__ sets to zero, in five loads: {loaded}")
assert any(value != 0 for value in loaded)
PYTHON
