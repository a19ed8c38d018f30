"""The problem sizes that are measured, by name, and the dtypes."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from .names import require_known

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DROPOUT = 0.1  # of every adapter that is measured


class LayerShape(NamedTuple):
    """One linear layer with its mixture: T tokens, D_in and D_out features, R rank, E experts, K chosen."""

    T: int
    D_in: int
    D_out: int
    R: int
    E: int
    K: int

    def __str__(self) -> str:
        return f"{self.T} tokens, {self.D_in} -> {self.D_out}, R={self.R}, E={self.E}, K={self.K}"


# The linear layers of real models are measured at as many tokens as a CPU takes in a minute.
LAYERS = {
    "cpu-1024": LayerShape(4096, 1024, 1024, 8, 8, 2),
    "cpu-2048": LayerShape(2048, 2048, 2048, 8, 8, 2),
    "cpu-768-3072": LayerShape(4096, 768, 3072, 16, 8, 2),
    "decode-2048": LayerShape(1, 2048, 2048, 8, 8, 2),
    "gpu-4096": LayerShape(8192, 4096, 4096, 16, 8, 2),
    "gpu-4096-14336": LayerShape(8192, 4096, 14336, 16, 8, 2),
    "gpu-14336-4096": LayerShape(8192, 14336, 4096, 16, 8, 2),
    "gpu-2048": LayerShape(8192, 2048, 2048, 16, 8, 2),
    "gpu-4096-e32": LayerShape(8192, 4096, 4096, 16, 32, 2),
    "gpu-4096-t1024": LayerShape(1024, 4096, 4096, 16, 8, 2),
    "llama-2-7b-qkvo": LayerShape(512, 4096, 4096, 16, 8, 2),
    "llama-2-7b-gate-up": LayerShape(512, 4096, 11008, 16, 8, 2),
    "llama-2-7b-down": LayerShape(512, 11008, 4096, 16, 8, 2),
    "llama-3-8b-qo": LayerShape(512, 4096, 4096, 16, 8, 2),
    "llama-3-8b-kv": LayerShape(512, 4096, 1024, 16, 8, 2),
    "llama-3-8b-gate-up": LayerShape(512, 4096, 14336, 16, 8, 2),
    "llama-3-8b-down": LayerShape(512, 14336, 4096, 16, 8, 2),
    "qwen2.5-7b-qo": LayerShape(512, 3584, 3584, 16, 8, 2),
    "qwen2.5-7b-kv": LayerShape(512, 3584, 512, 16, 8, 2),
    "qwen2.5-7b-gate-up": LayerShape(512, 3584, 18944, 16, 8, 2),
    "qwen2.5-7b-down": LayerShape(512, 18944, 3584, 16, 8, 2),
    "bert-base-qkvo": LayerShape(4096, 768, 768, 16, 8, 2),
    "bert-base-up": LayerShape(4096, 768, 3072, 16, 8, 2),
    "bert-base-down": LayerShape(4096, 3072, 768, 16, 8, 2),
    "toy": LayerShape(64, 32, 48, 4, 4, 2),
}


def named(known: Mapping[str, LayerShape], names: Sequence[str]) -> dict[str, LayerShape]:
    """The shapes of these names; raises ValueError for a name that does not exist, listing those that do."""
    require_known("shape", names, known)
    return {name: known[name] for name in names}
