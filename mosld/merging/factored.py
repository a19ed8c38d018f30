"""Several adapters on one base as a mixture whose gates are the merging coefficients.

    W0 + sum_k lambda_k s_k B_k A_k    =    the diagonal mixing with an expert a task and gates that no token decides

So layer-wise coefficients train through the fast path, in memory that grows with the ranks and not with the base, and
the result leaves as one LoRA exactly (`mosld.export_lora`) or goes on as a mixture: "merge, then mix".
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
from .dense import forward_with
from .unlabelled import Forward
from .vectors import Factors, MergeError, TaskVector


class FactoredMerge:
    """The merged model as a function of the coefficients, in memory that grows with the adapters' ranks.

    base: adapted in place; `unload` gives it back as it was. raises MergeError as `stacked`.
    """

    def __init__(self, base: nn.Module, vectors: Sequence[TaskVector]):
        self.model = stacked(base, vectors).requires_grad_(False).eval()
        self.count = len(vectors)
        # Layer -> the weight of its router, which holds the coefficients, and weight -> its name in the model.
        self.routers: dict[str, nn.Parameter] = {}
        for layer, (_, adapter) in adapted_layers(self.model.get_base_model()).items():
            self.routers[layer] = adapter.router.weight
        self._names = {weight: name for name, weight in self.model.named_parameters()}

    @property
    def layers(self) -> list[str]:
        return list(self.routers)

    def __call__(self, coefficients: Tensor) -> Forward:
        """coefficients [K], or [layers, K] in the order of `layers` -> the merged model's forward"""
        by_layer = coefficients.expand(len(self.layers), self.count)
        gates: dict[str, Tensor] = {}
        for gate, weight in zip(by_layer, self.routers.values(), strict=True):
            gates[self._names[weight]] = gate.to(weight.device, weight.dtype).unsqueeze(0)
        return forward_with(self.model, gates)

    @torch.no_grad()
    def write(self, coefficients: Tensor) -> None:
        """Put the coefficients into the model."""
        by_layer = coefficients.expand(len(self.layers), self.count)
        for own, weight in zip(by_layer, self.routers.values(), strict=True):
            weight.copy_(own.unsqueeze(0))

    def unload(self) -> nn.Module:
        """-> the base model without the adapters"""
        return unload(self.model)


def unload(model: PeftModel) -> nn.Module:
    """-> the base model, as it was before it was adapted"""
    base = model.unload()
    # PEFT leaves the attribute there and would warn of a second adapter.
    vars(base).pop("peft_config", None)
    return base


@torch.no_grad()
def mixed(
    base: nn.Module, vectors: Sequence[TaskVector], coefficients: Tensor, layers: Sequence[str],
    rank: int | None = None, **settings: Any,
) -> PeftModel:  # fmt: skip
    """Merge, then mix: `base`, adapted in place, with one expert a task and a router of tokens to be trained from here.

    The router starts at zero with a softmax over all experts, so that every gate is 1 / K, and expert k holds
    K lambda_k times its task vector: the mixture starts as the merged model.
    coefficients: [K], or [layers, K] in the order of `layers`. settings: fields of MoSLDConfig.
    rank: of the A that all experts share, the best basis of that size; None keeps an A for each expert, and every
        vector exactly.
    raises MergeError as `stacked`.
    """
    count = len(vectors)
    # Every gate is 1 / K at first, so that K times a vector gives what is to be merged.
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
        # Of a task whose adapter leaves this layer out.
        none = Factors(torch.zeros(1, d_in), torch.zeros(d_out, 1))
        of_tasks = [adapter_factors(vector).get(name, none) for vector in scaled]
        shared, ups, _ = shared_basis(of_tasks, rank)
        adapter.shared_a.weight.copy_(shared)
        adapter.expert_b.weight.copy_(torch.cat(ups, 1))
    return model


def _scaled_vectors(vectors: Sequence[TaskVector], scales: Tensor, layers: Sequence[str]) -> list[TaskVector]:
    """Each vector with its ups times scales [layers, K]"""
    place = {name: i for i, name in enumerate(layers)}
    scaled = []
    for k, vector in enumerate(vectors):
        factors = {}
        for name, own in adapter_factors(vector).items():
            up = own.up.double() * float(scales[place[name], k])
            factors[name] = Factors(own.down, up.to(own.up.dtype))
        scaled.append(TaskVector(vector.name, vector.folder, vector.base, factors))
    return scaled


