"""The Triton kernels in Triton's interpreter: values and gradients against float64, masks, bad input, what is run."""

import contextlib
import json
import random
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import mosld_kernels
from mosld_kernels import checks, dispatch, gating, mosld_delta, mosld_linear, reference
from tests.helpers.inputs import KERNEL_SHAPES, SHAPES, Shape, make_case
from tests.helpers.runs import PLACES, SEED, assert_accurate, run

if torch.cuda.is_available():
    pytest.skip("on a machine with a GPU the kernels are compiled: tests/gpu checks them", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from mosld_kernels.dropout import threshold, triton_keep  # noqa: E402
from mosld_kernels.limits import MOST_COLUMNS, padded  # noqa: E402
from mosld_kernels.triton import down, down_backward, prepare, tiles  # noqa: E402
from mosld_kernels.triton.launch import precision  # noqa: E402
from tests.kernels import bf16_shim  # noqa: E402

# The interpreter computes with numpy, which warns of what a GPU computes without a word.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")
DIAGONAL_RULE = r"with mixing='diagonal' E \* R must be at most 128, E rounded .* to one from 4 on, "
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _slow_if_large(shape):
    """The interpreter takes seconds where many tokens have many experts."""
    return pytest.param(shape, marks=pytest.mark.slow) if shape.T * shape.E > 1000 else shape


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """What a kernel leaves unwritten then shows: torch fills new tensors with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=checks.MIXINGS)
def mixing(request):
    return request.param


@pytest.fixture(autouse=True)
def _exact_bfloat16(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED_FLOATS", dispatch.TRITON_FLOATS)
    with bf16_shim.exact_bfloat16():
        yield


def test_the_shim_makes_the_interpreter_compute_bfloat16():
    bf16_shim.check()


@pytest.mark.parametrize("shape", [_slow_if_large(shape) for shape in KERNEL_SHAPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_less_accurate_than_eager(shape, dtype):
    assert_accurate(shape, dtype, backend="triton")


@pytest.mark.parametrize("seed", range(12))
def test_random_sizes(seed):
    draw = random.Random(seed).randint
    experts = draw(1, 64) if seed % 2 else draw(1, 9)
    shape = Shape(
        draw(1, 40), draw(1, 90), draw(1, 90), draw(1, 128) if seed % 3 else draw(1, 9), experts, draw(1, experts)
    )
    assert_accurate(shape, torch.float32, draws=2, backend="triton")


@pytest.mark.parametrize("seed", range(12))
def test_random_sizes_with_an_a_for_each_expert(seed):
    draw = random.Random(100 + seed).randint
    experts = draw(1, 64) if seed % 2 else draw(1, 9)
    experts = min(experts, MOST_COLUMNS // 4)
    rank = draw(1, MOST_COLUMNS // padded(experts))
    shape = Shape(draw(1, 40), draw(1, 90), draw(1, 90), rank, experts, draw(1, experts), "diagonal")
    assert_accurate(shape, torch.float32, draws=2, backend="triton")


@pytest.mark.parametrize("p", [0.0, 0.999, 1.0])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_every_dropout_with_and_without_bias(p, bias, mixing):
    assert_accurate(Shape(33, 17, 31, 3, 5, 2, mixing), torch.float32, p=p, bias=bias, backend="triton")


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float16),
    ],
    ids=str,
)
def test_adapters_in_another_dtype(dtype, adapter_dtype, mixing):
    assert_accurate(Shape(65, 33, 129, 16, 3, 3, mixing), dtype, adapter_dtype, backend="triton")
    assert_accurate(Shape(33, 17, 31, 3, 5, 2, mixing), dtype, adapter_dtype, backend="triton")


def planes_of(monkeypatch):
    """-> a list that gets each launch's kernel and the planes into which its sums are cut"""
    cut, pick, count = [], tiles.pick, tiles.split_k

    def picked(kernel, *sizes):
        cut.append((kernel, 1))
        return pick(kernel, *sizes)

    def counted(*sizes):
        cut[-1] = (cut[-1][0], count(*sizes))
        return cut[-1][1]

    monkeypatch.setattr(tiles, "pick", picked)
    monkeypatch.setattr(tiles, "split_k", counted)
    return cut


GRADIENTS = ["grad_down", "grad_expert_b"]


@pytest.mark.parametrize(
    ("shape", "in_planes"),
    [
        (SHAPES[1], []),
        (KERNEL_SHAPES[13], []),
        (KERNEL_SHAPES[-4], []),
        (Shape(5, 130, 131, 6, 7, 4), ["down", "up_backward"]),
        (Shape(5, 130, 131, 6, 7, 4, "diagonal"), ["down", "up_backward"]),
        (Shape(300, 18, 16, 2, 2, 1), GRADIENTS),
        (Shape(300, 18, 20, 2, 2, 1, "diagonal"), GRADIENTS),
    ],
    ids=lambda value: "-".join(value) or "none" if isinstance(value, list) else str(value),
)
def test_tiles_from_a_file_and_planes_change_nothing(shape, in_planes, tmp_path, monkeypatch):
    # The smallest tiles: several in every direction, sums in planes, experts in several blocks.
    tile = dict(tokens=16, features=16, columns=16, warps=4, stages=2)
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps([dict(kernel=kernel, tile=tile) for kernel in tiles.KERNELS]))
    case = make_case(shape, torch.float32).to(torch.float32)
    before = run(mosld_linear, case, shape, backend="triton")
    monkeypatch.setenv("MOSLD_TILES", str(path))
    assert tiles.pick("down", 90, 8192, 4096, 0, 24, 2).tile == tiles.Tile(**tile)
    cut = planes_of(monkeypatch)
    after = run(mosld_linear, case, shape, backend="triton")
    assert sorted(kernel for kernel, planes in cut if planes > 1) == in_planes
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert_accurate(shape, torch.float32, backend="triton")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "must hold a list of rows, got dict"),
        ("[3]", "row 0: must be an object with the fields kernel, tile"),
        ('[{"kernel": "down", "tile": {"tokens": 16}}]', "row 0: must be an object with the fields kernel, tile"),
        ('[{"kernel": "up", "tile": TILE}]', "row 0: kernel must be one of down, up_backward, .*, got 'up'"),
        ('[{"kernel": "down", "tile": TILE, "arch": "90"}]', "row 0: arch must be an integer of at least 0, got '90'"),
        (
            '[{"kernel": "down", "tile": TILE}, {"kernel": "down", "tile": ODD}]',
            "row 1: tile.tokens must be a power of",
        ),
    ],
)
def test_a_bad_tile_file_is_named_with_its_row(text, message, tmp_path, monkeypatch):
    tile = '{"tokens": 16, "features": 16, "columns": 16, "warps": 4, "stages": 2}'
    path = tmp_path / "tiles.json"
    path.write_text(text.replace("TILE", tile).replace("ODD", tile.replace("16", "24", 1)))
    monkeypatch.setenv("MOSLD_TILES", str(path))
    with pytest.raises(ValueError, match=f"MOSLD_TILES={path}.*{message}"):
        tiles.pick("down", 90, 8192, 4096, 0, 24, 2)
    with pytest.raises(ValueError, match=f"MOSLD_TILES={path}.*{message}"):  # before anything is launched
        prepare(torch.ones(2, 4), torch.ones(2, 4), torch.ones(3, 4), None, 0.0, torch.float32)


