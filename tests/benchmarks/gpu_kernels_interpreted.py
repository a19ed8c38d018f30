"""The measurements' Triton kernels against torch, run as a program under TRITON_INTERPRET=1."""

from unittest import mock

import torch
from torch.nn import functional as F

from benchmarks.gpu import kernels
from mosld_kernels import dropout, numpy_mask, philox


def check_linear() -> None:
    for tile in kernels.LINEAR_TILES:
        for dtype, rtol in ((torch.float32, 1e-5), (torch.float16, 1e-3)):  # one rounding to float16 is 5e-4
            for T, D_in, D_out in ((65, 72, 136), (300, 64, 40)):  # beyond whole tiles, and more than one group
                x, weight = torch.randn(T, D_in).to(dtype), torch.randn(D_out, D_in).to(dtype)
                out = torch.full((T, D_out), float("nan"), dtype=dtype)
                kernels.linear(x, weight, out, tile._replace(tokens=32, outputs=32, features=32), 5)
                wanted = x.float() @ weight.float().T
                torch.testing.assert_close(out.float(), wanted, rtol=rtol, atol=1e-4)


def check_philox() -> None:
    seed, elements = torch.tensor([2**40 + 7]), 2500
    for rounds in (10, 7):
        with mock.patch.object(philox, "ROUNDS", rounds), mock.patch.object(numpy_mask, "ROUNDS", rounds):
            keep = dropout.keep_mask(seed, (1, elements), 0.3).flatten()
        wanted = F.pad(keep, (0, 3 * kernels.PHILOX_BLOCK - elements)).view(3, -1).sum(1)
        for four_per_call in (True, False):
            assert torch.equal(kernels.philox_kept(seed, elements, 0.3, rounds, four_per_call).long(), wanted)


def check_the_rest() -> None:
    x = torch.randn(5, 9001)
    torch.testing.assert_close(kernels.stream(x, torch.empty(3)).sum(), x.sum(), rtol=1e-4, atol=1e-3)
    assert kernels.touch(torch.zeros(1)).item() == 1


if __name__ == "__main__":
    torch.manual_seed(0)
    check_linear()
    check_philox()
    check_the_rest()
