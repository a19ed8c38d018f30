"""One frozen linear layer with its mixture: `MoSLDAdapter` owns A, B and the router.

    y = x W0^T + b0 + s sum_{k in top-K} g_k B_k A~ x,     s = alpha / r        (MoSLD, arXiv 2412.08946, Eq. 1 to 3)

A starts Kaiming-uniform, B at zero, so a freshly adapted layer computes exactly what the frozen one does. Sibling
methods are other Mixtures of the same adapter: MoSLD's structure runs in the fused operator, others in three stages.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mosld_kernels import mosld_delta, mosld_linear
from mosld_kernels.precision import no_autocast
from mosld_kernels.staged import Dropout, staged_linear

from ..mixture.gates import Routing, apply_gate, gates_without_logits, router_logits, task_ids
from ..mixture.spec import FIELDS, PARTS, Mixture
from .calls import Call, EarlierCall, Slot
from .deferred_grads import attach
from .dropout import MASK_RATES, RATES, mask_dropouts
from .forwards import Forward, in_backward, remember_checkpoints, this_thread
from .start import StartsWithoutCheckpoint


class AdapterWeight(nn.Module):
    """One weight as a leaf module, saved by PEFT as `<name>.weight`.

    Not an nn.Linear, so that `target_modules="all-linear"` and quantisers pass it by.
    """

    def __init__(self, *shape: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


class MoSLDAdapter(StartsWithoutCheckpoint):
    """The mixture beside one linear layer; by default MoSLD's, E experts of rank r that share one down-projection A.

    Args:
        in_features: Input size of the layer.
        out_features: Output size of the layer.
        device, dtype: Of the trained weights.
        hyperparameters: The fields of `mosld.mixture.Mixture`.

    Raises:
        ValueError: Mixture refuses a value, or the mixing is of feed-forward blocks.

    shared_a.weight: [r, in_features]; expert_b.weight: [out_features, num_experts * r], where
    `.view(out_features, num_experts, r)[:, e]` is expert e; router.weight: [num_experts, in_features]. Other mixtures
    have other shapes, `mixture.shapes` tells them, some a mixer.weight or tasks.weight too; what one has not is None.
    router_logits: [..., num_experts] of the last call, for `balance_loss` and `router_stats`; None before the first,
    since `forget_routing`, and where tokens do not choose among experts. gates: [..., num_experts], where a gate
    function of the mixing's own made them; else top_k of the logits says who was chosen. mask: which of its tokens are
    real, None where that is not known. earlier: the same of earlier calls in one forward of the model, for layers that
    it calls several times; see `mosld.layers.forwards`. hidden, gram: z [..., rows of A] of the last forward and B^T B,
    for `mosld.losses.contrastive_loss`; None unless `keep_hidden`. deferred_grads: gradients for these, by name, of a
    forward that kept none; see `mosld.layers.deferred_grads`. routing: what `mosld.set_routing` gave. None of them is
    part of the state: copies and pickles of the module start without them.

    >>> import torch
    >>> from torch.nn import functional as F
    >>> from mosld import MoSLDAdapter
    >>> adapter = MoSLDAdapter(6, 5, r=2, num_experts=4)
    >>> adapter.mixture.shapes(6, 5)
    {'shared_a': (2, 6), 'expert_b': (5, 8), 'router': (4, 6)}
    >>> x, weight = torch.randn(3, 6), torch.randn(5, 6)
    >>> torch.equal(adapter(x, weight), F.linear(x, weight))  # B is still zero
    True
    """

    # "auto", "eager" or "triton", as for `mosld_kernels.mosld_linear`; set it on the class for all layers, or on one.
    backend = "auto"
    # Whether `router_logits` are kept; set it as `backend`. Inside activation checkpointing
    # torch.compile(fullgraph=True) takes such a memory only under
    # torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True. False lets it through where neither the
    # balance loss nor statistics are wanted.
    keep_logits = True
    # Whether `hidden` and `gram` are kept, where each expert has a B of its own behind z (mixings "expand" and
    # "diagonal"); set it as `backend`, before the forward. Such layers then run in three stages, not in the fused
    # operator.
    keep_hidden = False

    parts = PARTS
    balanced = False  # whether somebody took a balance loss of it, ever
    mask: Tensor | None

    shared_a: AdapterWeight
    expert_b: AdapterWeight
    router: AdapterWeight  # None, too, where nobody routes; who asks for it has made sure
    tasks: AdapterWeight | None
    mixer: AdapterWeight | None

    def __init__(self, in_features: int, out_features: int, *, device=None, dtype=None, **hyperparameters):
        super().__init__()
        self.mixture = m = Mixture(**hyperparameters)
        self.r, self.alpha, self.scale, self.num_experts = m.r, m.alpha, m.scale, m.num_experts
        self.top_k = m.experts_per_token
        self._can_fuse = m.uses_fused_operator
        self._can_keep_hidden = m.tokens_choose and m.mixing in ("expand", "diagonal")
        shapes = m.shapes(in_features, out_features)
        if not shapes.keys() <= set(self.parts):
            of_block = m.kind.block is not None
            raise ValueError(
                f"mixing={m.mixing!r} is of {'whole feed-forward blocks' if of_block else 'linear layers'}: "
                f"it cannot be placed on a {'linear layer' if of_block else 'feed-forward block'}"
            )
        for part in self.parts:
            self.register_module(
                part, AdapterWeight(*shapes[part], device=device, dtype=dtype) if part in shapes else None
            )
        self.dropouts = mask_dropouts(m)
        self._rates = tuple(self.dropouts)
        self.reset_state()
        self.deferred_grads: dict[str, Tensor] | None = None
        self.routing: Routing | None = None
        self.layer = ""  # its layer's name, once somebody walked the model
        remember_checkpoints()
        self.reset_parameters()

    def reset_state(self) -> None:
        """As before the first forward.

        >>> import torch
        >>> from mosld import MoSLDAdapter
        >>> adapter = MoSLDAdapter(6, 5, num_experts=4)
        >>> _ = adapter(torch.randn(3, 6))
        >>> adapter.router_logits.shape
        torch.Size([3, 4])
        >>> adapter.reset_state()
        >>> adapter.router_logits is None
        True
        """
        self.router_logits: Tensor | None = None
        self.hidden: Tensor | None = None
        self.gram: Tensor | None = None
        self.mask: Tensor | None = None
        self.gates: Tensor | None = None
        self.slot: Slot | None = None
        self.earlier: tuple[EarlierCall, ...] = ()
        self.last_forward: Forward | None = None  # of the model, in which it ran last

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start anew, in place: B zero, the rest as `down_std`, `router_std` and the mixing say.

        >>> from mosld import MoSLDAdapter
        >>> adapter = MoSLDAdapter(6, 5, device="meta").to_empty(device="cpu")
        >>> adapter.reset_parameters()
        >>> int(adapter.expert_b.weight.count_nonzero())
        0
        """
        m = self.mixture
        init_weight(self.shared_a.weight, m.down_std)
        nn.init.zeros_(self.expert_b.weight)
        self._mark_started()
        if self.router is not None and m.router_kind.start is not None:
            m.router_kind.start(self.router.weight, m)
        elif self.router is not None:
            init_weight(self.router.weight, m.router_std)
        if self.tasks is not None:
            nn.init.normal_(self.tasks.weight)  # as nn.Embedding starts
        if self.mixer is not None:
            m.kind.start(self.mixer.weight)

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """x [..., in_features] -> the layer's output with `weight` [out_features, in_features], the update without.

        >>> import torch
        >>> from mosld import MoSLDAdapter
        >>> adapter, x = MoSLDAdapter(6, 5), torch.randn(2, 3, 6)
        >>> adapter(x).shape, adapter(x).any()  # an update of zero at the start
        (torch.Size([2, 3, 5]), tensor(False))
        """
        self._expect_whole()
        keeps_hidden = self.keep_hidden and self._can_keep_hidden
        call = self._call(x, MASK_RATES)
        if keeps_hidden or not self._can_fuse:
            out, logits, z, gates = self._staged(x, weight, bias, call)
        else:
            out, logits = self._fused(x, weight, bias, call)
            z, gates = None, None
        hidden, gram = (z, self._gram(z)) if keeps_hidden and z is not None else (None, None)
        return self._kept(x, out, call, router_logits=logits, hidden=hidden, gram=gram, gates=gates)

    def _call(self, x: Tensor, drawn: tuple[str, ...]) -> Call:
        """Dropout, scale and routing of this call: as they are now, or in a recomputation as they were.

        drawn: the rates whose masks are made of a seed.
        """
        rates = {name: self._rate(name) for name in self._rates}
        # From torch's generator, so manual_seed, checkpointing and resuming repeat the masks by themselves.
        seeded = any(rates.get(name) for name in drawn)
        seed = torch.randint(2**62, (1,), device=x.device) if seeded else None
        if torch.compiler.is_compiling() or this_thread.region is None:
            return Call(rates, self.scale, seed, None)
        return this_thread.region.same(self, Call(rates, self.scale, seed, Slot()))

    def _kept(self, x: Tensor, out: Tensor, call: Call, **kept: Tensor | None) -> Tensor:
        """Keep what losses and statistics ask for; -> the layer's output, with the gradients that these deferred."""
        if torch.compiler.is_compiling():
            self._keep(kept)
            return out if self.deferred_grads is None else attach(self, out, kept)
        if call.slot is not None and in_backward():  # a recomputation: what was kept of the forward stays
            return out if call.slot.deferred_grads is None else attach(call.slot, out, kept)
        forward = this_thread.forward
        if forward is not None and forward is self.last_forward and self.router_logits is not None:
            self.earlier = (*self.earlier, EarlierCall(self))
        elif self.earlier:
            self.earlier = ()
        self.last_forward = forward
        self._keep(kept)
        self.__dict__["mask"] = None if forward is None else forward.mask_of(x)
        self.__dict__["slot"] = call.slot
        return out if self.deferred_grads is None else attach(self, out, kept)

    def _keep(self, kept: dict[str, Tensor | None]) -> None:
        if self.keep_logits:
            self.router_logits, self.gates = kept["router_logits"], kept.get("gates")
        if self.keep_hidden:
            self.hidden, self.gram = kept.get("hidden"), kept.get("gram")

    def _gram(self, z: Tensor) -> Tensor:
        """B^T B in z's dtype; made here because B is whole while the layer runs, and perhaps not later (FSDP, ZeRO)."""
        with no_autocast(z.device.type):
            expert_b = self.expert_b.weight.to(z.dtype)
            return expert_b.t() @ expert_b

    def _expect_whole(self) -> None:
        weights: dict[str, Any] = {}
        for part in self.parts:
            own: Any = self._modules[part]
            if own is not None:
                weights[part] = own.weight
        if any(isinstance(weight, DTensor) for weight in weights.values()):
            raise RuntimeError(
                f"{', '.join(weights)} must be whole while the layer runs, and one of them is a shard: apply "
                "fully_shard to the transformer block, which puts them together, and not to the weights by themselves"
            )

    def _rate(self, name: str) -> float:
        """The rate of one dropout in this forward: 0 where its module is not in training mode, or was replaced by one
        that drops nothing (nn.Identity)."""
        # Not by attribute: nn.Module's lookup costs more than all the rest of this.
        own: Any = self._modules["dropouts"]._modules.get(name)  # pyright: ignore[reportOptionalMemberAccess]
        return getattr(own, "p", 0.0) if own is not None and own.training else 0.0

    @property
    def dropout(self) -> float:
        """The probability of dropping an element of A in training, as it is now.

        >>> from mosld import MoSLDAdapter
        >>> MoSLDAdapter(6, 5, dropout=0.1).dropout
        0.1
        """
        return getattr(self.dropouts._modules.get("dropout"), "p", 0.0)

    def _fused(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        tensors = (self.shared_a.weight, self.expert_b.weight, self.router.weight)
        dropout_p = call.rates.get("dropout", 0.0)
        settings: dict[str, Any] = dict(top_k=self.top_k, scale=call.scale, dropout_p=dropout_p, seed=call.seed)
        settings |= {"backend": self.backend, "mixing": self.mixture.mixing}
        if weight is None:
            return mosld_delta(x, *tensors, **settings)
        return mosld_linear(x, weight, bias, *tensors, **settings)

    def _staged(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """-> the output, the logits by which tokens choose experts or None, z [..., rows of A], and the gates [..., E]
        where a gate function of the mixing's own made them"""
        if self.backend == "triton":
            raise RuntimeError(
                f"backend='triton' cannot run: mixing={self.mixture.mixing!r} with router={self.mixture.router!r}, "
                f"keep_hidden={self.keep_hidden} and this dropout runs in torch products alone; backend='auto' can"
            )
        m, routed, hidden = self.mixture, [], []
        own_gates: list[Tensor] = []
        rates = [call.rates.get(name, 0.0) for name in RATES]

        def mix(z: Tensor, logits: Tensor | None) -> Tensor:
            hidden.append(z)
            if m.has_logits:
                logits = router_logits(self, x, z, logits)
                routed.append(logits)
                gates = apply_gate(self, logits)
                if m.kind.gate is not None and gates.shape == logits.shape:
                    own_gates.append(gates.detach())
            else:
                gates = gates_without_logits(self, x, z)
            mixer = None if self.mixer is None else self.mixer.weight.to(z.dtype)
            if m.kind.per_task and mixer is not None:
                mixer = mixer[task_ids(self, x)]
                mixer = mixer if x.dim() > 1 else mixer.squeeze(0)
            return m.kind.mix(z, gates, mixer)

        out, _ = staged_linear(
            x, weight, bias, self.shared_a.weight, self.expert_b.weight, mix, scale=call.scale, seed=call.seed,
            router_weight=self.router.weight if m.router_kind.linear else None,
            dropout=Dropout(*rates),
        )  # fmt: skip
        # Gates of another form than one an expert say nothing of who was chosen.
        chooses = m.tokens_choose and (m.kind.gate is None or own_gates)
        return out, routed[0] if routed and chooses else None, hidden[0], own_gates[0] if own_gates else None

    def routing_input(self, name: str) -> Any:
        """What `mosld.set_routing` gave under this name, or None.

        >>> import torch
        >>> from mosld import MoSLDLinear, set_routing
        >>> layer = MoSLDLinear(6, 5, num_experts=2, router="external")
        >>> set_routing(layer, gates=torch.tensor([0.25, 0.75]))
        >>> layer.adapter.routing_input("gates"), layer.adapter.routing_input("prior")
        (tensor([0.2500, 0.7500]), None)
        """
        routing = self.routing
        if not torch.compiler.is_compiling():
            scope, region = this_thread.scope, this_thread.region
            if scope is not None:
                routing = scope.get(self, routing)
            if region is not None:
                routing = region.same((self, "routing"), routing)
        return None if routing is None else getattr(routing, name)

    @property
    def training(self) -> bool:
        """Whether the layer is in training mode: as its weights' modules say, which whoever walks a model sets.

        >>> from mosld import MoSLDLinear
        >>> MoSLDLinear(6, 5).eval().adapter.training
        False
        """
        modules: Any = self.__dict__.get("_modules") or {}
        own = modules.get(self.parts[0])
        return True if own is None else own.training

    @training.setter
    def training(self, value: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """nn.Module sets it beside those of its modules."""

    def running_forward(self) -> Forward | None:
        """The forward of the model that runs in this thread, which knows how many rows it was called with; or None.

        >>> from mosld import MoSLDAdapter
        >>> MoSLDAdapter(6, 5).running_forward() is None
        True
        """
        return None if torch.compiler.is_compiling() else this_thread.forward

    def extra_repr(self) -> str:
        m = self.mixture
        first = ("r", "alpha", "num_experts", "top_k", "dropout")
        texts = [f"{name}={getattr(m, name)}" for name in first]
        for name in FIELDS:
            if name not in first and getattr(m, name) != getattr(_DEFAULT, name):
                texts.append(f"{name}={getattr(m, name)!r}")
        return ", ".join(texts)

    def __getstate__(self) -> dict:
        # They belong to the last forward's graph, which can be neither copied nor pickled.
        return {**self.__dict__, **dict.fromkeys(_OF_THE_LAST_FORWARD), "earlier": ()}


_DEFAULT = Mixture()
_OF_THE_LAST_FORWARD = (
    "router_logits", "hidden", "gram", "mask", "gates", "slot", "deferred_grads", "routing", "last_forward",
)  # fmt: skip


def init_weight(weight: Tensor, std: float | None) -> None:
    """In place: Kaiming-uniform, or normal with a standard deviation."""
    if std is None:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    else:
        nn.init.normal_(weight, std=std)
