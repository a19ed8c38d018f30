"""Products by whichever library is fastest are products: as accurate as torch's own, for every layout."""

import pytest
import torch
from torch.nn import functional as F

from mosld_kernels import mosld_linear, products
from mosld_kernels.staged import staged_linear
from tests.helpers.accuracy import assert_no_less_accurate
from tests.helpers.inputs import Shape, make_case

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.fixture
def onednn(monkeypatch):
    """As on an AMD processor, for products of any size; -> the calls that oneDNN got."""
    if not HAS_ONEDNN:
        pytest.skip("this build of torch has no oneDNN")
    calls = []

    def faster(a, b):
        calls.append((tuple(a.shape), tuple(b.shape)))
        return True

    monkeypatch.setattr(products, "_onednn_is_faster", faster)
    return calls


@pytest.fixture
def no_instructions(monkeypatch):
    """As on a processor without 16-bit products."""
    monkeypatch.setattr(products, "lacks", lambda dtype: dtype in (torch.bfloat16, torch.float16))


def operands(rows, summed, columns, dtype, layout):
    generator = torch.Generator().manual_seed(rows)
    a, b, bias = (
        torch.randn(size, generator=generator).to(dtype) for size in ((rows, summed), (summed, columns), columns)
    )
    if layout == "transposed":
        a, b = a.t().contiguous().t(), b.t().contiguous().t()
    if layout == "views":  # rows and columns far apart in memory
        a, b = (torch.stack((t, t), dim=-1).flatten(-2)[:, ::2] for t in (a, b))
    return a, b, bias


LONGEST = [(130, 192, 260), (40, 191, 256), (512, 130, 300)]  # as long as sums that oneDNN gets
SIZES = [(1, 7, 5), (0, 4, 3), (33, 17, 31), (64, 128, 64), (130, 1, 9), (9, 65, 1)]


@pytest.mark.parametrize("layout", ["plain", "transposed", "views"])
@pytest.mark.parametrize("size", SIZES + LONGEST, ids=str)
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("mean", [0.0, 1.0], ids=["both-signs", "one-sign"])
def test_onednn_is_no_less_accurate_than_torch(onednn, size, layout, with_bias, mean):
    """Terms of one sign are the harder data: rounding errors then grow with the sum and do not cancel."""
    a, b, bias = operands(*size, torch.float32, layout)
    a, b = a + mean, b + mean
    bias = bias if with_bias else None
    truth = a.double() @ b.double() + (0 if bias is None else bias.double())
    eager = torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    assert_no_less_accurate(products.mm(a, b, bias), eager, truth, "mm")
    assert onednn == [(a.shape, b.shape)]
    assert torch.equal(products.mm(a, b, bias), products.mm(a, b, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_without_instructions_16_bit_products_are_rounded_once(no_instructions, dtype, size):
    a, b, bias = operands(*size, dtype, "plain")
    rounded = (a.double() @ b.double() + bias.double()).to(dtype)
    torch.testing.assert_close(products.mm(a, b, bias), rounded, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    out = torch.full((2, size[0], size[2]), float("nan"), dtype=dtype)
    batch = products.bmm(torch.stack((a, -a)), torch.stack((b, b)), out=out)
    assert batch is out and torch.equal(out[1], -out[0])
    torch.testing.assert_close(out[0], products.mm(a, b))


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("ways", ["onednn", "no_instructions"])
def test_the_frozen_layers_product_is_torchs_own_bit_for_bit(request, ways, dtype, with_bias):
    request.getfixturevalue(ways)
    x, weight_t, bias = operands(65, 40, 33, dtype, "transposed")
    bias = bias if with_bias else None
    nothing = (torch.zeros(65, 6, dtype=dtype), torch.zeros(6, 33, dtype=dtype))
    out = products.mm_sum((x, weight_t), nothing, bias, as_frozen=True)
    assert torch.equal(out, F.linear(x, weight_t.t(), bias))


def fused(x, weight, bias, a, b, router):
    return mosld_linear(x, weight, bias, a, b, router, top_k=2, scale=1.0, backend="eager")[0]


def staged(x, weight, bias, a, b, router):
    return staged_linear(x, weight, bias, a, b, lambda z, _: z.repeat(1, 4), scale=1.0, router_weight=router)[0]


@pytest.mark.parametrize("operator", [fused, staged])
def test_a_fresh_layer_leaves_the_frozen_layers_product_to_torch(monkeypatch, operator):
    """Two libraries may give the same bits on this processor and others on the next: what counts is who is asked."""
    asked, mm = [], products.mm

    def recorded(a, b, bias=None):
        asked.append((a.shape[1], b.shape[1]))
        return mm(a, b, bias)

    monkeypatch.setattr(products, "mm", recorded)
    case = make_case(Shape(T=65, D_in=40, D_out=33, R=3, E=4, K=2)).to(torch.float32)
    x, weight, bias, a, b, router = case[:6]
    y = operator(x, weight, bias, a, torch.zeros_like(b), router)
    assert (12, 33) in asked and (40, 33) not in asked  # the update's, of E * R columns, and not the frozen layer's
    assert torch.equal(y, F.linear(x, weight, bias))


@pytest.mark.parametrize("ways", ["onednn", "no_instructions"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_sum_of_two_products_is_no_less_accurate_than_torch(request, ways, dtype):
    request.getfixturevalue(ways)
    (a, b, bias), (c, d, _) = operands(65, 40, 33, dtype, "plain"), operands(65, 6, 33, dtype, "plain")
    truth = a.double() @ b.double() + c.double() @ d.double() + bias.double()
    eager = torch.addmm(bias, a, b) + c @ d
    assert_no_less_accurate(products.mm_sum((a, b), (c, d), bias), eager, truth, "sum")


def test_sizes_and_processor_decide_not_values(monkeypatch):
    monkeypatch.setattr(products, "_is_amd_with_onednn", lambda: True)

    def faster(rows, summed, columns):
        return products._onednn_is_faster(torch.empty(rows, summed), torch.empty(summed, columns))

    assert faster(4096, 64, 1024) and faster(4096, 16, 1024) and faster(512, 192, 512)
    assert not faster(64, 64, 64)  # too little to do
    assert (
        not faster(512, 193, 512) and not faster(512, 512, 512) and not faster(4096, 1024, 64)
    )  # sums too long for its accuracy
    with monkeypatch.context() as switched_off:
        switched_off.setattr(torch.backends.mkldnn, "enabled", False)
        assert not faster(4096, 64, 1024)
    assert faster(4096, 64, 1024)
    monkeypatch.setattr(products, "_is_amd_with_onednn", lambda: False)
    assert not faster(4096, 64, 1024)


def test_the_processor_is_asked_once_and_float32_always_has_instructions():
    assert isinstance(products._is_amd_with_onednn(), bool)
    assert not products.lacks(torch.float32) and not products.lacks(torch.float64)
