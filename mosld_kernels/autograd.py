"""Forward and backward in closed form. What is saved for backward is x, hidden, gates and the seed: never a mask, never
anything of size [T, D_out] or [T, E, D_out].

    u  = dy B  viewed [T, E, R]       dg_e = s <u_e, z>        dz = s sum_e g_e u_e
    dl = g * (dg - sum_e g_e dg_e)    on the chosen experts, plus what arrives for the logits
    dB = dy^T h                       [dA~ | dWr] = [dz | dl]^T x        dA = keep * dA~ / (1 - p)
    dx = dy W0 + dz A~ + dl Wr
"""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import eager
from .dropout import draw_keep, drop_elements


class Inputs(NamedTuple):
    """The tensors of one call, x flattened to [T, D_in]; the same order as the gradients that `backward` returns."""

    x: Tensor  # [T, D_in]
    weight: Tensor | None  # [D_out, D_in]; None leaves the base product out
    bias: Tensor | None  # [D_out]
    shared_a: Tensor  # [R, D_in]
    expert_b: Tensor  # [D_out, E * R]
    router_weight: Tensor  # [E, D_in]
    seed: Tensor | None  # int64 [1]


class Settings(NamedTuple):
    top_k: int
    scale: float
    dropout_p: float


def forward(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> out [T, D_out], logits [T, E], hidden [T, R], gates [T, E]"""
    x, weight, bias, shared_a, expert_b, router_weight, seed = inputs
    keep = draw_keep(seed, shared_a.shape, settings.dropout_p)
    down_weight = eager.stack_down(drop_elements(shared_a, keep, settings.dropout_p, x.dtype), router_weight)
    hidden, logits, gates = eager.down(x, down_weight, shared_a.shape[0], settings.top_k)
    out = eager.up(eager.mix(hidden, gates, settings.scale), expert_b, x, weight, bias)
    return out, logits, hidden, gates


def backward(
    dout: Tensor | None,
    dlogits: Tensor | None,
    hidden: Tensor,
    gates: Tensor,
    inputs: Inputs,
    settings: Settings,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """The gradients of x, weight, bias, shared_a, expert_b, router_weight, in that order; None where not needed.

    dout [T, D_out] and dlogits [T, E] are the incoming gradients; None stands for zeros.
    """
    x, weight, bias, shared_a, expert_b, router_weight, seed = inputs
    needs_x, needs_weight, needs_bias, needs_a, needs_b, needs_router = needs
    if dout is None:
        dout = x.new_zeros(x.shape[0], expert_b.shape[0])
    dout = dout.contiguous()
    grads: list[Tensor | None] = [None] * 6
    if needs_weight and weight is not None:
        grads[1] = torch.mm(dout.t(), x)
    if needs_bias and bias is not None:
        grads[2] = dout.sum(0)
    if needs_b:
        grads[4] = eager.grad_expert_b(dout, eager.mix(hidden, gates, settings.scale)).to(expert_b.dtype)
    if not (needs_x or needs_a or needs_router):
        return grads

    dmixed = torch.mm(dout, expert_b.to(x.dtype))
    dhidden, drouted = eager.mix_backward(dmixed, hidden, gates, settings.scale)
    drouted = drouted if dlogits is None else drouted + dlogits
    dprojected = eager.down_backward(dhidden, drouted, x.dtype)
    keep = draw_keep(seed, shared_a.shape, settings.dropout_p)
    if needs_x:
        dropped_a = drop_elements(shared_a, keep, settings.dropout_p, x.dtype)
        grads[0] = eager.grad_x(dprojected, eager.stack_down(dropped_a, router_weight), dout, weight)
    if needs_a or needs_router:
        ddown = torch.mm(dprojected.t(), x)  # [R + E, D_in]
        rank = shared_a.shape[0]
        # Copies, so that the two gradients share no storage: an optimiser or a collective may work on each in place.
        grads[3] = drop_elements(ddown[:rank].clone(), keep, settings.dropout_p, shared_a.dtype)
        grads[5] = ddown[rank:].to(router_weight.dtype, copy=True)
    return grads


def _no_autocast(device: str) -> contextlib.AbstractContextManager:
    if not torch.amp.is_autocast_available(device):  # the meta device, for one
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


class MoSLDFunction(torch.autograd.Function):
    """Eager mode's way in: no dispatcher between the caller and the products."""

    @staticmethod
    def forward(ctx, x, weight, bias, shared_a, expert_b, router_weight, seed, top_k, scale, dropout_p):
        inputs, settings = (
            Inputs(x, weight, bias, shared_a, expert_b, router_weight, seed),
            Settings(top_k, scale, dropout_p),
        )
        out, logits, hidden, gates = forward(inputs, settings)
        ctx.save_for_backward(hidden, gates, *inputs)
        ctx.settings = settings
        ctx.set_materialize_grads(False)  # no gradient for the logits is the common case and costs nothing
        return out, logits

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlogits):
        hidden, gates, *inputs = ctx.saved_tensors
        needs = ctx.needs_input_grad[:6]
        with _no_autocast(hidden.device.type):  # routing stays in float32 inside the user's autocast, too
            grads = backward(dout, dlogits, hidden, gates, Inputs(*inputs), ctx.settings, needs)
        return *grads, None, None, None, None