def test_tiles_follow_the_bucket_of_t_and_never_t_itself(tmp_path, monkeypatch):
    for kernel in tiles.KERNELS:
        for arch in (80, 86, 89, 90, 100, 120):
            picked = {tiles.pick(kernel, arch, tokens, 4096, 4096, 128, 2) for tokens in range(4097, 8193, 7)}
            assert len(picked) == 1
    # Nor does a row of one's own, with a bound inside a bucket, which holds for buckets that end at it or before.
    tile = dict(tokens=16, features=16, columns=16, warps=4, stages=2)
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps([dict(kernel=kernel, tile=tile, tokens_to=6000) for kernel in tiles.KERNELS]))
    monkeypatch.setenv("MOSLD_TILES", str(path))
    for kernel in tiles.KERNELS:
        picked = [tiles.pick(kernel, 80, tokens, 4096, 4096, 128, 2).tile for tokens in (2049, 4096, 4097, 6000, 8192)]
        assert [own == tiles.Tile(**tile) for own in picked] == [True, True, False, False, False]
    assert [tiles.bucket(tokens) for tokens in (0, 1, 2, 3, 4096, 4097)] == [1, 1, 2, 4, 4096, 8192]
    assert tiles.split_k(programs=128, steps=64, processors=132) == 1
    assert tiles.split_k(programs=32, steps=64, processors=132) == 4
    assert tiles.split_k(programs=1, steps=5, processors=132) == 2  # never fewer than two steps in a plane


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 5, 2**62, -3])
@pytest.mark.parametrize(("rank", "d_in"), [(1, 1), (3, 5), (8, 500), (16, 333)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999999, 1.0])
def test_the_mask_is_the_torch_twin_bit_for_bit(seed, rank, d_in, p):
    seed = torch.tensor([seed])
    keep = mosld_kernels.keep_mask(seed, (rank, d_in), p)
    ones, router = torch.ones(rank, d_in), torch.zeros(1, d_in)
    down_weight, _, again = prepare(ones, router, torch.ones(2, rank), seed, p, torch.float32)
    assert torch.equal(down_weight[:rank] != 0, keep)
    # The gradient's mask, drawn in another kernel and in other tiles: every sum over tokens is 1 before it.
    dshared_a, _ = down_backward(torch.ones(1, rank + 1), torch.ones(1, d_in), again, p, rank, torch.float32)
    assert torch.equal(dshared_a, down_weight[:rank])


