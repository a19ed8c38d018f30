"""The known methods' mixings, as `MoSLDConfig(mixing=...)` names them. The arithmetic is `mosld_kernels.mixing`'s."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mosld_kernels import gating, mixing

from .gates import broadcast_per_row
from .registry import register_mixing
from .spec import Mixture, number


def _own_sizes(m: Mixture) -> int:
    return m.num_experts * m.r


@register_mixing("expand", down=lambda m: m.r, up=_own_sizes)
def _expand(z: Tensor, gates: Tensor, mixer: None) -> Tensor:
    return mixing.expand(z, gates)


@register_mixing("diagonal", down=_own_sizes, up=_own_sizes)
def _diagonal(z: Tensor, gates: Tensor, mixer: None) -> Tensor:
    return mixing.diagonal(z, gates)


@register_mixing("reduce", down=_own_sizes, up=lambda m: m.r)
def _reduce(z: Tensor, gates: Tensor, mixer: None) -> Tensor:
    return mixing.reduce(z, gates)


def _check_positive(m: Mixture, name: str) -> None:
    value = m.option(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} in mixing_options must be an integer of at least 1, got {value!r}")


def _check_word(m: Mixture, name: str, words: tuple[str, ...]) -> None:
    value = m.option(name)
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"{name} in mixing_options must be one of {', '.join(words)}, got {value!r}")


def _start_cores(cores: Tensor) -> None:
    nn.init.uniform_(cores, -1 / math.sqrt(cores.shape[-1]), 1 / math.sqrt(cores.shape[-1]))  # Kaiming, core by core


@register_mixing(
    "core",
    down=lambda m: m.r,
    up=lambda m: m.num_experts * m.option("r_up"),
    mixer=lambda m, _: (m.num_experts, m.option("r_up"), m.r),
    start=_start_cores,
    options={"r_up": 12},
    check=lambda m: _check_positive(m, "r_up"),
)
def _core(z: Tensor, gates: Tensor, mixer: Tensor) -> Tensor:
    return mixing.core(z, gates, mixer)


@register_mixing(
    "task_core",
    down=lambda m: m.r,
    up=_own_sizes,
    mixer=lambda m, _: (m.num_tasks, m.r, m.r),
    per_task=True,
    start=lambda cores: cores.zero_().diagonal(dim1=-2, dim2=-1).fill_(1),  # a shard takes no whole matrix
)
def _task_core(z: Tensor, gates: Tensor, mixer: Tensor) -> Tensor:
    return mixing.task_core(z, gates, mixer)


def _check_groups(m: Mixture) -> None:
    _check_positive(m, "group_size")
    if m.r % m.option("group_size"):
        raise ValueError(f"r={m.r} contradicts group_size={m.option('group_size')}: r must be a multiple of it")


def _softmax_by_group(logits: Tensor, adapter: Any) -> Tensor:
    return gating.grouped_softmax(logits, adapter.mixture.r // adapter.mixture.option("group_size"))


@register_mixing(
    "grouped",
    down=lambda m: m.r,
    up=_own_sizes,
    gates=lambda m: m.num_experts * (m.r // m.option("group_size")),
    gate=_softmax_by_group,
    options={"group_size": 1},
    check=_check_groups,
    per_expert=False,
)
def _grouped(z: Tensor, gates: Tensor, mixer: None) -> Tensor:
    return mixing.grouped(z, gates)


PRIOR_GAIN, SIGMOID_GAIN = 4.0, 100.0  # of T-REX's code


def _with_prior(logits: Tensor, adapter: Any) -> Tensor:
    """sigma(100 b) (w n softmax(logits) + (1 - w) 4 rho), w = sigma(100 v), as [..., r_up, r]; rho from set_routing."""
    balance, gain = torch.sigmoid(SIGMOID_GAIN * adapter.mixer.weight.to(logits.dtype))
    matrix = balance * logits.shape[-1] * logits.softmax(-1)
    if adapter.routing_input("prior") is not None:
        matrix = matrix + (1 - balance) * PRIOR_GAIN * _prior(adapter, logits)
    sizes = _pair_sizes(adapter.mixture)
    pairs = (gain * matrix).unflatten(-1, tuple(sizes.values()))
    return pairs if list(sizes) == ["r_up", "r"] else pairs.transpose(-1, -2)


def _pair_sizes(m: Mixture) -> dict[str, int]:
    """The two sizes of the matrix whose rows, one after the other, are a token's pairs."""
    sizes = {"r_up": m.option("r_up"), "r": m.r}
    return sizes if m.option("slow_index") == "r_up" else dict(reversed(sizes.items()))


def _prior(adapter: Any, logits: Tensor) -> Tensor:
    """What `set_routing` gave, a matrix or its rows one after the other, as it broadcasts with the logits [..., n]."""
    given = adapter.routing_input("prior")
    sizes, n = _pair_sizes(adapter.mixture), logits.shape[-1]
    if given.dim() > 1 and given.shape[-2:] == tuple(sizes.values()):
        return broadcast_per_row(adapter, "prior", logits, given.flatten(-2))
    if given.shape[-1:] != (n,):
        names, numbers = ", ".join(sizes), ", ".join(map(str, sizes.values()))
        raise ValueError(
            f"prior must be [batch, {n}] or [batch, sequence, {n}], got {list(given.shape)}. As a matrix it is "
            f"[..., {names}] = [..., {numbers}] with slow_index={adapter.mixture.option('slow_index')!r}, whose rows "
            f"one after the other are the {n}"
        )
    return broadcast_per_row(adapter, "prior", logits)


