"""What the mixture of one layer is: how many of what, which mixing matrix, who routes, where dropout falls.

Every mixture of LoRA experts that we know is one operator, h = M(x) z between a down- and an up-projection (the table
in docs/reference/methods.md). `Mixture` holds the choices, checked; `register_mixing` and
`register_router` add what is not here.
"""

import math
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .registry import MIXINGS, Mixing
from .routers import ROUTERS, Router

GATES = ("top_k", "softmax", "top_p")


def number(value: Any) -> float:
    """`value` as a float; NaN, which no comparison holds for, where it is no number or larger than any float."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


PARTS = ("shared_a", "expert_b", "router", "tasks", "mixer")  # the tensors that the mixture of a linear layer may train
BLOCK_PARTS = ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b", "router")  # and that of a feed-forward block


@dataclass(frozen=True)
class Mixture:
    """The mixture of one layer, whose values have been checked.

    Args:
        r, alpha, num_experts, ...: The fields have the names and meanings of those of `mosld.MoSLDConfig`, which
            documents them and takes its defaults from here. `num_experts` is that of this layer. `mixing` is never
            None.

    Raises:
        ValueError: A value cannot be used, or two contradict each other. The message has the rule and the values.
    """

    r: int = 8
    alpha: float = 16
    num_experts: int = 8
    top_k: int = 2
    dropout: float = 0.1
    up_dropout: float = 0.0
    input_dropout: float = 0.0
    hidden_dropout: float = 0.0
    mixing: str = "expand"
    mixing_options: dict[str, Any] = field(default_factory=dict)
    router: str = "token"
    gate: str = "top_k"
    top_p: float = 0.8
    temperature: float = 1.0
    num_tasks: int | None = None
    task_dim: int | None = None
    down_std: float | None = None
    router_std: float | None = None

    def __post_init__(self):
        self._check_numbers()
        self._check_names()
        if self._takes_top_k and self.top_k > self.num_experts:
            raise ValueError(f"top_k must be in [1, num_experts={self.num_experts}], got {self.top_k}")
        if not 0 < number(self.top_p) <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        self._check_options()
        self._check_tasks()
        self._check_gates()
        self.router_kind.check(self)
        self.kind.check(self)

    def _check_numbers(self) -> None:
        for name in ("r", "num_experts", "top_k", "num_tasks", "task_dim"):
            value = getattr(self, name)
            if value is None and name in ("num_tasks", "task_dim"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        for name in ("dropout", "up_dropout", "input_dropout", "hidden_dropout"):
            if not 0 <= number(getattr(self, name)) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        for name in ("alpha", "temperature"):
            if not 0 < number(getattr(self, name)) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)!r}")
        for name in ("down_std", "router_std"):
            std = getattr(self, name)
            if std is not None and not 0 <= number(std) < math.inf:
                raise ValueError(f"{name} must be None or at least 0, got {std!r}")

    def _check_names(self) -> None:
        for name, known in (("mixing", MIXINGS), ("router", ROUTERS), ("gate", GATES)):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def _check_options(self) -> None:
        known = self.kind.options
        if not isinstance(self.mixing_options, dict):
            raise ValueError(f"mixing_options must be a dictionary, got {self.mixing_options!r}")
        if unknown := sorted(map(str, set(self.mixing_options) - set(known))):
            raise ValueError(
                f"mixing_options of {self.mixing!r} may have {', '.join(known) or 'none'}, got {', '.join(unknown)}"
            )
        for name, value in self.mixing_options.items():
            if isinstance(known[name], bool) and not isinstance(value, bool):
                raise ValueError(f"{name} in mixing_options must be True or False, got {value!r}")

    def _check_tasks(self) -> None:
        for name, asks in (("router", self.router_kind.needs_tasks), ("mixing", self.kind.per_task)):
            if asks and self.num_tasks is None:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} contradicts num_tasks=None: say how many tasks there are"
                )
        if self.task_dim is not None and not self.router_kind.embeds_tasks:
            embedding = ", ".join(repr(name) for name, router in ROUTERS.items() if router.embeds_tasks)
            raise ValueError(
                f"task_dim={self.task_dim} contradicts router={self.router!r}: only {embedding} embeds tasks"
            )
        if self.num_tasks is not None and not self.wants_tasks:
            raise ValueError(
                f"num_tasks={self.num_tasks} contradicts router={self.router!r} with mixing={self.mixing!r}: neither "
                "asks for the task"
            )

    def _check_gates(self) -> None:
        makes_gates = self.kind.gate is not None
        if makes_gates and not self.has_logits:
            raise ValueError(f"router={self.router!r} contradicts mixing={self.mixing!r}, which makes gates of logits")
        for name, unused in (("temperature", 1), ("router_std", None)):
            if not self.has_logits and getattr(self, name) != unused:
                raise ValueError(
                    f"{name}={getattr(self, name)} contradicts router={self.router!r}, which has no logits"
                )
        if self.gate == "top_p" and (makes_gates or not self.has_logits):
            which = f"mixing={self.mixing!r}" if makes_gates else f"router={self.router!r}"
            raise ValueError(f"gate='top_p' contradicts {which}, which has gates of its own")

    @property
    def kind(self) -> Mixing:
        return MIXINGS[self.mixing]

    @property
    def router_kind(self) -> Router:
        return ROUTERS[self.router]

    @property
    def num_gates(self) -> int:
        """How many logits or gates a token has: one an expert, unless the mixing says otherwise."""
        return self.kind.gates(self)

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    @property
    def has_logits(self) -> bool:
        """Whether there are logits, of which a gate function makes gates."""
        return self.router_kind.has_logits

    @property
    def wants_tasks(self) -> bool:
        return self.router_kind.needs_tasks or self.kind.per_task

    @property
    def experts_per_token(self) -> int:
        """K, experts chosen per token: all of them where the softmax goes over all."""
        return self.top_k if self._takes_top_k else self.num_experts

    @property
    def _takes_top_k(self) -> bool:
        return self.gate == "top_k" and self.has_logits and self.kind.gate is None

    @property
    def renormalises(self) -> bool:
        """Whether the chosen experts' gates are their own softmax; False: the router's probabilities as they are."""
        return self.kind.block is None or bool(self.option("renormalise"))

    @property
    def uses_fused_operator(self) -> bool:
        """Whether the fused operator computes it: MoSLD's structure, or the same with an A per expert."""
        sites = self.up_dropout or self.input_dropout or self.hidden_dropout
        return (
            self.mixing in ("expand", "diagonal")
            and self.router_kind.linear
            and self.gate != "top_p"
            and self.temperature == 1
            and not sites
        )

    @property
    def tokens_choose(self) -> bool:
        """Whether tokens choose among experts, so that load balance and router statistics mean something."""
        router = self.router_kind
        return self.kind.per_expert and router.has_logits and router.tokens_choose and self.gate != "top_p"

    @property
    def for_linear_layers(self) -> "Mixture":
        """Itself; where it is of a block, the plain LoRA of a linear layer beside the blocks."""
        if self.kind.block is None:
            return self
        plain: dict[str, Any] = dict(mixing="expand", mixing_options={}, num_experts=1, top_k=1, router="none")
        return replace(self, **plain, gate="top_k", temperature=1.0, router_std=None)

    def option(self, name: str) -> Any:
        return self.mixing_options.get(name, self.kind.options[name])

    def shapes(self, in_features: int, out_features: int) -> dict[str, tuple[int, ...]]:
        """Name of each trained tensor of a layer -> its shape. Of a block: of its hidden and its intermediate size."""
        if self.kind.block is not None:
            return self.kind.block(self, in_features, out_features)
        kind, router = self.kind, self.router_kind
        shapes: dict[str, tuple[int, ...]] = {
            "shared_a": (kind.down(self), in_features),
            "expert_b": (out_features, kind.up(self)),
        }
        if router.weight is not None:
            shapes["router"] = router.weight(self, in_features)
        if self.task_dim is not None and self.num_tasks is not None:
            shapes["tasks"] = (self.num_tasks, self.task_dim)
        mixer = None if kind.mixer is None else kind.mixer(self, in_features)
        if mixer is not None:
            shapes["mixer"] = mixer
        return shapes

    def matrix(self, gates: Tensor, mixer: Tensor | None = None) -> Tensor:
        """gates [n], the same for every token -> M [R_out, R_in], with which the update is s B M A

        mixer: the layer's, where the mixing has one; of a mixing per task, that of one task.
        """
        rows = self.kind.down(self)
        z = torch.eye(rows, dtype=gates.dtype, device=gates.device)
        if mixer is not None and self.kind.per_task:
            return self.kind.mix(z, gates, mixer.expand(rows, *mixer.shape)).T
        return self.kind.mix(z, gates, mixer).T

    def parameters(self, in_features: int, out_features: int) -> int:
        """How many numbers one layer trains."""
        return sum(math.prod(shape) for shape in self.shapes(in_features, out_features).values())


FIELDS = tuple(f.name for f in fields(Mixture))
