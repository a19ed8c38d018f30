"""The sweep over transformers' configuration types: a dozen of them here, and the page of all of them."""

import json

import pytest
import torch

from benchmarks.sweep import checks, run, shrunk
from docs.build import architectures

DOZEN = (
    "albert", "bert", "bart", "clip", "gpt2", "llama", "mamba", "phimoe", "qwen2_vl", "siglip", "t5", "vit", "wav2vec2",
)  # fmt: skip
# What PEFT's save_pretrained asks of every model, and these models' classes do not have.
NOT_SAVED = {"wav2vec2"}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", DOZEN)
def test_a_type_passes(name):
    row = checks.check(name)
    assert "not_built" not in row, row
    own = row["mosld"]
    if name in NOT_SAVED:
        assert own["error"].startswith("save: NotImplementedError") and row["lora"]["error"] == own["error"]
        assert own["fresh_equal"] and not own["still"] and not own["idle_unsaid"]
    else:
        assert checks.passes(own), run.verdict(own)
        assert own["adapted"] > 0


def test_sizes_shrink_and_relations_stay():
    how, config = next(shrunk.configurations("llama"))
    assert how == "narrow" and config.num_hidden_layers == 2 and config.vocab_size == shrunk.TOKENS
    assert config.hidden_size == 512 and config.hidden_size % config.num_attention_heads == 0
    assert len(shrunk.types()) > 300 and "llama" in shrunk.types()


class Wrong(torch.nn.Module):
    """A base in which each check can fail."""

    def __init__(self):
        super().__init__()
        self.runs, self.idle = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x):
        return {"logits": self.runs(x)}


def result(**changes):
    held = dict(adapted=2, fresh_equal=True, reloaded_equal=True, still=[], idle=[], idle_unsaid=[])
    return {**held, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "passes (2)"),
        ({"fresh_equal": False}, "fresh_equal does not hold"),
        ({"reloaded_equal": False}, "reloaded_equal does not hold"),
        ({"still": ["a.weight", "b.weight"]}, "2 trained tensors did not move: a.weight"),
        ({"idle_unsaid": ["a"]}, "1 layers never ran without a word: a"),
        ({"error": "train: RuntimeError: x"}, "train: RuntimeError: x"),
    ],
)
def test_what_does_not_hold_is_told(changes, words):
    own = result(**changes)
    assert run.verdict(own) == words
    rows = [{"type": "some", "class": "Some", "lora": result(), "mosld": own}, {"type": "other", "not_built": "no"}]
    assert (run.missed(rows) == ["some"]) == bool(changes)
    assert (run.silent(rows) == ["some"]) == (bool(changes) and "error" not in changes)
    counted = run.counts(rows)
    assert counted["types"] == 2 and counted["run"] == 1 and counted["mosld passes"] == (not changes)


def test_a_base_with_a_layer_that_never_runs_is_seen():
    torch.manual_seed(0)
    base = checks.Running(Wrong().requires_grad_(False), {"x": torch.randn(2, 4)}, "whole", "Wrong")
    own = checks.try_method(base, checks.MoSLDConfig(r=2, num_experts=3, top_k=2, target_modules=["runs", "idle"]))
    assert checks.passes(own) and own["idle"] == ["base_model.model.idle"] and own["unasked"] == 0
    lora = checks.try_method(base, checks.peft.LoraConfig(r=2, target_modules=["runs", "idle"]))
    assert not checks.passes(lora) and lora["idle_unsaid"] == ["base_model.model.idle"]


def test_the_page_is_up_to_date():
    written = architectures.PAGE.read_text()
    assert written == architectures.page(json.loads(architectures.RESULT.read_text()))
    data = json.loads(architectures.RESULT.read_text())
    assert data["counts"] == run.counts(data["types"])
