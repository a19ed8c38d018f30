"""MixLoRA: mixtures of whole blocks inside a PEFT model, against loops over tokens and experts in float64."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from mosld import (
    MoSLDAdapter,
    MoSLDConfig,
    MoSLDLinear,
    balance_loss,
    export_lora,
    import_lora,
    localized_balance_loss,
    presets,
    router_stats,
)
from mosld.analysis.saved_adapters import inspect_adapter
from mosld.files.adapter_folder import AdapterFileError
from mosld.layers.feed_forward import BlockAdapter
from tests.helpers.models import checkpoint_layers, perturb, tiny_llama, token_ids

WIDE = torch.float64
BLOCK = "base_model.model.model.layers.{}.mlp"


def adapted(trained=True, base=None, **changes):
    config = presets.mixlora(**{"r": 2, "alpha": 3, "num_experts": 4, "input_dropout": 0.0, **changes})
    torch.manual_seed(0)
    model = peft.get_peft_model(base or tiny_llama(), config)
    if trained:
        torch.manual_seed(4)
        perturb(model)
    return model


def block_of(model, layer=0):
    """-> the adapted block, its mixture"""
    block = model.get_submodule(BLOCK.format(layer))
    return block, block.mixtures["default"]


def by_loops(base: nn.Module, a: BlockAdapter, x: torch.Tensor) -> torch.Tensor:
    """x [tokens, hidden]"""
    m, rows = a.mixture, []
    for token in x:
        logits = a.router.weight @ token / m.temperature
        probability = logits.softmax(0)
        order = sorted(range(len(logits)), key=lambda e: -logits[e].item())
        chosen = order[: m.top_k]
        if m.gate == "top_p":
            reached = [sum(probability[e].item() for e in order[: i + 1]) for i in range(len(order))]
            chosen = order[: next(i for i, total in enumerate(reached) if total >= m.top_p) + 1]
        total = sum(probability[e] for e in chosen) if m.option("renormalise") else 1
        out = 0
        for e in chosen:
            own = slice(e * m.r, e * m.r + m.r)

            def linear(name, value, own=own):
                down, up = getattr(a, f"{name}_a").weight[own], getattr(a, f"{name}_b").weight[:, own]
                return getattr(base, f"{name}_proj").weight @ value + m.alpha / m.r * (up @ (down @ value))

            out = out + probability[e] / total * linear("down", F.silu(linear("gate", token)) * linear("up", token))
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"top_k": 1, "mixing_options": {"renormalise": False}},
        {"top_k": 2, "mixing_options": {"renormalise": False}},
        {"top_k": 4, "temperature": 0.5},
        {"gate": "top_p", "top_p": 0.6},
        {"gate": "top_p", "top_p": 0.6, "mixing_options": {"renormalise": False}},
    ],
)
def test_values_and_gradients_are_those_of_the_loops(changes):
    block, a = block_of(adapted(**changes).double())
    x = torch.randn(2, 5, 32, dtype=WIDE, requires_grad=True)
    leaves = [x, *a.parameters()]
    assert len(leaves) == 8
    ours, truth = block(x), by_loops(block.base_layer, a, x.flatten(0, 1)).view(2, 5, 32)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    incoming = torch.randn_like(ours)
    for own, expected in zip(*(torch.autograd.grad(y, leaves, incoming) for y in (ours, truth)), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-12)
        assert expected.abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_model_is_the_frozen_one_to_the_last_bit(dtype):
    base = tiny_llama().to(dtype)
    with torch.no_grad():
        before = base(token_ids()).logits
        model = adapted(trained=False, base=base)
        assert torch.equal(model(token_ids()).logits, before)
        model.train()  # nothing is dropped yet that matters: B is zero
        assert torch.equal(model(token_ids()).logits, before)


def test_llama2_7b_has_as_many_parameters_as_published():
    """203.4 M, 2.93 % of all."""
    config = LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, vocab_size=32000)
    with torch.device("meta"):
        model = peft.get_peft_model(LlamaForCausalLM(config), presets.mixlora())
    per_layer = 4 * 16 * 2 * 4096 + 8 * 16 * 3 * (4096 + 11008) + 8 * 4096
    trained, whole = model.get_nb_trainable_parameters()
    assert trained == 32 * per_layer == 203_423_744 and round(100 * trained / whole, 2) == 2.93


def test_linear_layers_get_plain_loras_and_blocks_a_router():
    model = adapted()
    attention = model.get_submodule(BLOCK.format(1).replace("mlp", "self_attn.q_proj")).mixtures["default"]
    assert attention.mixture == presets.lora(r=2, alpha=3).mixture_of("q_proj")
    model(token_ids())
    assert list(router_stats(model)) == [BLOCK.format(0), BLOCK.format(1)]
    assert router_stats(model)[BLOCK.format(0)].tokens == 21
    logits = block_of(model)[1].router_logits
    assert logits.shape == (3, 7, 4) and logits.dtype == torch.float32


def test_it_trains_and_so_do_its_routers_with_the_balance_loss():
    model = adapted(trained=False, input_dropout=0.05).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    before, losses = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}, []
    for _ in range(40):
        loss = model(token_ids(), labels=token_ids()).loss
        losses.append(loss.item())
        (loss + 0.01 * balance_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3
    assert all((p != before[n]).any() for n, p in model.named_parameters() if p.requires_grad)
    assert localized_balance_loss(model, [0, 1, 0]).item() > 0


def test_a_saved_adapter_computes_the_same_and_is_checked(tmp_path):
    model = adapted(num_experts_pattern={r"layers\.1\.mlp": 3}).eval()
    model.save_pretrained(str(tmp_path))
    with torch.no_grad():
        expected = model(token_ids()).logits
        again = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
        assert torch.equal(again(token_ids()).logits, expected)
    report = inspect_adapter(tmp_path)
    layer = report["layers"]["model.layers.1.mlp"]
    assert (layer["in_features"], layer["out_features"], layer["num_experts"]) == (32, 48, 3)
    assert report["parameters"] == model.get_nb_trainable_parameters()[0]
    _, a = block_of(model, 1)
    own = [slice(e * 2, e * 2 + 2) for e in range(3)]
    squares = [
        sum(
            (getattr(a, f"{n}_b").weight[:, e] @ getattr(a, f"{n}_a").weight[e]).square().sum().item()
            for n in ("gate", "up", "down")
        )
        for e in own
    ]  # fmt: skip
    assert layer["update_norms"] == pytest.approx([1.5 * square**0.5 for square in squares], rel=1e-5)
    weights = tmp_path / "adapter_model.safetensors"
    tensors, whole = load_file(weights), weights.read_bytes()
    name = "base_model.model.model.layers.0.mlp.mosld_{}.weight"
    for altered, message in (
        ({k: v for k, v in tensors.items() if k != name.format("up_b")}, "layers.0.mlp lacks mosld_up_b"),
        ({**tensors, name.format("down_a"): torch.zeros(8, 47)}, r"mosld_down_a of .* has shape \[8, 47\]"),
    ):
        save_file(altered, weights)
        with pytest.raises(AdapterFileError, match=message):
            peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    weights.write_bytes(whole)
    with pytest.raises(ValueError, match=r"trained for 32 -> 48 features in .*layers.0.mlp, which has 32 -> 40 here"):
        peft.PeftModel.from_pretrained(tiny_llama(intermediate_size=40), str(tmp_path))


def test_batch_mates_padding_and_later_tokens_change_nothing():
    model = adapted().double().eval()
    ids = token_ids(rows=3, length=7)
    with torch.no_grad():
        together = model(ids).logits
        for row, expected in zip(ids, together, strict=True):
            torch.testing.assert_close(model(row[None]).logits[0], expected, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(model(row[None, :4]).logits[0], expected[:4], rtol=1e-10, atol=1e-12)
        padded = model(F.pad(ids, (0, 2), value=1), attention_mask=F.pad(torch.ones_like(ids), (0, 2))).logits
    torch.testing.assert_close(padded[:, :7], together, rtol=1e-10, atol=1e-12)


def gradients(model, forward) -> list[torch.Tensor]:
    torch.manual_seed(5)
    loss = forward(token_ids())
    loss = loss.square().mean() + 0.3 * balance_loss(model)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_are_the_same_under_activation_checkpointing(use_reentrant):
    truth = gradients(model := adapted(input_dropout=0.3, dropout=0.2).double().train(), lambda ids: model(ids).logits)
    model = adapted(input_dropout=0.3, dropout=0.2).double().train()
    checkpoint_layers(model.get_base_model(), use_reentrant)
    for ours, expected in zip(gradients(model, lambda ids: model(ids, use_cache=False).logits), truth, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_block_checkpointed_by_hand_gets_the_balance_losss_gradient(use_reentrant):
    grads = []
    for by_hand in (False, True):
        block, a = block_of(adapted().double())
        x = torch.linspace(-1, 1, 320, dtype=WIDE).view(2, 5, 32).requires_grad_()
        out = checkpoint(block, x, use_reentrant=use_reentrant) if by_hand else block(x)
        (0.0 * out.sum() + balance_loss(block, recomputed=by_hand and use_reentrant)).backward()
        grads.append((x.grad, a.router.weight.grad))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
        assert expected.abs().max() > 1e-4


@pytest.mark.slow
def test_a_compiled_model_has_the_same_gradients_without_a_graph_break():
    model = adapted().double().train()
    truth = gradients(model, lambda ids: model(ids, use_cache=False).logits)
    model = adapted().double().train()
    compiled = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(gradients(model, compiled), truth, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_under_bfloat16_autocast_it_computes_as_the_bfloat16_block_with_rounded_adapters():
    block, a = block_of(adapted())
    x = torch.randn(2, 5, 32, dtype=torch.bfloat16)
    narrow = copy.deepcopy(block).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x.float())
    assert a.router_logits.dtype == torch.float32  # as in the routing of any layer
    assert out.dtype == torch.bfloat16 and torch.equal(out, narrow(x))
    (out.float().square().sum() + balance_loss(block)).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in a.parameters())


def test_what_cannot_be_done_is_refused(tmp_path):
    model = adapted()
    with pytest.raises(
        ValueError, match="no LoRA equals a mixture of feed-forward blocks, such as the one on .*layers.0.mlp"
    ):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    model.add_adapter("linear", MoSLDConfig(r=2, num_experts=2, target_modules=["q_proj"]))
    export_lora(model, tmp_path / "lora", adapter_name="linear")  # beside it and, below, in its place
    model.set_adapter("linear")
    model.delete_adapter("default")
    export_lora(model, tmp_path / "again", adapter_name="linear")
    model = adapted(target_modules=["mlp"])
    attention = model.get_base_model().model.layers[0].self_attn
    attention.q_proj = MoSLDLinear.from_linear(attention.q_proj, r=2, num_experts=2)
    with pytest.raises(ValueError, match="all adapted by hand or all through PEFT"):
        export_lora(model, tmp_path / "half")
    model = adapted()
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(
        ValueError, match="mixing='block' is of whole feed-forward blocks: it cannot be placed on a linear layer"
    ):
        MoSLDLinear(3, 4, mixing="block")
    with pytest.raises(
        ValueError, match="mixing='expand' is of linear layers: it cannot be placed on a feed-forward block"
    ):
        BlockAdapter(3, 4, mixing="expand")
    with pytest.raises(ValueError, match="found no feed-forward block: target_modules must name one, such as 'mlp'"):
        adapted(target_modules=["q_proj"])
    with pytest.raises(
        ValueError, match=r"layers.0.mlp cannot be adapted together with .*layers.0.mlp.up_proj inside it"
    ):
        adapted(target_modules=["mlp", "up_proj"])
    with pytest.raises(ValueError, match="layers.0.mlp is a LlamaMLP"):
        peft.get_peft_model(tiny_llama(), MoSLDConfig(target_modules=["mlp"]))
    for changes, message in (
        ({"router": "sequence"}, "router='sequence' contradicts mixing='block'"),
        ({"up_dropout": 0.1}, "up_dropout=0.1 contradicts mixing='block'"),
        ({"top_k": 5}, r"top_k must be in \[1, num_experts=4\], got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            adapted(**changes)
    model.add_adapter("second", presets.mixlora(r=2, num_experts=4))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="cannot be added up, activate one of default, second"):
        model(token_ids())
    model.base_model.set_adapter("second")
    model(token_ids())
    with pytest.raises(
        ValueError, match="a LoRA becomes a mixture with mixing 'expand', 'diagonal' or 'reduce', got 'block'"
    ):
        plain = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
        plain.save_pretrained(str(tmp_path / "plain"))
        import_lora(tiny_llama(), tmp_path / "plain", mixing="block")


def test_a_block_that_computes_something_else_is_refused():
    class Clipped(type(tiny_llama().model.layers[0].mlp)):
        def forward(self, x):
            return super().forward(x).clamp(min=0)

    base = tiny_llama()
    for layer in base.model.layers:
        layer.mlp.__class__ = Clipped
    with pytest.raises(ValueError, match="a Clipped computes something else than down_proj"):
        adapted(base=base)


def test_without_the_adapter_it_is_the_base_and_unloading_gives_it_back():
    base = tiny_llama()
    with torch.no_grad():
        before = base(token_ids()).logits
        model = adapted(base=base)
        assert not torch.equal(model(token_ids()).logits, before)
        with model.disable_adapter():
            assert torch.equal(model(token_ids()).logits, before)
        assert torch.equal(model.unload()(token_ids()).logits, before)


def test_logits_are_kept_as_the_class_says(monkeypatch):
    monkeypatch.setattr(MoSLDAdapter, "keep_logits", False)
    model = adapted()
    model(token_ids())
    assert block_of(model)[1].router_logits is None
