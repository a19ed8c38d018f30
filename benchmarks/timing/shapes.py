"""The problem sizes that are measured, by name."""

from collections.abc import Mapping, Sequence
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


# On the CPU at hand, on a GPU, and the linear layers of real models by name, at as many tokens as a CPU takes.
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
    **{
        f"{model}-{layer}": LayerShape(tokens, d_in, d_out, 16, 8, 2)
        for model, tokens, layers in (
            ("llama-2-7b", 512, {"qkvo": (4096, 4096), "gate-up": (4096, 11008), "down": (11008, 4096)}),
            (
                "llama-3-8b",
                512,
                {"qo": (4096, 4096), "kv": (4096, 1024), "gate-up": (4096, 14336), "down": (14336, 4096)},
            ),
            (
                "qwen2.5-7b",
                512,
                {"qo": (3584, 3584), "kv": (3584, 512), "gate-up": (3584, 18944), "down": (18944, 3584)},
            ),
            ("bert-base", 4096, {"qkvo": (768, 768), "up": (768, 3072), "down": (3072, 768)}),
        )
        for layer, (d_in, d_out) in layers.items()
    },
    "toy": LayerShape(64, 32, 48, 4, 4, 2),
}


def named(known: Mapping[str, LayerShape], names: Sequence[str]) -> dict[str, LayerShape]:
    """The shapes of these names; raises ValueError for a name that does not exist, listing those that do."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"there is no shape {', '.join(unknown)}; there are: {', '.join(known)}")
    return {name: known[name] for name in names}
