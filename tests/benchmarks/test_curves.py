"""`python -m benchmarks curves`: what it compares is what it says, and its figures follow from the losses."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import __main__ as command
from benchmarks.long import curves
from benchmarks.long.curve_figures import OURS, SEEDS, TRUTH, judged
from benchmarks.long.curves import RUNS, ReferenceLinear
from benchmarks.long.models import MODELS, text
from mosld import MoSLDLinear

ROOT = Path(__file__).parents[2]
TOY = MODELS["toy"]
STEPS = 8


def test_the_text_can_be_learned_and_has_the_entropy_that_is_told():
    size = MODELS["small"]
    rows = text(size, 2000)
    assert rows.shape == (2000, size.length) and torch.equal(rows, text(size, 2000))
    pairs = torch.stack((rows[:, :-1].flatten(), rows[:, 1:].flatten()))
    counts = torch.zeros(size.vocabulary, size.vocabulary).index_put_(tuple(pairs), torch.ones(()), accumulate=True)
    assert (counts > 0).sum(1).max() <= 4
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    entropy = (counts.sum(1) / counts.sum() * -torch.xlogy(shares, shares).sum(1)).sum()
    assert entropy.item() == pytest.approx(7 / 4 * torch.tensor(2.0).log().item(), rel=0.02)


def test_the_reference_layer_is_ours_in_float64_with_the_same_masks():
    linear, x = nn.Linear(12, 10).double(), torch.randn(5, 12, dtype=torch.float64)
    results = []
    for layer in (ReferenceLinear, MoSLDLinear):
        torch.manual_seed(3)
        adapted = layer.from_linear(linear, r=4, num_experts=4, top_k=2, dropout=0.3).train()
        nn.init.normal_(adapted.expert_b.weight)
        out = adapted(x)
        (out.square().sum() + adapted.adapter.router_logits.sin().sum()).backward()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        assert len(trained) == 3
        results.append([out.detach(), adapted.adapter.router_logits.detach(), *(p.grad for p in trained)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_every_run_begins_with_the_same_numbers_but_for_other_seeds():
    start = {name: dict(curves.model_of(run, TOY).named_parameters()) for name, run in RUNS.items()}
    for name, own in start.items():
        same = [torch.equal(p.float(), start[TRUTH][key].float()) for key, p in own.items()]
        assert all(same) != (name in SEEDS[1:]), name
    frozen = [key for key, p in start[TRUTH].items() if not p.requires_grad]
    assert all(torch.equal(start[SEEDS[1]][key], start[SEEDS[0]][key]) for key in frozen)


def test_the_truth_is_float64_throughout():
    """A change that float32 would swallow anywhere between the embedding and the logits arrives, and in proportion."""
    model, ids = curves.model_of(RUNS[TRUTH], TOY).eval(), text(TOY, 1)
    embedding = model.get_input_embeddings().weight
    logits, direction = [], torch.randn_like(embedding)
    for size in (0.0, 1e-10, 2e-10):
        with torch.no_grad():
            embedding += size * direction
            logits.append(model(ids).logits)
            embedding -= size * direction
    once, twice = (other - logits[0] for other in logits[1:])
    assert once.abs().max() > 1e-11
    torch.testing.assert_close(twice, 2 * once, rtol=1e-2, atol=1e-13)


@pytest.fixture(scope="module")
def trained():
    return {name: curves.train(run, TOY, STEPS) for name, run in RUNS.items()}


def test_float32_follows_float64_and_fewer_bits_follow_less_closely(trained):
    losses = {name: torch.tensor(run["losses"], dtype=torch.float64) for name, run in trained.items()}
    far = {name: (own - losses[TRUTH]).abs().max().item() for name, own in losses.items()}
    assert 0 < far["ours float32"] < 1e-5 and 0 < far["eager float32"] < 1e-5
    assert 1e-4 < far["ours bfloat16"] < 0.02 and 1e-4 < far["eager bfloat16"] < 0.02
    # The scaler skips the first step, where float16's gradients overflow at its scale: both paths are behind by one.
    half, eager = trained["ours float16"], trained["eager float16"]
    assert half["skipped_steps"] == eager["skipped_steps"] == 1 and half["scale"] == eager["scale"] == 2.0**15
    assert 1e-5 < (losses["ours float16"] - losses["eager float16"]).abs().max() < 0.005 < far["ours float16"] < 0.1
    assert all(far[name] > 0.01 for name in SEEDS[1:])
    masks = {name for name, run in trained.items() if run["generator"] == trained[TRUTH]["generator"]}
    assert masks == set(RUNS) - set(SEEDS[1:])


def made(**changes):
    """Runs whose curves, over two steps, are 2 in float64, and those of the three seeds 2, 2.3 and 2.6."""
    levels = {**dict.fromkeys(RUNS, 2.0), SEEDS[1]: 2.3, SEEDS[2]: 2.6, **changes}
    runs = {}
    for name, level in levels.items():
        runs[name] = {"losses": [level + 1, level - 1, level + 1], "generator": "", "seed": 0}
    return runs


def test_the_figures_are_those_of_made_up_curves():
    runs = made(**{OURS[0]: 2.39, OURS[2]: 2.61})
    runs[OURS[1]]["losses"][0] += 0.82  # 0.41 away in the first window alone
    told = judged(runs, window=2)
    assert told["spread"] == pytest.approx(0.4) and told["greatest_spread"] == pytest.approx(0.6)
    rows = {row["name"]: row for row in told["rows"]}
    assert rows.keys() == set(RUNS) - {TRUTH, *SEEDS[1:]}
    seen = [[rows[name][key] for name in OURS] for key in ("distance", "within", "inside")]
    assert seen[0] == pytest.approx([0.39, 0.41, 0.61]) and seen[1:] == [[True, False, False], [1.0, 1.0, 0.0]]
    assert [rows[name]["follows"] for name in (OURS[0], SEEDS[0])] == [1, 3]


@pytest.mark.parametrize(("level", "code"), [(2.39, 0), (2.41, 1)])
def test_the_command_fails_where_a_curve_of_ours_leaves_the_spread(monkeypatch, tmp_path, capsys, level, code):
    runs = iter(made(**{OURS[1]: level}).values())
    monkeypatch.setattr(curves, "train", lambda *_: next(runs))
    out, chart = tmp_path / "curves.json", tmp_path / "pictures" / "curves.png"
    arguments = ["curves", "--toy", "--steps", "4", "--out", str(out), "--chart", str(chart)]
    monkeypatch.setattr(sys, "argv", ["python -m benchmarks", *arguments])
    assert command.main() == code
    assert (" NO " in capsys.readouterr().out) == bool(code)
    result = json.loads(out.read_text())
    assert {"processor", "torch", "commit"} <= set(result["machine"]) and result["settings"]["steps"] == 4
    assert judged(result["runs"], 2)["rows"] == result["rows"]
    assert chart.read_bytes()[:4] == b"\x89PNG"


def test_too_few_steps_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["python -m benchmarks", "curves", "--steps", "1"])
    assert command.main() == 2
    assert "steps must be at least 2, got 1" in capsys.readouterr().err


def test_the_committed_figures_follow_from_the_committed_losses():
    result = json.loads((ROOT / curves.OUT).read_text())
    again = judged(result["runs"], result["settings"]["window"])
    assert {row["name"]: row for row in again["rows"]}.keys() >= set(OURS)
    for row, kept in zip(again["rows"], result["rows"], strict=True):
        for key, value in row.items():
            assert kept[key] == (pytest.approx(value) if isinstance(value, float) else value), (row["name"], key)
    assert again["spread"] == pytest.approx(result["spread"])
    assert all(len(run["losses"]) == result["settings"]["steps"] >= 300 for run in result["runs"].values())
    assert (ROOT / curves.CHART).is_file()
