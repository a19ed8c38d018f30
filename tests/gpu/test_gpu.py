"""The kernels on a real GPU: what the interpreter cannot show. `python -m pytest tests/gpu`, where there is one."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mosld_kernels
from mosld import MoSLDLinear
from mosld_kernels import mosld_linear
from tests.helpers.inputs import KERNEL_SHAPES, Shape, make_case
from tests.helpers.runs import PLACES, SEED, assert_accurate, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and torch finds none"),
]
HALVES = [torch.bfloat16, torch.float16]
MEBIBYTE = 2**20


def layer(shape, dtype=torch.bfloat16, adapter_dtype=torch.float32):
    """-> inputs of one call, of these sizes and random, without make_case's care for ties; and the gradient for y"""
    T, D_in, D_out, _, E, _, _ = shape
    torch.manual_seed(0)

    def draw(*sizes, dtype=dtype, scale=1.0):
        return (scale * torch.randn(*sizes, device="cuda")).to(dtype)

    adapter = [
        draw(*size, dtype=adapter_dtype, scale=size[1] ** -0.5)
        for size in ((shape.rows, D_in), (D_out, E * shape.R), (E, D_in))
    ]
    inputs = [draw(T, D_in), draw(D_out, D_in, scale=D_in**-0.5), draw(D_out), *adapter]
    return [tensor.requires_grad_(i in PLACES) for i, tensor in enumerate(inputs)], draw(T, D_out)


def step(inputs, dout, shape, seed=None, p=0.1, function=mosld_linear, backend="triton"):
    """-> y, logits and the four gradients"""
    seed = torch.tensor([SEED], device="cuda") if seed is None else seed
    y, logits = function(
        *inputs, top_k=shape.K, scale=2.0, dropout_p=p, seed=seed, mixing=shape.mixing, backend=backend
    )
    return y, logits, *torch.autograd.grad(y, [inputs[place] for place in PLACES], dout)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("shape", KERNEL_SHAPES, ids=str)
def test_no_less_accurate_than_eager(shape, dtype):
    assert_accurate(shape, dtype, device="cuda", backend="triton")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(500, 4096, 14336, 16, 8, 2),
        Shape(300, 14336, 4096, 16, 8, 2),
        Shape(130, 4096, 4096, 128, 64, 4),
        Shape(500, 4096, 14336, 8, 8, 2, "diagonal"),
        Shape(300, 14336, 4096, 32, 4, 2, "diagonal"),
    ],
    ids=str,
)
def test_no_less_accurate_than_eager_on_real_sizes(shape, dtype):
    assert_accurate(shape, dtype, torch.float32, draws=1, device="cuda", backend="triton")


@pytest.mark.parametrize(
    "shape",
    [
        Shape(8192, 4096, 4096, 16, 8, 2),
        Shape(100, 4096, 4096, 8, 8, 2),
        Shape(8192, 4096, 4096, 8, 8, 2, "diagonal"),
    ],
    ids=str,
)
def test_the_same_bits_twice(shape):
    inputs, dout = layer(shape)
    for first, second in zip(step(inputs, dout, shape), step(inputs, dout, shape), strict=True):
        assert torch.equal(first, second)


def test_the_mask_is_the_cpus_bit_for_bit():
    from mosld_kernels.triton import down_backward, prepare

    for value, rank, d_in, p in ((1, 16, 4096, 0.1), (2**62 - 1, 7, 333, 0.5), (3, 128, 14336, 0.05), (4, 1, 1, 1.0)):
        seed = torch.tensor([value])
        keep = mosld_kernels.keep_mask(seed, (rank, d_in), p).cuda()
        ones, router = torch.ones(rank, d_in, device="cuda"), torch.ones(1, d_in, device="cuda")
        down_weight, _, again = prepare(ones, router, ones[:1, :1], seed.cuda(), p, torch.float32)
        assert torch.equal(down_weight[:rank] != 0, keep)
        dprojected, x = torch.ones(1, rank + 1, device="cuda"), torch.ones(1, d_in, device="cuda")
        dshared_a, _ = down_backward(dprojected, x, again, p, rank, torch.float32)
        assert torch.equal(dshared_a, down_weight[:rank])


