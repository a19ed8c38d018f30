"""The reference itself, against loops over tokens and experts."""

import pytest
import torch

from mosld_kernels import keep_mask, reference
from tests.helpers.inputs import DIAGONAL_SHAPES, SHAPES, make_case


def by_loops(case, shape, scale, p, seed):
    """MoSLD's Eq. 1 to 3 for one token and one expert at a time: softmax over all, top-k, renormalise."""
    a = case.shared_a * keep_mask(seed, (shape.rows, shape.D_in), p) / (1 - p)
    out = torch.zeros(shape.T, shape.D_out, dtype=torch.float64)
    for t in range(shape.T):
        x = case.x[t]
        probability = (case.router_weight @ x).softmax(0)
        chosen = sorted(range(shape.E), key=lambda e: (-probability[e].item(), e))[: shape.K]
        total = sum(probability[e] for e in chosen)
        out[t] = case.weight @ x + case.bias
        for e in chosen:
            expert = case.expert_b[:, e * shape.R : (e + 1) * shape.R]
            first = e * shape.R if shape.mixing == "diagonal" else 0
            hidden = torch.stack([sum(a[first + r] * x) for r in range(shape.R)])
            out[t] += scale * probability[e] / total * (expert @ hidden)
    return out


@pytest.mark.parametrize("shape", [s for s in SHAPES + DIAGONAL_SHAPES if s.T <= 66], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_reference_equals_loops_over_tokens_and_experts(shape, p):
    case = make_case(shape)
    seed = torch.tensor([11])
    settings = dict(top_k=shape.K, scale=1.7, dropout_p=p, seed=seed, mixing=shape.mixing)
    out, logits = reference.mosld_linear(*case[:6], **settings)
    torch.testing.assert_close(out, by_loops(case, shape, 1.7, p, seed), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits, case.x @ case.router_weight.t(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [SHAPES[0], DIAGONAL_SHAPES[0]], ids=str)
def test_delta_is_the_difference_to_the_frozen_layer(shape):
    case = make_case(shape)
    settings = dict(top_k=shape.K, scale=0.5, dropout_p=0.2, seed=torch.tensor([4]), mixing=shape.mixing)
    out, logits = reference.mosld_linear(*case[:6], **settings)
    delta, delta_logits = reference.mosld_delta(case.x, *case[3:6], **settings)
    torch.testing.assert_close(out - torch.nn.functional.linear(case.x, case.weight, case.bias), delta)
    assert torch.equal(logits, delta_logits)


@pytest.mark.parametrize("function", [reference.mosld_linear, reference.mosld_delta])
def test_an_unknown_mixing_is_refused(function):
    case = make_case(SHAPES[0])
    inputs = case[:6] if function is reference.mosld_linear else (case.x, *case[3:6])
    with pytest.raises(ValueError, match="mixing must be one of expand, diagonal, got 'sum'"):
        function(*inputs, top_k=2, scale=1.0, mixing="sum")


def test_equal_logits_go_to_the_lower_index():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0], [0.0, -1.0, 0.0, 5.0]])
    chosen = reference.top_k_mask(logits, 2)
    assert chosen.tolist() == [[False, True, True, False], [True, True, False, False], [True, False, False, True]]
    many = torch.zeros(3, 64)
    assert reference.top_k_mask(many, 5).nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4] * 3


def test_gates_are_softmax_then_top_k_then_renormalised():
    logits = torch.randn(50, 7, dtype=torch.float64)
    probability = logits.softmax(1)
    kept = probability * reference.top_k_mask(logits, 3)
    gates = reference.gates_from_logits(logits, 3)
    torch.testing.assert_close(gates, kept / kept.sum(1, keepdim=True))
    assert ((gates == 0).sum(1) == 4).all()


def test_gates_survive_logits_far_apart():
    gates = reference.gates_from_logits(torch.tensor([[1e4, -1e4, 0.0], [-3e38, 3e38, 0.0]]), 2)
    assert torch.equal(gates, torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))


@pytest.mark.parametrize("experts", [1, 2, 5, 9])
@pytest.mark.parametrize("tokens", [3, 3000])  # few and many are sorted differently
def test_gates_are_the_softmax_over_the_chosen(experts, tokens):
    """Against the definition, for every K: ties (integers), infinities that leave fewer than K finite logits."""
    torch.manual_seed(experts)
    tied = torch.randint(-2, 3, (tokens, experts)).double()
    scarce = torch.randn(tokens, experts).double()
    scarce[:, 1:][torch.rand(tokens, experts - 1) < 0.6] = float("-inf")
    for logits in (tied, scarce):
        for top_k in range(1, experts + 1):
            chosen = reference.top_k_mask(logits, top_k)
            wanted = logits.masked_fill(~chosen, float("-inf")).softmax(-1)
            gates = reference.gates_from_logits(logits, top_k)
            torch.testing.assert_close(gates, wanted, rtol=0, atol=1e-15)
            assert torch.equal(gates > 0, wanted > 0)
