"""`mosld inspect`: its numbers are those of updates and routings written out; what is no adapter is refused by name."""

import json
import math

import peft
import pytest
import torch
from torch import nn

from mosld import MoSLDConfig, MoSLDLinear, router_stats
from mosld.analysis.saved_adapters import expert_numbers, inspect_adapter
from mosld.cli.main import main
from mosld.files.adapter_folder import AdapterFileError
from mosld.layers.stats import RouterUse
from mosld.mixture.spec import Mixture
from mosld.tasks.encode import Encoder
from tests.helpers.models import perturb, tiny_llama
from tests.tasks.test_scoring import byte_tokenizer

TEXTS = {
    "even": [{"prompt": f"{i}?", "choices": ["odd", "even"], "answer": 1 - i % 2} for i in range(7)],
    "vowel": [{"prompt": f"b{c}", "choices": ["no", "yes"], "answer": int(c in "aeiou")} for c in "aeiobcd"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny model, an adapter of five experts (three in the second layer) for it, and two tasks."""
    folder = tmp_path_factory.mktemp("data")
    tokenizer = byte_tokenizer()
    base = tiny_llama(vocab_size=len(tokenizer))
    base.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    config = MoSLDConfig(
        r=2, alpha=6, num_experts=5, num_experts_pattern={r"layers\.1\..*": 3}, target_modules=["q_proj", "down_proj"]
    )
    model = peft.get_peft_model(base, config)
    torch.manual_seed(1)
    perturb(model)
    router = model.base_model.model.model.layers[0].self_attn.q_proj.mosld_router["default"].weight
    router.data[:] = (
        torch.tensor([[1.0], [-1], [0.5], [-0.5], [0.1]]) * router.data[0]
    )  # two are always before the last
    model.save_pretrained(str(folder / "adapter"))
    for name, rows in TEXTS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def load(data):
    base = type(tiny_llama()).from_pretrained(data / "model")
    return peft.PeftModel.from_pretrained(base, str(data / "adapter")).eval()


def numbers_of(shared_a, expert_b, num_experts, scale) -> dict:
    r = len(shared_a)
    mixture = Mixture(r=r, alpha=scale * r, num_experts=num_experts, top_k=1)
    return expert_numbers({"shared_a": shared_a, "expert_b": expert_b}, mixture)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_and_similarities_are_those_of_the_updates_written_out(dtype):
    shared_a, expert_b = torch.randn(3, 11).to(dtype), torch.randn(7, 5 * 3).to(dtype)
    expert_b[:, 6:9] = 0  # the third expert
    numbers = numbers_of(shared_a, expert_b, 5, scale=1.5)
    own = [expert_b[:, 3 * e : 3 * e + 3].double() for e in range(5)]
    expected = [sum(x * x for x in (1.5 * b @ shared_a.double()).flatten().tolist()) ** 0.5 for b in own]
    assert numbers["update_norms"] == pytest.approx(expected, rel=1e-12) and numbers["untrained"] == [2]
    cosines = [
        (own[e] * own[f]).sum().item() / (own[e].norm() * own[f].norm()).item()
        for e in (0, 1, 3, 4)
        for f in (0, 1, 3, 4)
        if e != f
    ]
    assert numbers["similarity"] == pytest.approx(sum(cosines) / len(cosines), rel=1e-12)


def test_similarity_is_one_for_equal_experts_and_none_without_a_pair():
    b = torch.randn(6, 2)
    a = torch.randn(2, 5)
    assert numbers_of(a, torch.cat((b, 3 * b), 1), 2, 1.0)["similarity"] == pytest.approx(1)
    assert numbers_of(a, torch.cat((b, -b), 1), 2, 1.0)["similarity"] == pytest.approx(-1)
    zero = numbers_of(a, torch.zeros(6, 4), 2, 1.0)
    assert zero == {"update_norms": [0, 0], "similarity": None, "untrained": [0, 1]}
    assert numbers_of(a, b, 1, 1.0)["similarity"] is None


def test_a_report_is_of_the_saved_adapter(data):
    report, model = inspect_adapter(data / "adapter"), load(data)
    assert report["method"] == "MOSLD" and (report["r"], report["alpha"], report["top_k"]) == (2, 6, 2)
    assert report["parameters"] == sum(p.numel() for n, p in model.named_parameters() if ".mosld_" in n)
    assert list(report["layers"]) == [
        f"model.layers.{i}.{n}" for i in (0, 1) for n in ("mlp.down_proj", "self_attn.q_proj")
    ]
    for name, layer in report["layers"].items():
        mixture = model.base_model.model.get_submodule(name).mixtures["default"]
        assert layer["num_experts"] == mixture.num_experts == (5 if ".0." in name else 3)
        assert (layer["in_features"], layer["out_features"]) == ((48, 32) if "down" in name else (32, 32))
        assert layer["parameters"] == sum(p.numel() for p in mixture.parameters())
        for e, norm in enumerate(layer["update_norms"]):
            update = 3.0 * mixture.expert_b.weight[:, 2 * e : 2 * e + 2] @ mixture.shared_a.weight
            assert norm == pytest.approx(update.norm().item(), rel=1e-5)


def test_modules_saved_beside_the_adapter_are_told_apart(tmp_path):
    model = peft.get_peft_model(tiny_llama(), MoSLDConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    model.save_pretrained(str(tmp_path))
    report = inspect_adapter(tmp_path)
    assert report["others"] == {"lm_head.weight": [96, 32]} and len(report["layers"]) == 2
    assert all(layer["untrained"] == list(range(8)) for layer in report["layers"].values())


def test_use_over_many_batches_is_what_a_loop_over_tokens_counts():
    layer = MoSLDLinear(6, 5, r=2, num_experts=4, top_k=2, dtype=torch.float64)
    model, use = nn.Sequential(layer), RouterUse()
    lengths = {"a": [[3, 1], [2, 3]], "b": [[1, 2]]}
    tokens = {"a": [], "b": []}
    for group, batches in lengths.items():
        for rows in batches:
            x = torch.randn(2, 3, 6, dtype=torch.float64)
            model(x)
            use.update(group, model, torch.tensor([[1] * n + [0] * (3 - n) for n in rows]))
            tokens[group] += [x[i, j] for i, n in enumerate(rows) for j in range(n)]
    for group, own in use.stats().items():
        places, gates, probabilities, entropy = [0] * 4, [0.0] * 4, [0.0] * 4, 0.0
        for token in tokens[group]:
            logits = [
                sum(w * v for w, v in zip(row, token.tolist(), strict=True)) for row in layer.router.weight.tolist()
            ]
            weights = [math.exp(logit) for logit in logits]
            chosen = sorted(range(4), key=lambda e: -weights[e])[:2]
            for e in range(4):
                places[e] += e in chosen
                gates[e] += weights[e] / sum(weights[c] for c in chosen) if e in chosen else 0
                probabilities[e] += weights[e] / sum(weights)
                entropy -= weights[e] / sum(weights) * math.log(weights[e] / sum(weights))
        n, stats = len(tokens[group]), own["0"]
        assert stats.tokens == n == {"a": 9, "b": 3}[group]
        assert stats.load.tolist() == pytest.approx([p / (2 * n) for p in places])
        assert stats.gates.tolist() == pytest.approx([g / n for g in gates])
        assert stats.probability.tolist() == pytest.approx([p / n for p in probabilities])
        assert stats.entropy == pytest.approx(entropy / n)
        assert stats.dead == [e for e in range(4) if places[e] == 0]
    assert use.shares()["b"]["0"] == use.stats()["b"]["0"].load.tolist()
    assert router_stats(model)["0"].tokens == 6


def tasks(data):
    return [word for name in TEXTS for word in ("--task", f"{name}={data / f'{name}.jsonl'}")]


def test_the_command_reports_use_by_task_and_draws_it(data, tmp_path, capsys):
    model = str(data / "model")
    words = ["inspect", str(data / "adapter"), "--model", model, *tasks(data), "--eval-batch-size", "5", "--json"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert (tmp_path / "out" / "experts.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert main(["eval", "--model", model, "--adapter", str(data / "adapter"), *tasks(data)]) == 0
    assert report["tasks"] == json.loads(capsys.readouterr().out)
    adapted, encoder = load(data), Encoder(byte_tokenizer(), 64)
    for task, rows in TEXTS.items():
        places: dict[str, list[int]] = {}
        for row in rows:
            for choice in row["choices"]:  # every text by itself: no padding, no batch
                pair = encoder.pair(row["prompt"], choice)
                adapted(torch.tensor([pair.prompt + pair.answer]))
                for name in report["layers"]:
                    mixture = adapted.base_model.model.get_submodule(name).mixtures["default"]
                    counts = places.setdefault(name, [0] * mixture.num_experts)
                    for token in mixture.router_logits[0].tolist():
                        for e in sorted(range(len(token)), key=lambda e, token=token: -token[e])[:2]:
                            counts[e] += 1
        assert set(report["use"][task]) == set(places)
        for name, counts in places.items():
            use = report["use"][task][name]
            assert use["tokens"] == sum(counts) / 2
            assert use["load"] == pytest.approx([count / sum(counts) for count in counts])
            assert use["dead"] == [e for e, count in enumerate(counts) if count == 0]
            assert sum(use["gates"]) == pytest.approx(1) and 0 < use["entropy"] <= math.log(len(counts)) + 1e-6
    assert 4 in report["use"]["even"]["model.layers.0.self_attn.q_proj"]["dead"]
    assert report["use"]["even"] != report["use"]["vowel"]


def test_the_command_prints_tables(data, capsys):
    assert main(["inspect", str(data / "adapter")]) == 0
    text = capsys.readouterr().out
    report = inspect_adapter(data / "adapter")
    assert f"{report['parameters']:,} parameters in 4 layers" in text and "experts per layer 3 to 5" in text
    for name, layer in report["layers"].items():
        row = next(line.split() for line in text.splitlines() if line.startswith(name))
        assert row[1:6] == [str(layer["in_features"]), "->", "32", str(layer["num_experts"]), str(layer["parameters"])]
        assert float(row[6]) == pytest.approx(min(layer["update_norms"]), rel=1e-2)
        assert float(row[8]) == pytest.approx(max(layer["update_norms"]), rel=1e-2) and row[-1] == "none"
    assert main(["inspect", str(data / "adapter"), "--model", str(data / "model"), *tasks(data)]) == 0
    text = capsys.readouterr().out
    assert "even, accuracy" in text and "vowel, accuracy" in text
    assert sum(line.startswith("model.layers.0.mlp.down_proj") for line in text.splitlines()) == 3


def copied(data, folder):
    folder.mkdir(exist_ok=True)
    for path in (data / "adapter").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_what_is_no_adapter_is_refused_by_name(data, tmp_path):
    with pytest.raises(AdapterFileError, match="is not a saved adapter: adapter_config.json is missing"):
        inspect_adapter(tmp_path)
    folder = copied(data, tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(
        AdapterFileError, match="safetensors is missing, and adapter_model.bin, a pickle, is not opened"
    ):
        inspect_adapter(folder)
    folder = copied(data, tmp_path / "b")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(AdapterFileError, match="b/adapter_model.safetensors is cut off"):
        inspect_adapter(folder)
    folder = copied(data, tmp_path / "c")
    for text, message in (
        ("{", "c/adapter_config.json is not JSON"),
        ("[]", "its peft_type is None"),
        ('{"peft_type": "LORA"}', "is of no MoSLD adapter: its peft_type is 'LORA'"),
        ('{"peft_type": "MOSLD", "r": 0}', "cannot be used: r must be an integer of at least 1, got 0$"),
        (
            '{"peft_type": "MOSLD", "shared": "sideways", "noise": 1}',
            "got 'sideways'; it has fields that .* not know: noise",
        ),
    ):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(AdapterFileError, match=message):
            inspect_adapter(folder)


def test_fields_of_a_newer_version_are_named(data, tmp_path, capsys):
    folder = copied(data, tmp_path / "a")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "router_noise": 0.5}))
    (folder / "adapter_model.sha256").unlink()
    assert inspect_adapter(folder)["unknown_fields"] == ["router_noise"]
    assert main(["inspect", str(folder)]) == 0
    assert "adapter_config.json that this version does not know: router_noise" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "even=even.jsonl"], "--task and --quick need --model"),
        (["--model", "x", "--quick"], "--quick is for --model embedded"),
        (["--model", "/no/such/model", "--task", "even=EVEN"], "the model '/no/such/model' cannot be loaded"),
        (["--model", "MODEL"], "--model needs at least one --task"),
        (["--output", "FULL"], "is not empty: choose another --output"),
        (["--eval-batch-size", "0", "--model", "MODEL", "--task", "even=EVEN"], "must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(data, capsys, more, message):
    places = {"MODEL": str(data / "model"), "FULL": str(data), "even=EVEN": f"even={data / 'even.jsonl'}"}
    assert main(["inspect", str(data / "adapter"), *(places.get(word, word) for word in more)]) == 2
    assert message in capsys.readouterr().err


def test_an_adapter_for_another_model_is_refused(data, tmp_path, capsys):
    tokenizer = byte_tokenizer()
    tiny_llama(vocab_size=len(tokenizer), hidden_size=64).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert main(["inspect", str(data / "adapter"), "--model", str(tmp_path), *tasks(data)]) == 2
    assert "which has 64 -> 64 here" in capsys.readouterr().err
