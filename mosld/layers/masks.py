"""Attention masks of every form, brought to [rows, tokens]: which tokens are real."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def reduced(mask: Any) -> Tensor | None:
    """What a model was given as its attention mask -> [rows, tokens], nonzero at real tokens, or None without one.

    A mask [rows, tokens] is left as it is. Of several by kind of layer, the one of full attention is taken. A mask
    [rows, 1 or heads, tokens, tokens], of what each token may attend to (as booleans, or numbers that are added to the
    scores), has a real token where the token may attend to itself; a row in which everything is allowed stands for one
    in which nothing was, which models write so for padding on the left. Of another form, None.
    """
    if isinstance(mask, Mapping):
        entries = [mask.get("full_attention"), *mask.values()]
        mask = next((entry for entry in entries if isinstance(entry, Tensor)), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask
    if mask.dim() == 4 and mask.shape[-1] == mask.shape[-2]:
        allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] >= 0
        itself = allowed.diagonal(dim1=-2, dim2=-1)
        everything = allowed.all(-1)
        none_padded = everything.all(-1, keepdim=True)  # where nothing is causal, and nothing padding
        everything[:, -1] = False  # the last token of a causal mask attends to all
        return itself & (~everything | none_padded)
    return None
