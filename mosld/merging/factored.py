"""Several adapters on one base as a mixture whose gates are the merging coefficients.

    W0 + sum_k lambda_k s_k B_k A_k    =    the diagonal mixing with an expert a task and gates that no token decides

So layer-wise coefficients train through the fast path, in memory that grows with the ranks and not with the base, and the
result leaves as one LoRA exactly (`mosld.export_lora`) or goes on as a mixture: "merge, then mix".
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..convert.adapted_layers import adapted_layers
from ..convert.export import target_modules
from ..tuner.config import MoSLDConfig
from ..tuner.peft_api import in_out_features
from .dense import running
from .unlabelled import Forward
from .vectors import Factors, MergeError, TaskVector


class FactoredMerge:
    """The merged model as a function of the coefficients, in memory that grows with the adapters' ranks.

    base: adapted in place; `unload` gives it back as it was. raises MergeError as `stacked`.
    """

    def __init__(self, base: nn.Module, vectors: Sequence[TaskVector]):
        self.model = stacked(base, vectors).requires_grad_(False).eval()
        self.count = len(vectors)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        own = adapted_layers(self.model.get_base_model())
        self.routers = {name: adapter.router.weight for name, (_, adapter) in own.items()}
        self._names = {name: names[id(weight)] for name, weight in self.routers.items()}

    @property
    def layers(self) -> list[str]:
        return list(self.routers)

    def __call__(self, coefficients: Tensor) -> Forward:
        """coefficients [K], or [layers, K] in the order of `layers` -> the merged model's forward"""
        own = coefficients.expand(len(self.layers), self.count)
        gates = {
            self._names[name]: gate.to(weight.device, weight.dtype).unsqueeze(0)
            for gate, (name, weight) in zip(own, self.routers.items(), strict=True)
        }
        return running(self.model, gates)

    @torch.no_grad()
    def write(self, coefficients: Tensor) -> None:
        """Put the coefficients into the model."""
        own = coefficients.expand(len(self.layers), self.count)
        for gate, weight in zip(own, self.routers.values(), strict=True):
            weight.copy_(gate.unsqueeze(0))

    def unload(self) -> nn.Module:
        base = self.model.unload()
        vars(base).pop("peft_config", None)  # PEFT leaves it there and would warn of a second adapter
        return base


@torch.no_grad()
def mixed(
    base: nn.Module, vectors: Sequence[TaskVector], coefficients: Tensor, layers: Sequence[str], rank: int | None = None,
    **settings: Any,
) -> PeftModel:  # fmt: skip
    """Merge, then mix: `base`, adapted in place, with one expert a task and a router of tokens that can be trained from here.

    The router starts at zero with a softmax over all experts, so that every gate is 1 / K, and expert k holds K lambda_k
    times its task vector: the mixture starts as the merged model.
    coefficients: [K], or [layers, K] in the order of `layers`. rank: of the A that all experts share, the best basis of that
        size; None keeps an A for each expert, and every vector exactly. settings: fields of MoSLDConfig.
    raises MergeError as `stacked`.
    """
    count = len(vectors)
    scaled = _scaled_vectors(vectors, coefficients.expand(len(layers), count) * count, layers)
    if rank is None:
        routed = {"router": "token", "gate": "softmax", "router_std": 0.0, "top_k": count, **settings}
        return stacked(base, scaled, **routed)
    check_fit(base, scaled)
    config = MoSLDConfig(
        r=rank, alpha=rank, num_experts=count, target_modules=target_modules(base, layers),
        **{"gate": "softmax", "router_std": 0.0, "top_k": count, **settings},
    )  # fmt: skip
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    for name, (_, adapter) in adapted_layers(model.get_base_model()).items():
        d_out, d_in = adapter.expert_b.weight.shape[0], adapter.shared_a.weight.shape[1]
        none = Factors(torch.zeros(1, d_in), torch.zeros(d_out, 1))
        shared, ups, _ = shared_basis([(vector.factors or {}).get(name, none) for vector in scaled], rank)
        adapter.shared_a.weight.copy_(shared)
        adapter.expert_b.weight.copy_(torch.cat(ups, 1))
    return model


def _scaled_vectors(vectors: Sequence[TaskVector], scales: Tensor, layers: Sequence[str]) -> list[TaskVector]:
    """Each vector with its ups times scales [layers, K]"""
    place = {name: i for i, name in enumerate(layers)}
    return [
        TaskVector(
            vector.name, vector.folder, vector.base,
            {
                name: Factors(own.down, (own.up.double() * float(scales[place[name], k])).to(own.up.dtype))
                for name, own in (vector.factors or {}).items()
            },
        )
        for k, vector in enumerate(vectors)
    ]  # fmt: skip


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
            d_in, d_out = in_out_features(layer)
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
