"""The auxiliary losses of the sibling methods, against loops in float64, and their gradients in every setting."""

import copy
import math
import pickle

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mosld import MoSLDAdapter, MoSLDLinear, contrastive_loss, forget_routing, localized_balance_loss, presets
from tests.helpers.models import perturb, tiny_llama, token_ids

WIDE = torch.float64
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


@pytest.fixture
def keeps_hidden(monkeypatch):
    monkeypatch.setattr(MoSLDAdapter, "keep_hidden", True)


def layer(mixing="diagonal", experts=4, top_k=2, gate="top_k", **more) -> MoSLDLinear:
    made = MoSLDLinear(6, 7, r=2, alpha=3, num_experts=experts, top_k=top_k, mixing=mixing, gate=gate, **more).double()
    perturb(made)
    return made


def gates_by_loops(own: MoSLDLinear, row: torch.Tensor) -> dict[int, torch.Tensor]:
    """x [D_in] -> chosen expert -> gate"""
    logits = own.router.weight @ row
    chosen = sorted(range(len(logits)), key=lambda e: -logits[e].item())[: own.adapter.top_k]
    total = sum(logits[e].exp() for e in chosen)
    return {e: logits[e].exp() / total for e in chosen}


def localized_by_loops(own: MoSLDLinear, x: torch.Tensor, kinds, mask, delta, groups) -> torch.Tensor:
    z = []
    for b, rows in enumerate(x):
        sums = [torch.zeros((), dtype=WIDE) for _ in groups]
        for t, row in enumerate(rows):
            if mask[b][t]:
                for e, gate in gates_by_loops(own, row).items():
                    sums[e] = sums[e] + gate
        z += [s * (1 + delta if groups[e] == kinds[b] else 1 - delta) for e, s in enumerate(sums)]
    mean = sum(z) / len(z)
    return sum((v - mean) ** 2 for v in z) / (len(z) - 1) / mean**2


