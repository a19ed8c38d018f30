"""The uplink of R-MTLLMF (arXiv 2411.18220): task vectors that arrive with additive Gaussian noise.

    tau^_q = tau_q + n_q,   E|n_q|^2 = |tau_q|^2 / SNR

    ideal        no noise
    isotropic    covariance proportional to the identity
    worst        all of the same power in one direction, that of the strongest user's vector: covariance P v v^T

The paper's body was not at hand: it derives worst cases for a sum-rate and a strongest-user criterion; the second is
built here, as a rank-one covariance. Users freeze their embeddings and do not send them.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .elementwise import Deltas, per_vector

NOISES = ("ideal", "isotropic", "worst")


def received(walk: Deltas, noise: str, snr_db: float, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """What the base station receives, one weight at a time: its name, tau_q + n_q of all users [K, *shape] in float32.

    walk: the weights that the users send. noise: one of NOISES. generator: decides the noise.
    snr_db: ratio of each user's power to its noise's, in decibel.
    raises ValueError for an unknown noise and an SNR that is not finite.
    """
    if noise not in NOISES:
        raise ValueError(f"noise must be one of {', '.join(NOISES)}, got {noise!r}")
    if not math.isfinite(snr_db):
        raise ValueError(f"snr_db must be finite, got {snr_db}")
    if noise == "ideal":
        yield from walk()
        return
    powers, size = sent_powers(walk)
    wanted = powers / 10 ** (snr_db / 10)  # E|n_q|^2
    strongest = int(powers.argmax())
    # Isotropic noise does not use these numbers. They are drawn for it too, so that a seed keeps its noise.
    along = (wanted / powers.max()).sqrt() * torch.randn(len(powers), generator=generator, dtype=torch.float64)
    sigma = (wanted / size).sqrt()
    for name, taus in walk():
        if noise == "isotropic":
            normal = torch.randn(taus.shape, generator=generator)
            yield name, taus + per_vector(sigma.to(taus.dtype), taus) * normal
        else:
            direction = taus[strongest].unsqueeze(0)
            yield name, taus + torch.tensordot(along.to(taus.dtype).unsqueeze(1), direction, dims=1)


def sent_powers(walk: Deltas) -> tuple[Tensor, int]:
    """-> |tau_q|^2 of each user over all weights [K], float64, and how many numbers a user sends"""
    powers, size = torch.zeros(()).double(), 0
    for _, taus in walk():
        powers = powers + taus.double().flatten(1).square().sum(1)
        size += taus[0].numel()
    return powers, size
