"""`mosld merge`, as a user gives it: what it writes, what it refuses, and that it goes on where it was cut off."""

import functools
import json
import math

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mosld
from mosld.cli import merge as merge_verb
from mosld.cli.main import build_parser, main
from mosld.experiments import compare_merged
from mosld.merging import descent
from mosld.merging.methods import METHODS
from tests.helpers.cli_data import write_data
from tests.helpers.models import perturb, token_ids

RANKS = {"a": 2, "b": 3}
TARGETS = {"a": ["q_proj", "down_proj"], "b": ["q_proj", "up_proj"]}
FEW = ("--steps", "3", "--batch-size", "4", "--learning-rate", "0.05")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The user's model and tasks, two LoRAs of it and, of the first, the full checkpoint."""
    folder = write_data(tmp_path_factory.mktemp("merge"))
    for number, name in enumerate(RANKS):
        config = peft.LoraConfig(r=RANKS[name], lora_alpha=3, target_modules=TARGETS[name])
        model = peft.get_peft_model(base(folder), config)
        torch.manual_seed(number)
        perturb(model)
        model.save_pretrained(str(folder / name))
        model.merge_and_unload().save_pretrained(folder / f"full_{name}")
    return folder


def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model").eval()


def ids(folder):
    return token_ids() % base(folder).config.vocab_size


@torch.no_grad()
def logits(folder, adapter=None, full=None):
    model = AutoModelForCausalLM.from_pretrained(full).eval() if full else base(folder)
    model = peft.PeftModel.from_pretrained(model, str(adapter)).eval() if adapter else model
    return model(ids(folder)).logits


@torch.no_grad()
def expected(folder, scales):
    """The base with scales[name] times each adapter's own dense update, by PEFT."""
    model = base(folder)
    for name, scale in scales.items():
        tuned = AutoModelForCausalLM.from_pretrained(folder / f"full_{name}")
        before = base(folder)
        for key, weight in model.named_parameters():
            weight += scale * (tuned.get_parameter(key) - before.get_parameter(key))
    return model(ids(folder)).logits


def merge(folder, output, method, *more, adapters=("a", "b"), tasks=True):
    specs = [f"{name}={folder / name}.jsonl:{folder / name}.jsonl" for name in ("even", "vowel")] if tasks else []
    own = ["--tasks", *specs] if tasks else []
    paths = [str(folder / name) for name in adapters]
    return main(
        ["merge", "--method", method, "--base", str(folder / "model"), *paths, *own, "--output", str(output), *more]
    )


def told(output):
    return json.loads((output / "results.json").read_text())