@pytest.mark.parametrize("gate", ["top_k", "softmax"])
def test_localized_loss_and_gradients_are_those_of_the_loops(gate):
    own = layer(gate=gate, experts=5)
    x = torch.randn(2, 5, 6, dtype=WIDE, requires_grad=True)
    kinds, groups = [1, 0], [0, 0, 1, 1, 1]
    grads = []
    for mask, given in ((torch.ones(2, 5), None), (MASK, [1, 0, 1, 0, 0])):
        for loops in (False, True):
            if loops:
                value = localized_by_loops(own, x, kinds, mask, 0.3, given or groups)
            else:
                own(x)
                value = localized_balance_loss(own, kinds, mask, delta=0.3, groups=given)
            grads.append([value, *torch.autograd.grad(value, (x, own.router.weight))])
        for ours, truth in zip(*grads[-2:], strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
            assert truth.abs().max() > 1e-3


def test_localized_loss_is_least_where_each_kind_goes_to_its_own_group():
    own = MoSLDLinear(2, 2, r=1, num_experts=4, top_k=4, gate="softmax").double()
    x = torch.eye(2, dtype=WIDE).unsqueeze(1)  # a row of either kind
    losses = []
    for pull in (-0.3, 0.0, 0.2):  # a kind's router probabilities towards its own half of the experts
        own.router.weight.data = pull * torch.tensor([[1.0, -1], [1, -1], [-1, 1], [-1, 1]], dtype=WIDE)
        own(x)
        losses.append(localized_balance_loss(own, [1, 0], delta=0.2).item())
    # With Z even the gates are as 1 / I: at a pull where e^(2 pull) = 0.8 / 1.2 the wrong way round the loss is zero.
    own.router.weight.data = math.log(1.2 / 0.8) / 2 * torch.tensor([[1.0, -1], [1, -1], [-1, 1], [-1, 1]], dtype=WIDE)
    own(x)
    assert localized_balance_loss(own, [1, 0], delta=0.2).item() == pytest.approx(0, abs=1e-12)
    assert losses[2] < losses[1] < losses[0]


def test_localized_loss_refuses_what_does_not_fit():
    own = layer()
    own(torch.randn(2, 5, 6, dtype=WIDE))
    with pytest.raises(ValueError, match=r"kinds must be one a row: .* saw \[2, 5\] tokens, got 3"):
        localized_balance_loss(own, [0, 1, 0])
    with pytest.raises(ValueError, match="kinds must be integers"):
        localized_balance_loss(own, torch.rand(2))
    with pytest.raises(ValueError, match="has 4 experts, got 2"):
        localized_balance_loss(own, [0, 1], groups=[0, 1])
    with pytest.raises(ValueError, match=r"delta must be in \[0, 1\), got 1"):
        localized_balance_loss(own, [0, 1], delta=1)


def contrast_by_loops(own: MoSLDLinear, x: torch.Tensor, mask, temperature) -> torch.Tensor:
    adapter, made = own.adapter, []
    r, experts = adapter.r, adapter.num_experts
    b = own.expert_b.weight.view(-1, experts, r)
    for rows, real in zip(x, mask, strict=True):
        for row, counts in zip(rows, real, strict=True):
            if counts:
                for e in gates_by_loops(own, row):
                    a = own.shared_a.weight if len(own.shared_a.weight) == r else own.shared_a.weight[e * r : e * r + r]
                    made.append((e, adapter.scale * b[:, e] @ (a @ row)))
    terms = []
    for i, (e, q) in enumerate(made):
        scores = [(f, (q @ p / temperature).exp()) for j, (f, p) in enumerate(made) if j != i]
        if any(f == e for f, _ in scores):
            terms.append(-torch.log(sum(s for f, s in scores if f == e) / sum(s for _, s in scores)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("mixing, gate", [("expand", "top_k"), ("diagonal", "top_k"), ("diagonal", "softmax")])
@pytest.mark.parametrize("masked", [False, True])
def test_contrastive_loss_and_gradients_are_those_of_the_loops(mixing, gate, masked, keeps_hidden):
    own, mask = layer(mixing, gate=gate).eval(), MASK if masked else torch.ones(2, 5)
    x = torch.randn(2, 5, 6, dtype=WIDE, requires_grad=True)
    trained = (x, own.shared_a.weight, own.expert_b.weight)
    own(x)
    value = contrastive_loss(own, mask if masked else None, temperature=0.5)
    truth = contrast_by_loops(own, x, mask, 0.5)
    torch.testing.assert_close(value, truth, rtol=1e-10, atol=0)
    for ours, expected in zip(torch.autograd.grad(value, trained), torch.autograd.grad(truth, trained), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
        assert expected.abs().max() > 1e-4


def test_contrastive_loss_sees_the_dropped_z(keeps_hidden):
    """It is of the forward that ran, its dropout included, which repeats under the same seed."""
    own = layer(dropout=0.5)
    x = torch.randn(2, 5, 6, dtype=WIDE)
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        own(x)
        values.append(contrastive_loss(own).item())
    assert values[0] == values[1] != values[2]


def test_a_sample_of_tokens_is_of_real_ones_and_what_the_seed_says(keeps_hidden):
    own = layer().eval()
    x = torch.randn(2, 5, 6, dtype=WIDE)
    x[0, 3:] = float("nan")  # padding
    own(x)
    values = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(contrastive_loss(own, MASK, tokens=6).item())
    assert values[0] == values[1] != values[2] and all(math.isfinite(value) for value in values)
    whole = contrastive_loss(own, MASK, tokens=100).item()
    for _ in range(4):  # as many as there are real ones, whichever the seed
        assert contrastive_loss(own, MASK, tokens=8).item() == pytest.approx(whole)
    own(torch.cat((x[0, :3], x[1])).unsqueeze(0))
    assert contrastive_loss(own).item() == pytest.approx(whole)
    assert contrastive_loss(own, tokens=8).item() == pytest.approx(whole)


@pytest.mark.parametrize("leading", [(1, 1), ()], ids=["batch", "vector"])
def test_one_token_has_no_positives(keeps_hidden, leading):
    own = layer().eval()
    x = torch.randn(*leading, 6, dtype=WIDE, requires_grad=True)
    own(x)
    value = contrastive_loss(own)
    assert value.item() == 0
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(value, (x, own.expert_b.weight)))


def test_nothing_is_kept_unless_asked_and_copies_start_without(monkeypatch):
    own = layer()
    x = torch.randn(2, 5, 6, dtype=WIDE)
    own(x)
    assert own.adapter.hidden is None
    with pytest.raises(RuntimeError, match=r"keep_hidden = True before the forward"):
        contrastive_loss(own)
    fused = own.eval()(x)
    monkeypatch.setattr(MoSLDAdapter, "keep_hidden", True)
    torch.testing.assert_close(own(x), fused, rtol=1e-12, atol=1e-12)
    assert own.adapter.hidden is not None and own.adapter.gram is not None
    for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert other.adapter.hidden is None and other.adapter.gram is None
    forget_routing(own)
    assert own.adapter.hidden is None and own.adapter.gram is None
    own(x)
    for name, value in (("temperature", 0), ("tokens", 0)):
        with pytest.raises(ValueError, match=name):
            contrastive_loss(own, **{name: value})


class Checkpointed(nn.Module):
    def __init__(self, mode: str):
        super().__init__()
        self.layers, self.mode = nn.Sequential(*(MoSLDLinear(6, 6, r=2, mixing="diagonal") for _ in range(3))), mode

    def forward(self, x):
        for own in self.layers:
            x = own(x) if self.mode == "off" else checkpoint(own, x, use_reentrant=self.mode == "reentrant")
        return x


@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant"])
def test_gradients_are_the_same_under_activation_checkpointing(mode, keeps_hidden):
    x, truth = torch.randn(2, 5, 6, dtype=WIDE), None
    for used in ("off", mode):
        torch.manual_seed(3)
        model = Checkpointed(used).double()
        perturb(model)
        torch.manual_seed(5)  # the same dropout
        for scale in (1.0, 8.0):
            own_x = x.clone().requires_grad_()
            out, recomputed = model(own_x), used == "reentrant"
            loss = 0.3 * contrastive_loss(model, MASK, recomputed=recomputed) + out.square().mean()
            loss = loss + 0.2 * localized_balance_loss(model, [0, 1], MASK, recomputed=recomputed)
            (scale * loss).backward()
        grads = [loss, own_x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
        truth = truth or grads
    for ours, expected in zip(grads, truth, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


def test_under_reentrant_checkpointing_each_weight_gets_its_gradient_once(keeps_hidden):
    """DistributedDataParallel counts on it: B's share comes through the layer, not beside it."""
    model = Checkpointed("reentrant").double()
    perturb(model)
    times = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda _, name=name: times.update({name: times.get(name, 0) + 1})
            )
    out = model(torch.randn(2, 5, 6, dtype=WIDE, requires_grad=True))
    (out.sum() + contrastive_loss(model, recomputed=True)).backward()
    assert len(times) == 9 and set(times.values()) == {1}


def test_a_forward_without_gradient_is_told(keeps_hidden):
    model = layer()
    with torch.no_grad():
        model(torch.randn(2, 5, 6, dtype=WIDE))
    with pytest.raises(RuntimeError, match="kept no gradient for the experts of"):
        contrastive_loss(model)
    with pytest.raises(RuntimeError, match="kept no gradient for the router of"):
        localized_balance_loss(model, [0, 1])
    with torch.no_grad():
        assert contrastive_loss(model).isfinite()


def adapted(**changes):
    torch.manual_seed(0)
    config = presets.moelora(r=2, num_experts=4, target_modules=["q_proj", "v_proj"], **changes)
    model = peft.get_peft_model(tiny_llama(), config)
    torch.manual_seed(4)
    perturb(model)
    return model.train()


def losses(model) -> torch.Tensor:
    return contrastive_loss(model) + localized_balance_loss(model, [0, 1, 0])


def gradients(model, forward=None) -> torch.Tensor:
    (model if forward is None else forward)(token_ids())
    losses(model).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_the_losses_are_computed_in_float32_inside_bfloat16_autocast_too(keeps_hidden):
    model = adapted(input_dropout=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        model(token_ids())
        inside = losses(model)
    assert inside.dtype == torch.float32 and torch.equal(inside, losses(model))
    inside.backward()
    rounded = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    truth = gradients(adapted(input_dropout=0.0))
    assert rounded @ truth > 0.99 * rounded.norm() * truth.norm()


@pytest.mark.slow
def test_a_compiled_model_gives_the_same(keeps_hidden):
    truth = gradients(adapted(input_dropout=0.0).double())
    model = adapted(input_dropout=0.0).double()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(gradients(model, compiled), truth, rtol=1e-9, atol=1e-12)
