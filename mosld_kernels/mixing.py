"""The mixing matrices M(x) of mixtures of LoRA experts: h = M(x) z, between the down- and the up-projection.

    z [..., R_in]     gates [..., n], of every token or broadcast over tokens     h [..., R_out]

    expand      h[e, i] = g_e z_i                  one A, a B per expert        MoSLD, HydraLoRA
    diagonal    h[e, i] = g_e z[e, i]              an A and a B per expert      MoLA, LoRAMoE, MoELoRA, X-LoRA
    reduce      h[i]    = sum_e g_e z[e, i]        an A per expert, one B       MoSLD with the up-projection shared
    core        h[e, :] = g_e P_e z                one A, a core per expert     MALoRA
    task_core   h[e, :] = g_e L_t z                one A, a core per task       MTL-LoRA
    grouped     h[i, j] = g[group of j, i] z_j     one softmax per group        MoDE
    dense       h       = G z                      a matrix per token           MoR1E / T-REX, conditional MixLoRA

None loops over experts, and none makes anything larger than [tokens, R_out] beside a core's [tokens, E, R_up]. They
are plain differentiable torch on small tensors; z comes in the routing's dtype, and h is rounded once, by the caller.
"""

import math

from torch import Tensor


def expand(z: Tensor, gates: Tensor) -> Tensor:
    """z [..., R], gates [..., E] -> [..., E * R]"""
    return (gates.unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2)


def diagonal(z: Tensor, gates: Tensor) -> Tensor:
    """z [..., E * R], gates [..., E] -> [..., E * R]"""
    return (gates.unsqueeze(-1) * z.unflatten(-1, (gates.shape[-1], -1))).flatten(-2)


def reduce(z: Tensor, gates: Tensor) -> Tensor:
    """z [..., E * R], gates [..., E] -> [..., R]"""
    return (gates.unsqueeze(-2) @ z.unflatten(-1, (gates.shape[-1], -1))).squeeze(-2)


def core(z: Tensor, gates: Tensor, cores: Tensor) -> Tensor:
    """z [..., R], gates [..., E], cores [E, R_up, R] -> [..., E * R_up]"""
    through = (z @ cores.flatten(0, 1).t()).unflatten(-1, cores.shape[:2])  # [..., E, R_up], one product
    return (gates.unsqueeze(-1) * through).flatten(-2)


def task_core(z: Tensor, gates: Tensor, cores: Tensor) -> Tensor:
    """z [batch, ..., R], gates [batch, ..., E], cores [batch, R, R], of each row's task -> [batch, ..., E * R]

    Or of one vector: z [R], gates [E], cores [R, R].
    """
    if z.dim() > 1:  # a product per row
        tokens = math.prod(z.shape[1:-1])
        return expand((z.reshape(len(z), tokens, z.shape[-1]) @ cores.transpose(-1, -2)).view(z.shape), gates)
    return expand(cores @ z, gates)


def grouped(z: Tensor, gates: Tensor) -> Tensor:
    """z [..., R], gates [..., G, E] -> [..., E * R]; each R / G neighbours of z are a group with gates of its own"""
    by_group = gates.transpose(-1, -2).unsqueeze(-1)  # [..., E, G, 1]
    return (by_group * z.unflatten(-1, (gates.shape[-2], -1)).unsqueeze(-3)).flatten(-3)


def dense(z: Tensor, matrix: Tensor) -> Tensor:
    """z [..., R_in], matrix [..., R_out, R_in] -> [..., R_out]"""
    if matrix.dim() > 2 and matrix.shape[-3] == 1:  # one for all tokens of a row: a product per row
        return z @ matrix.squeeze(-3).transpose(-1, -2)
    return (matrix @ z.unsqueeze(-1)).squeeze(-1)
