"""A mixture with fixed gates leaves as a plain LoRA that computes the same, and a LoRA comes back as a mixture."""

import json
import math
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import mosld.convert.export
from mosld import MoSLDConfig, MoSLDLinear, export_lora, import_lora, router_stats
from mosld.tuner.layer import MoSLDPeftLinear
from tests.helpers.models import perturb, tiny_llama, token_ids

IDS = token_ids()
PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def trained(base=None, **changes):
    config = {"r": 4, "alpha": 6, "num_experts": 4, "target_modules": ["q_proj", "down_proj"], "dropout": 0.5}
    model = peft.get_peft_model(base or tiny_llama(), MoSLDConfig(**{**config, "task_type": "CAUSAL_LM", **changes}))
    torch.manual_seed(1)
    perturb(model)
    return model.eval()


def mixtures(model) -> dict[str, MoSLDPeftLinear]:
    return {n.removeprefix(PREFIX): m for n, m in model.named_modules() if isinstance(m, MoSLDPeftLinear)}


@torch.no_grad()
def logits_with_gates(model, gates: dict, ids=IDS):
    """The model's logits with every layer's experts summed one by one, weighted with its fixed gates."""

    def fixed(layer, args, output, weights):
        mixture = layer.mixtures["default"]
        out = layer.base_layer(args[0])
        for weight, expert_b in zip(weights, mixture.expert_b.weight.split(mixture.r, dim=1), strict=True):
            out = out + weight * mixture.alpha / mixture.r * (args[0] @ mixture.shared_a.weight.T @ expert_b.T)
        return out

    handles = [
        layer.register_forward_hook(lambda *args, weights=gates[name]: fixed(*args, weights))
        for name, layer in mixtures(model).items()
    ]
    logits = model(ids).logits
    for handle in handles:
        handle.remove()
    return logits


