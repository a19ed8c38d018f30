"""Merges that are decided element by element: task arithmetic and TIES. One weight in memory at a time.

task arithmetic    theta = theta_0 + lambda sum_k tau_k                          (arXiv 2212.04089)
TIES               trim each tau_k to its largest share, elect a sign for every element, average those that agree
                                                                                 (arXiv 2306.01708)

The authors' code of TIES keeps one element more than the share, int(d K) + 1 of d, and where what is trimmed adds up to
exactly zero it elects the sign that most elements have. Both rules are here.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

# Each call begins a new walk over the weights: name, updates [K, *shape].
Deltas = Callable[[], Iterable[tuple[str, Tensor]]]
# Of a float32's 31 bits without the sign, which order magnitudes like integers.
LOW_BITS = 15
TIES_RULES = ("paper", "code")


def summed(
    walk: Deltas, scales: float | Sequence[float] | Tensor | Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """name -> sum_k scales_k tau_k [*shape], in float32; scales: one, or K, or K of every weight by its name"""
    for name, taus in walk():
        of_weight = scales[name] if isinstance(scales, Mapping) else scales
        of_vectors = torch.as_tensor(of_weight, dtype=torch.float32).expand(len(taus))
        yield name, torch.tensordot(of_vectors, taus, dims=1)


def ties(walk: Deltas, keep: float = 0.2, rule: str = "paper") -> Iterator[tuple[str, Tensor]]:
    """name -> the vectors that TIES merges, [K, *shape]: trimmed, and zero where their sign is not the elected one.

    keep: share of each vector's elements that trimming leaves, over all its weights together, in (0, 1].
    rule: "paper", or "code" as the authors' code counts and elects; it walks over the weights once more.
    """
    limits = thresholds(walk, keep, rule)
    majority = _majority_sign(walk, limits) if rule == "code" else None
    for name, taus in walk():
        trimmed, elected = _trimmed_and_elected(taus, limits)
        if majority is None:
            agrees = trimmed.sign() == elected
        else:
            elected = torch.where(elected == 0, majority, elected)
            # Where not even the majority has a sign, the code keeps what is negative.
            agrees = torch.where(elected > 0, trimmed > 0, trimmed < 0)
        yield name, torch.where(agrees, trimmed, 0.0)


def _trimmed_and_elected(taus: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """taus [K, *shape], limits [K] -> taus without their small elements, and the sign of their sum [*shape]"""
    trimmed = torch.where(taus.abs() >= per_vector(limits, taus), taus, 0.0)
    elected = trimmed.sum(0).sign()
    return trimmed, elected


def _majority_sign(walk: Deltas, limits: Tensor) -> Tensor:
    """-> the sign that more elements of all weights elect, a scalar; zero for a draw"""
    total = torch.zeros((), dtype=torch.float64)
    for _, taus in walk():
        _, elected = _trimmed_and_elected(taus, limits)
        total += elected.sum(dtype=torch.float64).cpu()
    return total.sign().float()


def per_vector(values: Tensor, taus: Tensor) -> Tensor:
    """values [K] -> [K, 1, ...], to be broadcast over taus [K, *shape]"""
    return values.view(-1, *[1] * (taus.dim() - 1))


def disjoint_mean(parts: Tensor) -> Tensor:
    """[K, *shape] as `ties` yields them -> the mean over those that are not zero [*shape]"""
    return parts.sum(0) / parts.ne(0).sum(0).clamp(min=1)


def thresholds(walk: Deltas, keep: float, rule: str = "paper") -> Tensor:
    """-> [K], the least magnitude among the largest share `keep` of each vector; zero where all are kept.

    rule: how many elements a share of d is, "paper" for d keep rounded, "code" for int(d keep) + 1.

    Exact, without holding a vector: the bits of a float32's magnitude are ordered as integers, so the upper ones are
    counted in one walk and the lower ones, where the threshold lies, in a second.
    raises ValueError for a share outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be in (0, 1], got {keep}")
    upper: Tensor | None = None
    for _, taus in walk():
        bits = _magnitude_bits(taus) >> LOW_BITS
        counts = torch.stack([torch.bincount(of_vector, minlength=1 << (31 - LOW_BITS)) for of_vector in bits])
        upper = counts if upper is None else upper + counts
    if upper is None:
        raise ValueError("there is nothing to merge")
    size = int(upper[0].sum())  # of every vector; the share of it in Python's double precision
    count = min(int(size * keep) + 1, size) if rule == "code" else max(round(size * keep), 1)
    wanted = torch.full((len(upper),), count)
    place, before = _bin_of_rank(upper, wanted)
    lower = torch.zeros(len(upper), 1 << LOW_BITS, dtype=torch.long)
    for _, taus in walk():
        bits = _magnitude_bits(taus)
        for k, of_vector in enumerate(bits):
            inside = of_vector[of_vector >> LOW_BITS == place[k]] & ((1 << LOW_BITS) - 1)
            lower[k] += torch.bincount(inside, minlength=1 << LOW_BITS)
    last, _ = _bin_of_rank(lower, wanted - before)
    # A threshold of zero keeps all elements. Those that it should not keep are zeros, which change nothing.
    limit = ((place << LOW_BITS) | last).to(torch.int32).view(torch.float32)
    return limit


def _bin_of_rank(counts: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """counts [K, bins] of ever larger magnitudes, wanted [K]: how many elements, the largest first
    -> [K], the bin in which the last wanted element is; [K], how many are in the bins above it"""
    from_here = counts.flip(1).cumsum(1).flip(1)  # elements in this bin or one of larger magnitude
    place = (from_here >= wanted.unsqueeze(1)).sum(1) - 1
    own = place.unsqueeze(1)
    above = from_here.gather(1, own) - counts.gather(1, own)
    return place, above.squeeze(1)


def _magnitude_bits(taus: Tensor) -> Tensor:
    """[K, *shape] float32 -> [K, n] int64"""
    return taus.float().abs().contiguous().view(torch.int32).flatten(1).long()
