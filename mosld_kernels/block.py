"""A mixture of whole SwiGLU feed-forward blocks over one frozen block: the part between the base products.

    g  = W1 x,  u  = W3 x     [T, F]       of the frozen block, once for all experts
    z1 = A1 x~, z3 = A3 x~    [T, E * R]
    for each of a token's K experts e, with gate w_k:
        h_k = act(g + s B1_e z1_e) * (u + s B3_e z3_e)                                  [T, F]
    hidden = sum_k w_k h_k                             [T, F]       for one product with W2, which is linear
    mixed  = s sum_k w_k (place of e) A2_e h~_k        [T, E * R]   for one product with B2

    y = W2 hidden + B2 mixed

Experts are picked by zeroing the places of z1 and z3 that belong to others, so each slot k is two skinny products and
no token is sorted or gathered. Of the size [T, F] backward keeps g and u alone, and a bit an element and slot where h
is dropped. Where the gates sum to one, hidden is h_1 + sum_{k>1} w_k (h_k - h_1): while all experts are equal, as at
the start, that is the frozen block's own to the last bit.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .bits import draw_bits, zeroed
from .precision import no_autocast, router_dtype
from .products import add_mm, mm
from .stages import Down, Up, drop_weight
from .transforms import needs_plain_operators

DOWN_STREAM = 2  # of the mask on A2; that of A1 and A3, one above the other, has stream 0


class Settings(NamedTuple):
    act: Callable[[Tensor], Tensor]  # elementwise
    rank: int  # R
    scale: float  # s
    sums_to_one: bool = True  # whether the gates of every token do
    dropout_p: float = 0.0  # of h before A2


class Inputs(NamedTuple):
    """All but `chosen` and `weights` are in one dtype."""

    gate: Tensor  # [T, F], g
    up: Tensor  # [T, F], u
    z_gate: Tensor  # [T, E * R], z1
    z_up: Tensor  # [T, E * R], z3
    gate_b: Tensor  # [F, E * R], B1
    up_b: Tensor  # [F, E * R], B3
    down_a: Tensor  # [E * R, F], A2
    weights: Tensor  # [T, K], the gates
    chosen: Tensor  # int64 [T, K], whose they are, no expert twice


def down(
    x: Tensor,
    gate_a: Tensor,
    up_a: Tensor,
    router_weight: Tensor,
    dropout_a: float,
    dropout_x: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, D], gate_a and up_a [E * R, D], router_weight [E, D] -> z_gate, z_up [T, E * R], router logits [T, E]

    dropout_a: on elements of the A's, whose mask is a pure function of `seed`, int64 [1].
    dropout_x: on x before them, drawn from torch's generator.
    The logits are in float32 (float64 for float64 x).
    """
    keep = draw_bits(x, dropout_x) if dropout_x else None
    both = drop_weight(torch.cat((gate_a, up_a)), dropout_a, seed, 0, x.dtype)
    router_weight = router_weight.to(x.dtype)
    if _by_hand(x):
        _, z, logits = Down.apply(x, both, router_weight, keep)  # pyright: ignore
    else:
        z, logits = F.linear(zeroed(x, keep), both), F.linear(x, router_weight)
    if 0 < dropout_x < 1:
        z = z / (1 - dropout_x)
    return z[:, : len(gate_a)], z[:, len(gate_a) :], logits.to(router_dtype(x.dtype))


def drop_down_a(down_a: Tensor, dropout_a: float, seed: Tensor | None) -> Tensor:
    """A2 with its elements dropped"""
    return drop_weight(down_a, dropout_a, seed, DOWN_STREAM, down_a.dtype)


def up(out: Tensor, mixed: Tensor, down_b: Tensor) -> Tensor:
    """out [T, D], mixed [T, E * R], down_b [D, E * R] -> out + mixed B2^T"""
    down_b = down_b.to(mixed.dtype)
    update = Up.apply(None, None, None, mixed, down_b) if _by_hand(mixed) else F.linear(mixed, down_b)
    return out + update  # pyright: ignore


def _by_hand(x: Tensor) -> bool:
    is_plain_tensor = type(x) in (Tensor, torch.nn.Parameter)
    return is_plain_tensor and not torch.compiler.is_compiling() and not needs_plain_operators()


