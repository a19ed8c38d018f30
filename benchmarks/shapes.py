"""The problem sizes that are measured, by name."""

from typing import NamedTuple


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
    "toy": LayerShape(64, 32, 48, 4, 4, 2),
}
