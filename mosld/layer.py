"""One frozen linear layer with its mixture: `MoSLDAdapter` owns A, B and the router, `MoSLDLinear` is an nn.Linear with one.

    y = x W0^T + b0 + s sum_{k in top-K} g_k B_k A~ x,     s = alpha / r        (MoSLD, arXiv 2412.08946, Eq. 1 to 3)

A starts Kaiming-uniform, B at zero, so a freshly adapted layer computes exactly what the frozen one does.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mosld_kernels import mosld_delta, mosld_linear


def check_hyperparameters(*, r: int, alpha: float, num_experts: int, top_k: int, dropout: float) -> None:
    """Raise ValueError, with the rule and the value, for a mixture that cannot be built."""
    for name, value in (("r", r), ("num_experts", num_experts), ("top_k", top_k)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if top_k > num_experts:
        raise ValueError(f"top_k must be in [1, num_experts={num_experts}], got {top_k}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be in [0, 1], got {dropout}")
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be positive and finite, got {alpha}")


class AdapterWeight(nn.Module):
    """One weight as a leaf module, saved by PEFT as `<name>.weight`.

    Not an nn.Linear, so that `target_modules="all-linear"` and quantisers pass it by.
    """

    def __init__(self, rows: int, cols: int, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, cols, device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.weight.shape)


class _WithOwed(torch.autograd.Function):
    """out unchanged; backward gives `logits` the gradient `owed` as well."""

    @staticmethod
    def forward(ctx, out: Tensor, logits: Tensor, owed: Tensor) -> Tensor:
        ctx.save_for_backward(owed)
        return out.clone()  # no view: what comes next may work in place

    @staticmethod
    def backward(ctx, *dout: Tensor) -> tuple[Tensor, Tensor, None]:
        return dout[0], ctx.saved_tensors[0], None


class MoSLDAdapter(nn.Module):
    """The mixture beside one linear layer: E experts of rank r that share one down-projection A.

    shared_a.weight: [r, in_features]; expert_b.weight: [out_features, num_experts * r], where
    `.view(out_features, num_experts, r)[:, e]` is expert e; router.weight: [num_experts, in_features].
    router_logits: [..., num_experts] of the last forward, for `balance_loss` and `router_stats`; None before the
    first and since `forget_routing`. owed: a gradient for the logits of a forward that kept none, which the
    recomputation takes along; set and explained by `balance_loss`. Neither is part of the state: copies and pickles of
    the module start without them.

    raises ValueError for values that `check_hyperparameters` refuses.
    """

    # "auto", "eager" or "triton", as for `mosld_kernels.mosld_linear`; set it on the class for all layers, or on one.
    backend = "auto"
    # Whether `router_logits` are kept; set it as `backend`. Inside activation checkpointing torch.compile(fullgraph=True)
    # takes such a memory only under torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True. False
    # lets it through where neither the balance loss nor statistics are wanted.
    keep_logits = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int = 8,
        alpha: float = 16,
        num_experts: int = 8,
        top_k: int = 2,
        dropout: float = 0.1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_hyperparameters(r=r, alpha=alpha, num_experts=num_experts, top_k=top_k, dropout=dropout)
        self.r, self.alpha, self.scale = r, alpha, alpha / r
        self.num_experts, self.top_k, self.dropout = num_experts, top_k, dropout
        self.shared_a = AdapterWeight(r, in_features, device, dtype)
        self.expert_b = AdapterWeight(out_features, num_experts * r, device, dtype)
        self.router = AdapterWeight(num_experts, in_features, device, dtype)
        self.router_logits: Tensor | None = None
        self.owed: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for module in (self.shared_a, self.router):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
        nn.init.zeros_(self.expert_b.weight)

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """x [..., in_features] -> the layer's output with `weight` [out_features, in_features], the update without."""
        dropout_p, seed = 0.0, None
        if self.training and self.dropout > 0:
            # From torch's generator, so manual_seed, checkpointing and resuming repeat the mask by themselves.
            dropout_p, seed = self.dropout, torch.randint(2**62, (1,), device=x.device)
        tensors = (self.shared_a.weight, self.expert_b.weight, self.router.weight)
        if any(isinstance(tensor, DTensor) for tensor in tensors):
            raise RuntimeError(
                "shared_a, expert_b and router must be whole while the layer runs, and one of them is a shard: apply "
                "fully_shard to the transformer block, which puts them together, and not to the weights by themselves"
            )
        settings: dict[str, Any] = dict(top_k=self.top_k, scale=self.scale, dropout_p=dropout_p, seed=seed)
        settings["backend"] = self.backend
        if weight is None:
            out, logits = mosld_delta(x, *tensors, **settings)
        else:
            out, logits = mosld_linear(x, weight, bias, *tensors, **settings)
        if self.keep_logits:
            self.router_logits = logits
        if self.owed is not None:
            # A gradient that is owed outside backward is left from one that broke off. A compiled layer cannot ask
            # whether it is inside; there, `forget_routing` takes away what is left.
            if (torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1) and logits.requires_grad:
                out = cast(Tensor, _WithOwed.apply(out, logits, self.owed))
            self.owed = None
        return out

    def extra_repr(self) -> str:
        return (
            f"r={self.r}, alpha={self.alpha}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"dropout={self.dropout}"
        )

    def __getstate__(self) -> dict:
        # They belong to the last forward's graph, which can be neither copied nor pickled.
        return {**self.__dict__, "router_logits": None, "owed": None}


