"""The mask on a CPU, drawn in NumPy: the same bits as `keep_mask` in torch, in a quarter of the time.

Importing this file imports NumPy, which the operator can do without.
"""

import sys

import numpy as np
import torch
from torch import Tensor

from .philox import KEY_STEPS, MULTIPLIERS, ROUNDS, WORD

LOW, HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)  # where a 64-bit integer's halves lie


def drawn(seed: int, rows: int, cols: int, limit: int, layer_id: int = 0, stream_id: int = 0) -> Tensor:
    """bool [rows, cols], True where the element's word is at least `limit`"""
    blocks = -(-rows * cols // 4)  # one Philox call decides four neighbours
    kept = np.empty((blocks, 4), np.bool_)
    for lane, word in enumerate(philox_numpy(seed, blocks, 0, layer_id, stream_id)):
        np.greater_equal(word, limit, out=kept[:, lane])
    return torch.from_numpy(kept.reshape(-1)[: rows * cols].reshape(rows, cols))


def philox_numpy(seed: int, count: int, word1: int = 0, word2: int = 0, word3: int = 0) -> tuple[np.ndarray, ...]:
    """The same words from NumPy, for the counters (n, word1, word2, word3) with n from 0 to count - 1.

    seed: any integer, of which the low 64 bits are the key. count: at most 2^32. The words: each in [0, 2^32).
    returns: four arrays, uint32 [count].
    """
    multiplied, mixed_in = np.empty((2, count), np.uint32), np.empty((2, count), np.uint32)  # as in `philox`
    multiplied[0], multiplied[1] = np.arange(count, dtype=np.uint32), word2
    mixed_in[0], mixed_in[1] = word1, word3
    multipliers = np.array(MULTIPLIERS, np.uint64).reshape(2, 1)
    key = np.array((seed & WORD, seed >> 32 & WORD), np.uint64)
    steps = np.arange(ROUNDS, dtype=np.uint64).reshape(ROUNDS, 1) * np.array(KEY_STEPS, np.uint64)
    keys = (key + steps).astype(np.uint32).reshape(ROUNDS, 2, 1)
    # Two buffers in turn, and views of their halves made once: for a few thousand words calls are the whole cost.
    products = np.empty((2, 2, count), np.uint64)
    halves = products.view(np.uint32).reshape(2, 2, count, 2)[:, ::-1]
    high, low = (list(halves[..., half]) for half in (HIGH, LOW))
    for number, round_key in enumerate(keys):
        turn = number % 2
        np.multiply(multiplied, multipliers, out=products[turn])
        np.bitwise_xor(high[turn], mixed_in, out=multiplied)
        np.bitwise_xor(multiplied, round_key, out=multiplied)
        mixed_in = low[turn]
    return multiplied[0], mixed_in[0], multiplied[1], mixed_in[1]