def block_mixture(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """-> hidden [T, F], mixed [T, E * R]. Dropout on h draws from torch's generator."""
    slots = range(inputs.chosen.shape[1])
    bits = [draw_bits(inputs.gate, settings.dropout_p) for _ in slots] if settings.dropout_p else []
    if not _by_hand(inputs.gate):
        return _forward(inputs, settings, bits)
    return _Block.apply(settings, *inputs, *bits)  # pyright: ignore


def _forward(inputs: Inputs, settings: Settings, bits: list[Tensor]) -> tuple[Tensor, Tensor]:
    mixed, hidden = torch.zeros_like(inputs.z_gate), torch.zeros_like(inputs.gate)
    first = hidden
    for k in range(inputs.chosen.shape[1]):
        place, weight = _place(inputs, settings, k), inputs.weights[:, k : k + 1]
        g, u = _expert(inputs, settings, place)
        h = settings.act(g) * u
        through = _product(_drop(h, bits, k, settings), inputs.down_a.t())
        mixed = mixed + torch.where(place, (settings.scale * weight) * through, 0.0)
        if settings.sums_to_one and k == 0:
            hidden = first = h
        else:
            hidden = hidden + weight * (h - first if settings.sums_to_one else h)
    return hidden, mixed


def _place(inputs: Inputs, settings: Settings, k: int) -> Tensor:
    """-> bool [T, E * R], True at the places of each token's k-th expert"""
    places = torch.arange(inputs.z_gate.shape[1], device=inputs.chosen.device)
    return torch.div(places, settings.rank, rounding_mode="floor") == inputs.chosen[:, k : k + 1]


def _expert(inputs: Inputs, settings: Settings, place: Tensor) -> tuple[Tensor, Tensor]:
    """-> what goes into the activation and what it is multiplied with, each [T, F]"""
    z_gate = torch.where(place, settings.scale * inputs.z_gate, 0.0)
    z_up = torch.where(place, settings.scale * inputs.z_up, 0.0)
    return _plus(inputs.gate, z_gate, inputs.gate_b.t()), _plus(inputs.up, z_up, inputs.up_b.t())


def _drop(h: Tensor, bits: list[Tensor], k: int, settings: Settings) -> Tensor:
    """Linear in h, so the same maps the gradient."""
    if not bits:
        return h
    kept = zeroed(h, bits[k])
    return kept / (1 - settings.dropout_p) if settings.dropout_p < 1 else kept


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b) if torch.compiler.is_compiling() else mm(a, b)


def _plus(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(base, a, b) if torch.compiler.is_compiling() else add_mm(base.clone(), a, b)


class _Block(torch.autograd.Function):
    """Saves its inputs and computes each expert again in backward, slot by slot."""

    @staticmethod
    def forward(ctx, settings: Settings, *tensors: Tensor):
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        count = len(Inputs._fields)
        return _forward(Inputs._make(tensors[:count]), settings, list(tensors[count:]))

    @staticmethod
    @once_differentiable
    def backward(ctx, dhidden, dmixed):
        count, settings = len(Inputs._fields), ctx.settings
        saved = ctx.saved_tensors  # asked for once: activation checkpointing hands them out a single time
        inputs, bits = Inputs._make(saved[:count]), list(saved[count:])
        dhidden = torch.zeros_like(inputs.gate) if dhidden is None else dhidden
        dmixed = torch.zeros_like(inputs.z_gate) if dmixed is None else settings.scale * dmixed
        grads = [torch.zeros_like(tensor) for tensor in inputs[:-2]]
        sums = Inputs._make((*grads, inputs.weights, inputs.chosen))
        dweights = []
        with no_autocast(dhidden.device.type):
            for k in range(inputs.chosen.shape[1]):
                dweights.append(_slot_backward(inputs, settings, bits, k, dhidden, dmixed, sums))
        # The settings, the experts' indices and the masks have none.
        return None, *grads, torch.stack(dweights, dim=1), None, *[None] * len(bits)


def _slot_backward(
    inputs: Inputs, settings: Settings, bits: list[Tensor], k: int, dhidden: Tensor, dmixed: Tensor, grads: Inputs
) -> Tensor:
    """Adds the k-th expert's share to `grads`, in place; -> the gradient of its gate [T]

    That is of sum_k w_k h_k also where the gates sum to one and forward wrote it otherwise: the two differ by a number
    that all gates of a token have in common, which no change of gates that sum to one notices.
    """
    place, weight = _place(inputs, settings, k), inputs.weights[:, k : k + 1]
    g, u = _expert(inputs, settings, place)
    with torch.enable_grad():
        g.requires_grad_()
        activated = settings.act(g)
    h = activated.detach() * u
    dropped = _drop(h, bits, k, settings)
    dplaced = torch.where(place, dmixed, 0.0)  # [T, E * R], of w_k A2 h~
    through = mm(dropped, inputs.down_a.t())
    dweight = (dhidden * h).sum(1) + (dplaced * through).sum(1)
    dplaced = weight * dplaced
    add_mm(grads.down_a, dplaced.t(), dropped)
    dh = _drop(mm(dplaced, inputs.down_a), bits, k, settings).add_(weight * dhidden)
    (dg,) = torch.autograd.grad(activated, g, dh * u)
    du = dh.mul_(activated.detach())
    grads.gate.add_(dg)
    grads.z_gate.add_(torch.where(place, settings.scale * mm(dg, inputs.gate_b), 0.0))
    add_mm(grads.gate_b, dg.t(), torch.where(place, settings.scale * inputs.z_gate, 0.0))
    grads.up.add_(du)
    grads.z_up.add_(torch.where(place, settings.scale * mm(du, inputs.up_b), 0.0))
    add_mm(grads.up_b, du.t(), torch.where(place, settings.scale * inputs.z_up, 0.0))
    return dweight
