"""From logits to gates, against the definition; and the examples of what the kernels' files share."""

import doctest

import pytest
import torch

from mosld_kernels import checks, gating, packing, precision


def test_equal_logits_go_to_the_lower_index():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0], [0.0, -1.0, 0.0, 5.0]])
    chosen = gating.top_k_mask(logits, 2)
    assert chosen.tolist() == [[False, True, True, False], [True, True, False, False], [True, False, False, True]]
    many = torch.zeros(3, 64)
    assert gating.top_k_mask(many, 5).nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4] * 3


def test_gates_are_softmax_then_top_k_then_renormalised():
    logits = torch.randn(50, 7, dtype=torch.float64)
    probability = logits.softmax(1)
    kept = probability * gating.top_k_mask(logits, 3)
    gates = gating.gates_from_logits(logits, 3)
    torch.testing.assert_close(gates, kept / kept.sum(1, keepdim=True))
    assert ((gates == 0).sum(1) == 4).all()


def test_gates_survive_logits_far_apart():
    gates = gating.gates_from_logits(torch.tensor([[1e4, -1e4, 0.0], [-3e38, 3e38, 0.0]]), 2)
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
            chosen = gating.top_k_mask(logits, top_k)
            wanted = logits.masked_fill(~chosen, float("-inf")).softmax(-1)
            gates = gating.gates_from_logits(logits, top_k)
            torch.testing.assert_close(gates, wanted, rtol=0, atol=1e-15)
            assert torch.equal(gates > 0, wanted > 0)


EXAMPLES = {
    checks: ["check_mixing"],
    gating: ["gates_from_logits", "largest", "top_k_mask"],
    packing: ["by_expert", "expert_rank"],
    precision: ["router_dtype"],
}


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in EXAMPLES.items() for name in names], ids=str
)
def test_an_example_computes_what_it_says(module, name):
    example = doctest.DocTestParser().get_doctest(getattr(module, name).__doc__, {}, name, None, None)
    assert any(step.want for step in example.examples)
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0