def test_a_captured_graph_replays_what_eager_computes_with_the_seed_of_the_day():
    shape = Shape(1024, 1024, 2048, 16, 8, 2)
    inputs, dout = layer(shape)
    seed = torch.tensor([1], device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(inputs, dout, shape, seed)  # compiles, which a capture does not allow
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs, dout, shape, seed)
    for value in (1, 2, 3):
        seed.fill_(value)
        graph.replay()
        for replayed, plain in zip(captured, step(inputs, dout, shape, seed), strict=True):
            assert torch.equal(replayed, plain)


def test_compiled_without_a_graph_break_gives_the_same_bits():
    shape = Shape(256, 1024, 512, 16, 8, 2)
    inputs, dout = layer(shape)
    torch._dynamo.reset()
    compiled = torch.compile(mosld_linear, fullgraph=True)
    for backend in ("triton", "auto"):
        plain = step(inputs, dout, shape, backend=backend)
        for ours, expected in zip(step(inputs, dout, shape, function=compiled, backend=backend), plain, strict=True):
            assert torch.equal(ours, expected)


def test_auto_takes_the_kernels_and_eager_what_they_cannot():
    shape = Shape(512, 256, 512, 16, 8, 2)
    inputs, dout = layer(shape)
    for auto, triton in zip(step(inputs, dout, shape, backend="auto"), step(inputs, dout, shape), strict=True):
        assert torch.equal(auto, triton)
    wide, dout = layer(shape, torch.float64, torch.float64)
    for auto, eager in zip(
        step(wide, dout, shape, backend="auto"), step(wide, dout, shape, backend="eager"), strict=True
    ):
        assert torch.equal(auto, eager)
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16"):
        step(wide, dout, shape)


def test_a_drop_in_layer_trains_under_autocast():
    module = MoSLDLinear(256, 512, r=8, num_experts=4, top_k=2, dropout=0.1).cuda()
    torch.nn.init.normal_(module.adapter.expert_b.weight, std=0.02)
    with torch.autocast("cuda", torch.bfloat16):
        y = module(torch.randn(2, 50, 256, device="cuda"))
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    for parameter in module.adapter.parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any()


@pytest.mark.parametrize("view", ["transposed", "misaligned", "far rows", "every other"])
def test_views_of_x(view):
    shape = Shape(130, 64, 96, 8, 4, 2)
    inputs, dout = layer(shape)
    expected = step(inputs, dout, shape)
    x = inputs[0].detach()
    if view == "transposed":
        x = x.t().contiguous().t()
    elif view == "misaligned":
        x = torch.cat((x[:, :1], x), dim=1)[:, 1:]
    elif view == "far rows":  # one step over a tile of tokens passes 2^31 elements
        memory = torch.empty(130 * (2**25 + 16), dtype=torch.bfloat16, device="cuda")
        x = memory.as_strided(x.shape, (2**25 + 16, 1)).copy_(x)
    else:
        x = x.repeat_interleave(2, dim=1)[:, ::2]
    assert not x.is_contiguous()
    for ours, plain in zip(step([x.requires_grad_(), *inputs[1:]], dout, shape), expected, strict=True):
        assert (ours.float() - plain.float()).norm() <= 0.01 * plain.float().norm()


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_every_dropout_with_and_without_bias(p, bias):
    assert_accurate(
        Shape(33, 17, 31, 3, 5, 2), torch.bfloat16, torch.float32, p=p, bias=bias, device="cuda", backend="triton"
    )


@pytest.mark.parametrize("tokens", [1, 2, 15, 17, 129])
def test_few_tokens(tokens):
    assert_accurate(Shape(tokens, 4096, 1024, 16, 8, 2), torch.bfloat16, torch.float32, device="cuda", backend="triton")


