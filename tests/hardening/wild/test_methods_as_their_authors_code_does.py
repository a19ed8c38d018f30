"""Methods with the rules of their authors' code, where these differ from the paper: against loops in float64."""

from math import exp, sqrt

import peft
import pytest
import torch
from transformers import TrainingArguments

from mosld import MoSLDConfig, MoSLDLinear, MoSLDTrainer, balance_loss, presets, set_routing
from mosld.layers.host import running_adapters
from mosld.training.balance import _block
from mosld_kernels.gating import top_p_gates
from tests.helpers.models import perturb, tiny_llama, token_ids

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0] * 2 + [1] * 5])


def adapted(config: MoSLDConfig, layers: int) -> peft.PeftModel:
    model = peft.get_peft_model(tiny_llama(num_hidden_layers=layers), config).double()
    torch.manual_seed(1)
    perturb(model)
    return model


def logits_of(model: peft.PeftModel, mask: torch.Tensor | None) -> dict[str, list[list[float]]]:
    """A layer's name -> the router's logits of each real token."""
    found = {}
    for name, adapter in running_adapters(model):
        if adapter.router_logits is not None:
            logits = adapter.router_logits if mask is None else adapter.router_logits[mask != 0]
            found[name] = logits.detach().reshape(-1, logits.shape[-1]).tolist()
    return found


def load_times_probability(logits: list[list[float]], top_k: int) -> float:
    """E sum_e f_e P_e over these tokens, where f adds up to one."""
    experts = len(logits[0])
    load, probability = [0.0] * experts, [0.0] * experts
    for token in logits:
        total = sum(exp(logit) for logit in token)
        for e in sorted(range(experts), key=lambda e: -token[e])[:top_k]:
            load[e] += 1 / (len(logits) * top_k)
        for e in range(experts):
            probability[e] += exp(token[e]) / total / len(logits)
    return experts * sum(load[e] * probability[e] for e in range(experts))


@pytest.mark.parametrize("layers", [1, 2, 8])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
def test_mixloras_loss_is_one_of_the_whole_model(layers, mask):
    """MoE-PEFT puts the logits of all layers one below the other, and its f adds up to top_k."""
    model = adapted(presets.mixlora(r=2, num_experts=4, input_dropout=0.0, balance_pool="model"), layers)
    model(token_ids(), attention_mask=mask)
    together = []
    for own in logits_of(model, mask).values():
        together += own
    theirs = 0.001 * 2 * load_times_probability(together, top_k=2)
    ours = balance_loss(model, mask, pool="model")
    assert 2e-3 * ours.item() == pytest.approx(theirs, rel=1e-12)
    assert model.peft_config["default"].balance_coef == 2e-3
    # The default adds up a term for every layer: it grows with them.
    assert balance_loss(model, mask).item() == pytest.approx(
        sum(load_times_probability(own, 2) for own in logits_of(model, mask).values()), rel=1e-12
    )
    assert balance_loss(model, mask).item() > 0.8 * layers


@pytest.mark.parametrize(("targets", "a_block"), [(["q_proj", "v_proj"], 2), (ALL, 7)])
def test_molas_loss_is_one_a_block(targets, a_block):
    """Of all its layers' tokens together, whichever the blocks' numbers of experts are."""
    pattern = presets.experts_by_depth(4, 2, 3, 4, 5)
    config = presets.mola(
        r=2, top_k=1, num_experts_pattern=pattern, input_dropout=0.0, balance_pool="block", target_modules=targets
    )
    model = adapted(config, layers=4)
    model(token_ids())
    blocks: dict[str, list[list[float]]] = {}
    for name, own in logits_of(model, None).items():
        blocks.setdefault(name.split(".self_attn")[0].split(".mlp")[0], []).extend(own)
    assert len(blocks) == 4 and all(len(tokens) == a_block * 21 for tokens in blocks.values())
    theirs = sum(load_times_probability(tokens, top_k=1) for tokens in blocks.values())
    assert balance_loss(model, pool="block").item() == pytest.approx(theirs, rel=1e-12)
    # The default is a term for each adapted layer, as many times as large and more.
    assert balance_loss(model).item() > a_block * 4 * 0.95 > theirs


