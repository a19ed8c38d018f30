"""What MoSLD is measured against, each over the same frozen weight: libraries' layers as they are, and formulas.

`PEERS` is name -> builder; a builder takes the frozen nn.Linear and a `Mixture` and returns the module to run. One that
cannot run here raises `Absent` with the reason.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import peft
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mosld import MoSLDLinear
from mosld_kernels import reference
from mosld_kernels.precision import router_dtype

from ..timing.names import require_known
from .optional import OPTIONAL, Absent

FROZEN, OURS, LORA = "frozen linear", "MoSLD", "PEFT LoRA"


@dataclass(frozen=True)
class Mixture:
    """The settings that all peers share, as far as each has them."""

    r: int
    num_experts: int
    top_k: int
    dropout: float


def parameters_of(linear: nn.Linear, mixture: Mixture) -> int:
    """How many parameters MoSLD trains beside `linear`."""
    shared_a = mixture.r * linear.in_features
    router = mixture.num_experts * linear.in_features
    expert_b = mixture.num_experts * mixture.r * linear.out_features
    return shared_a + router + expert_b


def equal_rank(linear: nn.Linear, mixture: Mixture) -> int:
    """The rank at which one LoRA trains about as many parameters as MoSLD."""
    return max(1, round(parameters_of(linear, mixture) / (linear.in_features + linear.out_features)))


def mosld_layer(linear: nn.Linear, mixture: Mixture) -> MoSLDLinear:
    return MoSLDLinear.from_linear(linear, alpha=2 * mixture.r, **dataclasses.asdict(mixture))


def own_a_layer(linear: nn.Linear, mixture: Mixture) -> MoSLDLinear:
    return MoSLDLinear.from_linear(linear, alpha=2 * mixture.r, mixing="diagonal", **dataclasses.asdict(mixture))


def triton_layer(linear: nn.Linear, mixture: Mixture) -> MoSLDLinear:
    if linear.weight.device.type != "cuda":
        raise Absent("Triton's kernels need an NVIDIA GPU")
    layer = mosld_layer(linear, mixture)
    layer.adapter.backend = "triton"
    return layer


class ReferenceLayer(nn.Module):
    """MoSLD's formula as differentiable torch, without the closed form: what autograd makes of it."""

    def __init__(self, linear: nn.Linear, mixture: Mixture):
        super().__init__()
        self.layer = mosld_layer(linear, mixture)

    def forward(self, x: Tensor) -> Tensor:
        adapter, layer = self.layer.adapter, self.layer
        seed = torch.randint(2**62, (1,), device=x.device) if self.training and adapter.dropout else None
        tensors = (adapter.shared_a.weight, adapter.expert_b.weight, adapter.router.weight)
        p = adapter.dropout if seed is not None else 0.0
        settings: dict[str, Any] = dict(top_k=adapter.top_k, scale=adapter.scale, dropout_p=p, seed=seed)
        return reference.mosld_linear(x, layer.weight, layer.bias, *tensors, **settings)[0]


def _wide(logits: Tensor) -> Tensor:
    return logits.to(router_dtype(logits.dtype))


class ConcatenatedProduct(nn.Module):
    """MoSLD with what anyone would do to make it quick: A and the router in one product, the experts in another.

    Ordinary torch and autograd, torch's own random numbers and top-k: the strongest simple rival.
    """

    def __init__(self, linear: nn.Linear, mixture: Mixture):
        super().__init__()
        self.layer, self.mixture = mosld_layer(linear, mixture), mixture

    def forward(self, x: Tensor) -> Tensor:
        adapter, r = self.layer.adapter, self.mixture.r
        a = F.dropout(adapter.shared_a.weight, self.mixture.dropout, self.training)
        projected = F.linear(x, torch.cat((a, adapter.router.weight)))
        values, chosen = _wide(projected[..., r:]).topk(self.mixture.top_k, dim=-1)
        gates = torch.zeros_like(projected[..., r:]).scatter(-1, chosen, values.softmax(-1).to(x.dtype))
        mixed = (adapter.scale * gates.unsqueeze(-1) * projected[..., :r].unsqueeze(-2)).flatten(-2)
        return F.linear(x, self.layer.weight, self.layer.bias) + F.linear(mixed, adapter.expert_b.weight)


class HydraLoop(nn.Module):
    """The published form of HydraLoRA: a Python loop over experts, each with a dropout of its own on x, and A
    computed anew.

    y = x W0^T + b0 + s sum_e softmax(x Wr^T)_e B_e A dropout(x)
    """

    def __init__(self, linear: nn.Linear, mixture: Mixture):
        super().__init__()
        self.layer = mosld_layer(linear, mixture)

    def forward(self, x: Tensor) -> Tensor:
        adapter = self.layer.adapter
        gates = _wide(F.linear(x, adapter.router.weight)).softmax(-1).to(x.dtype)
        y = F.linear(x, self.layer.weight, self.layer.bias)
        for e in range(adapter.num_experts):
            expert = adapter.expert_b.weight[:, e * adapter.r : (e + 1) * adapter.r]
            hidden = F.linear(F.dropout(x, adapter.dropout, self.training), adapter.shared_a.weight)
            y = y + gates[..., e : e + 1] * F.linear(hidden, expert) * adapter.scale
        return y


