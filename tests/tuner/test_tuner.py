"""MoSLD as a method of PEFT: placing, equality at the start, saving, loading, several adapters, generation."""

import copy
import json
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import mosld
from mosld import MoSLDConfig, balance_loss
from mosld.tuner.layer import MoSLDPeftLinear
from mosld.tuner.register import register
from tests.helpers.models import perturb, tiny_llama, token_ids

IDS = token_ids()


def adapted(base=None, **changes):
    config = MoSLDConfig(
        **{"r": 4, "num_experts": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    )
    return peft.get_peft_model(base if base is not None else tiny_llama(), config)


@pytest.fixture(scope="module")
def frozen_logits():
    with torch.no_grad():
        return tiny_llama()(IDS).logits


def trained_adapter(**changes):
    model = adapted(**changes)
    torch.manual_seed(1)
    perturb(model)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_starts_bit_for_bit_equal_to_the_base(dtype, training):
    base = tiny_llama().to(dtype)
    expected = base(IDS).logits
    assert torch.equal(adapted(base).train(training)(IDS).logits, expected)


def test_adapts_every_linear_but_the_head_and_trains_adapters_only():
    model = adapted()
    layers = [name for name, module in model.named_modules() if isinstance(module, MoSLDPeftLinear)]
    assert len(layers) == 14 and not any("lm_head" in name for name in layers)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".mosld_" in name and name.endswith(".default.weight") for name in trainable)
    model.train()(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trainable), name


def test_default_targets_are_q_and_v_as_in_the_paper():
    model = adapted(target_modules=None)
    names = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, MoSLDPeftLinear)}
    assert names == {"q_proj", "v_proj"}


def test_parameter_count_is_the_formula():
    """r D_in + E r D_out + E D_in per layer."""
    model = adapted(target_modules=["q_proj"], r=4, num_experts=6)
    assert model.get_nb_trainable_parameters()[0] == 2 * (4 * 32 + 6 * 4 * 32 + 6 * 32)


def test_experts_per_layer_follow_the_pattern():
    model = adapted(num_experts=8, num_experts_pattern={r"layers\.0\..*": 4, "v_proj": 2})
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MoSLDPeftLinear)}
    for name, layer in layers.items():
        expected = 4 if ".layers.0." in name else 2 if name.endswith("v_proj") else 8
        assert layer.mixtures["default"].num_experts == len(layer.mosld_router["default"].weight) == expected, name


def test_save_and_load_round_trip(tmp_path, frozen_logits):
    model = trained_adapter(num_experts_pattern={"v_proj": 2})
    expected = model(IDS).logits
    assert not torch.equal(expected, frozen_logits)
    model.save_pretrained(str(tmp_path))
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    first = "base_model.model.model.layers.0.self_attn.q_proj.mosld_"
    assert {f"{first}shared_a.weight", f"{first}expert_b.weight", f"{first}router.weight"} <= keys
    assert len(keys) == 3 * 14
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MOSLD"
    assert torch.equal(peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))(IDS).logits, expected)


def test_loads_through_the_auto_classes(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    perturb(model)
    expected = model.eval()(IDS).logits
    model.save_pretrained(str(tmp_path / "adapter"))
    assert torch.equal(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")(IDS).logits, expected)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")(IDS).logits, expected)


def test_transformers_own_adapter_methods(frozen_logits):
    model = tiny_llama()
    model.add_adapter(MoSLDConfig(r=4, num_experts=4, target_modules=["q_proj", "v_proj"]), "mine")
    assert torch.equal(model(IDS).logits, frozen_logits)
    perturb(model)
    assert not torch.equal(model(IDS).logits, frozen_logits)
    model.disable_adapters()
    assert torch.equal(model(IDS).logits, frozen_logits)
    model.delete_adapter("mine")
    assert torch.equal(model(IDS).logits, frozen_logits)


def test_generation_with_and_without_cache_agree():
    model = trained_adapter()
    settings = dict(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(**settings, use_cache=True), model.generate(**settings, use_cache=False))


def test_logits_do_not_depend_on_batch_mates_padding_or_later_tokens():
    model = trained_adapter()
    with torch.no_grad():
        together = model(IDS).logits
        for row in range(len(IDS)):
            torch.testing.assert_close(model(IDS[row : row + 1]).logits[0], together[row], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(IDS[:, :4]).logits, together[:, :4], rtol=1e-5, atol=1e-5)
        padded = torch.cat((IDS, torch.ones_like(IDS)), 1)
        mask = torch.cat((torch.ones_like(IDS), torch.zeros_like(IDS)), 1)
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, :7], together, rtol=1e-5, atol=1e-5)


def test_dropout_stops_in_eval_and_returns_in_train():
    model = trained_adapter(dropout=0.5)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_several_adapters_switch_add_disable_and_delete(frozen_logits):
    model = trained_adapter()
    first = model(IDS).logits
    model.add_adapter("second", MoSLDConfig(r=2, num_experts=3, top_k=1, target_modules="all-linear"))
    model.set_adapter("second")
    assert torch.equal(model(IDS).logits, frozen_logits)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".default." in n)
    model.base_model.set_adapter(["default", "second"])
    assert torch.equal(model(IDS).logits, first)  # the second still adds nothing
    torch.manual_seed(3)
    perturb(model)
    with model.disable_adapter():
        assert torch.equal(model(IDS).logits, frozen_logits)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert not any("second" in name for name, _ in model.named_parameters())


def test_two_active_adapters_add_their_updates():
    layer = MoSLDPeftLinear(nn.Linear(6, 5))
    for name in ("a", "b"):
        layer.update_layer(name, False, r=2, alpha=4, num_experts=3, top_k=2, dropout=0.0)
    layer.set_adapter(["a", "b"])
    perturb(layer)
    x = torch.randn(4, 6)
    updates = [layer.mixtures[name](x) for name in ("a", "b")]
    torch.testing.assert_close(layer(x), layer.base_layer(x) + updates[0] + updates[1])


