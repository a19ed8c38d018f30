"""The two factors of the LoRA that a mixture with fixed gates is, whatever file they go to.

    s B M(c) A = (alpha / rank) B' A'     A' [rank, D_in], B' [D_out, rank], rank = min(rows of A, columns of B)

M(c) goes into the factor that it makes no larger, so the other one is exported as it was trained.
"""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..layers.adapter import MoSLDAdapter
from ..tuner.layer import MoSLDPeftLinear
from .fixed_gates import fixed_matrix


def lora_factors(adapter: MoSLDAdapter, gates: Tensor, task: int | None = None) -> tuple[Tensor, Tensor]:
    """gates [n] -> A [rank, D_in] and B [D_out, rank] of the LoRA, in the adapter's dtype"""
    down = adapter.shared_a.weight.detach().cpu().contiguous()
    up = adapter.expert_b.weight.detach().cpu().contiguous()
    matrix = fixed_matrix(adapter, gates, task)  # [R_out, R_in]
    if len(down) <= up.shape[1]:
        return down, (up.double() @ matrix).to(up.dtype).contiguous()
    return (matrix @ down.double()).to(down.dtype).contiguous(), up


def alpha_of(scale: float, rank: int) -> float:
    """The alpha with which a LoRA of this rank is scaled by `scale`; an int where it is whole, as people write it."""
    alpha = scale * rank
    return int(alpha) if alpha == int(alpha) else alpha


def is_conv1d(layer: nn.Module) -> bool:
    """Whether the base layer's weight is [D_in, D_out], as GPT-2's are."""
    return isinstance(layer, MoSLDPeftLinear) and isinstance(layer.get_base_layer(), Conv1D)
