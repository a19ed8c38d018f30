"""The launches that are compiled: mixtures, tokens, dtypes and architectures, and sizes that are awkward."""

import itertools
from collections.abc import Iterator, Sequence

from ..timing.shapes import DTYPES, LayerShape
from .machine_code import ARCHS
from .recorded import Problem

# R and E.
MIXTURES = ((16, 8), (8, 8), (1, 1), (5, 3), (64, 4), (64, 8), (48, 5), (24, 33), (16, 32), (8, 64), (128, 64))
DIAGONAL = ((8, 8), (16, 4), (4, 8), (5, 3), (16, 8), (4, 32))  # with an A for each expert
# One that fills the chip, and one that needs planes.
TOKENS = (8192, 256)
# Sizes of one, which a compiler takes for constants, and rows that no vector of 16 bytes divides.
AWKWARD = (
    LayerShape(1, 4096, 4096, 16, 8, 2),
    LayerShape(8191, 4096, 4096, 16, 8, 2),
    LayerShape(1, 1, 1, 1, 1, 1),
    LayerShape(100, 1, 4095, 16, 8, 2),
    LayerShape(4097, 4095, 1, 64, 8, 2),
)


def grid(archs: Sequence[int] = ARCHS, quick: bool = False) -> list[Problem]:
    """quick: one layer a dtype instead of the whole grid."""
    problems = [] if quick else [*_mixtures(archs), *_mixtures_with_own_a(archs), *_awkward(archs)]
    for arch in archs:
        shape = LayerShape(8192, 4096, 14336, 16, 8, 2)
        for dtype in DTYPES:
            problems.append(Problem(shape, dtype, dtype, arch))
        problems.append(Problem(shape, "float16", "float32", arch))
        problems.append(Problem(shape, "float32", "float32", arch, "tf32"))
    return problems


def _mixtures(archs: Sequence[int]) -> Iterator[Problem]:
    for arch, (R, E), T in itertools.product(archs, MIXTURES, TOKENS):
        yield from _both_dtypes(LayerShape(T, 4096, 4096, R, E, min(2, E)), arch)


def _mixtures_with_own_a(archs: Sequence[int]) -> Iterator[Problem]:
    for arch, (R, E), T in itertools.product(archs, DIAGONAL, TOKENS):
        yield from _both_dtypes(LayerShape(T, 4096, 4096, R, E, min(2, E)), arch, mixing="diagonal")


def _awkward(archs: Sequence[int]) -> Iterator[Problem]:
    for arch, shape in itertools.product(archs, AWKWARD):
        yield from _both_dtypes(shape, arch)


def _both_dtypes(shape: LayerShape, arch: int, mixing: str = "expand") -> Iterator[Problem]:
    for dtype in ("bfloat16", "float32"):
        yield Problem(shape, dtype, "float32", arch, mixing=mixing)