@torch.no_grad()
def loaded_logits(folder, base=None, ids=IDS):
    return peft.PeftModel.from_pretrained(base or tiny_llama(), str(folder)).eval()(ids).logits


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
def test_plain_peft_computes_the_uniform_mixture_without_mosld(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = trained(target_modules="all-linear", top_k=4)
    export_lora(model, tmp_path / "lora")
    listed = json.loads((tmp_path / "lora/adapter_config.json").read_text())["target_modules"]
    assert listed == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    program = (
        "import sys, torch, peft, transformers\n"
        "from safetensors.torch import save_file\n"
        "base = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/base')\n"
        "model = peft.PeftModel.from_pretrained(base, sys.argv[1] + '/lora').eval()\n"
        "ids = torch.tensor(eval(sys.argv[2]))\n"
        "with torch.no_grad(): logits = model(ids).logits\n"
        "with torch.no_grad(): merged = model.merge_and_unload()(ids).logits\n"
        "assert 'mosld' not in sys.modules and 'mosld_kernels' not in sys.modules\n"
        "save_file({'logits': logits, 'merged': merged}, sys.argv[1] + '/out.safetensors')\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), str(IDS.tolist())], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    out = load_file(tmp_path / "out.safetensors")
    for layer in mixtures(model).values():  # with K = E and equal logits the routed mixture itself is uniform
        layer.mixtures["default"].router.weight.data.zero_()
    with torch.no_grad():
        close(out["logits"], model(IDS).logits)
        close(out["merged"], model(IDS).logits)
    assert (out["logits"] - tiny_llama()(IDS).logits).abs().max() > 0.01


def test_given_weights_need_not_sum_to_one(tmp_path):
    model, weights = trained(), [0.5, 2.0, 0.0, -1.0]
    report = export_lora(model, tmp_path / "lora", torch.tensor(weights))
    expected = logits_with_gates(model, dict.fromkeys(mixtures(model), weights))
    close(loaded_logits(tmp_path / "lora"), expected)
    assert report[Q0].gates == weights and report[Q0].gate_variance is None
    assert export_lora(model, tmp_path / "again", weights) == report


def test_layers_of_several_expert_counts_take_their_own_gates(tmp_path):
    model = trained(num_experts_pattern={r"layers\.0\..*": 2, "down_proj": 3})
    counts = {name: layer.mixtures["default"].num_experts for name, layer in mixtures(model).items()}
    assert sorted(counts.values()) == [2, 2, 3, 4]
    gates = {name: [(i + 1.0) / (i + 2) for i in range(count)] for name, count in counts.items()}
    names_as_in_router_stats = {PREFIX + name: weights for name, weights in gates.items()}
    for folder, given in (("a", gates), ("b", names_as_in_router_stats)):
        export_lora(model, tmp_path / folder, given)
        close(loaded_logits(tmp_path / folder), logits_with_gates(model, gates))
    export_lora(model, tmp_path / "c")
    close(loaded_logits(tmp_path / "c"), logits_with_gates(model, {n: [1 / e] * e for n, e in counts.items()}))


@torch.no_grad()
def by_loop(model, rows):
    """Token by token and expert by expert: layer name -> gates, squared errors, updates and outputs of all tokens."""
    seen: dict = {name: [] for name in mixtures(model)}
    handles = [
        layer.register_forward_hook(
            lambda m, args, out, name=name: seen[name].extend(zip(args[0][0], out[0], strict=True))
        )
        for name, layer in mixtures(model).items()
    ]
    for row in rows:
        model(row.unsqueeze(0))
    for handle in handles:
        handle.remove()
    result = {}
    for name, layer in mixtures(model).items():
        mixture = layer.mixtures["default"]
        experts = mixture.expert_b.weight.split(mixture.r, dim=1)
        gates, inputs, outputs = [], [], []
        for x, out in seen[name]:
            logits = (x @ mixture.router.weight.T).tolist()
            chosen = sorted(range(len(logits)), key=lambda e: -logits[e])[: mixture.top_k]
            total = sum(math.exp(logits[e]) for e in chosen)
            gates.append([math.exp(logits[e]) / total if e in chosen else 0.0 for e in range(len(logits))])
            inputs.append(x)
            outputs.append(out)
        gates = torch.tensor(gates)
        parts = [F.linear(torch.stack(inputs) @ mixture.shared_a.weight.T, b) * mixture.scale for b in experts]
        parts = torch.stack(parts, 1)  # [tokens, E, D_out]
        routed, fixed = ((g.unsqueeze(-1) * parts).sum(1) for g in (gates, gates.mean(0).expand_as(gates)))
        result[name] = (gates, routed, fixed, torch.stack(outputs))
    return result


def test_calibrated_gates_and_their_errors_are_those_of_a_loop_over_real_tokens(tmp_path):
    model = trained(num_experts_pattern={"down_proj": 3})
    lengths = (7, 4, 1)
    rows = [row[:length] for row, length in zip(IDS, lengths, strict=True)]
    mask = torch.tensor([[1] * length + [0] * (7 - length) for length in lengths])
    batches = [dict(input_ids=IDS[:2], attention_mask=mask[:2]), dict(input_ids=IDS[2:], attention_mask=mask[2:])]
    report = export_lora(model, tmp_path / "lora", (batch for batch in batches))
    for name, (gates, routed, fixed, out) in by_loop(model, rows).items():
        assert report[name].tokens == sum(lengths) == len(gates)
        assert report[name].gates == pytest.approx(gates.mean(0).tolist(), abs=1e-5)
        assert report[name].gate_variance == pytest.approx(gates.var(0, correction=0).tolist(), abs=1e-5)
        error = (fixed - routed).norm()
        assert report[name].update_error == pytest.approx(float(error / routed.norm()), rel=1e-4)
        assert report[name].output_error == pytest.approx(float(error / out.norm()), rel=1e-4)
        assert report[name].update_error > 0.1  # there is something to lose here
    close(loaded_logits(tmp_path / "lora"), logits_with_gates(model, {name: r.gates for name, r in report.items()}))
    saved = json.loads((tmp_path / "lora" / "export.json").read_text())["layers"]
    assert saved[Q0]["gates"] == report[Q0].gates and saved[Q0]["update_error"] == report[Q0].update_error


def test_one_expert_loses_nothing(tmp_path):
    model = trained(num_experts=1, top_k=1)
    report = export_lora(model, tmp_path / "lora", [dict(input_ids=IDS)])
    for layer in report.values():
        assert layer.gates == [1.0] and layer.gate_variance == [0.0]
        assert layer.update_error < 1e-7 and layer.output_error < 1e-7
    with torch.no_grad():
        close(loaded_logits(tmp_path / "lora"), model(IDS).logits)


def test_an_untrained_mixture_has_no_error(tmp_path):
    model = peft.get_peft_model(tiny_llama(), MoSLDConfig(r=4))
    report = export_lora(model, tmp_path / "lora", [dict(input_ids=IDS)])
    assert {layer.update_error for layer in report.values()} == {0.0}
    with torch.no_grad():
        assert torch.equal(loaded_logits(tmp_path / "lora"), tiny_llama()(IDS).logits)


def test_exporting_leaves_the_model_as_it_was(tmp_path):
    model = trained().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    batches = [dict(input_ids=IDS, attention_mask=torch.ones_like(IDS))]
    report = export_lora(model, tmp_path / "lora", batches, per_expert=True)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert hooks == [len(module._forward_hooks) for module in model.modules()]
    assert model.training and all(layer.mixtures["default"].training for layer in mixtures(model).values())
    assert report == export_lora(model.eval(), tmp_path / "again", batches)  # so there was no dropout


def test_each_expert_leaves_alone_and_together_they_are_the_mixture(tmp_path):
    model, weights = trained(num_experts_pattern={"down_proj": 2}), [0.1, 0.2, 0.3, 0.4]
    layers = mixtures(model)
    counts = {name: layer.mixtures["default"].num_experts for name, layer in layers.items()}
    gates = {name: weights[:count] for name, count in counts.items()}
    export_lora(model, tmp_path / "lora", gates, per_expert=True)
    folders = sorted(path.name for path in (tmp_path / "lora").iterdir() if path.is_dir())
    assert folders == ["expert_0", "expert_1", "expert_2", "expert_3"]
    for expert in range(4):
        one_hot = {name: [float(e == expert) for e in range(count)] for name, count in counts.items()}
        close(loaded_logits(tmp_path / "lora" / f"expert_{expert}"), logits_with_gates(model, one_hot))
    config = json.loads((tmp_path / "lora/expert_3/adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]
    whole = load_file(tmp_path / "lora/adapter_model.safetensors")
    parts = [load_file(tmp_path / f"lora/expert_{e}/adapter_model.safetensors") for e in range(4)]
    for key in (key for key in whole if key.endswith("lora_B.weight")):
        summed = sum(weight * part[key] for weight, part in zip(weights, parts, strict=True) if key in part)
        close(whole[key], summed, 1e-6)


def test_the_files_are_what_servers_ask_for(tmp_path):
    model = trained(alpha=6.0)
    export_lora(model, tmp_path / "lora")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora"]
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    expected = dict(
        peft_type="LORA", task_type="CAUSAL_LM", r=4, lora_alpha=6, lora_dropout=0.0, bias="none", use_dora=False,
        use_rslora=False, fan_in_fan_out=False, modules_to_save=None, inference_mode=True, rank_pattern={},
    )  # fmt: skip
    assert {key: config[key] for key in expected} == expected and type(config["lora_alpha"]) is int
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj"]
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert set(tensors) == {f"{PREFIX}{name}.lora_{factor}.weight" for name in mixtures(model) for factor in "AB"}
    mixture = mixtures(model)[Q0].mixtures["default"]
    assert torch.equal(tensors[f"{PREFIX}{Q0}.lora_A.weight"], mixture.shared_a.weight)


def test_the_dtype_of_the_adapter_is_kept_and_b_is_rounded_once(tmp_path):
    model, weights = trained().to(torch.bfloat16), [0.1, 0.2, 0.3, 0.4]
    export_lora(model, tmp_path / "lora", weights)
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    for name, layer in mixtures(model).items():
        experts = layer.mixtures["default"].expert_b.weight.double().split(4, dim=1)
        summed = sum(weight * expert for weight, expert in zip(weights, experts, strict=True))
        assert torch.equal(tensors[f"{PREFIX}{name}.lora_B.weight"], summed.to(torch.bfloat16))


def test_a_folder_that_came_to_be_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    """Calibrating takes minutes, in which somebody else may have written there."""
    real = mosld.convert.export._save

    def meanwhile(*args):
        (tmp_path / "lora").mkdir()
        (tmp_path / "lora" / "precious").write_text("mine")
        real(*args)

    monkeypatch.setattr(mosld.convert.export, "_save", meanwhile)
    with pytest.raises(ValueError, match="holds something else than an export"):
        export_lora(trained(), tmp_path / "lora")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["precious"]
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_conv1d_layers_of_gpt2(tmp_path):
    model, weights = trained(tiny_gpt2(), target_modules=["c_attn", "c_fc"]), [0.1, 0.2, 0.3, 0.4]
    export_lora(model, tmp_path / "lora", weights)
    assert json.loads((tmp_path / "lora/adapter_config.json").read_text())["fan_in_fan_out"] is True
    expected = logits_with_gates(model, dict.fromkeys(mixtures(model), weights))
    close(loaded_logits(tmp_path / "lora", tiny_gpt2()), expected)  # warnings of PEFT's would fail here
    lora = peft.PeftModel.from_pretrained(tiny_gpt2(), str(tmp_path / "lora"))
    with torch.no_grad():
        close(lora.merge_and_unload()(IDS).logits, expected)


def test_target_modules_name_the_adapted_layers_and_no_other(tmp_path):
    model = trained(layers_to_transform=[1])
    export_lora(model, tmp_path / "lora")
    listed = json.loads((tmp_path / "lora/adapter_config.json").read_text())["target_modules"]
    assert sorted(listed) == ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    lora = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "lora"))
    adapted = {n.removeprefix(PREFIX) for n, m in lora.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert adapted == set(listed) == set(mixtures(model))


class Nested(nn.Module):
    """Its layer `up` ends the path of another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.block = nn.Linear(6, 8), nn.ModuleDict({"up": nn.Linear(8, 5)})

    def forward(self, x, attention_mask=None):
        return self.block["up"](self.up(x))


def test_layers_adapted_by_hand_leave_too(tmp_path):
    model, x = Nested().requires_grad_(False), torch.randn(3, 6)
    model.up = MoSLDLinear.from_linear(model.up, r=2, alpha=3, num_experts=3, top_k=3)
    perturb(model)
    hooks = set(model.up._forward_hooks)
    report = export_lora(model, tmp_path / "lora", [{"x": x}])
    assert list(report) == ["up"] and report["up"].tokens == 3
    with pytest.raises(ValueError, match=r"attention_mask must have one entry per token; \[1, 2\] fits no layer"):
        export_lora(model, tmp_path / "bad", [{"x": x, "attention_mask": torch.ones(1, 2)}])
    assert not model.up._forward_hooks.keys() - hooks
    single = [export_lora(model, tmp_path / name, [{"x": one}])["up"] for name, one in (("v", x[0]), ("b", x[:1]))]
    assert single[0].tokens == 1 and single[0].gates == pytest.approx(single[1].gates)
    assert single[0].output_error == pytest.approx(single[1].output_error)
    model.up.router.weight.data.zero_()
    export_lora(model, tmp_path / "uniform")
    lora = peft.PeftModel.from_pretrained(Nested(), str(tmp_path / "uniform"))
    assert isinstance(lora.get_base_model().block["up"], nn.Linear)
    close(lora(x), model.eval()(x))


def test_the_adapter_is_named_where_several_are_active(tmp_path):
    model = trained()
    model.add_adapter("second", MoSLDConfig(r=2, alpha=2, num_experts=3, target_modules=["v_proj"]))
    alone = export_lora(model, tmp_path / "first")
    assert {name.rpartition(".")[2] for name in alone} == {"q_proj", "down_proj"}
    assert set(export_lora(model, tmp_path / "second", adapter_name="second")) == {
        "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj",
    }  # fmt: skip
    assert json.loads((tmp_path / "second/adapter_config.json").read_text())["target_modules"] == ["v_proj"]
    with pytest.raises(ValueError, match="activate it with set_adapter; in .* the active ones are \\['default'\\]"):
        export_lora(model, tmp_path / "x", [dict(input_ids=IDS)], adapter_name="second")
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"adapter_name must be one of \['default', 'second'\], since the active"):
        export_lora(model, tmp_path / "x")
    with pytest.raises(ValueError, match=r"adapter_name must be one of \['default', 'second'\], got 'third'"):
        export_lora(model, tmp_path / "x", adapter_name="third")
    assert not (tmp_path / "x").exists()


def test_a_compiled_model_leaves_under_its_own_names(tmp_path):
    model = trained()
    report = export_lora(torch.compile(model), tmp_path / "lora", [dict(input_ids=IDS)])
    assert report == export_lora(model, tmp_path / "again", [dict(input_ids=IDS)]) and set(report) == set(
        mixtures(model)
    )


def test_transformers_own_adapters_leave_too(tmp_path):
    model = tiny_llama()
    model.add_adapter(MoSLDConfig(r=4, num_experts=4, target_modules=["q_proj"]), "mine")
    perturb(model.eval())
    export_lora(model, tmp_path / "lora", [1.0, 0, 0, 0])
    close(loaded_logits(tmp_path / "lora"), _with_first_expert(model))


@torch.no_grad()
def _with_first_expert(model):
    for module in model.modules():
        if isinstance(module, MoSLDPeftLinear):
            mixture = module.mixtures["mine"]
            mixture.expert_b.weight.copy_(mixture.expert_b.weight[:, : mixture.r].repeat(1, 4))
    return model(IDS).logits


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ("mean", "gates must be 'uniform', weights or calibration batches, got 'mean'"),
        (3, "gates must be 'uniform', weights or calibration batches, got 3"),
        ([0.5, 0.5], f"gates of {Q0} must be num_experts=4 weights, got 2"),
        ([0.5, 0.5, math.nan, 0], f"gates of {Q0} must be finite"),
        (
            {Q0: [1, 0, 0, 0], "lm_head": [1]},
            r"unknown are \['lm_head'\], missing are \['model.layers.0.mlp.down_proj'",
        ),
        ({Q0: [1, 0, 0, 0]}, r"unknown are \[\], missing are"),
        ([], "at least one calibration batch, got none"),
        (dict(input_ids=IDS), r"calibration takes a list of them, \[batch\]"),
        ([IDS], "a calibration batch must be a dict of the model's arguments, got Tensor"),
        ([dict(input_ids=IDS, attention_mask=torch.zeros_like(IDS))], f"bring no token to {Q0}"),
    ],
)  # fmt: skip
def test_bad_gates_are_refused_before_anything_is_written(tmp_path, gates, message):
    with pytest.raises(ValueError, match=message):
        export_lora(trained(), tmp_path / "lora", gates)
    assert not list(tmp_path.iterdir())


def test_models_that_no_lora_can_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"modules_to_save must be empty, got \['lm_head'\]"):
        export_lora(trained(modules_to_save=["lm_head"]), tmp_path / "lora")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoSLD layer"):
        export_lora(tiny_llama(), tmp_path / "lora")
    two = nn.Sequential(MoSLDLinear(4, 4, r=2), MoSLDLinear(4, 4, r=3))
    with pytest.raises(ValueError, match=r"one r and one alpha, got \(r, alpha\) in \[\(2, 16\), \(3, 16\)\]"):
        export_lora(two, tmp_path / "lora")
    with pytest.raises(ValueError, match="a LoRA needs layers inside a model"):
        export_lora(MoSLDLinear(4, 4), tmp_path / "lora")
    with pytest.raises(ValueError, match="layers adapted by hand have no adapter name, got 'default'"):
        export_lora(nn.Sequential(MoSLDLinear(4, 4)), tmp_path / "lora", adapter_name="default")
    assert not list(tmp_path.iterdir())


def test_only_an_export_is_replaced_and_only_when_asked(tmp_path):
    model, folder = trained(), tmp_path / "lora"
    (tmp_path / "lora").mkdir()  # empty is free
    export_lora(model, folder, per_expert=True)
    with pytest.raises(ValueError, match="holds an export: choose another output folder, or overwrite it"):
        export_lora(model, folder)
    export_lora(model, folder, [1, 0, 0, 0], overwrite=True)
    assert json.loads((folder / "export.json").read_text())["layers"][Q0]["gates"] == [1, 0, 0, 0]
    assert not (folder / "expert_0").exists() and [path.name for path in tmp_path.iterdir()] == ["lora"]
    model.save_pretrained(str(tmp_path / "adapter"))
    (folder / "thesis.txt").write_text("precious")
    for taken in (folder, tmp_path / "adapter", folder / "thesis.txt"):
        with pytest.raises(ValueError, match="holds something else than an export"):
            export_lora(model, taken, overwrite=True)
    assert (folder / "thesis.txt").read_text() == "precious"


def test_an_export_that_is_cut_off_leaves_what_was_there(tmp_path, monkeypatch):
    model = trained()
    export_lora(model, tmp_path / "lora")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(mosld.convert.export, "save_file", killed)
    for folder in (tmp_path / "lora", tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            export_lora(model, folder, [1, 0, 0, 0], overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
    assert json.loads((tmp_path / "lora/export.json").read_text())["layers"][Q0]["gates"] == [0.25] * 4


def trained_lora(folder, base=None, **changes) -> torch.Tensor:
    """Save a LoRA with random weights; -> its logits."""
    settings = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"], **changes}
    model = peft.get_peft_model(base or tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(2)
    perturb(model)
    model.save_pretrained(str(folder))
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (tiny_llama, {}),
        (tiny_llama, dict(use_rslora=True, layers_to_transform=[1])),
        (tiny_llama, dict(target_modules=r".*\.0\..*_proj", exclude_modules=["o_proj"])),
        (tiny_gpt2, dict(target_modules=["c_attn"], fan_in_fan_out=True)),
    ],
    ids=["llama", "rslora-one-layer", "expression", "gpt2"],
)  # fmt: skip
def test_an_imported_lora_computes_the_same_then_trains_and_its_experts_part(tmp_path, base, changes):
    expected = trained_lora(tmp_path / "lora", base(), **changes)
    model = import_lora(base(), tmp_path / "lora", num_experts=3, top_k=2, dropout=0.0)
    assert isinstance(model.peft_config["default"], MoSLDConfig)
    with torch.no_grad():
        close(model.eval()(IDS).logits, expected, 1e-6)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model.train()(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for layer in mixtures(model).values():
        first, second, _ = layer.mixtures["default"].expert_b.weight.split(4, dim=1)
        assert not torch.allclose(first, second)
    assert all(stats.tokens == IDS.numel() for stats in router_stats(model).values())


def test_there_and_back_is_the_same_lora(tmp_path):
    expected = trained_lora(tmp_path / "lora")
    model = import_lora(tiny_llama(), tmp_path / "lora", num_experts_pattern={"q_proj": 3})
    export_lora(model, tmp_path / "back", [dict(input_ids=IDS)])
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "back"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        close(after[key], tensor, 1e-6)
    close(loaded_logits(tmp_path / "back"), expected)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        (dict(use_dora=True), {}, "a mixture can take over a plain LoRA alone, this one has use_dora=True"),
        (dict(rank_pattern={"q_proj": 2}), {}, "this one has rank_pattern={'q_proj': 2}"),
        (dict(modules_to_save=["lm_head"]), {}, r"this one has modules_to_save=\['lm_head'\]"),
        (dict(init_lora_weights="olora"), {}, "this one has init_lora_weights='olora'"),
        (dict(target_modules=["wpe"]), {}, "must hold lora_A and lora_B alone"),
        ({}, dict(r=4), "r comes from the LoRA and cannot be given"),
        ({}, dict(top_k=9), r"top_k must be in \[1, num_experts=8\], got 9"),
    ],
)
def test_loras_that_a_mixture_cannot_compute_are_refused(tmp_path, changes, settings, message):
    base = tiny_gpt2 if "wpe" in changes.get("target_modules", ()) else tiny_llama
    trained_lora(tmp_path / "lora", base(), **changes)
    base = base()
    with pytest.raises(ValueError, match=message):
        import_lora(base, tmp_path / "lora", **settings)
    assert not any(isinstance(module, MoSLDPeftLinear) for module in base.modules())


def test_loras_of_another_model_and_other_adapters_are_refused(tmp_path):
    trained_lora(tmp_path / "lora")
    with pytest.raises(
        ValueError, match=r"lora_A and lora_B of .*down_proj must be \[4, 64\] and \[32, 4\], got \[4, 48\]"
    ):
        import_lora(tiny_llama(intermediate_size=64), tmp_path / "lora")
    with pytest.raises(ValueError, match="lacks layers that the LoRA adapts: model.layers.1.mlp.down_proj"):
        import_lora(tiny_llama(num_hidden_layers=1), tmp_path / "lora")
    with pytest.raises(ValueError, match="is not a saved LoRA: adapter_config.json is missing"):
        import_lora(tiny_llama(), tmp_path)
    trained().save_pretrained(str(tmp_path / "mixture"))
    with pytest.raises(ValueError, match="must hold a LoRA, got PeftType.MOSLD"):
        import_lora(tiny_llama(), tmp_path / "mixture")