@pytest.mark.parametrize("pool", ["block", "model"])
def test_the_pooled_losss_gradient_is_that_of_its_formula(pool):
    model = adapted(presets.mola(r=2, num_experts=4, input_dropout=0.0, target_modules=ALL), layers=2)
    routers = [adapter.router.weight for _, adapter in running_adapters(model)]
    model(token_ids(), attention_mask=MASK)
    ours = torch.autograd.grad(balance_loss(model, MASK, pool=pool), routers)
    model(token_ids(), attention_mask=MASK)
    pools: dict[str, list[torch.Tensor]] = {}
    for name, adapter in running_adapters(model):
        key = "model" if pool == "model" else name.split("layers.")[1][0]
        pools.setdefault(key, []).append(adapter.router_logits[MASK != 0])
    total = 0
    for own in pools.values():
        logits = torch.cat(own)
        load = torch.zeros(4, dtype=torch.float64)
        for token in logits:
            load[token.topk(2).indices] += 1 / (2 * len(logits))
        total = total + 4 * (load * logits.softmax(-1).mean(0)).sum()
    for own, expected in zip(ours, torch.autograd.grad(total, routers), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-14)
        assert expected.abs().max() > 1e-8


def test_the_trainer_adds_the_loss_of_the_configurations_pool(tmp_path):
    data = [{"input_ids": row.tolist(), "labels": row.tolist()} for row in token_ids(4)]
    logged = {}
    for pool in ("layer", "block", "model"):
        config = presets.mola(r=2, num_experts=4, input_dropout=0.0, balance_pool=pool, target_modules=ALL)
        model = adapted(config, layers=2).float()
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, logging_steps=1, per_device_train_batch_size=4, learning_rate=0.0,
            use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = MoSLDTrainer(model, arguments, train_dataset=data)
        trainer.train()
        logged[pool] = trainer.state.log_history[0]["balance_loss"]
        model.eval()
        model(input_ids=token_ids(4))
        assert logged[pool] == pytest.approx(balance_loss(model, pool=pool).item(), rel=1e-5)
    assert logged["layer"] > 13 and 1.9 < logged["block"] < 7 and logged["model"] < 4


def test_what_cannot_be_pooled_is_refused():
    pattern = presets.experts_by_depth(2, 3, 4)
    model = adapted(presets.mola(r=2, num_experts_pattern=pattern, target_modules=["q_proj"]), layers=2)
    model(token_ids())
    balance_loss(model, pool="block")
    with pytest.raises(
        ValueError, match=r"needs layers with equal num_experts and top_k: .*0.* has 3 and 2, .*1.* 4 and 2"
    ):
        balance_loss(model, pool="model")
    with pytest.raises(ValueError, match="pool must be one of layer, block, model, got 'layers'"):
        balance_loss(model, pool="layers")
    with pytest.raises(ValueError, match="balance_pool must be one of layer, block, model, got 'mean'"):
        MoSLDConfig(balance_pool="mean")


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("base_model.model.model.layers.12.self_attn.q_proj", "base_model.model.model.layers.12"),
        ("encoder.block.3.layer.0.SelfAttention.q", "encoder.block.3"),
        ("decoder.block.3.layer.1.EncDecAttention.q", "decoder.block.3"),
        ("transformer.h.0", "transformer.h.0"),
        ("0", "0"),
        ("model.layers2.1.fc1", "model.layers2.1"),
        ("lm_head", "lm_head"),
        ("", ""),
    ],
)
def test_a_block_is_what_has_the_same_first_number(name, block):
    assert _block(name) == block


def dynamic_gates(probabilities: list[float], p: float) -> list[float]:
    """Down to the first expert with which the sum of probabilities exceeds p; as they are."""
    gates, total = [0.0] * len(probabilities), 0.0
    for e in sorted(range(len(probabilities)), key=lambda e: -probabilities[e]):
        gates[e] = probabilities[e]
        total += probabilities[e]
        if total > p:
            break
    return gates


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8, 1.0])
def test_mixloras_dynamic_gates_are_not_renormalised(p):
    logits = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[0] = 0.0
    found = top_p_gates(logits, p, renormalise=False)
    for token, gates in zip(logits, found, strict=True):
        expected = dynamic_gates(token.softmax(0).tolist(), p)
        assert gates.tolist() == pytest.approx(expected, rel=1e-12, abs=0)
    renormalised = top_p_gates(logits, p)
    torch.testing.assert_close(renormalised.sum(-1), torch.ones(50, dtype=torch.float64))
    assert p == 1 or (found.sum(-1) < 1).any()
    # Of four equal experts three exceed one half; two reach it.
    equal = torch.zeros(4, dtype=torch.float64)
    assert top_p_gates(equal, 0.5, renormalise=False).tolist() == [0.25, 0.25, 0.25, 0.0]
    assert top_p_gates(equal, 0.5).tolist() == [0.5, 0.5, 0.0, 0.0]


