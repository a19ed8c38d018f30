"""What is written where output is a file: results, and no bars that draw themselves again and again."""

import io
import sys

import peft
import pytest
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.utils import logging

from mosld import MoSLDConfig, MoSLDTrainer
from mosld.cli.main import VERBS, main
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


@pytest.mark.parametrize("on_a_terminal", [False, True])
def test_transformers_bars_are_not_drawn_into_a_file_either(tmp_path, monkeypatch, on_a_terminal):
    """A command loads models, and transformers draws a bar for each."""
    tiny_llama().save_pretrained(tmp_path)
    stream = Terminal() if on_a_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(VERBS["inspect"], "run", lambda *_: AutoModelForCausalLM.from_pretrained(tmp_path) and 0)
    assert main(["inspect", str(tmp_path)]) == 0
    assert ("Loading weights" in stream.getvalue()) == on_a_terminal
    assert logging.is_progress_bar_enabled()  # for whoever calls a command from a program of his own
