"""Several adapters on one base as a mixture whose gates are the merging coefficients.

    W0 + sum_k lambda_k s_k B_k A_k    =    the diagonal mixing with an expert a task and gates that no token decides

So layer-wise coefficients train through the fast path, in memory that grows with the ranks and not with the base, and the
result leaves as one LoRA exactly (`mosld.export_lora`) or goes on as a mixture: "merge, then mix".
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import _get_in_out_features
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config import MoSLDConfig
from ..export import adapted_layers, target_modules
from .vectors import Factors, MergeError, TaskVector


def stacked(base: nn.Module, vectors: Sequence[TaskVector], **settings: Any) -> PeftModel:
    """`base`, adapted in place, with one expert a task: A and B of its vector, zeros where it has none of a layer.

    settings: fields of MoSLDConfig; without any, gates are parameters (router="constant") that start at 1 / K.
    raises MergeError for vectors that are no adapters, layers that the base has not, and sizes that do not fit.
    """
    for vector in vectors:
        if vector.factors is None:
            raise MergeError(f"{vector.folder} is a full checkpoint: only adapters can be stacked as experts")
    layers = list(dict.fromkeys(layer for vector in vectors for layer in vector.factors or {}))
    check_fit(base, vectors)
    rank = max(len(own.down) for vector in vectors for own in (vector.factors or {}).values())
    defaults = dict(mixing="diagonal", router="constant", top_k=1, dropout=0.0, balance_coef=0.0)
    config = MoSLDConfig(
        r=rank, alpha=rank, num_experts=len(vectors), target_modules=target_modules(base, layers), **{**defaults, **settings},
    )  # fmt: skip
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    with torch.no_grad():
        for name, (_, adapter) in adapted_layers(model.get_base_model()).items():
            down = adapter.shared_a.weight.view(len(vectors), rank, -1)
            up = adapter.expert_b.weight.view(-1, len(vectors), rank)
            down.zero_()
            up.zero_()
            for k, vector in enumerate(vectors):
                own = (vector.factors or {}).get(name)
                if own is not None:
                    down[k, : len(own.down)] = own.down
                    up[:, k, : len(own.down)] = own.up
    return model


def check_fit(base: nn.Module, vectors: Sequence[TaskVector]) -> None:
    """raises MergeError, naming folder, layer and sizes, where an adapter's layer is not in `base` or has another size."""
    modules = dict(base.named_modules())
    for vector in vectors:
        for name, own in (vector.factors or {}).items():
            layer = modules.get(name)
            if not isinstance(layer, (nn.Linear, Conv1D)):
                raise MergeError(f"{vector.folder} adapts {name}, which is no linear layer of {type(base).__name__}")
            d_in, d_out = _get_in_out_features(layer)
            if own.shape != (d_out, d_in):
                raise MergeError(
                    f"{vector.folder} has {own.shape[1]} -> {own.shape[0]} features in {name}, the base model {d_in} -> {d_out}"
                )


def shared_basis(factors: Sequence[Factors], rank: int) -> tuple[Tensor, list[Tensor], float]:
    """The best shared A of `rank` rows for several updates, each with a B of its own.

    A spans the rows that explain most of all updates together (the right singular vectors of the stacked updates; by
    their factors, so that nothing of size [D_out, D_in] is made).
    -> A [rank, D_in], B_k [D_out, rank] for each, and |error| / |updates|, Frobenius norms over all.
    """
    downs = torch.cat([own.down.double() for own in factors])  # [sum r, D_in]
    # Rows of every down, weighted by how much its up makes of them: up_k = Q R, and Q changes no length.
    weighted = torch.cat([torch.linalg.qr(own.up.double()).R @ own.down.double() for own in factors])
    _, singular, rows = torch.linalg.svd(weighted, full_matrices=False)
    shared = rows[:rank]
    if len(shared) < rank:  # more rows than all updates have
        shared = torch.cat((shared, torch.zeros(rank - len(shared), downs.shape[1], dtype=shared.dtype)))
    ups = [own.up.double() @ (own.down.double() @ shared.T) for own in factors]
    total = singular.square().sum()
    error = float((singular[rank:].square().sum() / total).sqrt()) if total else 0.0
    return shared, ups, error
