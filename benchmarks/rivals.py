"""What MoSLD is measured against, on the same frozen weight: PEFT's LoRA, the formula in plain torch, the published loop."""

from typing import Any, cast

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mosld import MoSLDLinear
from mosld_kernels import reference


class ReferenceLayer(nn.Module):
    """MoSLD's formula as differentiable torch, without the closed form: what autograd makes of it."""

    def __init__(self, layer: MoSLDLinear):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        adapter, layer = self.layer.adapter, self.layer
        seed = torch.randint(2**62, (1,), device=x.device) if adapter.dropout else None
        tensors = (adapter.shared_a.weight, adapter.expert_b.weight, adapter.router.weight)
        settings: dict[str, Any] = dict(top_k=adapter.top_k, scale=adapter.scale, dropout_p=adapter.dropout, seed=seed)
        return reference.mosld_linear(x, layer.weight, layer.bias, *tensors, **settings)[0]


class ExpertLoop(nn.Module):
    """The published form of HydraLoRA: a Python loop over experts, each with a dropout of its own on x, A computed anew.

    y = x W0^T + b0 + s sum_e softmax(x Wr^T)_e B_e A dropout(x)
    """

    def __init__(self, layer: MoSLDLinear):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        adapter = self.layer.adapter
        gates = F.linear(x, adapter.router.weight).float().softmax(-1).to(x.dtype)
        y = F.linear(x, self.layer.weight, self.layer.bias)
        for e in range(adapter.num_experts):
            expert = adapter.expert_b.weight[:, e * adapter.r : (e + 1) * adapter.r]
            hidden = F.linear(F.dropout(x, adapter.dropout), adapter.shared_a.weight)
            y = y + gates[..., e : e + 1] * F.linear(hidden, expert) * adapter.scale
        return y


def peft_lora(linear: nn.Linear, r: int, dropout: float) -> nn.Module:
    """PEFT's LoRA on `linear`, its weights in the linear's dtype."""
    config = peft.LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(linear), config, autocast_adapter_dtype=False)
    return cast(nn.Sequential, model.base_model.model)[0]


def candidates(linear: nn.Linear, *, r: int, num_experts: int, top_k: int, dropout: float) -> dict[str, nn.Module]:
    """Name -> module, every one over the same frozen weight, with B away from zero and ready to train."""
    layer = MoSLDLinear.from_linear(linear, r=r, alpha=2 * r, num_experts=num_experts, top_k=top_k, dropout=dropout)
    modules = {
        "frozen linear": linear,
        "MoSLD": layer,
        "PEFT LoRA": peft_lora(linear, r, dropout),
        "PEFT LoRA, no dropout": peft_lora(linear, r, 0.0),
        "formula in plain torch": ReferenceLayer(layer),
        "loop over experts": ExpertLoop(layer),
    }
    for module in modules.values():
        for parameter in module.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.02)
    return modules
