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