def test_a_hooked_base_layer_is_called_and_gives_the_same():
    """Hooks and offloading live in the layer's call, which the fused path would pass by."""
    layer = MoSLDPeftLinear(nn.Linear(6, 5))
    layer.update_layer("default", False, r=2, alpha=4, num_experts=3, top_k=2, dropout=0.0)
    perturb(layer)
    x = torch.randn(4, 6)
    fused, calls = layer(x), []
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(layer(x), fused)
    assert calls == [1]


def test_conv1d_layers_of_gpt2():
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    base = GPT2LMHeadModel(config).eval()
    expected = base(IDS).logits
    model = adapted(base, target_modules=["c_attn", "c_fc"])
    assert torch.equal(model(IDS).logits, expected)
    model.train()(IDS, labels=IDS).loss.backward()


def test_merging_is_refused_with_a_reason_and_unload_gives_the_base_back(frozen_logits):
    model = trained_adapter()
    with pytest.raises(
        ValueError, match=r"its gates depend on the token. Fix them: mosld.export_lora\(model, folder\)"
    ):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="its gates depend on the token"):
        model.merge_adapter()
    unloaded = model.unload()
    assert torch.equal(unloaded(IDS).logits, frozen_logits)
    assert not any(isinstance(module, MoSLDPeftLinear) for module in unloaded.modules())


def test_modules_to_save_are_trained_and_saved(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    perturb(model)
    expected = model.eval()(IDS).logits
    model.save_pretrained(str(tmp_path))
    assert torch.equal(peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))(IDS).logits, expected)


def test_deepcopy_after_a_forward():
    model = trained_adapter()
    expected = model(IDS).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(IDS).logits, expected)
    perturb(copied)
    assert torch.equal(model(IDS).logits, expected) and not torch.equal(copied(IDS).logits, expected)


def test_adapters_of_a_bfloat16_model_are_float32_and_train():
    model = adapted(tiny_llama().to(torch.bfloat16)).train()
    loss = model(IDS, labels=IDS).loss + balance_loss(model)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert {g.dtype for g in grads} == {torch.float32} and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant):
    grads = []
    for checkpointing in (False, True):
        model = adapted(dropout=0.5).train()
        torch.manual_seed(1)
        perturb(model)
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # transformers' own rename
                model.enable_input_require_grads()
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(2)
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_an_adapted_model_compiles_without_a_graph_break():
    model = trained_adapter(dropout=0.0)
    torch._dynamo.reset()
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager")
    expected = model(IDS, use_cache=False).logits
    torch.testing.assert_close(compiled(IDS), expected, rtol=1e-5, atol=1e-5)
    compiled(IDS).square().sum().backward()


def test_registering_again_changes_nothing():
    before = list(peft.PeftType)
    register()
    assert list(peft.PeftType) == before
    assert peft.PeftType("MOSLD") is peft.PeftType.MOSLD and mosld.tuner.layer.PREFIX == "mosld_"


@pytest.mark.slow
def test_loading_without_importing_mosld_fails_and_importing_it_is_enough(tmp_path):
    model = adapted()
    model.save_pretrained(str(tmp_path))
    program = (
        "import sys\n"
        "from peft import PeftConfig\n"
        "try: PeftConfig.from_pretrained(sys.argv[1])\n"
        "except Exception as error: print('refused:', error)\n"
        "import mosld\n"
        "print(type(PeftConfig.from_pretrained(sys.argv[1])).__name__)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    refused, loaded = result.stdout.strip().split("\n")
    assert refused.startswith("refused:") and "MOSLD" in refused and loaded == "MoSLDConfig"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(top_k=9), r"top_k must be in \[1, num_experts=8\], got 9"),
        (dict(num_experts_pattern={"q_proj": 1}), r"top_k must be in \[1, num_experts=1\], got 2"),
        (dict(dropout=2), r"dropout must be in \[0, 1\], got 2"),
        (dict(shared="both"), "shared must be 'down' or 'up', got 'both'"),
        (dict(input_dropout=1.1), r"input_dropout must be in \[0, 1\], got 1.1"),
        (dict(balance_coef=-1.0), "balance_coef must be at least 0, got -1.0"),
        (dict(target_modules=r".*q_proj", layers_to_transform=[0]), "layers_to_transform chooses among listed"),
        (dict(target_modules=r".*q_proj", layers_to_transform=0), "layers_to_transform chooses among listed"),
        (dict(layers_pattern="h"), "layers_pattern needs layers_to_transform"),
    ],
)
def test_a_bad_configuration_is_refused_on_construction(changes, message):
    with pytest.raises(ValueError, match=message):
        MoSLDConfig(**changes)


def test_a_layer_that_cannot_be_adapted_is_named():
    with pytest.raises(ValueError, match="embed_tokens is a Embedding"):
        adapted(target_modules=["embed_tokens"])


def test_attention_that_never_calls_its_output_layer_is_refused():
    with pytest.raises(ValueError, match="out_proj cannot be adapted: nn.MultiheadAttention reads its weight"):
        peft.get_peft_model(nn.TransformerEncoderLayer(8, 2), MoSLDConfig(target_modules=["out_proj"]))


def test_low_memory_loading_goes_through_the_meta_device(tmp_path):
    model = trained_adapter()
    model.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path), low_cpu_mem_usage=True)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_batches_with_an_adapter_per_row_are_refused():
    layer = MoSLDPeftLinear(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="adapter_names must not be given"):
        layer(torch.ones(1, 3), adapter_names=["a"])
