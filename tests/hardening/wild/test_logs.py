"""What is written where output is a file: results, and no bars that draw themselves again and again."""

import io
import sys

import peft
from transformers import TrainingArguments

from mosld import MoSLDConfig, MoSLDTrainer
from mosld.training.progress import show_progress
from tests.helpers.models import tiny_llama, token_ids


def trained(tmp_path, monkeypatch, stream) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    model = peft.get_peft_model(tiny_llama(), MoSLDConfig(r=2, num_experts=3, target_modules=["q_proj"]))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=5, per_device_train_batch_size=1, use_cpu=True, report_to="none", save_strategy="no",
        logging_steps=1,
    )  # fmt: skip
    trainer = MoSLDTrainer(model, arguments, train_dataset=[{"input_ids": r, "labels": r} for r in token_ids()])
    show_progress(trainer, "training")
    trainer.train()
    return stream.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_a_few_lines_and_no_bar(tmp_path, monkeypatch):
    text = trained(tmp_path, monkeypatch, io.StringIO())
    lines = [line for line in text.splitlines() if line.startswith("training: step ")]
    assert "\r" not in text and 1 <= len(lines) <= 10 and all("loss=" in line for line in lines)


def test_a_terminal_shows_one(tmp_path, monkeypatch):
    assert "training" in trained(tmp_path, monkeypatch, Terminal())
