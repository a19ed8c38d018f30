"""The uplink of R-MTLLMF (arXiv 2411.18220): task vectors that arrive with additive Gaussian noise.

    tau^_q = tau_q + n_q,   E|n_q|^2 = |tau_q|^2 / SNR

    ideal        no noise
    isotropic    covariance proportional to the identity
    worst        all of the same power in one direction, that of the strongest user's vector: covariance P v v^T

The paper's body was not at hand: it derives worst cases for a sum-rate and a strongest-user criterion; the second is built
here, as a rank-one covariance. Users freeze their embeddings and do not send them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

NOISES = ("ideal", "isotropic", "worst")


def received(
    vectors: Sequence[dict[str, Tensor]], noise: str, snr_db: float, generator: torch.Generator
) -> list[dict[str, Tensor]]:
    """What the base station receives of each user's vector (weight's name -> update), in float32.

    snr_db: ratio of each vector's power to its noise's, in decibel. generator: decides the noise.
    raises ValueError for an unknown noise and an SNR that is not finite.
    """
    if noise not in NOISES:
        raise ValueError(f"noise must be one of {', '.join(NOISES)}, got {noise!r}")
    if noise == "ideal":
        return [dict(vector) for vector in vectors]
    if not math.isfinite(snr_db):
        raise ValueError(f"snr_db must be finite, got {snr_db}")
    strongest = max(vectors, key=power)
    arrived = []
    for vector in vectors:
        wanted = power(vector) / 10 ** (snr_db / 10)  # E|n|^2
        if noise == "isotropic":
            sigma = math.sqrt(wanted / sum(tau.numel() for tau in vector.values()))
            own = {name: sigma * torch.randn(tau.shape, generator=generator) for name, tau in vector.items()}
        else:
            gain = math.sqrt(wanted / power(strongest)) * float(torch.randn((), generator=generator))
            own = {name: gain * strongest[name] for name in vector}
        arrived.append({name: tau + own[name] for name, tau in vector.items()})
    return arrived


def power(vector: dict[str, Tensor]) -> float:
    """|tau|^2 over all weights"""
    return sum(float(tau.double().square().sum()) for tau in vector.values())