def columns_by_hand(layer: MoSLDLinear, x: torch.Tensor) -> list[list[int]]:
    """For each sequence the columns of B, by the released selector."""
    a = layer.adapter
    m, (rows, size) = a.mixture, a.shared_a.weight.shape
    router, weight, pool = a.router.weight.tolist(), a.mixer.weight.tolist(), a.shared_a.weight.tolist()
    found = []
    for sequence in x.tolist():
        mean = [sum(token[d] for token in sequence) / len(sequence) for d in range(size)]
        logits = [sum(row[d] * mean[d] for d in range(size)) for row in router]
        chosen = sorted(range(rows), key=lambda e: -logits[e])[: m.r]
        total = [0.0] * rows
        for q, row in enumerate(chosen):
            of_row = sum(pool[row])
            scores = [exp(of_row * sum(weight[e][q * size : (q + 1) * size])) for e in range(rows)]
            for e in range(rows):
                total[e] += scores[e] / sum(scores)
        own = [exp(logits[rows + e]) for e in range(rows)]
        given = [exp(total[e]) for e in range(rows)]
        both = [own[e] / sum(own) + given[e] / sum(given) for e in range(rows)]
        found.append([*chosen, *sorted(range(rows), key=lambda e: -both[e])[: m.r]])
    return found


def update_by_hand(layer: MoSLDLinear, x: torch.Tensor) -> torch.Tensor:
    a = layer.adapter
    out = torch.zeros(*x.shape[:-1], len(a.expert_b.weight), dtype=torch.float64)
    for b, chosen in enumerate(columns_by_hand(layer, x)):
        for row, column in zip(chosen[: a.mixture.r], chosen[a.mixture.r :], strict=True):
            for i, token in enumerate(x[b]):
                z = sum(a.shared_a.weight[row, d].item() * token[d].item() for d in range(x.shape[-1]))
                out[b, i] += a.mixture.scale * z * a.expert_b.weight[:, column].detach()
    return out


def test_the_released_selector_of_conditional_mixlora_multiplies_sums():
    options = {"selector": "sums", "straight_through": False}
    config = presets.mixlora_conditional(r=2, num_experts=6, mixing_options=options)
    torch.manual_seed(0)
    layer = MoSLDLinear(9, 5, dtype=torch.float64, **vars(config.mixture_of("q_proj"))).eval()
    assert config.mixture_of("q_proj").shapes(9, 5)["mixer"] == (6, 2 * 9)  # nn.Linear(r D_in, E), as released
    # It starts as that layer does, within 1 / sqrt(r D_in).
    assert 0.9 / sqrt(18) < layer.adapter.mixer.weight.abs().max().item() <= 1 / sqrt(18)
    for parameter in layer.adapter.parameters():
        parameter.data.normal_()
    x = torch.randn(200, 3, 9, dtype=torch.float64)
    found = layer(x) - torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(found.detach(), update_by_hand(layer, x), rtol=1e-9, atol=1e-12)
    # The projection that the paper writes takes other columns for many of them.
    paper = presets.mixlora_conditional(r=2, num_experts=6, mixing_options={"straight_through": False})
    projected = MoSLDLinear(9, 5, dtype=torch.float64, **vars(paper.mixture_of("q_proj"))).eval()
    assert 0.9 / 3 < projected.adapter.mixer.weight.abs().max().item() <= 1 / 3
    projected.load_state_dict({**layer.state_dict(), "adapter.mixer.weight": as_projection(layer.adapter.mixer.weight)})
    other = (projected(x) - layer(x)).flatten(1).abs().amax(1) > 1e-9
    assert 20 < int(other.sum()) < 180
    with pytest.raises(ValueError, match="selector in mixing_options must be one of product, sums, got 'dot'"):
        presets.mixlora_conditional(mixing_options={"selector": "dot"})


