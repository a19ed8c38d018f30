"""What the mixture of one layer is: how many of what, which mixing matrix, who routes, where dropout falls.

Every mixture of LoRA experts that we know is one operator, h = M(x) z between a down- and an up-projection (the table in
docs/reference/methods.md). `Mixture` holds the choices, checked; `register_mixing` adds a mixing matrix that is not
here.
"""

import math
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .registry import MIXINGS, Mixing
from .routers import ROUTERS

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
    """The mixture of one layer; the fields are those of MoSLDConfig, which documents them.

    raises ValueError for values that cannot be used and for two that contradict each other, with the rule and the values.
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
        sizes = (("r", self.r), ("num_experts", self.num_experts), ("top_k", self.top_k))
        optional = (("num_tasks", self.num_tasks), ("task_dim", self.task_dim))
        for name, value in (*sizes, *((name, value) for name, value in optional if value is not None)):
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
        for name, known in (("mixing", MIXINGS), ("router", ROUTERS), ("gate", GATES)):
            if not isinstance(getattr(self, name), str) or getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.gate == "top_k" and self.has_logits and self.kind.gate is None and self.top_k > self.num_experts:
            raise ValueError(f"top_k must be in [1, num_experts={self.num_experts}], got {self.top_k}")
        if not 0 < number(self.top_p) <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}")
        kind = self.kind
        if not isinstance(self.mixing_options, dict):
            raise ValueError(f"mixing_options must be a dictionary, got {self.mixing_options!r}")
        if unknown := sorted(map(str, set(self.mixing_options) - set(kind.options))):
            known = ", ".join(kind.options) or "none"
            raise ValueError(f"mixing_options of {self.mixing!r} may have {known}, got {', '.join(unknown)}")
        for name, value in self.mixing_options.items():
            if isinstance(kind.options[name], bool) and not isinstance(value, bool):
                raise ValueError(f"{name} in mixing_options must be True or False, got {value!r}")
        if self.router == "task" and self.num_tasks is None:
            raise ValueError("router='task' contradicts num_tasks=None: say how many tasks there are")
        if kind.per_task and self.num_tasks is None:
            raise ValueError(f"mixing={self.mixing!r} contradicts num_tasks=None: say how many tasks there are")
        if self.task_dim is not None and self.router != "task":
            raise ValueError(f"task_dim={self.task_dim} contradicts router={self.router!r}: only 'task' embeds tasks")
        if self.num_tasks is not None and not (self.router == "task" or kind.per_task):
            raise ValueError(
                f"num_tasks={self.num_tasks} contradicts router={self.router!r} with mixing={self.mixing!r}: neither "
                "asks for the task"
            )
        if kind.gate is not None and not self.has_logits:
            raise ValueError(f"router={self.router!r} contradicts mixing={self.mixing!r}, which makes gates of logits")
        if not self.has_logits:
            for name, unused in (("temperature", self.temperature != 1), ("router_std", self.router_std is not None)):
                if unused:
                    raise ValueError(
                        f"{name}={getattr(self, name)} contradicts router={self.router!r}, which has no logits"
                    )
        if self.gate == "top_p" and (kind.gate is not None or not self.has_logits):
            which = f"router={self.router!r}" if kind.gate is None else f"mixing={self.mixing!r}"
            raise ValueError(f"gate='top_p' contradicts {which}, which has gates of its own")
        kind.check(self)

    @property
    def kind(self) -> Mixing:
        return MIXINGS[self.mixing]

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    @property
    def has_logits(self) -> bool:
        """Whether there are logits, of which a gate function makes gates."""
        return self.router not in ("external", "constant", "none")

    @property
    def wants_tasks(self) -> bool:
        return self.router == "task" or self.kind.per_task

    @property
    def experts_per_token(self) -> int:
        """K, experts chosen per token: all of them where the softmax goes over all."""
        return self.top_k if self.gate == "top_k" and self.has_logits and self.kind.gate is None else self.num_experts

    @property
    def uses_fused_operator(self) -> bool:
        """Whether the fused operator computes it: MoSLD's structure, or the same with an A per expert."""
        sites = self.up_dropout or self.input_dropout or self.hidden_dropout
        return (
            self.mixing in ("expand", "diagonal")
            and self.router == "token"
            and self.gate != "top_p"
            and self.temperature == 1
            and not sites
        )

    @property
    def tokens_choose(self) -> bool:
        """Whether tokens choose among experts, so that load balance and router statistics mean something."""
        return self.kind.per_expert and self.router in ("token", "hidden") and self.gate != "top_p"

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
        kind, gates = self.kind, self.kind.gates(self)
        router = {
            "token": (gates, in_features),
            "hidden": (gates, kind.down(self)),
            "sequence": (gates, in_features),
            "task": (self.num_tasks, gates) if self.task_dim is None else (gates, self.task_dim),
            "constant": (1, gates),
        }.get(self.router)
        parts: dict[str, tuple[int, ...] | None] = {
            "shared_a": (kind.down(self), in_features),
            "expert_b": (out_features, kind.up(self)),
            "router": router,  # pyright: ignore[reportAssignmentType]  num_tasks is known where it is asked for
            "tasks": (self.num_tasks, self.task_dim) if self.task_dim is not None else None,  # pyright: ignore
            "mixer": kind.mixer(self, in_features) if kind.mixer else None,
        }
        return {name: shape for name, shape in parts.items() if shape is not None}

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
