"""The block mixture's operator against loops over tokens and experts in float64, and its closed-form backward."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mosld_kernels.bits import draw_bits, unpacked
from mosld_kernels.block import Inputs, Settings, block_mixture, down, drop_down_a, up
from tests.helpers.accuracy import assert_no_less_accurate

WIDE = torch.float64
SIZES = [
    (9, 6, 10, 2, 4, 2),
    (5, 7, 3, 3, 3, 3),
    (1, 4, 5, 1, 2, 1),
    (0, 4, 5, 2, 3, 2),
    (33, 17, 40, 4, 5, 2),
]  # T D F R E K


def draw(sizes, to_one=True, seed=0) -> tuple[Inputs, Tensor, Tensor]:
    """-> inputs, and gradients that arrive for both outputs"""
    T, _, f, r, e, k = sizes
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=WIDE)

    chosen = torch.stack([torch.randperm(e, generator=random)[:k] for _ in range(T)]) if T else torch.zeros(0, k).long()
    weights = normal(T, k).softmax(-1) if to_one else normal(T, k).sigmoid()
    inputs = Inputs(
        normal(T, f), normal(T, f), normal(T, e * r), normal(T, e * r), normal(f, e * r), normal(f, e * r),
        normal(e * r, f), weights, chosen,
    )  # fmt: skip
    return inputs, normal(T, f), normal(T, e * r)


def by_loops(inputs: Inputs, settings: Settings, keeps: list[Tensor]) -> tuple[Tensor, Tensor]:
    r = settings.rank
    hidden, mixed = [], []
    for t in range(len(inputs.gate)):
        total, parts = 0.0, [torch.zeros(r, dtype=inputs.gate.dtype)] * (inputs.z_gate.shape[1] // r)
        for k, e in enumerate(inputs.chosen[t].tolist()):
            own = slice(e * r, e * r + r)
            g = inputs.gate[t] + settings.scale * inputs.gate_b[:, own] @ inputs.z_gate[t, own]
            u = inputs.up[t] + settings.scale * inputs.up_b[:, own] @ inputs.z_up[t, own]
            h = settings.act(g) * u
            total = total + inputs.weights[t, k] * h
            if keeps:
                h = keeps[k][t] * h / (1 - settings.dropout_p)
            parts[e] = settings.scale * inputs.weights[t, k] * (inputs.down_a[own] @ h)
        hidden.append(total)
        mixed.append(torch.cat(parts))
    if not hidden:
        return 0 * inputs.gate, 0 * inputs.z_gate
    return torch.stack(hidden), torch.stack(mixed)


def run(function, inputs: Inputs, dhidden: Tensor, dmixed: Tensor, settings, *more) -> dict[str, Tensor]:
    """Outputs and gradients; that of the gates through the softmax or sigmoid that made them, as gates come."""
    to_one = settings.sums_to_one
    logits = (inputs.weights.log() if to_one else inputs.weights.logit()).requires_grad_()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs[:7]]
    weights = logits.softmax(-1) if to_one else logits.sigmoid()
    hidden, mixed = function(Inputs(*leaves, weights, inputs.chosen), settings, *more)
    grads = torch.autograd.grad((hidden, mixed), (*leaves, logits), (dhidden, dmixed), allow_unused=True)
    named = zip((*Inputs._fields[:7], "logits"), grads, strict=True)
    return {"hidden": hidden, "mixed": mixed, **{f"d{n}": torch.zeros(()) if g is None else g for n, g in named}}


def compare(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    for name, tensor in truth.items():
        if tensor.dim():
            torch.testing.assert_close(
                ours[name], tensor, rtol=1e-10, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("to_one", [True, False])
def test_values_and_gradients_are_those_of_the_loops(sizes, to_one):
    case, settings = draw(sizes, to_one), Settings(F.silu, sizes[3], 1.7, to_one)
    compare(run(block_mixture, *case, settings), run(by_loops, *case, settings, []))


def test_any_activation_serves_and_dropped_elements_are_those_of_the_mask():
    sizes, p = SIZES[0], 0.4
    case, settings = draw(sizes), Settings(lambda g: F.gelu(g, approximate="tanh"), sizes[3], 0.5, True, p)
    torch.manual_seed(3)
    ours = run(block_mixture, *case, settings)
    torch.manual_seed(3)
    keeps = [unpacked(draw_bits(case[0].gate, p), case[0].gate.shape) for _ in range(2)]  # a mask for each slot
    assert 0.4 < torch.stack(keeps).float().mean() < 0.8
    compare(ours, run(by_loops, *case, settings, keeps))


def test_all_dropped_leaves_the_base_layer_and_no_nan():
    case, settings = draw(SIZES[0]), Settings(F.silu, 2, 1.0, True, 1.0)
    ours = run(block_mixture, *case, settings)
    assert (
        (ours["mixed"] == 0).all() and (ours["ddown_a"] == 0).all() and all(t.isfinite().all() for t in ours.values())
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile looks at it
@pytest.mark.parametrize("to_one", [True, False])
def test_compiled_is_the_same(to_one):
    case, settings = draw(SIZES[4], to_one), Settings(F.silu, 4, 1.3, to_one)
    compiled = torch.compile(lambda inputs, own: block_mixture(inputs, own), fullgraph=True, backend="aot_eager")
    compare(run(compiled, *case, settings), run(block_mixture, *case, settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_less_accurate_than_the_formula_in_the_same_dtype(dtype):
    sizes, settings = (64, 24, 96, 4, 4, 2), Settings(F.silu, 4, 2.0)
    wide = [tensor.to(dtype).to(WIDE) if tensor.is_floating_point() else tensor for tensor in draw(sizes)[0]]
    _, dhidden, dmixed = draw(sizes)
    case = Inputs(*wide), dhidden.to(dtype).to(WIDE), dmixed.to(dtype).to(WIDE)
    narrow = Inputs(*(t.to(dtype) if t.is_floating_point() else t for t in wide)), case[1].to(dtype), case[2].to(dtype)

    def formula(inputs, own):
        one_hot = F.one_hot(inputs.chosen, 4).repeat_interleave(4, -1).to(inputs.gate.dtype)  # [T, K, E R]
        g = inputs.gate.unsqueeze(1) + own.scale * (one_hot * inputs.z_gate.unsqueeze(1)) @ inputs.gate_b.T
        u = inputs.up.unsqueeze(1) + own.scale * (one_hot * inputs.z_up.unsqueeze(1)) @ inputs.up_b.T
        weighted = inputs.weights.unsqueeze(-1) * (own.act(g) * u)
        return weighted.sum(1), own.scale * (one_hot * (weighted @ inputs.down_a.T)).sum(1)

    truth, eager, ours = (
        run(formula, *case, settings),
        run(formula, *narrow, settings),
        run(block_mixture, *narrow, settings),
    )
    for name, tensor in truth.items():
        assert_no_less_accurate(ours[name], eager[name], tensor, name)


def test_equal_experts_are_the_frozen_block_to_the_last_bit():
    for dtype in (torch.float32, torch.bfloat16):
        inputs = Inputs(*(t.to(dtype) if t.is_floating_point() else t for t in draw((64, 8, 40, 2, 5, 3))[0]))
        inputs = inputs._replace(gate_b=torch.zeros_like(inputs.gate_b), up_b=torch.zeros_like(inputs.up_b))
        hidden, _ = block_mixture(inputs, Settings(F.silu, 2, 2.0))
        assert torch.equal(hidden, F.silu(inputs.gate) * inputs.up)


def test_of_the_size_of_the_block_backward_keeps_two_tensors_and_a_bit_an_element():
    T, f, k = 64, 256, 4
    saved: dict[int, int] = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    inputs = draw((T, 8, f, 2, 4, k))[0]
    leaves = [tensor.requires_grad_() for tensor in inputs[:8]]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block_mixture(Inputs(*leaves, inputs.chosen), Settings(F.silu, 2, 1.0, True, 0.1))
    assert sum(size >= T * f * 8 for size in saved.values()) == 2
    weights = sum(leaf.numel() * 8 for leaf in leaves[4:7])
    small = 2 * T * 8 * 8 + 2 * T * k * 8
    assert sum(saved.values()) == 2 * T * f * 8 + weights + small + k * T * f // 8


def test_down_and_up_are_their_formulas():
    random = [
        torch.randn(*shape, dtype=WIDE, requires_grad=True)
        for shape in ((5, 6), (4, 6), (4, 6), (2, 6), (7, 4), (5, 7))
    ]
    x, gate_a, up_a, router, down_b, out = random
    for ours, truth in (
        (down(x, gate_a, up_a, router, 0.0, 0.0, None), (x @ gate_a.T, x @ up_a.T, x @ router.T)),
        ((up(out, x @ gate_a.T, down_b),), (out + x @ gate_a.T @ down_b.T,)),
    ):
        sums = [sum((tensor * (i + 1)).square().sum() for i, tensor in enumerate(made)) for made in (ours, truth)]
        for a, b in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, b)
        grads = [torch.autograd.grad(own, random, allow_unused=True) for own in sums]
        for a, b in zip(*grads, strict=True):
            assert (a is None) == (b is None)
            torch.testing.assert_close(a, b)


def test_dropout_falls_on_the_a_s_by_the_seed_and_on_x_once_for_all():
    x, gate_a, up_a, router = (torch.randn(*shape, dtype=WIDE) for shape in ((50, 6), (4, 6), (4, 6), (2, 6)))
    seed = torch.tensor([7])
    first, again = (down(x, gate_a, up_a, router, 0.5, 0.0, seed) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    eye = torch.eye(6, dtype=WIDE)
    dropped_gate, dropped_up, _ = down(eye, gate_a, up_a, router, 0.5, 0.0, seed)
    for dropped, whole in ((dropped_gate.T, gate_a), (dropped_up.T, up_a), (drop_down_a(gate_a, 0.5, seed), gate_a)):
        assert (
            ((dropped == 0) | torch.isclose(dropped, 2 * whole)).all() and (dropped == 0).any() and (dropped != 0).any()
        )
    assert ((dropped_gate == 0) != (dropped_up == 0)).any()
    assert ((dropped_gate.T == 0) != (drop_down_a(gate_a, 0.5, seed) == 0)).any()
    torch.manual_seed(0)
    z_gate, z_up, logits = down(x, torch.eye(6, dtype=WIDE), torch.eye(6, dtype=WIDE), router, 0.0, 0.3, None)
    torch.testing.assert_close(logits, x @ router.T)
    assert torch.equal(z_gate, z_up) and 0.2 < (z_gate == 0).double().mean() < 0.4
    torch.testing.assert_close(z_gate[z_gate != 0], x[z_gate != 0] / 0.7)
