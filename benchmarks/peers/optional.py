"""Peers from libraries that this one does not install: taken where they import, absent with the reason elsewhere.

Written from the sources of LoRAFusion (`lorafusion/ops/lora_v1.py`), Unsloth (`unsloth/kernels/fast_lora.py`) and
ScatterMoE (`scattermoe/mlp.py`, `examples/molora.py`), all of which need an NVIDIA GPU. Not run yet, because no machine
had both.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

SCALE = 2.0


class Absent(RuntimeError):
    """A peer that does not exist on this machine."""


def _library(name: str, linear: nn.Linear) -> ModuleType:
    """Import it, or raise `Absent`; any error of an import counts, since these libraries check for GPUs in it."""
    try:
        module = importlib.import_module(name)
    except Exception as error:
        raise Absent(f"{name.partition('.')[0]} cannot be imported ({type(error).__name__}: {error})") from error
    if linear.weight.device.type != "cuda":
        raise Absent(f"{name.partition('.')[0]} needs an NVIDIA GPU")
    return module


class OneLoRA(nn.Module):
    """One LoRA's weights, and the library's function of (x [1, T, D_in], linear, A, B)."""

    def __init__(self, linear: nn.Linear, r: int, function: Callable[[Tensor, nn.Linear, Tensor, Tensor], Tensor]):
        super().__init__()
        self.linear, self.function = linear, function
        self.a = nn.Parameter(linear.weight.new_empty(r, linear.in_features))
        self.b = nn.Parameter(linear.weight.new_empty(linear.out_features, r))

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(x.reshape(1, -1, x.shape[-1]), self.linear, self.a, self.b)
        return y.reshape(*x.shape[:-1], -1)


def lorafusion(linear: nn.Linear, mixture: Any) -> nn.Module:
    """One LoRA, dropout on x, the adapter inside the base product."""
    ops = _library("lorafusion.ops.lora_v1", linear)
    return OneLoRA(
        linear,
        mixture.r,
        lambda x, base, a, b: ops.fused_linear_lora(
            x, base.weight, a, b, SCALE, dropout_p=mixture.dropout, linear_bias=base.bias
        ),
    )


def unsloth(linear: nn.Linear, mixture: Any) -> nn.Module:
    """One LoRA without dropout, accumulated after the base product; the bias is added, as its models have none."""
    kernels = _library("unsloth.kernels.fast_lora", linear)

    def function(x: Tensor, base: nn.Linear, a: Tensor, b: Tensor) -> Tensor:
        y = kernels.LoRA_W.apply(x, base.weight, None, a, b, SCALE)
        return y if base.bias is None else y + base.bias

    return OneLoRA(linear, mixture.r, function)


class ScatterLoRA(nn.Module):
    """A mixture of LoRA experts, each with an A of its own, as two sorted products; square layers alone."""

    def __init__(self, mlp: type[nn.Module], linear: nn.Linear, mixture: Any):
        super().__init__()
        self.linear, self.top_k = linear, mixture.top_k
        size = dict(input_size=linear.in_features, hidden_size=mixture.r, num_experts=mixture.num_experts)
        experts = mlp(**size, top_k=mixture.top_k, activation=nn.Identity())
        self.experts = experts.to(linear.weight.device, linear.weight.dtype)
        self.router = nn.Parameter(linear.weight.new_empty(mixture.num_experts, linear.in_features))

    def forward(self, x: Tensor) -> Tensor:
        values, chosen = F.linear(x, self.router).float().topk(self.top_k, dim=-1)
        gates = values.softmax(-1).to(x.dtype)
        return F.linear(x, self.linear.weight, self.linear.bias) + SCALE * self.experts(x, gates, chosen)


def scattermoe(linear: nn.Linear, mixture: Any) -> nn.Module:
    module = _library("scattermoe.mlp", linear)
    if linear.in_features != linear.out_features:
        raise Absent("scattermoe's MLP gives back as many features as it takes")
    return ScatterLoRA(module.MLP, linear, mixture)


def moe_peft(linear: nn.Linear, mixture: Any) -> nn.Module:
    _library("moe_peft", linear)
    raise Absent("moe_peft adapts whole models of its own; its layer is the loop over experts of MoLA")


OPTIONAL: dict[str, Callable[[nn.Linear, Any], nn.Module]] = {
    "LoRAFusion": lorafusion,
    "Unsloth": unsloth,
    "ScatterMoE": scattermoe,
    "MoE-PEFT": moe_peft,
}