def near(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_task_arithmetic_of_loras_leaves_as_one_lora_that_equals_the_dense_sum(data, tmp_path, capsys):
    assert merge(data, tmp_path / "o", "task_arithmetic", "--scale", "0.7") == 0
    near(logits(data, tmp_path / "o" / "adapter"), expected(data, {"a": 0.7, "b": 0.7}))
    own = told(tmp_path / "o")
    assert own["coefficients"] == pytest.approx([0.7, 0.7]) and own["form"] == "lora" and 0 < own["lost"] < 1e-6
    fields = json.loads((tmp_path / "o" / "adapter" / "adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA" and fields["r"] <= sum(RANKS.values()) + 1
    out = capsys.readouterr().out
    assert "the adapters were trained on" not in out and "merged" in out and "coefficients: 0.700 0.700" in out
    # The scores are those of the saved model.
    scored = tmp_path / "scores.json"
    task = ["--task", f"even={data / 'even.jsonl'}", "--output", str(scored)]
    assert main(["eval", "--model", str(data / "model"), "--adapter", str(tmp_path / "o" / "adapter"), *task]) == 0
    assert json.loads(scored.read_text())["tasks"]["even"]["accuracy"] == own["tasks"]["even"]["accuracy"]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "r_mtllmf"])
def test_one_adapter_with_a_coefficient_of_one_is_that_adapter(data, tmp_path, method):
    more = ("--keep", "1") if method == "ties" else ()
    assert merge(data, tmp_path / "o", method, "--scale", "1", *more, adapters=("b",), tasks=False) == 0
    form = {"lora": "adapter", "checkpoint": "full"}[told(tmp_path / "o")["form"]]
    folder = tmp_path / "o" / told(tmp_path / "o")["saved_to"]
    near(logits(data, **{form: folder}), logits(data, data / "b"))


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_merges_and_the_order_of_the_adapters_changes_nothing(data, tmp_path, method):
    # Adam makes a whole step of a gradient that is rounding, one way or the other: a mask's steps are kept small.
    settings = (*FEW, "--learning-rate", "1e-4") if METHODS[method].masked else FEW
    found = {}
    for name, order in (("one", ("a", "b")), ("other", ("b", "a"))):
        assert merge(data, tmp_path / name, method, *settings, "--keep", "0.5", adapters=order) == 0
        own = told(tmp_path / name)
        form = {"lora": "adapter", "checkpoint": "full"}[own["form"]]
        found[name] = logits(data, **{form: tmp_path / name / own["saved_to"]})
        assert len(own["losses"]) == {True: 3, False: 0}[METHODS[method].adaptive] * (
            2 if "concrete_ada" in method else 1
        )
        shape = torch.tensor(own["coefficients"]).shape
        assert shape == ((len(own["layers"]), 2) if METHODS[method].by_layer else (2,))
        assert own["base"]["even"]["n"] == own["tasks"]["even"]["n"] == 24
    rtol, atol = (1e-3, 1e-4) if METHODS[method].masked else (1e-4, 1e-5)
    torch.testing.assert_close(found["one"], found["other"], rtol=rtol, atol=atol)
    assert (found["one"] - logits(data)).abs().max() > 1e-2


def test_the_entropy_falls_and_a_run_that_was_cut_off_goes_on_to_the_same_coefficients(data, tmp_path, monkeypatch):
    settings = ("--steps", "6", "--batch-size", "4", "--learning-rate", "0.05")
    often = functools.partial(merge_verb.AdaptiveSettings, save_steps=2)
    monkeypatch.setattr(merge_verb, "AdaptiveSettings", often)
    assert merge(data, tmp_path / "whole", "adamerging_layer", *settings) == 0
    done, original = [], descent.Descent.done

    def cut(self, loss):
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(loss)
        original(self, loss)

    with monkeypatch.context() as patch:
        patch.setattr(descent.Descent, "done", cut)
        assert merge(data, tmp_path / "cut", "adamerging_layer", *settings) == 130
    assert not (tmp_path / "cut" / "results.json").exists() and not (tmp_path / "cut" / "adapter").exists()
    assert merge(data, tmp_path / "cut", "adamerging_layer", *settings) == 0
    assert told(tmp_path / "cut")["coefficients"] == told(tmp_path / "whole")["coefficients"]
    losses = told(tmp_path / "cut")["losses"]
    assert losses[:4] == done and losses == told(tmp_path / "whole")["losses"] and losses[-1] < losses[0]


def test_answers_are_never_read_before_the_merge_is_scored(data, tmp_path):
    """With other answers in the file the coefficients are the same; only the scores are not."""
    for name in ("even", "vowel"):
        rows = [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        turned = [{**row, "answer": 1 - row["answer"]} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turned))
    assert merge(data, tmp_path / "true", "adamerging_task", *FEW) == 0
    more = [f"{name}={tmp_path / name}.jsonl:{tmp_path / name}.jsonl" for name in ("even", "vowel")]
    assert merge(data, tmp_path / "turned", "adamerging_task", *FEW, "--tasks", *more, tasks=False) == 0
    one, other = told(tmp_path / "true"), told(tmp_path / "turned")
    assert one["coefficients"] == other["coefficients"]
    assert one["tasks"]["even"]["accuracy"] == pytest.approx(1 - other["tasks"]["even"]["accuracy"])


def test_adaptive_methods_see_as_many_questions_as_were_asked_for(data, tmp_path):
    for name, more in (("all", ()), ("two", ("--unlabelled", "2"))):
        assert merge(data, tmp_path / name, "adamerging_task", *FEW, *more) == 0
    assert told(tmp_path / "all")["losses"][0] != told(tmp_path / "two")["losses"][0]


def test_without_other_words_the_steps_are_the_papers():
    def steps(method, *more):
        options = build_parser().parse_args(["merge", "--method", method, "a", "--output", "o", *more])
        settings = merge_verb.merge_settings(options)
        return settings.adaptive.steps, settings.concrete.steps

    assert steps("adamerging_task") == steps("adamerging_layer++") == (500, 2000)
    assert steps("concrete_task_arithmetic")[1] == 2000 and steps("concrete_adamerging") == (1000, 1000)
    assert steps("concrete_adamerging", "--steps", "7") == (7, 7)
    own = compare_merged.parse_merges("concrete_adamerging,adamerging_task", None, ["lora"], "both")
    assert [(s.adaptive.steps, s.concrete.steps) for s in own.values()] == [(1000, 1000), (500, 2000)]


@pytest.mark.parametrize("rank", [None, 1, 8])
def test_merge_then_mix_starts_as_the_merge_and_its_router_trains_from_there(data, tmp_path, rank):
    more = [] if rank is None else ["--rank", str(rank)]
    assert merge(data, tmp_path / "o", "task_arithmetic", "--save-as", "mosld", *more, tasks=False) == 0
    lost = told(tmp_path / "o")["lost"]
    assert lost > 1e-2 if rank == 1 else lost < 1e-5
    model = peft.PeftModel.from_pretrained(base(data), str(tmp_path / "o" / "adapter"), is_trainable=True).eval()
    assert isinstance(model.peft_config["default"], mosld.MoSLDConfig)
    assert model.peft_config["default"].num_experts == 2
    if rank != 1:
        near(model(ids(data)).logits, expected(data, {"a": 0.3, "b": 0.3}))
    model(ids(data)).logits.square().sum().backward()
    routers = [p for n, p in model.named_parameters() if "mosld_router" in n]
    assert routers and all((router.grad != 0).any() for router in routers)


def test_full_checkpoints_merge_as_their_adapters_do(data, tmp_path):
    assert merge(data, tmp_path / "o", "task_arithmetic", adapters=("full_a", "b"), tasks=False) == 0
    assert told(tmp_path / "o")["form"] == "checkpoint" and told(tmp_path / "o")["lost"] < 1e-6
    near(logits(data, full=tmp_path / "o" / "model"), expected(data, {"a": 0.3, "b": 0.3}))
    assert (tmp_path / "o" / "model" / "tokenizer_config.json").is_file()


def test_a_bfloat16_checkpoint_says_what_its_dtype_loses(data, tmp_path):
    base(data).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    for file in (data / "model").glob("token*"):
        (tmp_path / "half" / file.name).write_bytes(file.read_bytes())
    words = [
        "merge",
        "--method",
        "ties",
        "--base",
        str(tmp_path / "half"),
        str(data / "a"),
        "--output",
        str(tmp_path / "o"),
    ]
    assert main(words) == 0
    own = told(tmp_path / "o")
    tensors = load_file(tmp_path / "o" / "model" / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values()) and 1e-4 < own["lost"] < 0.5


def test_noise_is_told_by_channel_with_and_without_realignment(data, tmp_path, capsys):
    more = ("--noise", "ideal,isotropic,worst", "--snr-db=-20,30", "--shots", "4", "--realign-rate", "1e-2")
    assert merge(data, tmp_path / "o", "r_mtllmf", *more) == 0
    own = told(tmp_path / "o")
    assert [(c["noise"], c["snr_db"]) for c in own["channels"]] == [
        ("ideal", 0.0), ("isotropic", -20.0), ("isotropic", 30.0), ("worst", -20.0), ("worst", 30.0),
    ]  # fmt: skip
    assert (tmp_path / "o" / "snr.png").is_file() and not (tmp_path / "o" / "model").exists()
    assert all(set(c["realigned"]) == {"even", "vowel"} for c in own["channels"])
    assert "isotropic, -20 dB, realigned" in capsys.readouterr().out


def test_embeddings_are_neither_sent_nor_realigned(data, tmp_path):
    """A user's checkpoint with other embeddings, which R-MTLLMF leaves out and task arithmetic does not."""
    tuned = AutoModelForCausalLM.from_pretrained(data / "full_a")
    with torch.no_grad():
        tuned.get_input_embeddings().weight.add_(1.0)
    tuned.save_pretrained(tmp_path / "tuned")
    (data / "tuned").symlink_to(tmp_path / "tuned")
    before = base(data).get_input_embeddings().weight
    for method, more, kept in (
        ("task_arithmetic", (), False),
        ("r_mtllmf", (), True),
        ("r_mtllmf", ("--shots", "4", "--realign-rate", "1e-2"), True),
    ):
        output = tmp_path / f"{method}{len(more)}"
        assert merge(data, output, method, *more, adapters=("tuned",)) == 0
        model = AutoModelForCausalLM.from_pretrained(output / "model")
        assert torch.equal(model.get_input_embeddings().weight, before) == kept
        moved = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
        assert not torch.equal(moved, base(data).get_parameter("model.layers.0.self_attn.q_proj.weight"))
    plain, realigned = (load_file(tmp_path / f"r_mtllmf{n}" / "model" / "model.safetensors") for n in (0, 4))
    changed = {name for name in plain if not torch.equal(plain[name], realigned[name])}
    assert changed and not any("embed" in name for name in changed)


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("ties", ("--keep", "0"), "keep must be in (0, 1], got 0.0"),
        ("adamerging_task", ("--steps", "0"), "steps must be at least 1, got 0"),
        ("ties", ("--save-as", "lora"), "--save-as lora contradicts --method ties"),
        ("task_arithmetic", ("--rank", "4"), "--rank is the rank of the shared A of --save-as mosld"),
        ("task_arithmetic", ("--save-as", "mosld", "--rank", "0"), "rank must be at least 1, got 0"),
        ("adamerging_task", ("--unlabelled", "0"), "unlabelled must be at least 1, got 0"),
        ("adamerging_task", ("--unlabelled", "-3"), "unlabelled must be at least 1, got -3"),
        ("r_mtllmf", ("--snr-db", "5"), "--snr-db 5 is of noise, and --noise is ideal"),
        ("r_mtllmf", ("--noise", "worst", "--snr-db", "5,5"), "noise and snr-db must differ, got worst and 5,5"),
        ("ties", ("--noise", "worst"), "--noise is for --method r_mtllmf, got --method ties"),
        ("ties", ("--shots", "2"), "--shots is for --method r_mtllmf"),
        ("r_mtllmf", ("--noise", "pink", "--snr-db", "1"), "noise must be of ideal, isotropic, worst, got pink"),
        ("r_mtllmf", ("--noise", "worst"), "--noise worst needs --snr-db"),
        ("r_mtllmf", ("--snr-db", "loud"), "snr-db must be numbers with commas between them, got 'loud'"),
        ("r_mtllmf", ("--snr-db", "nan"), "snr-db must be in [-200, 200], got nan"),
        ("r_mtllmf", ("--shots", "99"), "task even has 24 training examples, realignment needs 99"),
        ("task_arithmetic", ("--scale", "nan"), "scale must be finite, got nan"),
        ("concrete_adamerging", ("--temperature", "0"), "temperature must be positive, got 0.0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(data, tmp_path, capsys, method, more, message):
    assert merge(data, tmp_path / "o", method, *more) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "o").exists()


def damaged(folder, tmp_path, change):
    """A copy of adapter `a` with other tensors or another configuration."""
    bad = tmp_path / "bad"
    bad.mkdir()
    tensors, fields = (
        load_file(folder / "a" / "adapter_model.safetensors"),
        json.loads((folder / "a" / "adapter_config.json").read_text()),
    )
    change(tensors, fields)
    save_file(tensors, bad / "adapter_model.safetensors")
    (bad / "adapter_config.json").write_text(json.dumps(fields))
    return bad


def _nan(tensors, fields):
    tensors[next(iter(tensors))][0, 0] = math.nan


def _wide(tensors, fields):
    for name in tensors:
        tensors[name] = tensors[name].repeat_interleave(2, 1 if "lora_A" in name else 0)


def _foreign(tensors, fields):
    for name in list(tensors):
        tensors[name.replace("layers.1", "layers.7")] = tensors.pop(name)


def _other_base(tensors, fields):
    fields["base_model_name_or_path"] = "another"


def _half(tensors, fields):
    del tensors[next(name for name in tensors if "lora_B" in name)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_nan, "bad holds values that are not finite in model.layers."),
        (_wide, "bad has 32 -> "),
        (_foreign, "bad adapts model.layers.7."),
        (_other_base, "the adapters are of different bases: "),
        (_half, "has no lora_B beside the lora_A of model.layers."),
    ],
)
def test_adapters_that_do_not_fit_are_named_and_nothing_is_written(data, tmp_path, capsys, change, message):
    bad = damaged(data, tmp_path, change)
    if change is _wide and base(data).config.hidden_size * 2 != 32:
        message = "bad has "
    words = ["merge", "--method", "ties", "--base", str(data / "model"), str(data / "b"), str(bad)]
    assert main([*words, "--output", str(tmp_path / "o")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_checkpoints_that_do_not_fit_are_named(data, tmp_path, capsys):
    def merged(change):
        bad = tmp_path / "full"
        bad.mkdir(exist_ok=True)
        tensors = load_file(data / "full_a" / "model.safetensors")
        change(tensors)
        save_file(tensors, bad / "model.safetensors")
        words = ["merge", "--method", "ties", "--base", str(data / "model"), str(bad), "--output", str(tmp_path / "o")]
        assert main(words) == 2
        assert not (tmp_path / "o" / "results.json").exists()
        return capsys.readouterr().err

    key = "model.layers.1.mlp.up_proj.weight"
    assert f"full lacks {key}" in merged(lambda t: t.pop(key))
    assert f"for {key}, the base model" in merged(lambda t: t.update({key: t[key][:3].clone()}))
    assert "full changes extra, which the base model has not" in merged(lambda t: t.update(extra=torch.ones(1)))
    assert f"full holds values that are not finite in {key}" in merged(lambda t: t[key].fill_(math.inf))


def test_adaptive_methods_say_that_they_need_data_and_an_adapter_is_needed(data, tmp_path, capsys):
    assert merge(data, tmp_path / "o", "adamerging_task", tasks=False) == 2
    assert "adamerging_task needs unlabelled data, got none: give --tasks" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["merge", "--method", "ties", "--base", str(data / "model"), "--output", str(tmp_path / "o")])
    assert "ADAPTER" in capsys.readouterr().err
    assert merge(data, tmp_path / "o", "ties", tasks=False) == 0
    assert merge(data, tmp_path / "o", "ties", tasks=False) == 2
    assert "holds a finished run" in capsys.readouterr().err
    assert merge(data, tmp_path / "o", "ties", "--scale", "2", "--overwrite", tasks=False) == 0