def _check_pairs(m: Mixture) -> None:
    _check_positive(m, "r_up")
    _check_word(m, "slow_index", ("r_up", "r"))


@register_mixing(
    "dense",
    down=lambda m: m.r,
    up=lambda m: m.option("r_up"),
    gates=lambda m: m.r * m.option("r_up"),
    mixer=lambda m, _: (2,),
    gate=_with_prior,
    options={"r_up": 8, "slow_index": "r_up"},
    check=_check_pairs,
    per_expert=False,
)
def _dense(z: Tensor, gates: Tensor, mixer: Tensor) -> Tensor:
    return mixing.dense(z, gates)


def _check_pool(m: Mixture) -> None:
    if m.r > m.num_experts:
        raise ValueError(f"r={m.r} contradicts num_experts={m.num_experts}: r of them are selected")
    weight = m.option("conditional_weight")
    if not 0 <= number(weight) < math.inf:
        raise ValueError(f"conditional_weight in mixing_options must be at least 0, got {weight!r}")
    _check_word(m, "selector", ("product", "sums"))


def _selected(logits: Tensor, adapter: Any) -> Tensor:
    """0/1 matrices [..., E, E] that pair the q-th selected column of B with the q-th selected row of A."""
    m = adapter.mixture
    through = m.option("straight_through")
    of_a, of_b = logits.chunk(2, dim=-1)
    rows = gating.selection(of_a, m.r, through)  # [..., r, E]
    if m.option("conditional"):
        pool, weight = adapter.shared_a.weight.to(logits.dtype), adapter.mixer.weight.to(logits.dtype)
        score = _scores_of_sums if m.option("selector") == "sums" else _scores_of_products
        conditional = score(rows, pool, weight).softmax(-1).sum(-2).softmax(-1)
        of_b = (of_b.softmax(-1) + m.option("conditional_weight") * conditional).log()
    columns = gating.selection(of_b, m.r, through)
    return columns.transpose(-1, -2) @ rows


def _scores_of_products(rows: Tensor, pool: Tensor, weight: Tensor) -> Tensor:
    """rows [..., r, E], of zeros and ones, pool [E, D_in], weight [r, D_in, E] -> [..., r, E], (a_q W_q)[e]"""
    return ((rows @ pool).unsqueeze(-2) @ weight).squeeze(-2)


def _scores_of_sums(rows: Tensor, pool: Tensor, weight: Tensor) -> Tensor:
    """The same with weight [E, r * D_in], of a linear layer on the r rows together: sum(a_q) sum(W_q[e]).

    The released code's einsum gives the features of the two factors different letters, and so sums each by itself.
    """
    of_weight = weight.unflatten(-1, (rows.shape[-2], -1)).sum(-1)  # [E, r]
    return (rows @ pool.sum(-1)).unsqueeze(-1) * of_weight.T


def _selector_shape(m: Mixture, in_features: int) -> tuple[int, ...] | None:
    if not m.option("conditional"):
        return None
    if m.option("selector") == "sums":
        return m.num_experts, m.r * in_features
    return m.r, in_features, m.num_experts


def _start_selector(weight: Tensor) -> None:
    """Within 1 / sqrt of what a score adds up: D_in features of each row, or, as nn.Linear starts, r * D_in."""
    bound = 1 / math.sqrt(weight.shape[-1] if weight.dim() == 2 else weight.shape[-2])
    nn.init.uniform_(weight, -bound, bound)


@register_mixing(
    "select",
    down=lambda m: m.num_experts,
    up=lambda m: m.num_experts,
    gates=lambda m: 2 * m.num_experts,
    mixer=_selector_shape,
    start=_start_selector,
    gate=_selected,
    options={"conditional": True, "conditional_weight": 1.0, "straight_through": True, "selector": "product"},
    check=_check_pool,
    per_expert=False,
)
def _select(z: Tensor, gates: Tensor, mixer: Tensor) -> Tensor:
    return mixing.dense(z, gates)


def _check_block(m: Mixture) -> None:
    if not m.router_kind.linear:
        raise ValueError(f"router={m.router!r} contradicts mixing='block', whose router is linear on the block's input")
    for name in ("up_dropout", "hidden_dropout"):
        if getattr(m, name):
            raise ValueError(
                f"{name}={getattr(m, name)} contradicts mixing='block', which drops elements of A (dropout) and of "
                "what goes into A (input_dropout)"
            )


def _block_shapes(m: Mixture, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    rows = _own_sizes(m)
    return {
        "gate_a": (rows, hidden), "gate_b": (intermediate, rows), "up_a": (rows, hidden), "up_b": (intermediate, rows),
        "down_a": (rows, intermediate), "down_b": (hidden, rows), "router": (m.num_experts, hidden),
    }  # fmt: skip


@register_mixing(
    "block",
    down=_own_sizes,
    up=_own_sizes,
    options={"renormalise": True},
    check=_check_block,
    block=_block_shapes,
)
def _block(z: Tensor, gates: Tensor, mixer: None) -> Tensor:
    raise NotImplementedError("mixing='block' is no mixing matrix: mosld.layers.feed_forward computes it")
