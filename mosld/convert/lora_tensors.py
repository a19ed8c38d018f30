"""The two factors of the LoRA that a mixture with fixed gates is."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..layers.adapter import MoSLDAdapter
from ..tuner.layer import MoSLDPeftLinear
from .fixed_gates import fixed_matrix


def _alpha(scale: float, rank: int) -> float:
    alpha = scale * rank
    return int(alpha) if alpha == int(alpha) else alpha


def _folded(adapter: MoSLDAdapter, gates: Tensor, task: int | None) -> tuple[Tensor, Tensor]:
    """gates [n] -> A [rank, D_in] and B [D_out, rank] of the LoRA, in the adapter's dtype"""
    down, up = (part.weight.detach().cpu().contiguous() for part in (adapter.shared_a, adapter.expert_b))
    matrix = fixed_matrix(adapter, gates, task)  # [R_out, R_in]
    if len(down) <= up.shape[1]:
        return down, (up.double() @ matrix).to(up.dtype).contiguous()
    return (matrix @ down.double()).to(down.dtype).contiguous(), up


def _is_conv1d(layer: nn.Module) -> bool:
    return isinstance(layer, MoSLDPeftLinear) and isinstance(layer.get_base_layer(), Conv1D)
