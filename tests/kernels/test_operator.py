"""The operator against the reference in float64: values and all gradients, every dtype, awkward shapes, bad input."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mosld_kernels
from mosld_kernels import checks, mosld_delta, mosld_linear, reference
from mosld_kernels.eager import FEW_TOKENS
from tests.helpers.accuracy import assert_no_less_accurate
from tests.helpers.inputs import DIAGONAL_SHAPES, SHAPES, Shape, make_case
from tests.helpers.runs import NAMES, PLACES, SEED, assert_accurate, run


@pytest.fixture(params=checks.MIXINGS)
def mixing(request):
    return request.param


def settings(shape, p=0.2):
    return dict(top_k=shape.K, scale=2.0, dropout_p=p, seed=torch.tensor([SEED]), mixing=shape.mixing)


@pytest.mark.parametrize("shape", SHAPES + DIAGONAL_SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("p", [0.0, 0.2, 1.0])
def test_float64_equals_the_reference(shape, bias, p):
    case = make_case(shape)
    ours, truth = run(mosld_linear, case, shape, p, bias), run(reference.mosld_linear, case, shape, p, bias)
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_more_tokens_than_few_take_another_product_to_the_same_gradient(mixing):
    shape = Shape(FEW_TOKENS + 1, 6, 5, 2, 3, 2, mixing)
    case = make_case(shape)
    ours, truth = run(mosld_linear, case, shape), run(reference.mosld_linear, case, shape)
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shape", SHAPES + DIAGONAL_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_no_less_accurate_than_eager(shape, dtype, p):
    assert_accurate(shape, dtype, p=p, draws=8)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(5, 7, 6, 3, 4, 2),
        Shape(1, 4, 5, 2, 3, 1),
        Shape(6, 3, 4, 1, 1, 1),
        Shape(4, 5, 3, 2, 3, 3),
        Shape(5, 7, 6, 3, 4, 2, "diagonal"),
        Shape(1, 4, 5, 2, 3, 1, "diagonal"),
        Shape(4, 5, 3, 2, 3, 3, "diagonal"),
    ],
    ids=str,
)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(shape, p):
    case = make_case(shape)
    inputs = [tensor.clone().requires_grad_() for tensor in case[:6]]  # weight and bias too
    assert torch.autograd.gradcheck(lambda *tensors: mosld_linear(*tensors, **settings(shape, p)), inputs)
    adapters = [inputs[place] for place in PLACES]
    assert torch.autograd.gradcheck(lambda *tensors: mosld_delta(*tensors, **settings(shape, p)), adapters)


def test_each_output_alone_carries_its_gradients(mixing):
    shape = SHAPES[0]._replace(mixing=mixing)
    case = make_case(shape)
    for output in (0, 1):
        grads = []
        for function in (mosld_linear, reference.mosld_linear):
            inputs = [tensor.clone().requires_grad_(i in PLACES) for i, tensor in enumerate(case[:6])]
            function(*inputs, **settings(shape))[output].square().sum().backward()
            grads.append([inputs[place].grad for place in PLACES])
        for ours, truth in zip(*grads, strict=True):
            torch.testing.assert_close(torch.zeros_like(ours) if truth is None else truth, ours, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (2, 0)])
def test_any_leading_shape(leading, mixing):
    shape = Shape(0, 6, 5, 2, 3, 2, mixing)
    case = make_case(shape)
    x = torch.randn(*leading, 6, dtype=torch.float64)
    y, logits = mosld_linear(x, *case[1:6], **settings(shape))
    truth, truth_logits = reference.mosld_linear(x, *case[1:6], **settings(shape))
    assert y.shape == (*leading, 5) and logits.shape == (*leading, 3)
    torch.testing.assert_close(y, truth)
    torch.testing.assert_close(logits, truth_logits)


def test_non_contiguous_inputs_and_gradients(mixing):
    shape = Shape(12, 10, 14, 3, 4, 2, mixing)
    case = make_case(shape)
    scrambled = [t.t().contiguous().t() if t.dim() == 2 else t.repeat_interleave(2)[::2] for t in case[:6]]
    assert not scrambled[0].is_contiguous()
    grads = []
    for inputs in (case[:6], scrambled):
        inputs = [tensor.detach().requires_grad_(i in PLACES) for i, tensor in enumerate(inputs)]
        mosld_linear(*inputs, **settings(shape))[0].sum().backward()  # its incoming gradient has stride 0
        grads.append([inputs[place].grad for place in PLACES])
    for plain, strided in zip(*grads, strict=True):
        torch.testing.assert_close(plain, strided)


@pytest.mark.parametrize("wanted", [(0,), (3,), (4,), (5,), (3, 4, 5), (1,), (2,), (0, 1, 2, 3, 4, 5)], ids=str)
def test_only_the_wanted_gradients_come_and_they_are_right(wanted, mixing):
    shape = Shape(9, 6, 7, 3, 4, 2, mixing)
    case = make_case(shape)
    grads = []
    for function in (mosld_linear, reference.mosld_linear):
        inputs = [tensor.clone().requires_grad_(i in wanted) for i, tensor in enumerate(case[:6])]
        function(*inputs, **settings(shape))[0].backward(case.dout)
        assert [tensor.grad is not None for tensor in inputs] == [i in wanted for i in range(6)]
        grads.append([inputs[i].grad for i in wanted])
    for ours, truth in zip(*grads, strict=True):
        torch.testing.assert_close(ours, truth)


def test_gradients_share_no_storage(mixing):
    """Nor does one keep more memory alive than its own."""
    shape = SHAPES[0]._replace(mixing=mixing)
    grads = [value for name, value in run(mosld_linear, make_case(shape), shape, p=0.0).items() if name[0] == "d"]
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == len(grads)
    assert [grad.untyped_storage().nbytes() for grad in grads] == [grad.nbytes for grad in grads]


def test_what_is_saved_is_small(mixing):
    """Beyond the inputs: hidden [T, R or E * R], gates [T, E]; nothing of size [T, D_out], no mask."""
    shape = Shape(64, 32, 48, 4, 8, 2, mixing)
    inputs = [tensor.requires_grad_(i in PLACES) for i, tensor in enumerate(make_case(shape).to(torch.float32)[:6])]
    seed = torch.tensor([SEED])
    known = {tensor.data_ptr() for tensor in (*inputs, seed)}
    extra = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: extra.append(t) or t, lambda t: t):
        mosld_linear(*inputs, top_k=2, scale=1.0, dropout_p=0.1, seed=seed, mixing=mixing)
    beyond = sorted(tuple(t.shape) for t in extra if t.data_ptr() not in known)
    assert beyond == sorted([(64, shape.rows), (64, 8)])


def test_same_seed_gives_the_same_bits_and_another_seed_does_not(mixing):
    shape = SHAPES[0]._replace(mixing=mixing)
    case = make_case(shape).to(torch.float32)
    first, second = run(mosld_linear, case, shape), run(mosld_linear, case, shape)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    other = mosld_linear(*case[:6], top_k=2, scale=2.0, dropout_p=0.2, seed=torch.tensor([1]), mixing=mixing)[0]
    assert not torch.equal(first["y"], other)


def test_without_dropout_the_seed_is_not_looked_at(mixing):
    shape = SHAPES[0]._replace(mixing=mixing)
    case = make_case(shape)
    with_seed = mosld_linear(*case[:6], top_k=2, scale=2.0, dropout_p=0.0, seed=torch.tensor([1]), mixing=mixing)[0]
    assert torch.equal(with_seed, mosld_linear(*case[:6], top_k=2, scale=2.0, mixing=mixing)[0])


def test_dropped_elements_of_a_get_no_gradient(mixing):
    shape = SHAPES[0]._replace(mixing=mixing)
    keep = mosld_kernels.keep_mask(torch.tensor([SEED]), (shape.rows, shape.D_in), 0.2)
    grad = run(mosld_linear, make_case(shape), shape)["dshared_a"]
    assert (grad[~keep] == 0).all() and (grad[keep] != 0).all()


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_recomputing_under_checkpointing_repeats_the_mask(use_reentrant, mixing):
    shape = SHAPES[0]._replace(mixing=mixing)
    case = make_case(shape)

    def layer(*inputs):
        seed = torch.randint(2**62, (1,))  # inside, as a layer draws it
        return mosld_linear(*inputs, top_k=2, scale=2.0, dropout_p=0.5, seed=seed, mixing=mixing)[0]

    grads = []
    for wrapped in (layer, lambda *inputs: checkpoint(layer, *inputs, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        inputs = [tensor.clone().requires_grad_(i in PLACES) for i, tensor in enumerate(case[:6])]
        wrapped(*inputs).backward(case.dout)
        grads.append([inputs[place].grad for place in PLACES])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("backward_inside", [False, True], ids=["backward-outside", "backward-inside"])
def test_autocast_runs_in_its_dtype_and_returns_gradients_in_the_parameters(backward_inside, mixing):
    shape = SHAPES[0]._replace(mixing=mixing)
    case = make_case(shape, torch.bfloat16)
    truth = run(reference.mosld_linear, case, shape)
    eager = run(reference.mosld_linear, case.to(torch.bfloat16), shape)
    inputs = [tensor.float().requires_grad_(i in PLACES) for i, tensor in enumerate(case[:6])]
    trained = [inputs[place] for place in PLACES]
    with torch.autocast("cpu", torch.bfloat16):
        y, logits = mosld_linear(*inputs, **settings(shape))
        assert y.dtype == torch.bfloat16 and logits.dtype == torch.float32
        assert y.dtype == F.linear(inputs[0], inputs[1]).dtype
        incoming = (case.dout.bfloat16(), case.dlogits.float())
        if backward_inside:
            grads = torch.autograd.grad((y, logits), trained, incoming)
    if not backward_inside:
        grads = torch.autograd.grad((y, logits), trained, incoming)
    for name, grad in zip(NAMES, grads, strict=True):
        assert grad.dtype == torch.float32
        assert_no_less_accurate(grad.bfloat16(), eager[f"d{name}"], truth[f"d{name}"], name)
    assert_no_less_accurate(y, eager["y"], truth["y"], "y")


@pytest.mark.parametrize(("model", "adapter"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_adapters_in_another_dtype_than_the_model(model, adapter, mixing):
    """PEFT keeps adapters of a bfloat16 model in float32."""
    shape = SHAPES[0]._replace(mixing=mixing)
    case = make_case(shape, torch.bfloat16)
    truth, eager = run(reference.mosld_linear, case, shape), run(reference.mosld_linear, case.to(model), shape)
    inputs = [t.to(adapter if i >= 3 else model).requires_grad_(i in PLACES) for i, t in enumerate(case[:6])]
    y, logits = mosld_linear(*inputs, **settings(shape))
    assert y.dtype == model and logits.dtype == torch.float32
    assert_no_less_accurate(y, eager["y"], truth["y"], "y")
    torch.autograd.backward((y, logits), (case.dout.to(model), case.dlogits.float()))
    for place, name in zip(PLACES, NAMES, strict=True):
        grad = inputs[place].grad
        assert grad.dtype == inputs[place].dtype
        coarse = torch.bfloat16 if torch.bfloat16 in (model, adapter) and name != "x" else model
        reference_grad = run(reference.mosld_linear, case.to(coarse), shape)[f"d{name}"]
        assert_no_less_accurate(grad.to(coarse), reference_grad, truth[f"d{name}"], name)


def test_tokens_do_not_see_each_other(mixing):
    """Batch mates and later tokens change nothing: each row equals the row computed alone."""
    shape = Shape(33, 24, 20, 4, 6, 2, mixing)
    case = make_case(shape)
    y, logits = mosld_linear(*case[:6], **settings(shape))
    for t in range(shape.T):
        alone, alone_logits = mosld_linear(case.x[t], *case[1:6], **settings(shape))
        torch.testing.assert_close(alone, y[t], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(alone_logits, logits[t], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_token_stays_alone(value, mixing):
    shape = Shape(6, 5, 4, 2, 3, 2, mixing)
    case = make_case(shape)
    clean = mosld_linear(*case[:6], **settings(shape))[0]
    case.x[2, 1] = value
    y = mosld_linear(*case[:6], **settings(shape))[0]
    others = [0, 1, 3, 4, 5]
    assert not y[2].isfinite().all() and torch.equal(y[others], clean[others])


# torch 2.14's own check looks at the gradients of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("base", [True, False], ids=["linear", "delta"])
def test_opcheck(p, base, mixing):
    shape = Shape(7, 6, 5, 3, 4, 2, mixing)
    inputs = [tensor.float().requires_grad_(i in PLACES) for i, tensor in enumerate(make_case(shape)[:6])]
    if not base:
        inputs[1] = inputs[2] = None
    torch.library.opcheck(torch.ops.mosld.linear.default, (*inputs, torch.tensor([SEED]), 2, 1.5, p, "eager", mixing))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break_and_gives_the_same_bits(engine, mixing):
    torch._dynamo.reset()
    compiled = torch.compile(mosld_linear, fullgraph=True, backend=engine, dynamic=True)
    for tokens in (5, 9):
        shape = Shape(tokens, 6, 8, 3, 4, 2, mixing)
        case = make_case(shape).to(torch.float32)
        ours, plain = run(compiled, case, shape), run(mosld_linear, case, shape)
        for name in plain:
            assert torch.equal(ours[name], plain[name]), name


def test_with_one_expert_both_mixings_are_the_same():
    shape = Shape(40, 24, 30, 6, 1, 1)
    case = make_case(shape).to(torch.float32)
    shared, own = run(mosld_linear, case, shape), run(mosld_linear, case, shape._replace(mixing="diagonal"))
    for name, value in shared.items():
        torch.testing.assert_close(own[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_with_the_same_a_for_each_expert_it_is_the_shared_a():
    """Values, and A's gradient is the sum over the experts; without dropout, whose mask is another for each A."""
    shape = SHAPES[0]
    case = make_case(shape)
    copies = case._replace(shared_a=case.shared_a.repeat(shape.E, 1))
    shared = run(mosld_linear, case, shape, p=0.0)
    own = run(mosld_linear, copies, shape._replace(mixing="diagonal"), p=0.0)
    own["dshared_a"] = own["dshared_a"].view(shape.E, shape.R, shape.D_in).sum(0)
    for name, value in shared.items():
        torch.testing.assert_close(own[name], value, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_a_program_exported_before_there_were_two_mixings_expands():
    shape = Shape(7, 6, 5, 3, 4, 2)
    inputs = [tensor.float() for tensor in make_case(shape)[:6]]
    y, logits = mosld_linear(*inputs, **settings(shape, 0.3))
    ours = torch.ops.mosld.linear(*inputs, torch.tensor([SEED]), 2, 2.0, 0.3, "eager")
    assert torch.equal(ours[0], y) and torch.equal(ours[1], logits)


def test_second_derivatives_are_refused_rather_than_wrong(mixing):
    shape = Shape(3, 4, 5, 2, 2, 1, mixing)
    inputs = [tensor.requires_grad_(i in PLACES) for i, tensor in enumerate(make_case(shape)[:6])]
    y = mosld_linear(*inputs, **settings(shape))[0]
    (grad,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def good(**changes):
    T, D_in, D_out, R, E = 3, 4, 5, 2, 3
    arguments = dict(
        x=torch.randn(T, D_in), weight=torch.randn(D_out, D_in), bias=torch.randn(D_out),
        shared_a=torch.randn(R, D_in), expert_b=torch.randn(D_out, E * R), router_weight=torch.randn(E, D_in),
        top_k=2, scale=1.0, dropout_p=0.1, seed=torch.tensor([1]),
    )  # fmt: skip
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(top_k=4), r"top_k must be in \[1, num_experts=3\], got 4"),
        (dict(top_k=0), r"top_k must be in \[1, num_experts=3\], got 0"),
        (dict(dropout_p=-0.1), r"dropout_p must be in \[0, 1\], got -0.1"),
        (dict(dropout_p=1.1), r"dropout_p must be in \[0, 1\], got 1.1"),
        (dict(dropout_p=float("nan")), r"dropout_p must be in \[0, 1\], got nan"),
        (dict(seed=None), r"dropout_p=0.1 needs a seed"),
        (dict(seed=torch.tensor([1], dtype=torch.int32)), r"seed must be an int64 tensor of shape \[1\]"),
        (dict(seed=torch.tensor([1], device="meta")), r"seed must be on x's device cpu, got meta"),
        (dict(scale=float("inf")), r"scale must be finite, in float32 too, got inf"),
        (dict(scale=1e300), r"scale must be finite, in float32 too, got 1e\+300"),
        (dict(scale="1"), r"scale must be a number, got '1'"),
        (dict(dropout_p=None), r"dropout_p must be a number, got None"),
        (dict(top_k=2.0), r"top_k must be an integer, got 2.0"),
        (dict(x=None), r"x must be a dense torch.Tensor, got NoneType"),
        (dict(shared_a=torch.randn(2, 4).to_sparse()), r"shared_a must be a dense torch.Tensor, got torch.sparse_coo"),
        (dict(mixing="sum"), r"mixing must be one of expand, diagonal, got 'sum'"),
        (dict(mixing=None), r"mixing must be one of expand, diagonal, got None"),
        (
            dict(mixing="diagonal"),
            r"shared_a must be \[E \* R, D_in\] with E=3, got \[2, 4\]",
        ),
        (
            dict(mixing="diagonal", shared_a=torch.randn(9, 4)),
            r"expert_b must be \[D_out, E \* R\] with E=3, R=3 = \[5, 9\], got \[5, 6\]",
        ),
        (
            dict(mixing="diagonal", shared_a=torch.randn(6, 5)),
            r"shared_a must be \[E \* R, D_in\] = \[6, 4\], got \[6, 5\]",
        ),
        (
            dict(mixing="diagonal", shared_a=torch.randn(3, 2, 4)),
            r"shared_a \[E \* R, D_in\], .* must have two dimensions, got \[3, 2, 4\]",
        ),
        (dict(mixing="diagonal", shared_a=torch.randn(0, 4), expert_b=torch.randn(5, 0)), r"at least 1, got R=0"),
        (dict(backend="cuda"), r"backend must be one of auto, eager, triton, got 'cuda'"),
        (dict(x=torch.randn(3, 6)), r"shared_a must be \[R, D_in\] = \[2, 6\], got \[2, 4\]"),
        (dict(x=torch.tensor(1.0)), r"x must be a floating-point \[..., D_in\]"),
        (dict(x=torch.ones(3, 4, dtype=torch.int64)), r"x must be a floating-point .* got torch.int64 \[3, 4\]"),
        (dict(weight=torch.randn(4, 5)), r"weight must be \[D_out, D_in\] = \[5, 4\], got \[4, 5\]"),
        (dict(weight=torch.randn(5, 4).double()), r"weight must have x's dtype torch.float32, got torch.float64"),
        (dict(bias=torch.randn(4)), r"bias must be \[D_out\] = \[5\], got \[4\]"),
        (
            dict(expert_b=torch.randn(5, 5)),
            r"expert_b must be \[D_out, E \* R\] with E=3, R=2 = \[5, 6\], got \[5, 5\]",
        ),
        (dict(expert_b=torch.randn(5, 3, 2)), r"must have two dimensions, got \[2, 4\], \[5, 3, 2\], \[3, 4\]"),
        (dict(router_weight=torch.randn(3, 5)), r"router_weight must be \[E, D_in\] = \[3, 4\], got \[3, 5\]"),
        (dict(router_weight=torch.randn(3, 4).half()), r"must share one floating-point dtype, got torch.float16"),
        (dict(shared_a=torch.randn(2, 4, device="meta")), r"shared_a must be on x's device cpu, got meta"),
        (dict(shared_a=torch.randn(0, 4), expert_b=torch.randn(5, 0)), r"must be at least 1, got R=0"),
    ],
)
def test_bad_input_names_the_rule_and_the_value(changes, message):
    with pytest.raises(ValueError, match=message):
        mosld_linear(**good(**changes))


@pytest.mark.parametrize(
    ("name", "dtype"), [("x", torch.int32), ("weight", torch.int8), ("bias", torch.int32), ("weight", torch.float64)]
)
def test_autocast_casts_floats_alone(name, dtype):
    arguments = good()
    wrong = arguments | {name: arguments[name].to(dtype)}
    rule = "x must be a floating-point" if name == "x" else f"{name} must have x's dtype torch.float32, got {dtype}"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=rule):
        mosld_linear(**wrong)


def test_compiled_inside_autocast_gives_the_same_bits(mixing):
    shape = Shape(9, 6, 8, 3, 4, 2, mixing)
    case = make_case(shape).to(torch.float32)
    torch._dynamo.reset()
    results = []
    for function in (mosld_linear, torch.compile(mosld_linear, fullgraph=True, backend="eager")):
        with torch.autocast("cpu", torch.bfloat16):  # backward inside, too
            results.append(run(function, case, shape))
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name
