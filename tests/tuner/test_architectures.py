"""What PEFT checks of its own methods, for MoSLD on LLaMA, Qwen, Mistral, GPT-2, BERT, T5, ViT and Mixtral."""

import copy
import io
import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from mosld import MoSLDConfig, balance_loss, router_stats
from mosld.tuner.layer import MoSLDPeftLinear
from tests.helpers.architectures import ARCHITECTURES, build, logits_of
from tests.helpers.models import perturb

NAMES = list(ARCHITECTURES)


def adapted(name, **changes):
    config = dict(r=4, num_experts=4, top_k=2, dropout=0.0, target_modules=ARCHITECTURES[name].targets)
    return peft.get_peft_model(build(name), MoSLDConfig(**{**config, **changes}))


def trained(name, **changes):
    model = adapted(name, **changes)
    torch.manual_seed(1)
    perturb(model)
    return model.eval()


@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_adapter_is_the_identity_on_exactly_the_targets(name):
    expected = logits_of(build(name), name)
    model = adapted(name).eval()
    assert torch.equal(logits_of(model, name), expected)
    layers = [module for module in model.modules() if isinstance(module, MoSLDPeftLinear)]
    assert len(layers) == ARCHITECTURES[name].layers
    assert set(router_stats(model)) == {n for n, m in model.named_modules() if isinstance(m, MoSLDPeftLinear)}


@pytest.mark.parametrize("name", NAMES)
def test_training_changes_the_adapters_and_nothing_else(name):
    model = adapted(name).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(2):  # in the first step B is zero, so A and the router get no gradient from the task
        loss = model(**ARCHITECTURES[name].inputs()).logits.square().mean() + 0.1 * balance_loss(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for n, parameter in model.named_parameters():
        assert torch.equal(parameter, before[n]) == (".mosld_" not in n), n


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_it_computes_the_same(name, tmp_path):
    model = trained(name)
    expected = logits_of(model, name)
    model.save_pretrained(str(tmp_path))
    keys = set(load_file(str(tmp_path / "adapter_model.safetensors")))
    assert len(keys) == 3 * ARCHITECTURES[name].layers and all(".mosld_" in key for key in keys)
    loaded = peft.PeftModel.from_pretrained(build(name), str(tmp_path))
    assert torch.equal(logits_of(loaded, name), expected)
    assert not torch.allclose(expected, logits_of(build(name), name))


@pytest.mark.parametrize("name", NAMES)
def test_the_auto_class_loads_the_adapter_with_its_base(name, tmp_path):
    base_folder, folder = tmp_path / "base", tmp_path / "adapter"
    build(name).save_pretrained(str(base_folder))
    auto = getattr(transformers, ARCHITECTURES[name].auto)
    base = auto.from_pretrained(str(base_folder))
    config = MoSLDConfig(r=4, num_experts=4, dropout=0.0, target_modules=ARCHITECTURES[name].targets)
    model = peft.get_peft_model(base, config)
    perturb(model)
    expected = logits_of(model.eval(), name)
    model.save_pretrained(str(folder))
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base_folder)
    loaded = auto.from_pretrained(str(folder)).eval()
    torch.testing.assert_close(logits_of(loaded, name), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_disabling_unloading_and_deleting_give_the_base_back(name):
    expected = logits_of(build(name), name)
    model = trained(name)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, name), expected)
    changed = logits_of(model, name)
    assert not torch.allclose(changed, expected)
    config = MoSLDConfig(r=2, num_experts=2, top_k=1, target_modules=ARCHITECTURES[name].targets)
    model.add_adapter("other", config)
    model.set_adapter("other")
    assert torch.equal(logits_of(model.eval(), name), expected)  # fresh
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits_of(model, name), changed)
    status = model.get_model_status()
    assert status.peft_types == {"default": "MOSLD"} and status.num_adapter_layers == ARCHITECTURES[name].layers
    assert torch.equal(logits_of(model.unload(), name), expected)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles_compute_the_same(name):
    model = trained(name)
    expected = logits_of(model, name)
    assert torch.equal(logits_of(copy.deepcopy(model), name), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits_of(torch.load(buffer, weights_only=False), name), expected)  # our own, just written


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ViT"])
def test_injection_without_peft_model_and_transformers_own_method_agree(name):
    config = MoSLDConfig(r=4, num_experts=4, dropout=0.0, target_modules=ARCHITECTURES[name].targets)
    ways = {
        "get_peft_model": lambda model: peft.get_peft_model(model, config),
        "inject": lambda model: peft.inject_adapter_in_model(config, model),
        "transformers": lambda model: model.add_adapter(config) or model,
    }
    logits = []
    for way in ways.values():
        model = way(build(name))
        torch.manual_seed(1)
        for parameter in (p for n, p in model.named_parameters() if ".mosld_" in n):
            parameter.data.normal_(std=0.2)
        logits.append(logits_of(model.eval(), name))
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_bases_train(name, dtype):
    config = MoSLDConfig(r=4, num_experts=4, target_modules=ARCHITECTURES[name].targets)
    model = peft.get_peft_model(build(name).to(dtype), config).train()
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in ARCHITECTURES[name].inputs().items()}
    (model(**inputs).logits.float().square().mean() + balance_loss(model)).backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in grads) and any(g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("name", NAMES)
def test_forward_hooks_on_adapted_layers_see_their_outputs(name):
    model, seen = trained(name), []
    layer = next(module for module in model.modules() if isinstance(module, MoSLDPeftLinear))
    expected = logits_of(model, name)
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(out.shape[-1]))
    assert torch.equal(logits_of(model, name), expected)
    handle.remove()
    assert seen == [layer.out_features]


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "GPT-2", "Mixtral"])
def test_only_the_chosen_layers_are_adapted(name):
    pattern = {"GPT-2": "h"}.get(name, "layers")
    targets = ["c_attn"] if name == "GPT-2" else ["q_proj", "v_proj"]
    model = adapted(name, target_modules=targets, layers_to_transform=[1], layers_pattern=pattern)
    found = [n for n, m in model.named_modules() if isinstance(m, MoSLDPeftLinear)]
    assert len(found) == len(targets) and all(f".{pattern}.1." in n for n in found)
    model = adapted(name, target_modules=targets, exclude_modules=rf".*{pattern}\.0\..*")
    assert found == [n for n, m in model.named_modules() if isinstance(m, MoSLDPeftLinear)]
