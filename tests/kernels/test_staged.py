"""The three stages against plain torch in float64: values, all gradients, every site of dropout, what is saved."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mosld_kernels import keep_mask, mixing
from mosld_kernels.bits import draw_bits, unpacked, zeroed
from mosld_kernels.gating import gates_from_logits
from mosld_kernels.precision import router_dtype
from mosld_kernels.staged import UP_STREAM, Dropout, staged_linear
from tests.helpers.accuracy import assert_no_less_accurate
from tests.helpers.inputs import SHAPES, Shape, make_case
from tests.helpers.runs import SEED

SITES = {
    "nothing": Dropout(),
    "a": Dropout(down=0.3),
    "b": Dropout(up=0.3),
    "x": Dropout(x=0.3),
    "z": Dropout(z=0.3),
    "everywhere": Dropout(0.2, 0.3, 0.1, 0.4),
    "all of a": Dropout(down=1.0),
    "all of b": Dropout(up=1.0),
    "all of x": Dropout(x=1.0),
    "all of z": Dropout(z=1.0),
}
ODD = Shape(33, 17, 31, 3, 5, 2)
NAMES = ("x", "weight", "bias", "down_weight", "up_weight", "router_weight")
TRAINED = ("x", "down_weight", "up_weight", "router_weight")
RNG = 11  # torch's seed, from which the masks on x and z come


def mix_of(shape):
    """Top-K gates in front of a core for each expert: nothing about it is symmetric in tokens, experts or ranks."""
    cores = torch.randn(shape.E, shape.R, shape.R, generator=torch.Generator().manual_seed(1)).bfloat16()

    def mix(z, logits):
        gates = gates_from_logits(logits, shape.K).to(z.dtype)
        return mixing.core(z, gates, cores.to(z.dtype))

    return mix


def copies(shape):
    """The mixing without a router."""
    return lambda z, logits: torch.cat([(e + 1) * z for e in range(shape.E)], dim=-1)


def plain(x, weight, bias, down_weight, up_weight, mix, *, scale, router_weight=None, dropout=None, seed=None):
    """The formula in differentiable torch, with every mask drawn here again."""
    p, dtype = dropout or Dropout(), x.dtype
    kept = [1 - rate if rate < 1 else 1.0 for rate in (p.down, p.up, p.x, p.z)]
    logits = None
    if router_weight is not None:
        logits = F.linear(x, router_weight.to(dtype)).to(router_dtype(dtype))
    dropped = x
    if p.x:
        flat = x.reshape(-1, x.shape[-1])
        dropped = torch.where(unpacked(draw_bits(flat, p.x), flat.shape).view(x.shape), x, 0.0) / kept[2]
    if p.down:
        down_weight = torch.where(keep_mask(seed, down_weight.shape, p.down), down_weight, 0.0) / kept[0]
    if p.up:
        keep = keep_mask(seed, up_weight.shape, p.up, stream_id=UP_STREAM)
        up_weight = torch.where(keep, up_weight, 0.0) / kept[1]
    z = F.linear(dropped, down_weight.to(dtype))
    if p.z:
        z = z * F.dropout(torch.ones_like(z, dtype=router_dtype(dtype)), p.z).to(dtype)
    out = F.linear(scale * mix(z, logits), up_weight.to(dtype))
    return (out if weight is None else F.linear(x, weight, bias) + out), logits


def run(function, case, shape, dropout=SITES["nothing"], wanted=TRAINED, bias=True, base=True, routed=True):
    """-> y, logits, and the gradients of `wanted` for incoming gradients at both"""
    inputs = {name: t.clone().requires_grad_(name in wanted) for name, t in zip(NAMES, case[:6], strict=True)}
    x, weight, offset, down_weight, up_weight, router_weight = inputs.values()
    torch.manual_seed(RNG)
    y, logits = function(
        x,
        weight if base else None,
        offset if bias and base else None,
        down_weight,
        up_weight,
        mix_of(shape) if routed else copies(shape),
        scale=1.5,
        router_weight=router_weight if routed else None,
        dropout=dropout,
        seed=torch.tensor([SEED]),
    )
    outputs, incoming = [y], [case.dout.to(y.dtype)]
    if routed:
        outputs, incoming = [y, logits], [*incoming, case.dlogits.to(logits.dtype)]
    grads = torch.autograd.grad(outputs, [inputs[name] for name in wanted], incoming)
    return dict(zip(["y", "logits"], outputs, strict=False)) | {
        f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)
    }


def assert_same(ours, truth, tolerance=1e-11):
    assert ours.keys() == truth.keys()
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sites", SITES)
def test_float64_equals_the_formula(shape, sites):
    case = make_case(shape)
    assert_same(run(staged_linear, case, shape, SITES[sites]), run(plain, case, shape, SITES[sites]))


@pytest.mark.parametrize("sites", ["nothing", "everywhere"])
@pytest.mark.parametrize(
    "options",
    [{"bias": False}, {"base": False}, {"routed": False, "wanted": TRAINED[:3]}, {"wanted": NAMES}],
    ids=["no-bias", "update-alone", "no-router", "base-trained"],
)
def test_float64_equals_the_formula_with_less_and_more(options, sites):
    case = make_case(ODD)
    assert_same(run(staged_linear, case, ODD, SITES[sites], **options), run(plain, case, ODD, SITES[sites], **options))


@pytest.mark.parametrize("sites", ["nothing", "everywhere"])
@pytest.mark.parametrize("wanted", [(name,) for name in NAMES] + [("x", "router_weight"), TRAINED[1:]], ids=str)
def test_only_the_wanted_gradients_come_and_they_are_right(wanted, sites):
    case = make_case(ODD)
    for part in ("y", "logits"):
        grads = []
        for function in (staged_linear, plain):
            inputs = {name: t.clone().requires_grad_(name in wanted) for name, t in zip(NAMES, case[:6], strict=True)}
            x, weight, bias, down_weight, up_weight, router_weight = inputs.values()
            torch.manual_seed(RNG)
            y, logits = function(
                x, weight, bias, down_weight, up_weight, mix_of(ODD), scale=1.5, router_weight=router_weight,
                dropout=SITES[sites], seed=torch.tensor([SEED]),
            )  # fmt: skip
            output, incoming = (y, case.dout) if part == "y" else (logits, case.dlogits)
            if not output.requires_grad:
                grads.append({})
                continue
            output.backward(incoming)
            assert [name for name in inputs if inputs[name].grad is not None] == [
                name for name in inputs if name in wanted and (part == "y" or name in ("x", "router_weight"))
            ]
            grads.append({name: t.grad for name, t in inputs.items() if t.grad is not None})
        assert_same(*grads)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sites", ["nothing", "everywhere"])
def test_no_less_accurate_than_eager(shape, dtype, sites):
    truth, eager, ours = [], [], []
    # Several draws together: in a shape of few elements one draw's error is luck.
    for seed in range(32 if shape.D_in == 1 else 8):
        case = make_case(shape, dtype, seed)
        truth.append(run(plain, case, shape, SITES[sites]))
        eager.append(run(plain, case.to(dtype), shape, SITES[sites]))
        ours.append(run(staged_linear, case.to(dtype), shape, SITES[sites]))
    for name in truth[0]:
        joined = (torch.cat([draw[name].flatten() for draw in draws]) for draws in (ours, eager, truth))
        assert_no_less_accurate(*joined, f"{name} {dtype}")


@pytest.mark.parametrize(("model", "adapter"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("sites", ["nothing", "a", "b"])
def test_adapters_in_another_dtype_than_the_model_lose_nothing(model, adapter, sites):
    shape = Shape(64, 64, 128, 16, 8, 2)
    case = make_case(shape, torch.bfloat16)
    truth, eager = run(plain, case, shape, SITES[sites]), run(plain, case.to(model), shape, SITES[sites])
    mixed = case.to(model)._replace(
        shared_a=case.shared_a.to(adapter), expert_b=case.expert_b.to(adapter),
        router_weight=case.router_weight.to(adapter),
    )  # fmt: skip
    ours = run(staged_linear, mixed, shape, SITES[sites])
    assert ours["y"].dtype == model and ours["ddown_weight"].dtype == adapter
    assert_no_less_accurate(ours["y"], eager["y"], truth["y"], "y")
    low = run(plain, case.to(torch.bfloat16), shape, SITES[sites])
    for name in ("ddown_weight", "dup_weight", "drouter_weight"):
        assert_no_less_accurate(ours[name].bfloat16(), low[name], truth[name], name)


@pytest.mark.parametrize("backward_inside", [False, True], ids=["backward-outside", "backward-inside"])
def test_autocast_runs_in_its_dtype_and_returns_gradients_in_the_parameters(backward_inside):
    shape, sites = Shape(64, 64, 128, 16, 8, 2), SITES["everywhere"]
    case = make_case(shape, torch.bfloat16)
    truth, eager = run(plain, case, shape, sites), run(plain, case.to(torch.bfloat16), shape, sites)
    inputs = [tensor.float().requires_grad_(i in (0, 3, 4, 5)) for i, tensor in enumerate(case[:6])]
    trained = [inputs[place] for place in (0, 3, 4, 5)]
    torch.manual_seed(RNG)
    with torch.autocast("cpu", torch.bfloat16):
        y, logits = staged_linear(
            *inputs[:5], mix_of(shape), scale=1.5, router_weight=inputs[5], dropout=sites, seed=torch.tensor([SEED])
        )
        assert y.dtype == torch.bfloat16 and logits.dtype == torch.float32
        incoming = (case.dout.bfloat16(), case.dlogits.float())
        if backward_inside:
            grads = torch.autograd.grad((y, logits), trained, incoming)
    if not backward_inside:
        grads = torch.autograd.grad((y, logits), trained, incoming)
    assert_no_less_accurate(y, eager["y"], truth["y"], "y")
    for name, grad in zip(TRAINED, grads, strict=True):
        assert grad.dtype == torch.float32
        assert_no_less_accurate(grad.bfloat16(), eager[f"d{name}"], truth[f"d{name}"], name)


@pytest.mark.parametrize("shape", [Shape(5, 7, 6, 3, 4, 2), Shape(1, 4, 5, 2, 3, 1)], ids=str)
@pytest.mark.parametrize("sites", ["nothing", "everywhere"])
def test_gradcheck(shape, sites):
    inputs = [tensor.clone().requires_grad_() for tensor in make_case(shape)[:6]]

    def function(x, weight, bias, down_weight, up_weight, router_weight):
        torch.manual_seed(RNG)
        return staged_linear(
            x, weight, bias, down_weight, up_weight, mix_of(shape), scale=1.5, router_weight=router_weight,
            dropout=SITES[sites], seed=torch.tensor([SEED]),
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (2, 0), (0, 3)])
@pytest.mark.parametrize("sites", ["nothing", "everywhere"])
def test_any_leading_shape(leading, sites):
    shape = Shape(0, 6, 5, 2, 3, 2)
    case, x = make_case(shape), torch.randn(*leading, 6, dtype=torch.float64)
    results = []
    for function in (staged_linear, plain):
        torch.manual_seed(RNG)
        results.append(
            function(x, *case[1:5], mix_of(shape), scale=1.5, router_weight=case.router_weight, dropout=SITES[sites],
                     seed=torch.tensor([SEED]))
        )  # fmt: skip
    assert results[0][0].shape == (*leading, 5) and results[0][1].shape == (*leading, 3)
    torch.testing.assert_close(results[0], results[1])


def test_non_contiguous_inputs_and_gradients():
    case = make_case(ODD)
    grads = []
    for scramble in (False, True):
        inputs = []
        for i, tensor in enumerate(case[:6]):
            if scramble:
                tensor = tensor.t().contiguous().t() if tensor.dim() == 2 else tensor.repeat_interleave(2)[::2]
            inputs.append(tensor.detach().requires_grad_(i in (0, 3, 4, 5)))
        torch.manual_seed(RNG)
        y, _ = staged_linear(
            *inputs[:5], mix_of(ODD), scale=1.5, router_weight=inputs[5], dropout=SITES["everywhere"],
            seed=torch.tensor([SEED]),
        )  # fmt: skip
        y.sum().backward()  # its incoming gradient has stride 0
        grads.append([inputs[place].grad for place in (0, 3, 4, 5)])
    assert not inputs[0].is_contiguous()
    for straight, strided in zip(*grads, strict=True):
        torch.testing.assert_close(straight, strided)


def test_the_masks_are_drawn_from_torch_and_from_the_seed_and_keep_the_right_share():
    x = torch.zeros(401, 333)
    torch.manual_seed(3)
    keep = unpacked(draw_bits(x, 0.3), x.shape)
    torch.manual_seed(3)
    assert torch.equal(keep, unpacked(draw_bits(x, 0.3), x.shape))
    assert abs(keep.double().mean() - 0.7) < 0.005
    assert not torch.equal(keep, unpacked(draw_bits(x, 0.3), x.shape))
    seed, shape = torch.tensor([SEED]), (64, 96)
    a, b = keep_mask(seed, shape, 0.5), keep_mask(seed, shape, 0.5, stream_id=UP_STREAM)
    assert abs((a == b).double().mean() - 0.5) < 0.03  # A's and B's are independent


@pytest.mark.parametrize("numel", [*range(18), 63, 64, 65, 129])
def test_a_byte_holds_eight_elements_a_row_of_bytes_apart(numel):
    bits = torch.randint(0, 256, (-(-numel // 64) * 8,), dtype=torch.uint8)
    keep = unpacked(bits, torch.Size([numel]))
    assert keep.tolist() == [bool(bits[e % len(bits)] >> (e // len(bits)) & 1) for e in range(numel)]


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 1 / 3, 0.5, 0.75, 0.999, 1.0])
def test_an_element_is_kept_with_the_asked_probability_and_by_itself(p):
    x = torch.empty(999, 1001)
    keep = unpacked(draw_bits(x, p), x.shape).double()
    sigma = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(keep.mean() - (1 - p)) <= 4.5 * sigma + 2**-24
    if 0 < p < 1:  # neighbours in memory, in a byte, in a word
        flat = keep.flatten()
        for apart in (1, 8, 64, x.numel() // 8, x.numel() // 8 + 1):
            pair = torch.stack((flat[:-apart], flat[apart:]))
            assert abs(torch.corrcoef(pair)[0, 1]) < 4.5 / x.numel() ** 0.5


@pytest.mark.slow
def test_a_compiled_draw_has_random_words_of_its_own_for_every_digit():
    """And two draws are two: random calls with the same arguments may be taken for one."""
    x = torch.ones(401, 333, requires_grad=True)  # with a backward, whose graph is where they are looked for
    compiled = torch.compile(lambda x: [zeroed(x, draw_bits(x, 0.3)) for _ in range(2)], fullgraph=True)
    first, second = compiled(x)
    assert abs(first.mean() - 0.7) < 0.006 and abs((first == second).double().mean() - 0.58) < 0.006


@pytest.mark.parametrize("sites", ["a", "b", "x", "z"])
def test_the_same_randomness_gives_the_same_bits_and_other_randomness_does_not(sites):
    case, dropout = make_case(ODD).to(torch.float32), SITES[sites]
    first, second = run(staged_linear, case, ODD, dropout), run(staged_linear, case, ODD, dropout)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    torch.manual_seed(RNG + 1)
    y, _ = staged_linear(
        *case[:5], mix_of(ODD), scale=1.5, router_weight=case.router_weight, dropout=dropout, seed=torch.tensor([1])
    )
    assert not torch.equal(first["y"], y)


@pytest.mark.parametrize("wants_x", [True, False], ids=["x trained", "x frozen"])
def test_what_is_saved_is_small(wants_x):
    """x itself and not a copy, a bit an element for its dropout, and else nothing as large as a token's features."""
    shape = Shape(64, 160, 192, 4, 8, 2)
    case = make_case(shape).to(torch.float32)
    inputs = [tensor.requires_grad_(i in (3, 4, 5) or (wants_x and not i)) for i, tensor in enumerate(case[:6])]
    seed, saved = torch.tensor([SEED]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        staged_linear(
            *inputs[:5], mix_of(shape), scale=1.0, router_weight=inputs[5], dropout=SITES["everywhere"], seed=seed
        )
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    beyond = [t for t in saved if t.untyped_storage().data_ptr() not in own]
    assert sum(t.untyped_storage().data_ptr() == inputs[0].untyped_storage().data_ptr() for t in saved) >= 1
    bits = [t for t in beyond if t.dtype == torch.uint8]
    assert [t.numel() for t in bits] == [64 * 160 // 8]
    weights = {(4, 160), (192, 32)}  # A and B with their dropout
    per_token = [t for t in beyond if t.dtype != torch.uint8 and tuple(t.shape) not in weights]
    assert max(t.numel() for t in per_token) <= 64 * 8 * 4  # [T, E R]: the mixing's own


def test_an_x_without_gradient_costs_no_product_with_the_base(monkeypatch):
    """The first layer's input: backward must not multiply dy by W0 for nobody."""
    case, large = make_case(ODD), []
    inputs = [tensor.clone().requires_grad_(i in (3, 4, 5)) for i, tensor in enumerate(case[:6])]
    y, _ = staged_linear(*inputs[:5], mix_of(ODD), scale=1.5, router_weight=inputs[5])
    from mosld_kernels import stages

    monkeypatch.setattr(stages, "mm", lambda a, b, mm=stages.mm: large.append((a.shape, b.shape)) or mm(a, b))
    y.backward(case.dout)
    assert large and all(inputs[1].shape != b for _, b in large)


def test_backward_twice_gives_the_same_bits():
    case, grads = make_case(ODD).to(torch.float32), []
    inputs = [tensor.clone().requires_grad_(i in (0, 3, 4, 5)) for i, tensor in enumerate(case[:6])]
    y, _ = staged_linear(
        *inputs[:5], mix_of(ODD), scale=1.5, router_weight=inputs[5], dropout=SITES["everywhere"],
        seed=torch.tensor([SEED]),
    )  # fmt: skip
    for last in (False, True):
        grads.append(
            torch.autograd.grad(y, [inputs[i] for i in (0, 3, 4, 5)], case.dout.float(), retain_graph=not last)
        )
    for first, second in zip(*grads, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("sites", ["nothing", "everywhere"])
def test_adding_up_the_gradient_of_x_in_place_touches_nobody_elses(sites):
    """x has other consumers before and after, hooks and a kept gradient; y's incoming gradient is kept as well."""
    case, results = make_case(ODD), []
    for function in (staged_linear, plain):
        leaf = case.x.clone().requires_grad_()
        weights = [tensor.clone().requires_grad_(i in (2, 3)) for i, tensor in enumerate(case[1:5])]
        router_weight = case.router_weight.clone().requires_grad_()
        seen = []
        x = leaf * 2
        x.retain_grad()
        x.register_hook(lambda grad, seen=seen: seen.append(grad) or None)
        before = x.sin()
        torch.manual_seed(RNG)
        settings = dict(scale=1.5, router_weight=router_weight, dropout=SITES[sites], seed=torch.tensor([SEED]))
        y, logits = function(x, *weights, mix_of(ODD), **settings)
        again, _ = function(x, *weights, mix_of(ODD), **settings)
        after = x.cos()
        y.retain_grad()
        y.register_hook(lambda grad, seen=seen: seen.append(grad) or None)
        dout = case.dout.clone()
        loss = (y * dout).sum() + again.square().sum() + logits.square().sum() + (before * after).sum()
        loss.backward()
        assert torch.equal(dout, case.dout)
        results.append(
            {str(i): t for i, t in enumerate((leaf.grad, x.grad, y.grad, *seen, weights[2].grad, router_weight.grad))}
        )
    assert len(results[0]) == 7
    assert_same(*results, tolerance=1e-10)


def test_gradients_share_no_storage():
    grads = [value for name, value in run(staged_linear, make_case(ODD), ODD).items() if name[0] == "d"]
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == len(grads)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_recomputing_under_checkpointing_repeats_every_mask(use_reentrant):
    case, grads = make_case(ODD), []

    def layer(*inputs):
        seed = torch.randint(2**62, (1,))  # inside, as a layer draws it
        settings = dict(scale=1.5, router_weight=inputs[5], dropout=SITES["everywhere"], seed=seed)
        return staged_linear(*inputs[:5], mix_of(ODD), **settings)[0]

    for wrapped in (layer, lambda *inputs: checkpoint(layer, *inputs, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        inputs = [tensor.clone().requires_grad_(i in (0, 3, 4, 5)) for i, tensor in enumerate(case[:6])]
        y = wrapped(*inputs)
        torch.rand(7)  # the generator has gone on before backward
        y.backward(case.dout)
        grads.append([inputs[place].grad for place in (0, 3, 4, 5)])
    for straight, recomputed in zip(*grads, strict=True):
        assert torch.equal(straight, recomputed)


def test_fake_and_meta_tensors_have_the_right_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = [tensor.float() for tensor in make_case(ODD)[:6]]
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in inputs]
        y, logits = staged_linear(
            *fake[:5], lambda z, logits: mixing.expand(z, logits.softmax(-1)), scale=1.5, router_weight=fake[5],
            dropout=SITES["everywhere"], seed=torch.tensor([SEED]),
        )  # fmt: skip
        assert y.shape == (33, 31) and logits.shape == (33, 5) and y.dtype == torch.float32
    meta = [tensor.to("meta", torch.bfloat16).requires_grad_() for tensor in make_case(ODD)[:6]]
    y, logits = staged_linear(
        *meta[:5], lambda z, logits: mixing.expand(z, logits.softmax(-1)), scale=1.5, router_weight=meta[5],
        dropout=Dropout(x=0.1, z=0.1),
    )  # fmt: skip
    y.sum().backward()
    assert y.device.type == "meta" and y.dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert all(tensor.grad.shape == tensor.shape for tensor in meta)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
@pytest.mark.parametrize("sites", ["nothing", "everywhere"])
def test_compiles_without_a_graph_break_and_equals_eager(engine, sites):
    torch._dynamo.reset()
    # Inductor has a generator of its own unless it is told to fall back to torch's.
    torch._inductor.config.fallback_random = True
    compiled = torch.compile(staged_linear, fullgraph=True, backend=engine, dynamic=True)
    try:
        for tokens in (5, 9):
            shape = Shape(tokens, 6, 8, 3, 4, 2)
            case = make_case(shape)
            assert_same(
                run(compiled, case, shape, SITES[sites]), run(staged_linear, case, shape, SITES[sites]), tolerance=1e-10
            )
    finally:
        torch._inductor.config.fallback_random = False


def good(**changes):
    T, D_in, D_out, R, E = 3, 4, 5, 2, 3
    arguments = dict(
        x=torch.randn(T, D_in), weight=torch.randn(D_out, D_in), bias=torch.randn(D_out),
        down_weight=torch.randn(R, D_in), up_weight=torch.randn(D_out, E * R),
        mix=lambda z, logits: mixing.expand(z, logits.softmax(-1)), scale=1.0, router_weight=torch.randn(E, D_in),
        dropout=Dropout(down=0.1), seed=torch.tensor([1]),
    )  # fmt: skip
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, r"x must be a floating-point \[\.\.\., D_in\] .* got torch.int64"),
        ({"x": torch.ones(3, 0)}, r"with D_in at least 1, got torch.float32 \[3, 0\]"),
        ({"x": torch.ones(3, 6)}, r"down_weight must be \[R_in, D_in\] with D_in=6, got \[2, 4\]"),
        ({"router_weight": torch.ones(4)}, r"router_weight must be \[n, D_in\] with D_in=4, got \[4\]"),
        ({"up_weight": torch.ones(5)}, r"up_weight must be \[D_out, R_out\], got \[5\]"),
        ({"up_weight": torch.ones(5, 7)}, r"mix must return \[\.\.\., R_out\] = \[3, 7\] .* got \[3, 6\]"),
        ({"weight": torch.ones(4, 5)}, r"weight must be \[D_out, D_in\] = \[5, 4\], got \[4, 5\]"),
        ({"weight": None}, r"bias must come with weight, which is None, got \[5\]"),
        ({"bias": torch.ones(4)}, r"bias must be \[D_out\] = \[5\], got \[4\]"),
        ({"weight": torch.ones(5, 4).double()}, "weight must have x's dtype torch.float32, got torch.float64"),
        ({"bias": torch.ones(5).half()}, "bias must have x's dtype torch.float32, got torch.float16"),
        (
            {"down_weight": torch.ones(2, 4, dtype=torch.int32)},
            "down_weight must be a floating-point tensor, got torch.int32",
        ),
        ({"up_weight": torch.ones(5, 6, device="meta")}, "up_weight must be on x's device cpu, got meta"),
        ({"seed": None}, "needs a seed: an int64 tensor"),
        ({"seed": torch.tensor([1.0])}, "seed must be an int64 tensor"),
        ({"seed": torch.empty(1, dtype=torch.int64, device="meta")}, "seed must be on x's device cpu, got meta"),
    ],
)  # fmt: skip
def test_bad_input_names_the_rule_and_the_value(changes, message):
    staged_linear(**good())
    with pytest.raises(ValueError, match=message):
        staged_linear(**good(**changes))


@pytest.mark.parametrize("site", ["down", "up", "x", "z"])
def test_a_probability_outside_its_range_is_refused(site):
    with pytest.raises(ValueError, match=rf"dropout on {site} must be in \[0, 1\], got 1.5"):
        Dropout(**{site: 1.5})
