"""Philox-4x32-10, a counter-based generator: four 32-bit words, a pure function of a key (the seed) and a counter.

(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.) Here in torch, for any device and for tracing;
`numpy_mask` has it in NumPy, three to four times as fast on a CPU; the Triton one is `tl.philox`.
"""

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(seed: Tensor, counter: Tensor) -> Tensor:
    """The four words of Philox-4x32-10 for each counter, equal to `tl.philox` with 32-bit counters.

    seed: int64 [1]; its low and high 32 bits are the key.
    counter: int64 [4, N], each entry in [0, 2^32).
    returns: int64 [4, N], each entry in [0, 2^32).
    """
    # Words 0 and 2 are multiplied, words 1 and 3 are mixed in: two tensors [2, N] halve the number of operations,
    # and for a mask of a few thousand words the number of operations is the whole cost.
    multiplied, mixed_in = counter[0::2], counter[1::2]
    # Minus 2^32, so that the product with a 32-bit word always fits a signed 64-bit integer.
    multipliers = _pair((MULTIPLIERS[0] - 2**32, MULTIPLIERS[1] - 2**32), seed.device).view(2, 1)
    key = torch.cat((seed, seed >> 32)) & WORD  # [2]
    rounds = torch.arange(ROUNDS, device=seed.device).view(ROUNDS, 1)
    keys = (key + _pair(KEY_STEPS, seed.device) * rounds) & WORD  # [ROUNDS, 2]
    for round_key in keys.view(ROUNDS, 2, 1).unbind():
        product = multiplied * multipliers
        high = ((product >> 32) + multiplied) & WORD  # adds back the 2^32 * word that the multipliers leave out
        multiplied = high.flip(0) ^ mixed_in ^ round_key
        mixed_in = (product & WORD).flip(0)
    return torch.stack((multiplied, mixed_in), dim=1).flatten(0, 1)


def _pair(values: tuple[int, int], device: torch.device) -> Tensor:
    """Two constants as an int64 tensor made on the device: a copy from the host would break CUDA-graph capture."""
    first, second = values
    return first + (second - first) * torch.arange(2, device=device)