def call_me(module: nn.Module) -> None:
    """Make torch's fused encoder layers call `module` instead of reading its `weight`: they do so where hooks are."""
    module.register_forward_hook(_no_hook)


def _no_hook(module, args, output) -> None:
    """Changes nothing; see `call_me`."""


class MoSLDLinear(nn.Linear):
    """A drop-in for nn.Linear: its `weight` and `bias` are frozen, a mixture of LoRA experts beside them is trained.

    in_features, out_features, bias, device, dtype: as in nn.Linear.
    r: rank of A and of every expert. alpha: the update is scaled by alpha / r.
    num_experts: E. top_k: experts chosen per token, in [1, E].
    dropout: probability of dropping an element of A in training (MoSLD's Eq. 2).

    `weight` and `bias` load from a plain nn.Linear checkpoint, strictly too: one without any of the adapter's tensors
    leaves the adapter as it is. The adapter's own tensors are `adapter.shared_a.weight`, `adapter.expert_b.weight`
    and `adapter.router.weight`.

    >>> layer = MoSLDLinear.from_linear(nn.Linear(1024, 1024), r=8, num_experts=8, top_k=2)
    >>> layer(torch.randn(2, 5, 1024)).shape
    torch.Size([2, 5, 1024])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        r: int = 8,
        alpha: float = 16,
        num_experts: int = 8,
        top_k: int = 2,
        dropout: float = 0.1,
        device=None,
        dtype=None,
    ):
        check_hyperparameters(r=r, alpha=alpha, num_experts=num_experts, top_k=top_k, dropout=dropout)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.adapter = MoSLDAdapter(
            in_features,
            out_features,
            r=r,
            alpha=alpha,
            num_experts=num_experts,
            top_k=top_k,
            dropout=dropout,
            device=device,
            dtype=dtype,
        )
        self._freeze()
        call_me(self)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **hyperparameters) -> "MoSLDLinear":
        """A MoSLDLinear that shares `linear`'s weight and bias, which are frozen; the rest as in the constructor.

        raises ValueError for anything but a plain nn.Linear: subclasses may hold something else than a weight.
        """
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"from_linear takes a plain nn.Linear, got {type(linear).__name__}; quantised and other linear layers "
                "are adapted through PEFT: get_peft_model(model, MoSLDConfig(...))"
            )
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta", **hyperparameters)
        layer.adapter = layer.adapter.to_empty(device=linear.weight.device).to(linear.weight.dtype)
        layer.adapter.reset_parameters()
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._freeze()
        return layer.train(linear.training)

    def _freeze(self) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    @property
    def shared_a(self) -> AdapterWeight:
        return self.adapter.shared_a

    @property
    def expert_b(self) -> AdapterWeight:
        return self.adapter.expert_b

    @property
    def router(self) -> AdapterWeight:
        return self.adapter.router

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> y [..., out_features]"""
        return self.adapter(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.adapter.extra_repr()}"

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        if not any(key.startswith(f"{prefix}adapter.") for key in state_dict):
            state_dict.update({f"{prefix}adapter.{name}": p for name, p in self.adapter.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
