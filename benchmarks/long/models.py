"""What the long runs (`soak`, `curves`) train: small models, and text with something to learn."""

import torch
from torch import Tensor

from ..cpu.training import SIZES, Size
from ..peers.known import Mixture

MODELS = {
    "toy": SIZES["toy"],
    "small": Size(64, 2, 4, 176, 256, 4, 32, Mixture(8, 8, 2, 0.1)),
}
FOLLOWERS = 4  # tokens that may come after a token


def text(size: Size, rows: int) -> Tensor:
    """-> int64 [rows, size.length], the same in every call: each token is followed by one of four, the first of them in
    half of the cases. The entropy, which no model goes below, is 1.21 nats a token: 7/4 log 2.
    """
    generator = torch.Generator().manual_seed(0)
    followers = torch.randint(size.vocabulary, (size.vocabulary, FOLLOWERS), generator=generator)
    shares = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8])
    tokens = [torch.randint(size.vocabulary, (rows,), generator=generator)]
    for _ in range(size.length - 1):
        choice = torch.multinomial(shares, rows, replacement=True, generator=generator)
        tokens.append(followers[tokens[-1], choice])
    return torch.stack(tokens, dim=1)
