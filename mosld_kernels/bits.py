"""Masks drawn from torch's generator, one bit an element: dropout on x and on h, which backward reads again."""

import torch
from torch import Tensor

DIGITS = 24  # of the binary fraction 1 - p: as exact as float32


def draw_bits(x: Tensor, p: float) -> Tensor:
    """A mask for x [T, D] from torch's generator -> uint8, eight elements a byte; a bit is 1 with probability 1 - p

    From random words, one for each binary digit of 1 - p, 64 elements at a time: w | r has probability (P(w) + 1) / 2,
    w & r has P(w) / 2. A tenth of the time that drawing a number for every element takes on a CPU.
    """
    level, digits = round((1 - p) * 2**DIGITS), DIGITS
    words = torch.full((-(-x.numel() // 64),), -1 if level == 2**DIGITS else 0, dtype=torch.int64, device=x.device)
    if 0 < level < 2**DIGITS:
        while level % 2 == 0:  # a last digit of 0 does nothing to a word of zeros
            level, digits = level // 2, digits - 1
        for digit in range(digits):
            # Not randint_like: torch.compile takes two such calls with the same arguments for one, and their masks
            # would be equal.
            random = torch.randint(-(2**63), 2**63 - 1, words.shape, device=x.device)
            words = words | random if level >> digit & 1 else words & random
    return words.view(torch.uint8)


def unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """uint8 as `draw_bits` made it -> bool of `shape`"""
    one_each = (1 << torch.arange(8, dtype=torch.uint8, device=bits.device)).unsqueeze(1)
    # Element e is bit e // n of byte e % n, for n bytes: two passes over neighbours.
    return (bits & one_each).ne(0).flatten()[: shape.numel()].view(shape)


def zeroed(x: Tensor, bits: Tensor | None) -> Tensor:
    """x where the mask has a 1, zero elsewhere; x itself without a mask"""
    return x if bits is None else torch.where(unpacked(bits, x.shape), x, 0.0)