keep_elements = triton_keep()


@triton.jit
def _mask_kernel(seed_ptr, out_ptr, N, limit, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + n, keep_elements(tl.load(seed_ptr), n, limit), mask=n < N)


@pytest.mark.parametrize("block", [2, 16, 128, 4096])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_mask_does_not_depend_on_the_tile(block, p):
    seed, mask = torch.tensor([2**50 + 3]), torch.zeros(7 * 123, dtype=torch.bool)
    _mask_kernel[(-(-mask.numel() // block),)](seed, mask, mask.numel(), threshold(p), block)
    assert torch.equal(mask.view(7, 123), mosld_kernels.keep_mask(seed, (7, 123), p))


def test_equal_logits_go_to_the_lower_index():
    x, router = torch.ones(5, 4), torch.tensor([1.0, 3.0, 2.0, 3.0, 2.0, 3.0])[:, None].expand(6, 4)
    for top_k in range(1, 7):
        down_weight = torch.cat((torch.ones(2, 4), router))
        _, logits, gates, _ = down(x, down_weight, 2, top_k, 1.0)
        torch.testing.assert_close(gates, gating.gates_from_logits(logits, top_k))
        assert torch.equal(gates > 0, gating.top_k_mask(logits, top_k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_token_stays_alone(bad, dtype, mixing):
    # Even R + E: torch's bfloat16 product on CPU reads one element past a row of odd length, and NaN there is no zero.
    shape = Shape(21, 40, 24, 4, 6, 2, mixing)
    case = make_case(shape, dtype).to(dtype)
    clean = run(mosld_linear, case, shape, backend="triton")
    case.x[7, 3] = bad
    soiled = run(mosld_linear, case, shape, backend="triton")
    others = torch.arange(21) != 7
    for name in ("y", "logits", "dx"):
        assert torch.equal(soiled[name][others], clean[name][others]), name
    assert not soiled["y"][7].isfinite().any()


def test_a_bad_gradient_stays_with_its_token(mixing):
    """D_out is no multiple of the tile: behind each token's gradient lies the next one's in its last tile."""
    shape = Shape(21, 40, 22, 4, 6, 2, mixing)
    case = make_case(shape, torch.float32).to(torch.float32)
    clean = run(mosld_linear, case, shape, backend="triton")["dx"]
    case.dout[7, 3] = float("nan")
    soiled = run(mosld_linear, case, shape, backend="triton")["dx"]
    others = torch.arange(21) != 7
    assert torch.equal(soiled[others], clean[others]) and not soiled[7].isfinite().any()


@pytest.mark.parametrize("row", range(5))
def test_a_bad_row_of_a_or_of_the_router_stays_alone(row):
    """D_in is no multiple of the tile, so that behind each row lies the next one in its last tile."""
    x, down_weight = torch.randn(3, 21), torch.randn(5, 21)
    hidden, logits, _, _ = down(x, down_weight, 2, 1, 1.0)
    down_weight[row, 0] = float("nan")
    spoilt = torch.cat(down(x, down_weight, 2, 1, 1.0)[:2], dim=1)
    expected = torch.cat((hidden, logits), dim=1)
    expected[:, row] = float("nan")
    torch.testing.assert_close(spoilt, expected, equal_nan=True)


def test_a_token_does_not_depend_on_its_batch(mixing):
    torch.manual_seed(1)
    x, down_weight = torch.randn(60, 70), torch.randn(12, 70)
    whole = down(x, down_weight, 8, 2, 1.0, mixing)
    # Not bit for bit here: the interpreter multiplies with NumPy, which on some processors sums a row in an order that
    # depends on where in the tile it is.
    for part, all_tokens in zip(down(x[17:50], down_weight, 8, 2, 1.0, mixing), whole, strict=True):
        torch.testing.assert_close(part, all_tokens[17:50], rtol=1e-5, atol=1e-5)


def test_non_contiguous_inputs_and_gradients(mixing):
    shape = Shape(12, 10, 14, 3, 4, 2, mixing)
    case = make_case(shape).to(torch.float32)
    plain = [tensor.detach() for tensor in case[:6]]
    strided = [t.t().contiguous().t() if t.dim() == 2 else t.repeat_interleave(2)[::2] for t in plain]
    sliced = [torch.cat((plain[0], plain[0]), dim=1)[:, :10], *plain[1:]]
    grads = []
    for inputs in (plain, strided, sliced):
        inputs = [tensor.detach().requires_grad_(i in PLACES) for i, tensor in enumerate(inputs)]
        y, _ = mosld_linear(
            *inputs, top_k=2, scale=2.0, mixing=mixing, dropout_p=0.2, seed=torch.tensor([SEED]), backend="triton"
        )
        y.sum().backward()  # its incoming gradient has stride 0
        grads.append([inputs[place].grad for place in PLACES])
    for others in grads[1:]:
        for ours, expected in zip(others, grads[0], strict=True):
            torch.testing.assert_close(ours, expected)


@contextlib.contextmanager
def plain_memory():
    """Without this, five GB of memory would be filled with NaN."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize(("rows", "stride"), [(4, 2**30 + 7), (130, 2**25 + 16)])
def test_rows_that_lie_more_than_2_31_elements_apart(rows, stride):
    with plain_memory():
        memory = torch.empty(rows * stride, dtype=torch.float16)  # only the pages that are touched take room
    x = memory.as_strided((rows, 16), (stride, 1))  # the second: one step over the tokens alone passes 2^31
    x.copy_(torch.randn(rows, 16))
    down_weight = torch.randn(6, 16).half()
    for far, near in zip(down(x, down_weight, 4, 1, 1.0), down(x.contiguous(), down_weight, 4, 1, 1.0), strict=True):
        assert torch.equal(far, near)
    dprojected = torch.randn(rows, 6).half()
    far, near = (down_backward(dprojected, left, None, 0.0, 4, torch.float32) for left in (x, x.contiguous()))
    assert torch.equal(far[0], near[0]) and torch.equal(far[1], near[1])


@pytest.mark.parametrize("wanted", [(0,), (3,), (4,), (5,), (3, 4, 5), (1,), (2,), (0, 1, 2, 3, 4, 5)], ids=str)
def test_only_the_wanted_gradients_come_and_they_are_right(wanted, mixing):
    shape = Shape(9, 6, 7, 3, 4, 2, mixing)
    case, grads = make_case(shape).to(torch.float32), []
    for function, options in ((mosld_linear, dict(backend="triton")), (reference.mosld_linear, {})):
        inputs = [tensor.clone().requires_grad_(i in wanted) for i, tensor in enumerate(case[:6])]
        seed = torch.tensor([SEED])
        y, _ = function(*inputs, top_k=2, scale=2.0, mixing=mixing, dropout_p=0.3, seed=seed, **options)
        y.backward(case.dout)
        assert [tensor.grad is not None for tensor in inputs] == [i in wanted for i in range(6)]
        grads.append([tensor.grad for tensor in inputs if tensor.grad is not None])
    for ours, truth in zip(*grads, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5)


def test_only_x_the_seed_hidden_and_gates_are_saved_beside_the_parameters(mixing):
    shape = Shape(40, 24, 56, 4, 8, 2, mixing)
    inputs = [tensor.float().requires_grad_(i in PLACES) for i, tensor in enumerate(make_case(shape)[:6])]
    seed, saved = torch.tensor([SEED]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mosld_linear(*inputs, top_k=2, scale=2.0, mixing=mixing, dropout_p=0.2, seed=seed, backend="triton")
    given = {tensor.data_ptr() for tensor in (*inputs, seed)}
    new = sorted(tuple(tensor.shape) for tensor in saved if tensor.data_ptr() not in given)
    assert new == sorted([(40, shape.rows), (40, 8)])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_redraws_the_same_mask(reentrant, mixing):
    shape = Shape(12, 10, 14, 3, 4, 2, mixing)
    case = make_case(shape).to(torch.float32)

    def forward(*inputs):
        seed = torch.randint(2**62, (1,))
        return mosld_linear(*inputs, top_k=2, scale=2.0, mixing=mixing, dropout_p=0.4, seed=seed, backend="triton")[0]

    grads = []
    for wrapped in (forward, lambda *inputs: checkpoint(forward, *inputs, use_reentrant=reentrant)):
        torch.manual_seed(5)
        inputs = [tensor.clone().requires_grad_(i in PLACES) for i, tensor in enumerate(case[:6])]
        wrapped(*inputs).backward(case.dout)
        grads.append([inputs[place].grad for place in PLACES])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


def test_autocast_runs_the_products_in_its_dtype(mixing):
    shape = Shape(12, 16, 14, 4, 4, 2, mixing)
    inputs = [tensor.float().requires_grad_(i in PLACES) for i, tensor in enumerate(make_case(shape)[:6])]
    with torch.autocast("cpu", torch.bfloat16):
        y, logits = mosld_linear(*inputs, top_k=2, scale=2.0, mixing=mixing, backend="triton")
        truth, _ = mosld_linear(*inputs, top_k=2, scale=2.0, mixing=mixing, backend="eager")
    assert y.dtype == torch.bfloat16 and logits.dtype == torch.float32
    torch.testing.assert_close(y, truth, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(inputs[place].grad.dtype == torch.float32 for place in PLACES)


def test_the_update_alone(mixing):
    shape = Shape(33, 17, 31, 3, 5, 2, mixing)
    case = make_case(shape).to(torch.float32)
    adapter = (case.x, *case[3:6])
    options = dict(top_k=2, scale=2.0, mixing=mixing, dropout_p=0.2, seed=torch.tensor([SEED]))
    ours, truth = mosld_delta(*adapter, **options, backend="triton")[0], reference.mosld_delta(*adapter, **options)[0]
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("base", [True, False], ids=["linear", "delta"])
def test_opcheck(base, mixing):
    inputs = [
        tensor.float().requires_grad_(i in PLACES)
        for i, tensor in enumerate(make_case(Shape(7, 6, 5, 3, 4, 2, mixing))[:6])
    ]
    if not base:
        inputs[1] = inputs[2] = None
    torch.library.opcheck(
        torch.ops.mosld.linear.default, (*inputs, torch.tensor([SEED]), 2, 1.5, 0.3, "triton", mixing)
    )


@pytest.mark.slow
def test_compiles_and_exports_without_a_graph_break_and_gives_the_same_bits(mixing):
    shape = Shape(9, 6, 8, 3, 4, 2, mixing)
    case = make_case(shape).to(torch.float32)
    plain = run(mosld_linear, case, shape, backend="triton")
    torch._dynamo.reset()
    compiled = torch.compile(mosld_linear, fullgraph=True, backend="aot_eager")
    ours = run(compiled, case, shape, backend="triton")
    for name, value in plain.items():
        assert torch.equal(ours[name], value), name

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return mosld_linear(*inputs, top_k=2, scale=2.0, mixing=mixing, backend="triton")

    exported = torch.export.export(Module(), tuple(case[:6])).module()
    torch.testing.assert_close(exported(*case[:6])[0], Module()(*case[:6])[0], rtol=0, atol=0)


def test_float32_products_are_exact_unless_tf32_is_asked_for():
    assert precision() == "ieee"
    torch.set_float32_matmul_precision("high")
    try:
        assert precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert precision() == "ieee"


def test_there_are_no_atomics_and_nothing_passes_between_programs():
    for path in (Path(mosld_kernels.__file__).parent / "triton").glob("*.py"):
        assert not re.search(r"tl\.atomic|debug_barrier|inline_asm|semaphore|\.item\(|synchronize", path.read_text()), (
            path
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype=torch.float64), "x must be float32, bfloat16 or float16, got torch.float64"),
        (
            dict(adapter_dtype=torch.float64),
            "shared_a, expert_b and router_weight must be float32, bfloat16 or float16",
        ),
        (dict(rank=129), "R must be at most 128 and E at most 64, got R=129, E=2"),
        (dict(experts=65), "R must be at most 128 and E at most 64, got R=2, E=65"),
        (dict(rank=129, experts=1, mixing="diagonal"), DIAGONAL_RULE + "got E=1, R=129"),
        (dict(rank=17, experts=8, mixing="diagonal"), DIAGONAL_RULE + "got E=8, R=17"),
        (dict(rank=1, experts=33, mixing="diagonal"), DIAGONAL_RULE + "got E=33, R=1"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_by_name_and_taken_by_eager(change, message):
    options = dict(dtype=torch.float32, adapter_dtype=torch.float32, rank=2, experts=2, mixing="expand") | change
    mixing, adapter_dtype = options["mixing"], options["adapter_dtype"]
    shape = Shape(5, 4, 3, options["rank"], options["experts"], 1, mixing)
    sizes = ((shape.rows, 4), (3, shape.E * shape.R), (shape.E, 4))
    x, adapter = torch.ones(5, 4, dtype=options["dtype"]), [torch.ones(size, dtype=adapter_dtype) for size in sizes]
    with pytest.raises(RuntimeError, match=f"backend='triton' cannot run: {message}"):
        mosld_delta(x, *adapter, top_k=1, scale=1.0, backend="triton", mixing=mixing)
    assert mosld_delta(x, *adapter, top_k=1, scale=1.0, mixing=mixing)[0].shape == (5, 3)


def test_on_cpu_only_the_interpreter_runs_the_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    x, adapter = torch.ones(5, 4), (torch.ones(2, 4), torch.ones(3, 4), torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU, got x on cpu .*TRITON_INTERPRET=1"):
        mosld_delta(x, *adapter, top_k=1, scale=1.0, backend="triton")


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_bfloat16_is_refused_where_the_interpreter_is_wrong(dtype, adapter_dtype, monkeypatch):
    monkeypatch.undo()  # as a user has it
    adapter = [torch.ones(size, dtype=adapter_dtype) for size in ((2, 4), (3, 4), (2, 4))]
    with pytest.raises(RuntimeError, match="Triton's interpreter is wrong in torch.bfloat16"):
        mosld_delta(torch.ones(5, 4, dtype=dtype), *adapter, top_k=1, scale=1.0, backend="triton")


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_tensors_without_memory_give_shapes_and_dtypes(backend, mixing):
    rows = 6 if mixing == "diagonal" else 2
    with FakeTensorMode():
        x, weight = torch.empty(2, 3, 8, dtype=torch.float16), torch.empty(5, 8, dtype=torch.float16)
        adapter = [torch.empty(size, requires_grad=True) for size in ((rows, 8), (5, 6), (3, 8))]
        y, logits = mosld_linear(x, weight, None, *adapter, top_k=1, scale=1.0, backend=backend, mixing=mixing)
        y.sum().backward()
    assert y.shape == (2, 3, 5) and y.dtype == torch.float16 and logits.shape == (2, 3, 3)
    assert [tensor.grad.shape for tensor in adapter] == [(rows, 8), (5, 6), (3, 8)]
