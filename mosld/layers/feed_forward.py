"""MixLoRA's mixture (arXiv 2404.15159) of one frozen SwiGLU block: every expert is the whole block with LoRAs.

    y = sum_{k in top-K} g_k W2_k ( act(W1_k x) * W3_k x ),    W_k = W + s B_k A_k for each of the three linear layers

The router reads the block's input. W1 x, W3 x and the product with W2 are done once for all experts, and only what lies
between them for each of a token's K experts: see `mosld_kernels.block`. A starts Kaiming-uniform and B at zero.
"""

import contextlib
from typing import Any, cast

import torch
from torch import Tensor, nn

from mosld_kernels import block
from mosld_kernels.gating import largest, top_p_gates
from mosld_kernels.precision import autocasts, no_autocast

from ..mixture.spec import BLOCK_PARTS
from .adapter import AdapterWeight, MoSLDAdapter, init_weight

LINEARS = ("gate_proj", "up_proj", "down_proj")


class BlockAdapter(MoSLDAdapter):
    """The mixture beside one feed-forward block: one router, and E experts of rank r for each of its linear layers.

    hidden_size, intermediate_size: of the block. hyperparameters: fields of `mosld.mixture.Mixture`, mixing="block".

    gate_a.weight, up_a.weight: [E r, hidden_size]; gate_b.weight, up_b.weight: [intermediate_size, E r]; down_a.weight:
    [E r, intermediate_size]; down_b.weight: [hidden_size, E r]; router.weight: [E, hidden_size]. Expert e has the
    places e r to e r + r of every E r. What else the module has is as in MoSLDAdapter.

    Dropout: `dropout` on elements of the A's; `input_dropout` on x, once for gate and up and all experts, and on what
    goes into down, for each chosen expert anew. gate="top_p" has E slots a token, not K, most with a gate of zero.
    mixing_options renormalise=False makes the gates the router's probabilities, which need not sum to one: with top_k=1
    that is the Switch Transformer's router, with gate="top_p" MixLoRA's dynamic one. Such a block does not start equal
    to the frozen one.
    """

    parts = BLOCK_PARTS
    gate_a: AdapterWeight
    gate_b: AdapterWeight
    up_a: AdapterWeight
    up_b: AdapterWeight
    down_a: AdapterWeight
    down_b: AdapterWeight

    def __init__(self, hidden_size: int, intermediate_size: int, **hyperparameters: Any):
        super().__init__(hidden_size, intermediate_size, **hyperparameters)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for part in (self.gate_a, self.up_a, self.down_a):
            init_weight(part.weight, self.mixture.down_std)
        for part in (self.gate_b, self.up_b, self.down_b):
            nn.init.zeros_(part.weight)
        init_weight(self.router.weight, self.mixture.router_std)
        self._mark_started()

    def forward(self, x: Tensor, base: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x [..., hidden_size], the frozen block -> the block's output [..., hidden_size]"""
        self._expect_whole()
        if self.backend == "triton":
            raise RuntimeError("backend='triton' cannot run: mixing='block' runs in torch products; backend='auto' can")
        m = self.mixture
        call = self._call(x, ("dropout",))
        rates = (call.rates.get("dropout", 0.0), call.rates.get("input_dropout", 0.0))
        seed = call.seed
        gate, up = base.gate_proj(x), base.up_proj(x)  # inside the user's autocast, as in the frozen block
        dtype, leading = gate.dtype, x.shape[:-1]
        with _own_precision(x):
            z_gate, z_up, logits = block.down(
                x.reshape(-1, x.shape[-1]).to(dtype),
                self.gate_a.weight,
                self.up_a.weight,
                self.router.weight,
                *rates,
                seed,
            )
            logits = logits / m.temperature
            weights, chosen = self._gates(logits)
            inputs = block.Inputs(
                gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1]), z_gate, z_up,
                self.gate_b.weight.to(dtype), self.up_b.weight.to(dtype),
                block.drop_down_a(self.down_a.weight, rates[0], seed).to(dtype), weights.to(dtype), chosen,
            )  # fmt: skip
            renormalise: Any = m.option("renormalise")
            settings = block.Settings(base.act_fn, m.r, call.scale, renormalise, rates[1])
            hidden, mixed = block.block_mixture(inputs, settings)
        out = base.down_proj(hidden.view(*leading, hidden.shape[-1]))
        with _own_precision(x):
            out = block.up(out.reshape(-1, out.shape[-1]), mixed, self.down_b.weight).view(out.shape)
        logits = logits.view(*leading, logits.shape[-1])
        return self._kept(x, out, call, router_logits=logits if m.tokens_choose else None)

    def _gates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits [T, E] -> the gates of each token's slots and whose they are, each [T, K]"""
        m = self.mixture
        values, chosen = largest(logits, self.top_k)
        if m.gate == "top_p":
            return top_p_gates(logits, m.top_p, m.option("renormalise")).gather(-1, chosen), chosen
        if m.option("renormalise"):
            return values.softmax(-1), chosen
        return logits.softmax(-1).gather(-1, chosen), chosen


def _own_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """Dtypes are chosen here, not by the user's autocast."""
    return no_autocast(x.device.type) if autocasts(x) else contextlib.nullcontext()


def is_block(module: nn.Module) -> bool:
    """Whether `module` has what a SwiGLU feed-forward block of the Llama kind has: three linear layers and `act_fn`."""
    linears = [getattr(module, name, None) for name in LINEARS]
    return all(isinstance(linear, nn.Linear) for linear in linears) and callable(getattr(module, "act_fn", None))


@torch.no_grad()
def check_block(module: nn.Module, name: str) -> None:
    """raises ValueError for a block that computes something else than down_proj(act_fn(gate_proj(x)) * up_proj(x)).

    It is asked, with two tokens, unless its weights are not there (the meta device, ZeRO-3's shards) or quantised.
    """
    linears: list[Any] = [getattr(module, part) for part in LINEARS]
    if not all(type(linear) is nn.Linear and not linear.weight.is_meta and linear.weight.numel() for linear in linears):
        return
    dropout = [
        own for own, child in module.named_modules() if "Dropout" in type(child).__name__ and getattr(child, "p", 1)
    ]
    weight = linears[0].weight
    x = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(1, 2, -1)
    was_training = module.training
    out = module.eval()(x)
    module.train(was_training)
    gate_proj, up_proj, down_proj = linears
    expected = down_proj(cast(Any, module).act_fn(gate_proj(x)) * up_proj(x))
    if dropout or not isinstance(out, Tensor) or not torch.equal(out, expected):
        raise ValueError(
            f"mixing='block' cannot be placed on {name}: a {type(module).__name__} computes something else than "
            "down_proj(act_fn(gate_proj(x)) * up_proj(x))"
        )
