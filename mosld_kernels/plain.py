"""The steps in torch's own operators, each differentiable by itself: for transforms that know no others.

As `eager` has them, without its backward in closed form. See `transforms`.
"""

from torch import Tensor
from torch.nn import functional as F

from .autograd import Inputs, Settings
from .dropout import draw_keep, drop_elements
from .gating import gates_from_logits
from .packing import expert_rank
from .precision import router_dtype


def forward(inputs: Inputs, settings: Settings) -> tuple[Tensor, Tensor]:
    """x [T, D_in] and the weights -> y [T, D_out], router logits [T, E]; without `weight` the update alone."""
    x, experts = inputs.x, inputs.router_weight.shape[0]
    keep = draw_keep(inputs.seed, tuple(inputs.shared_a.shape), settings.dropout_p)
    z = F.linear(x, drop_elements(inputs.shared_a, keep, settings.dropout_p, x.dtype))  # [T, R or E * R]
    logits = F.linear(x, inputs.router_weight.to(x.dtype)).to(router_dtype(x.dtype))
    gates = gates_from_logits(logits, settings.top_k).to(x.dtype)
    rank = expert_rank(inputs.shared_a.shape[0], experts, settings.mixing)
    z = z.unflatten(-1, (experts, rank)) if settings.mixing == "diagonal" else z.unsqueeze(-2)  # [T, E or 1, R]
    mixed = settings.scale * (gates.unsqueeze(-1) * z).flatten(-2)
    update = F.linear(mixed, inputs.expert_b.to(x.dtype))
    return update if inputs.weight is None else F.linear(x, inputs.weight, inputs.bias) + update, logits
