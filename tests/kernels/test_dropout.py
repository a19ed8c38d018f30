"""The mask is Philox-4x32-10, drawn as DESIGN says, and behaves as dropout."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mosld_kernels import keep_mask
from mosld_kernels.dropout import draw_keep, drop_elements
from mosld_kernels.numpy_mask import philox_numpy
from mosld_kernels.philox import philox

MASK32 = 0xFFFFFFFF


def philox_by_hand(seed: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Salmon et al., in Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(10):
        p0, p2 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p2 >> 32) ^ c1 ^ k0, p2 & MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def seed_tensor(seed: int) -> torch.Tensor:
    return torch.tensor([seed])


def test_known_answers_of_the_authors():
    """The vectors that Random123 ships for philox4x32-10."""
    ones = 0xFFFFFFFF
    pi_counter, pi_key = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    vectors = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones, ones, ones, ones), (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi_counter, pi_key, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for counter, (k0, k1), words in vectors:
        seed = k0 | k1 << 32
        signed = seed - 2**64 if seed >= 2**63 else seed
        assert tuple(philox(seed_tensor(signed), torch.tensor(counter).view(4, 1)).flatten().tolist()) == words


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, 2**62 - 1, -1])
def test_words_equal_python_integers_for_every_seed_and_counter(seed):
    counters = [(0, 0, 0, 0), (1, 0, 0, 0), (MASK32, 0, 7, MASK32), (123456789, 1, 2, 3)]
    words = philox(seed_tensor(seed), torch.tensor(counters).t())
    assert [tuple(column) for column in words.t().tolist()] == [philox_by_hand(seed, c) for c in counters]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, 2**62 - 1, -1, -(2**63)])
@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_numpy_draws_the_words_of_torch(seed, count):
    salts = (0, 7, MASK32)
    counter = torch.stack((torch.arange(count), *(torch.full((count,), word) for word in salts)))
    words = [torch.from_numpy(word.astype("int64")) for word in philox_numpy(seed, count, *salts)]
    assert torch.equal(torch.stack(words), philox(seed_tensor(seed), counter))


def test_masks_share_no_memory():
    """The host remembers masks: a caller who writes into one must not change the next."""
    first = keep_mask(seed_tensor(3), (4, 6), 0.5)
    kept = first.clone()
    first.fill_(False)
    assert torch.equal(keep_mask(seed_tensor(3), (4, 6), 0.5), kept) and kept.any()


def test_a_mask_drawn_in_inference_serves_where_gradients_are():
    with torch.inference_mode():
        draw_keep(seed_tensor(99), (4, 6), 0.5)
    keep = draw_keep(seed_tensor(99), (4, 6), 0.5)
    values = torch.ones(4, 6, requires_grad=True)
    drop_elements(values, keep, 0.5, torch.float32).sum().backward()
    assert torch.equal(values.grad, keep * 2.0)


def test_a_trace_does_not_hold_one_mask():
    traced = make_fx(lambda seed: keep_mask(seed, (4, 16), 0.5))(seed_tensor(1))
    for seed in (1, 2, 3):
        assert torch.equal(traced(seed_tensor(seed)), keep_mask(seed_tensor(seed), (4, 16), 0.5))


@pytest.mark.parametrize("salts", [(2, 9), (0, 1)])
def test_a_traced_mask_has_the_salts_of_an_eager_one(salts):
    """Traced, it is drawn in torch; eager on a CPU, in NumPy."""
    traced = make_fx(lambda seed: keep_mask(seed, (5, 13), 0.5, *salts))(seed_tensor(1))
    assert torch.equal(traced(seed_tensor(7)), keep_mask(seed_tensor(7), (5, 13), 0.5, *salts))


@pytest.mark.parametrize("shape", [(8, 64), (3, 5), (1, 1), (7, 33), (0, 4)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.999999])
def test_mask_follows_the_specification_element_by_element(shape, p):
    rows, cols = shape
    mask = keep_mask(seed_tensor(77), shape, p, layer_id=2, stream_id=9)
    assert mask.shape == shape and mask.dtype == torch.bool
    for row in range(rows):
        for col in range(cols):
            n = row * cols + col
            word = philox_by_hand(77, (n >> 2, 0, 2, 9))[n & 3]
            assert mask[row, col].item() == (word >= round(p * 2**32))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_drop_rate_is_p_within_binomial_bounds(p):
    n = 64 * 1024
    kept = sum(keep_mask(seed_tensor(seed), (64, 1024), p).sum().item() for seed in range(4))
    deviation = (4 * n * p * (1 - p)) ** 0.5
    assert abs(kept - 4 * n * (1 - p)) < 5 * deviation


def test_seeds_rows_layers_and_streams_are_uncorrelated():
    base = keep_mask(seed_tensor(5), (16, 4096), 0.5).double()
    others = [
        keep_mask(seed_tensor(6), (16, 4096), 0.5),
        keep_mask(seed_tensor(5 + 2**32), (16, 4096), 0.5),
        keep_mask(seed_tensor(5), (16, 4096), 0.5, layer_id=1),
        keep_mask(seed_tensor(5), (16, 4096), 0.5, stream_id=1),
        base.roll(1, 0),
    ]
    bound = 5 / base.numel() ** 0.5
    for other in others:
        assert abs(torch.corrcoef(torch.stack((base.flatten(), other.double().flatten())))[0, 1]) < bound


def test_dropping_scales_what_is_kept_and_zeroes_the_rest():
    values = torch.randn(8, 32, dtype=torch.float64)
    keep = draw_keep(seed_tensor(3), (8, 32), 0.25)
    dropped = drop_elements(values, keep, 0.25, torch.float64)
    assert torch.equal(dropped, torch.where(keep, values / 0.75, torch.zeros_like(values)))


@pytest.mark.parametrize("given, wanted", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_dropping_rounds_once_from_one_dtype_to_another(given, wanted):
    """float32 adapters in a bfloat16 model, and their gradients the other way."""
    values = torch.randn(64, 32).to(given)
    keep = draw_keep(seed_tensor(3), (64, 32), 0.1)
    once = torch.where(keep, values.float() / (1 - 0.1), 0.0).to(wanted)
    assert torch.equal(drop_elements(values, keep, 0.1, wanted), once)


def test_the_ends_of_the_range_behave_as_torch_dropout_does():
    values = torch.full((4, 16), float("inf"))
    values[0] = 1.0
    assert drop_elements(values, draw_keep(None, (4, 16), 0.0), 0.0, torch.float32) is values
    everything_dropped = drop_elements(values, draw_keep(seed_tensor(1), (4, 16), 1.0), 1.0, torch.float32)
    assert torch.equal(everything_dropped, torch.zeros(4, 16))
    almost = 1 - 1e-12  # rounds to the greatest threshold: nothing is kept, nothing overflows
    assert torch.equal(
        drop_elements(values, draw_keep(seed_tensor(1), (4, 16), almost), almost, torch.float32), torch.zeros(4, 16)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tensor(3), (2, 2), 0.1), r"seed must be an int64 tensor of shape \[1\], got torch.int64 \[\]"),
        ((torch.tensor([3.0]), (2, 2), 0.1), r"seed must be an int64 tensor of shape \[1\], got torch.float32 \[1\]"),
        ((3, (2, 2), 0.1), r"seed must be an int64 tensor of shape \[1\], got 3"),
        ((torch.tensor([3]), (2, 2), 1.5), r"p must be in \[0, 1\], got 1.5"),
        ((torch.tensor([3]), (2, -2), 0.5), r"shape must be \(R, D_in\), both at least 0, got \(2, -2\)"),
        ((torch.tensor([3]), (2,), 0.5), r"shape must be \(R, D_in\)"),
    ],
)
def test_bad_values_name_the_rule_and_the_value(arguments, message):
    with pytest.raises(ValueError, match=message):
        keep_mask(*arguments)


def test_dropping_without_a_seed_is_refused():
    with pytest.raises(ValueError, match="dropout_p=0.1 needs a seed"):
        draw_keep(None, (2, 2), 0.1)
