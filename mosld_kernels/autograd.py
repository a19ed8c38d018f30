"""Forward and backward in closed form. What is saved for backward is x, hidden, gates and the seed: never a mask, never
anything of size [T, D_out] or [T, E, D_out].

    u  = dy B  viewed [T, E, R]       dg_e = s <u_e, z>        dz = s sum_e g_e u_e
    dl = g * (dg - sum_e g_e dg_e)    on the chosen experts, plus what arrives for the logits
    dB = dy^T h                       [dA~ | dWr] = [dz | dl]^T x        dA = keep * dA~ / (1 - p)
    dx = dy W0 + dz A~ + dl Wr

With mixing "diagonal" (an A for each expert) z is [T, E, R], and dg_e = s <u_e, z_e>, dz_e = s g_e u_e; all else is the
same. Below, "R or E * R" are the rows of A: R shared ones, or R for each expert.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .precision import no_autocast


class Inputs(NamedTuple):
    """The tensors of one call, x flattened to [T, D_in]; the same order as the gradients that `backward` returns."""

    x: Tensor  # [T, D_in]
    weight: Tensor | None  # [D_out, D_in]; None leaves the base product out
    bias: Tensor | None  # [D_out]
    shared_a: Tensor  # [R or E * R, D_in]
    expert_b: Tensor  # [D_out, E * R]
    router_weight: Tensor  # [E, D_in]
    seed: Tensor | None  # int64 [1]


class Settings(NamedTuple):
    top_k: int
    scale: float
    dropout_p: float
    backend: str = "eager"  # or "triton": which set of steps; the closed form is the same
    mixing: str = "expand"  # or "diagonal": one A for all experts, or one for each


def _steps(backend: str) -> Any:  # either module: both have the same functions
    if backend == "triton":
        from . import triton as steps  # here, because it imports Triton
    else:
        from . import eager as steps
    return steps


def forward(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> out [T, D_out], logits [T, E], hidden [T, R or E * R], gates [T, E]"""
    x, weight, bias, shared_a, expert_b, router_weight, seed = inputs
    top_k, scale, p, backend, mixing = settings
    steps = _steps(backend)
    down_weight, expert_b, _ = steps.prepare(shared_a, router_weight, expert_b, seed, p, x.dtype)
    hidden, logits, gates, mixed = steps.down(x, down_weight, shared_a.shape[0], top_k, scale, mixing)
    return steps.up(x, weight, bias, mixed, expert_b), logits, hidden, gates


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
    top_k, scale, p, backend, mixing = settings
    steps = _steps(backend)
    if dout is None:
        dout = x.new_zeros(x.shape[0], expert_b.shape[0])
    dout = dout.contiguous()
    dx = dweight = dbias = dshared_a = dexpert_b = drouter = None
    if needs_weight and weight is not None:
        dweight = torch.mm(dout.t(), x)
    if needs_bias and bias is not None:
        dbias = dout.sum(0)
    if needs_b:
        dexpert_b = steps.grad_expert_b(dout, hidden, gates, top_k, scale, expert_b.dtype, mixing)
    if needs_x or needs_a or needs_router:
        dtype = shared_a.dtype
        # Made again rather than saved: it costs a pass over A and the router, not over x.
        down_weight, expert_b, keep = steps.prepare(shared_a, router_weight, expert_b, seed, p, x.dtype, needs_x)
        dprojected = steps.up_backward(dout, expert_b, hidden, gates, dlogits, top_k, scale, mixing)
        if needs_a or needs_router:
            dshared_a, drouter = steps.down_backward(dprojected, x, keep, p, shared_a.shape[0], dtype)
        if down_weight is not None:
            dx = steps.grad_x(dout, weight, dprojected, down_weight)
    return [dx, dweight, dbias, dshared_a, dexpert_b, drouter]


class MoSLDFunction(torch.autograd.Function):
    """Eager mode's way in: no dispatcher between the caller and the products."""

    @staticmethod
    def forward(ctx, x, weight, bias, shared_a, expert_b, router_weight, seed, *settings):
        inputs, settings = Inputs(x, weight, bias, shared_a, expert_b, router_weight, seed), Settings(*settings)
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
        with no_autocast(hidden.device.type):  # routing stays in float32 inside the user's autocast, too
            grads = backward(dout, dlogits, hidden, gates, Inputs(*inputs), ctx.settings, needs)
        # The seed and the settings have none.
        return *grads, *[None] * (1 + len(ctx.settings))