@pytest.mark.parametrize("wanted", [(0,), (3,), (4,), (5,), (3, 4, 5), (1,), (2,)], ids=str)
def test_only_the_wanted_gradients_come_and_they_are_those_of_all(wanted):
    shape = Shape(90, 64, 96, 8, 4, 2)
    inputs, dout = layer(shape)
    seed, grads = torch.tensor([SEED], device="cuda"), []
    for places in ((0, 1, 2, 3, 4, 5), wanted):
        leaves = [tensor.detach().requires_grad_(i in places) for i, tensor in enumerate(inputs)]
        y, _ = mosld_linear(*leaves, top_k=2, scale=2.0, dropout_p=0.3, seed=seed, backend="triton")
        y.backward(dout)
        assert [leaf.grad is not None for leaf in leaves] == [i in places for i in range(6)]
        grads.append([leaf.grad for leaf in leaves])
    for place in wanted:
        assert torch.equal(grads[0][place], grads[1][place])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_redraws_the_same_mask(reentrant):
    module = MoSLDLinear(64, 96, r=8, num_experts=4, top_k=2, dropout=0.4).cuda()
    torch.nn.init.normal_(module.adapter.expert_b.weight, std=0.1)
    x, grads = torch.randn(50, 64, device="cuda", requires_grad=True), []
    for forward in (module, lambda x: checkpoint(module, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        y = forward(x)
        grads.append(torch.autograd.grad(y.square().sum(), x))
    assert torch.equal(*(grad for (grad,) in grads))


def test_float32_is_exact_and_tf32_comes_only_when_asked_for():
    shape = Shape(300, 1024, 256, 16, 8, 8)  # every expert: rounding decides no choice
    inputs, dout = layer(shape, torch.float32)
    truth = step([tensor.detach().double().requires_grad_(i in PLACES) for i, tensor in enumerate(inputs)],
                 dout.double(), shape, p=0.0, backend="eager")  # fmt: skip
    errors = {}
    for setting in ("highest", "high"):
        torch.set_float32_matmul_precision(setting)
        try:
            errors[setting] = [
                (a - b).norm() / b.norm() for a, b in zip(step(inputs, dout, shape, p=0.0), truth, strict=True)
            ]
        finally:
            torch.set_float32_matmul_precision("highest")
    assert max(errors["highest"]) < 1e-5 < 1e-4 < min(errors["high"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_stays_alone(bad):
    shape = Shape(200, 512, 256, 8, 8, 2)
    case = make_case(shape, torch.bfloat16).to(torch.bfloat16)
    clean = run(mosld_linear, case, shape, device="cuda", backend="triton")
    case.x[77, 3] = bad
    soiled = run(mosld_linear, case, shape, device="cuda", backend="triton")
    others = torch.arange(200) != 77
    for name in ("y", "logits", "dx"):
        assert torch.equal(soiled[name][others], clean[name][others]), name


def test_less_than_one_mebibyte_is_saved_beyond_x_and_the_parameters():
    shape = Shape(8192, 4096, 4096, 16, 8, 2)
    inputs, dout = layer(shape)
    seed, saved = torch.tensor([SEED], device="cuda"), {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        y, _ = mosld_linear(*inputs, top_k=2, scale=2.0, dropout_p=0.1, seed=seed, backend="triton")
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    assert sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in given) <= MEBIBYTE
    y.backward(dout)


def test_peak_memory_is_close_to_the_frozen_layers():
    shape = Shape(8192, 4096, 4096, 16, 8, 2)
    inputs, dout = layer(shape)

    def frozen():
        return torch.autograd.grad(torch.nn.functional.linear(*inputs[:3]), inputs[0], dout)

    def peak(run):
        run()  # workspaces and compiled kernels stay
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before

    # The most at one time beyond out and dx: B's gradient with its planes in float32, 4096 x 128 x 4 bytes each.
    assert peak(lambda: step(inputs, dout, shape)) - peak(frozen) <= 40 * MEBIBYTE


@pytest.mark.parametrize(("d_in", "d_out"), [(8192, 16), (16, 8192)])
def test_more_than_2_31_elements(d_in, d_out):
    tokens, last = 2**31 // 8192 + 300, 500
    shape = Shape(tokens, d_in, d_out, 4, 2, 2)  # both experts: rounding decides no choice
    inputs, dout = layer(shape)
    ours = step(inputs, dout, shape, p=0.0)
    part = [inputs[0].detach()[-last:].requires_grad_(), *inputs[1:]]
    alone = step(part, dout[-last:], shape, p=0.0)
    # By norm: the library may cut a product's sum one way for many tokens and another for few.
    for whole, tail in zip(ours[:3], alone[:3], strict=True):  # y, logits, dx
        assert (whole[-last:].float() - tail.float()).norm() <= 0.02 * tail.float().norm()
    for kernel, eager in zip(ours[3:], step(inputs, dout, shape, p=0.0, backend="eager")[3:], strict=True):
        assert (kernel - eager).norm() <= 0.02 * eager.norm()


def test_launches_go_to_the_tensors_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    shape = Shape(100, 64, 64, 4, 4, 2)
    case = make_case(shape, torch.float32).to(torch.float32)
    first, second = (run(mosld_linear, case, shape, device=f"cuda:{i}", backend="triton") for i in range(2))
    for name, value in first.items():
        assert torch.equal(value.cpu(), second[name].cpu()), name
