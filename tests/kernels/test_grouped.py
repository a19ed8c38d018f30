"""Tokens sorted by expert give what the dense product gives: values and all gradients, wherever either is taken."""

import pytest
import torch

from mosld_kernels import gating, grouped, mosld_linear, reference
from tests.helpers.inputs import SHAPES, Shape, make_case
from tests.helpers.runs import SEED, assert_accurate, run

WIDE = Shape(1000, 24, 72, 8, 64, 2)  # sorted by its own sizes
SOME = [shape for shape in SHAPES if shape.T]


@pytest.fixture
def always(monkeypatch):
    """Sorted whatever the sizes, in many slices of features, the last one narrower."""
    monkeypatch.setattr(grouped, "faster_than_dense", lambda *sizes: True)
    monkeypatch.setattr(grouped, "SLICE_BYTES", 0)
    monkeypatch.setattr(grouped, "LEAST_SLICE", 7)


@pytest.mark.parametrize("shape", SOME, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_float64_equals_the_reference(always, shape, p):
    case = make_case(shape)
    for bias in (True, False):
        ours, truth = run(mosld_linear, case, shape, p, bias), run(reference.mosld_linear, case, shape, p, bias)
        for name, value in truth.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shape", SOME, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_less_accurate_than_eager(always, shape, dtype):
    assert_accurate(
        shape, dtype, draws=32
    )  # sums of a different order: where few numbers come out, luck needs many draws


@pytest.mark.parametrize("rows", [1, 3, 32])
def test_every_pair_has_a_row_in_a_block_of_its_expert(monkeypatch, rows):
    monkeypatch.setattr(grouped, "ROWS", rows)
    logits = torch.randn(50, 6)
    logits[:, 4] = -100.0  # an expert that nobody chose
    logits[:, 1] += 3  # and one that most did
    gates = gating.gates_from_logits(logits, 2)
    p = grouped.plan(gates, 2)
    assert len(p.token) == len(p.expert) * rows and len(p.expert) == -(-50 * 2 // rows) + 6
    assert len(p.place.unique()) == 100  # no two pairs share a row
    for t in range(50):
        for k in range(2):
            place, expert = p.place[t, k], p.chosen[t, k]
            assert p.token[place] == t and p.expert[place // rows] == expert and p.gates[t, k] == gates[t, expert] > 0


def test_wide_mixtures_are_sorted_in_all_three_places_and_narrow_ones_are_not(monkeypatch):
    plans = []
    plan = grouped.plan
    monkeypatch.setattr(grouped, "plan", lambda *args: plans.append(1) or plan(*args))
    case = make_case(WIDE)
    ours, truth = run(mosld_linear, case, WIDE), run(reference.mosld_linear, case, WIDE)
    assert len(plans) == 3  # mix in forward, dB, and the gradients of hidden and gates
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    plans.clear()
    for other in (WIDE._replace(E=8), WIDE._replace(mixing="diagonal")):  # an A for each expert: not built
        run(mosld_linear, make_case(other), other)
        assert not plans


def test_nothing_is_sorted_elsewhere_than_on_a_cpu_nor_without_tokens():
    hidden = torch.empty(4096, 8, device="meta")
    assert not grouped.faster_than_dense(hidden, 64, 2) and grouped.faster_than_dense(torch.empty(4096, 8), 64, 2)
    assert not grouped.faster_than_dense(torch.empty(0, 8), 64, 2) and not grouped.faster_than_dense(
        torch.empty(1, 8), 64, 2
    )


def test_another_default_device_changes_nothing():
    case = make_case(WIDE, torch.float32).to(torch.float32)
    expected = run(mosld_linear, case, WIDE)
    with torch.device("meta"):
        ours = run(mosld_linear, case, WIDE)
    for name, value in expected.items():  # gradients, too: backward gathers and adds up on its own
        assert torch.equal(ours[name], value), name


def test_a_matrix_unit_makes_dense_bfloat16_cheaper(monkeypatch):
    hidden = torch.empty(4096, 8, dtype=torch.bfloat16)
    for unit in (True, False):
        monkeypatch.setattr(grouped, "_has_matrix_unit", lambda unit=unit: unit)
        assert grouped.faster_than_dense(hidden, 64, 2) == (not unit)
        assert grouped.faster_than_dense(hidden.float(), 64, 2)


def test_what_is_saved_is_small_and_the_bits_repeat():
    case = make_case(WIDE, torch.float32).to(torch.float32)
    first, second = run(mosld_linear, case, WIDE), run(mosld_linear, case, WIDE)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    inputs = [tensor.requires_grad_(i in (0, 3, 4, 5)) for i, tensor in enumerate(case[:6])]
    seed, known, extra = torch.tensor([SEED]), {tensor.data_ptr() for tensor in inputs}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: extra.append(t) or t, lambda t: t):
        mosld_linear(*inputs, top_k=2, scale=1.0, dropout_p=0.1, seed=seed)
    beyond = sorted(tuple(t.shape) for t in extra if t.data_ptr() not in known)
    assert beyond == [(1,), (1000, 8), (1000, 64)]


def test_a_token_that_is_not_a_number_stays_alone(always):
    shape = Shape(40, 24, 30, 4, 6, 2)
    case = make_case(shape).to(torch.float32)
    spoiled = case.x.clone()
    spoiled[0] = float("nan")  # the token that padding names
    y, _ = mosld_linear(spoiled, *case[1:6], top_k=2, scale=2.0)
    clean, _ = mosld_linear(*case[:6], top_k=2, scale=2.0)
    assert y[0].isnan().all()
    torch.testing.assert_close(y[1:], clean[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_with_experts_of_zeros_it_is_the_frozen_layer_bit_for_bit(always, dtype):
    shape = Shape(33, 24, 30, 4, 6, 2)
    case = make_case(shape).to(dtype)
    y, _ = mosld_linear(*case[:4], torch.zeros_like(case.expert_b), case.router_weight, top_k=2, scale=2.0)
    assert torch.equal(y, torch.nn.functional.linear(case.x, case.weight, case.bias))