class MolaLoop(nn.Module):
    """The published form of MoLA: a loop over experts with an A each, over the tokens that chose the expert.

    y = x W0^T + b0 + s sum_{e in top-K} g_e B_e A_e dropout(x), the K largest of a softmax renormalised
    """

    def __init__(self, linear: nn.Linear, mixture: Mixture):
        super().__init__()
        self.linear, self.mixture = linear, mixture
        like = linear.weight
        self.a, self.b = nn.ParameterList(), nn.ParameterList()
        for _ in range(mixture.num_experts):
            self.a.append(nn.Parameter(like.new_empty(mixture.r, linear.in_features)))
            self.b.append(nn.Parameter(like.new_empty(linear.out_features, mixture.r)))
        self.router = nn.Parameter(like.new_empty(mixture.num_experts, linear.in_features))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        probabilities = _wide(F.linear(tokens, self.router)).softmax(-1)
        weights, chosen = probabilities.topk(self.mixture.top_k, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        y = F.linear(tokens, self.linear.weight, self.linear.bias)
        for e, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            token, place = (chosen == e).nonzero(as_tuple=True)
            hidden = F.linear(F.dropout(tokens[token], self.mixture.dropout, self.training), a)
            y = y.index_add(0, token, 2 * weights[token, place].unsqueeze(1) * F.linear(hidden, b))
        return y.view(*x.shape[:-1], -1)


class _AccumulateAfter(torch.autograd.Function):
    """One LoRA, closed form: the base product first, B's accumulated onto it, as fused LoRA libraries do."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        out = F.linear(x, weight, bias)
        out.addmm_(x @ a.t(), b.t(), alpha=scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, weight, a, b = ctx.saved_tensors
        down = dout @ b  # [T, r]
        da = torch.mm(down.t(), x).mul_(ctx.scale)
        # This way round dout is walked in memory order.
        db = torch.mm((x @ a.t()).t(), dout).mul_(ctx.scale).t()
        dx = dout @ weight
        dx.addmm_(down, a, alpha=ctx.scale)
        return dx, None, None, da, db, None


class AccumulateAfter(nn.Module):
    """One LoRA without dropout in the pattern of fused LoRA libraries."""

    def __init__(self, linear: nn.Linear, mixture: Mixture):
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(linear.weight.new_empty(mixture.r, linear.in_features))
        self.b = nn.Parameter(linear.weight.new_empty(linear.out_features, mixture.r))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        out = _AccumulateAfter.apply(tokens, self.linear.weight, self.linear.bias, self.a, self.b, 2.0)
        return cast(Tensor, out).view(*x.shape[:-1], -1)


def from_peft(config: peft.PeftConfig, linear: nn.Linear) -> nn.Module:
    """PEFT's layer of this method around `linear`, its weights in the linear's dtype."""
    model = peft.get_peft_model(cast(Any, nn.Sequential(linear)), config, autocast_adapter_dtype=False)
    return cast(nn.Sequential, model.base_model.model)[0]


def lora(linear: nn.Linear, r: int, dropout: float) -> nn.Module:
    return from_peft(peft.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=["0"]), linear)


def lily(linear: nn.Linear, mixture: Mixture) -> nn.Module:
    """PEFT's Lily: shared A, B-experts mixed by gates that are averaged over all tokens; no dropout, no top-k."""
    if not hasattr(peft, "LilyConfig"):
        raise Absent(f"PEFT {peft.__version__} has no Lily")
    config = peft.LilyConfig(r=mixture.r, num_B=mixture.num_experts, scaling=2.0, target_modules=["0"])
    return from_peft(config, linear)


def compiled(build: Callable[[nn.Linear, Mixture], nn.Module]) -> Callable[[nn.Linear, Mixture], nn.Module]:
    """The same module under torch.compile."""

    def build_compiled(linear: nn.Linear, mixture: Mixture) -> nn.Module:
        return cast(nn.Module, torch.compile(build(linear, mixture), fullgraph=True))

    return build_compiled


Builder = Callable[[nn.Linear, Mixture], nn.Module]
PEERS: dict[str, Builder] = {
    FROZEN: lambda linear, m: linear,
    OURS: mosld_layer,
    "MoSLD, compiled": compiled(mosld_layer),
    "MoSLD, Triton": triton_layer,
    LORA: lambda linear, m: lora(linear, m.r, m.dropout),
    "PEFT LoRA, no dropout": lambda linear, m: lora(linear, m.r, 0.0),
    "PEFT LoRA, equal parameters": lambda linear, m: lora(linear, equal_rank(linear, m), m.dropout),
    "PEFT LoRA, equal parameters, no dropout": lambda linear, m: lora(linear, equal_rank(linear, m), 0.0),
    "fused LoRA pattern, no dropout": AccumulateAfter,
    "PEFT Lily": lily,
    "concatenated product": ConcatenatedProduct,
    "formula in plain torch": ReferenceLayer,
    "formula, compiled": compiled(ReferenceLayer),
    "HydraLoRA loop": HydraLoop,
    "MoLA loop": MolaLoop,
    "ours, an A per expert (MoLA)": own_a_layer,
    **OPTIONAL,
}


def choose(names: Iterable[str] | None = None, checkouts: Iterable[Path] = ()) -> dict[str, Builder]:
    """The peers of these names, all without names; the frozen linear, to which all is compared, comes first.

    checkouts: folders of optional peers' sources, put on the import path.
    raises ValueError for a name that does not exist, listing those that do, and for a checkout that is no folder.
    """
    names = list(PEERS if names is None else names)
    # Names of peers hold spaces and commas, so an error shows them in quotation marks.
    require_known("peer", map(repr, names), list(map(repr, PEERS)))
    for folder in checkouts:
        if not folder.is_dir():
            raise ValueError(f"checkout must be a folder, got {folder}")
        sys.path.append(str(folder))
    return {name: build for name, build in PEERS.items() if name in {FROZEN, *names}}


def build(name: str, linear: nn.Linear, mixture: Mixture) -> nn.Module:
    """The peer around `linear`, which stays frozen, in training mode, with every trained weight away from zero.

    raises whatever the peer raises, `Absent` where it does not exist here.
    """
    module = PEERS[name](linear.requires_grad_(False), mixture)
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    return module.train()