def adapter_factors(vector: TaskVector) -> dict[str, Factors]:
    """Layer -> Factors; raises MergeError for the vector of a full checkpoint, which has none."""
    if vector.factors is None:
        raise MergeError(f"{vector.folder} is a full checkpoint: only adapters can be stacked as experts")
    return vector.factors


def stacked(base: nn.Module, vectors: Sequence[TaskVector], **settings: Any) -> PeftModel:
    """`base`, adapted in place, with one expert a task: A and B of its vector, zeros where it has none of a layer.

    settings: fields of MoSLDConfig; without any, gates are parameters (router="constant") that start at 1 / K.
    raises MergeError for vectors that are no adapters, layers that the base has not, and sizes that do not fit.
    """
    # Of every vector, layer -> Factors.
    parts = [adapter_factors(vector) for vector in vectors]
    check_fit(base, vectors)
    layers, rank = [], 0
    for factors in parts:
        for layer, own in factors.items():
            rank = max(rank, len(own.down))
            if layer not in layers:
                layers.append(layer)
    defaults = dict(mixing="diagonal", router="constant", top_k=1, dropout=0.0, balance_coef=0.0)
    config = MoSLDConfig(
        r=rank, alpha=rank, num_experts=len(vectors), target_modules=target_modules(base, layers),
        **{**defaults, **settings},
    )  # fmt: skip
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    for name, (_, adapter) in adapted_layers(model.get_base_model()).items():
        _fill_experts(adapter, [factors.get(name) for factors in parts], rank)
    return model


@torch.no_grad()
def _fill_experts(adapter: Any, factors: Sequence[Factors | None], rank: int) -> None:
    """Put one task's factors into each expert of a layer's adapter; zeros up to `rank`, and where there are none."""
    down = adapter.shared_a.weight.view(len(factors), rank, -1)
    up = adapter.expert_b.weight.view(-1, len(factors), rank)
    down.zero_()
    up.zero_()
    for k, own in enumerate(factors):
        if own is not None:
            down[k, : len(own.down)] = own.down
            up[:, k, : len(own.down)] = own.up


def check_fit(base: nn.Module, vectors: Sequence[TaskVector]) -> None:
    """raises MergeError, naming folder, layer and sizes, for an adapter's layer that `base` has not in this size."""
    modules = dict(base.named_modules())
    for vector in vectors:
        for name, own in (vector.factors or {}).items():
            layer = modules.get(name)
            if not isinstance(layer, (nn.Linear, Conv1D)):
                raise MergeError(f"{vector.folder} adapts {name}, which is no linear layer of {type(base).__name__}")
            d_in, d_out = in_out_features(layer)
            if own.shape != (d_out, d_in):
                raise MergeError(
                    f"{vector.folder} has {own.shape[1]} -> {own.shape[0]} features in {name}, "
                    f"the base model {d_in} -> {d_out}"
                )


def shared_basis(factors: Sequence[Factors], rank: int) -> tuple[Tensor, list[Tensor], float]:
    """The best shared A of `rank` rows for several updates, each with a B of its own.

    A spans the rows that explain most of all updates together: the right singular vectors of the stacked updates. They
    are found by the factors, so that nothing of size [D_out, D_in] is made.
    -> A [rank, D_in], B_k [D_out, rank] for each, and |error| / |updates|, Frobenius norms over all.
    """
    weighted = []
    for own in factors:
        # The rows of a down, weighted by how much its up makes of them: up = Q R, and Q changes no length.
        _, triangle = torch.linalg.qr(own.up.double())
        weighted.append(triangle @ own.down.double())
    _, singular, rows = torch.linalg.svd(torch.cat(weighted), full_matrices=False)
    shared = rows[:rank]
    if len(shared) < rank:  # more rows than all updates have
        shared = torch.cat((shared, torch.zeros(rank - len(shared), shared.shape[1], dtype=shared.dtype)))
    ups = [own.up.double() @ (own.down.double() @ shared.T) for own in factors]
    total = singular.square().sum()
    error = float((singular[rank:].square().sum() / total).sqrt()) if total else 0.0
    return shared, ups, error