def as_projection(weight: torch.Tensor) -> torch.Tensor:
    """[E, r D_in] -> [r, D_in, E]"""
    return weight.detach().view(6, 2, 9).permute(1, 2, 0)


def test_the_released_selector_is_saved_and_loaded(tmp_path):
    options = {"selector": "sums"}
    config = presets.mixlora_conditional(r=2, num_experts=4, mixing_options=options, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_llama(), config)
    perturb(model)
    model.eval().save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


def mor1e_by_hand(layer: MoSLDLinear, x: torch.Tensor, prior, place) -> torch.Tensor:
    """The update of a token [D_in]; place: (row of A, column of B) -> the number of the pair."""
    a = layer.adapter
    r, up = a.mixture.r, a.mixture.option("r_up")
    v, b = (1 / (1 + exp(-100 * value)) for value in a.mixer.weight.tolist())
    exponentials = [exp((row * x).sum().item()) for row in a.router.weight]
    out = torch.zeros(len(a.expert_b.weight), dtype=torch.float64)
    for i in range(r):
        for j in range(up):
            pair = place(i, j)
            m = v * r * up * exponentials[pair] / sum(exponentials) + (1 - v) * 4 * prior(i, j)
            out += a.mixture.scale * b * m * (a.shared_a.weight[i] @ x) * a.expert_b.weight[:, j]
    return out


@pytest.mark.parametrize("slow", ["r_up", "r"])
@torch.no_grad()
def test_mor1es_prior_is_a_matrix_whose_wrong_layout_raises(slow):
    r, up = 2, 3
    config = presets.mor1e(r=r, mixing_options={"r_up": up, "slow_index": slow})
    layer = MoSLDLinear(7, 5, dtype=torch.float64, **vars(config.mixture_of("q_proj"))).eval()
    for parameter in layer.adapter.parameters():
        parameter.normal_()
    layer.adapter.mixer.weight.copy_(torch.tensor([0.004, -0.007]))
    x = torch.randn(4, 6, 7, dtype=torch.float64)
    rho = torch.rand(4, up, r, dtype=torch.float64)  # of column j of B and row i of A
    place = (lambda i, j: j * r + i) if slow == "r_up" else (lambda i, j: i * up + j)
    expected = torch.empty(4, 6, 5, dtype=torch.float64)
    for b in range(4):
        for t in range(6):
            expected[b, t] = mor1e_by_hand(layer, x[b, t], lambda i, j, b=b: rho[b, j, i].item(), place)
    matrix = rho if slow == "r_up" else rho.transpose(1, 2)
    every_token = matrix.unsqueeze(1).expand(4, 6, *matrix.shape[1:])
    for prior in (matrix, matrix.flatten(1), every_token, every_token.flatten(2)):
        set_routing(layer, prior=prior)
        found = layer(x) - torch.nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    set_routing(layer, prior=matrix[1])  # one for all rows
    one = layer(x)
    set_routing(layer, prior=matrix[1].flatten())
    assert torch.equal(layer(x), one)
    for wrong in (matrix.transpose(1, 2), matrix.transpose(1, 2)[0], every_token.transpose(2, 3)):
        set_routing(layer, prior=wrong)
        names = (
            r"\[\.\.\., r_up, r\] = \[\.\.\., 3, 2\]" if slow == "r_up" else r"\[\.\.\., r, r_up\] = \[\.\.\., 2, 3\]"
        )
        with pytest.raises(ValueError, match=f"prior must be .* As a matrix it is {names} with slow_index='{slow}'"):
            layer(x)
    with pytest.raises(ValueError, match="slow_index in mixing_options must be one of r_up, r, got 'up'"):
        presets.mor1e(mixing_options={"slow_index": "up"})


@pytest.mark.parametrize("name", ["mode", "mor1e"])
@pytest.mark.parametrize("r", [1, 4, 6])
def test_methods_without_an_alpha_are_not_scaled_at_any_rank(name, r):
    assert presets.preset(name, r=r).mixture_of("q_proj").scale == 1.0
    assert presets.preset(name, r=r, alpha=3 * r).mixture_of("q_proj").scale == 3.0
