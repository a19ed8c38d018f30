#!/usr/bin/env bash
# transformers 5.23.0 with peft 0.21.2: load_best_model_at_end with an adapter that is not called "default". PEFT saves
# such an adapter in a folder of its own inside the checkpoint; the Trainer looks for the files in the checkpoint
# itself, logs that it could not locate the best model, and the training ends with the LAST weights. An adapter called
# "default" is loaded.
# Seen: evaluation loss now against the best: default 4.1307 = 4.1307, another name 4.1590 > 4.1307.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$work"
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments


def row(tokens):
    return {"input_ids": tokens, "labels": tokens}


def trained(name):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    arguments = TrainingArguments(
        tempfile.mkdtemp(), num_train_epochs=3, learning_rate=0.2, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, save_strategy="epoch", eval_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=False, disable_tqdm=True, logging_strategy="no",
    )
    trainer = Trainer(
        model=get_peft_model(LlamaForCausalLM(config), lora, adapter_name=name),
        args=arguments,
        train_dataset=[row(torch.arange(8))] * 16,
        eval_dataset=[row(torch.arange(8).flip(0))] * 4,  # which gets worse while the other is learnt
    )
    trainer.train()
    return trainer.state.best_metric, trainer.evaluate()["eval_loss"]


best, now = trained("default")
best_other, now_other = trained("another")
print(f"loss at the end and best: default {now:.4f} {best:.4f}, another name {now_other:.4f} {best_other:.4f}")
assert abs(now - best) < 1e-6
assert now_other > best_other + 1e-3
PYTHON
