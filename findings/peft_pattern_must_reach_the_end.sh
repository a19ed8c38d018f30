#!/usr/bin/env bash
# PEFT 0.21.2: a rank_pattern (or alpha_pattern) must match up to the END of a module's name. A pattern for a prefix,
# such as "layers\.1\." or "layers.1", changes nothing and is reported nowhere, while a misspelt target_modules is an
# error. The same for layers_to_transform beyond the last layer, as long as one number matches.
# Seen: ranks of layers 0 and 1 under rank_pattern {pattern: 8} with r=2.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import warnings

from peft import LoraConfig, get_peft_model
from torch import nn


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(4, 4)}) for _ in range(2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Decoder()


def adapted(**options):
    adapted_model = get_peft_model(Model(), LoraConfig(r=2, target_modules=["q_proj"], **options))
    return [getattr(layer["q_proj"], "r", {}).get("default") for layer in adapted_model.base_model.model.model.layers]


ranks = {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for pattern in ("layers.1", r"layers\.1\.", r"layers\.1\..*", r"layers\.1\.q_proj"):
        ranks[pattern] = adapted(rank_pattern={pattern: 8})
        print(f"{pattern!r:25} {ranks[pattern]}")
    beyond = adapted(layers_to_transform=[1, 7])
    print(f"layers_to_transform=[1, 7] {beyond}")
assert list(ranks.values()) == [[2, 2], [2, 2], [2, 8], [2, 8]]
assert beyond == [None, 2]
said = [str(warning.message) for warning in caught]
assert not any("rank_pattern" in text or "layers_to_transform" in text for text in said)
PYTHON
