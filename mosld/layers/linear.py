"""`MoSLDLinear`: an nn.Linear, frozen, with a mixture of LoRA experts beside it."""

from typing import Any

from torch import Tensor, nn

from ..mixture.spec import Mixture
from .adapter import AdapterWeight, MoSLDAdapter
from .host import MixtureHost


def disable_encoder_fastpath(module: nn.Module) -> None:
    """Make torch's fused encoder layers call `module` instead of reading its `weight`: they do so where hooks are."""
    module.register_forward_hook(_no_hook)


def _no_hook(module, args, output) -> None:
    """Changes nothing; see `disable_encoder_fastpath`."""


class MoSLDLinear(nn.Linear, MixtureHost):
    """A drop-in for nn.Linear: its `weight` and `bias` are frozen, a mixture of LoRA experts beside them is trained.

    Args:
        in_features, out_features, bias, device, dtype: As in nn.Linear.
        r: Rank of A and of every expert.
        alpha: The update is scaled by alpha / r.
        num_experts: E, the number of experts.
        top_k: Experts chosen per token, in [1, E].
        dropout: Probability of dropping an element of A in training (MoSLD's Eq. 2).
        mixture: Further fields of `mosld.mixture.Mixture`, for the sibling methods.

    Raises:
        ValueError: Mixture refuses a value.

    `weight` and `bias` load from a plain nn.Linear checkpoint, strictly too: one without any of the adapter's tensors
    leaves the adapter as it is. One that was made on the meta device starts as a fresh one when it gets memory, whether
    by `to_empty`, `load_state_dict(assign=True)` or transformers' from_pretrained. The adapter's own tensors are
    `adapter.shared_a.weight`, `adapter.expert_b.weight` and `adapter.router.weight`.

    >>> import torch
    >>> from mosld import MoSLDLinear
    >>> layer = MoSLDLinear(1024, 1024, r=8, num_experts=8, top_k=2)
    >>> layer(torch.randn(2, 5, 1024)).shape
    torch.Size([2, 5, 1024])
    >>> {name: list(p.shape) for name, p in layer.named_parameters() if p.requires_grad}
    {'adapter.shared_a.weight': [8, 1024], 'adapter.expert_b.weight': [1024, 64], 'adapter.router.weight': [8, 1024]}
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        r: int = Mixture.r,
        alpha: float = Mixture.alpha,
        num_experts: int = Mixture.num_experts,
        top_k: int = Mixture.top_k,
        dropout: float = Mixture.dropout,
        device=None,
        dtype=None,
        **mixture,
    ):
        fields: dict[str, Any] = dict(
            r=r, alpha=alpha, num_experts=num_experts, top_k=top_k, dropout=dropout, **mixture
        )
        Mixture(**fields)  # bad values are refused before the base weight is made
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.adapter = MoSLDAdapter(in_features, out_features, **fields, device=device, dtype=dtype)
        self._freeze()
        disable_encoder_fastpath(self)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **hyperparameters) -> "MoSLDLinear":
        """A MoSLDLinear that shares `linear`'s weight and bias, which are frozen; the rest as in the constructor.

        raises ValueError for anything but a plain nn.Linear: subclasses may hold something else than a weight.

        >>> import torch
        >>> from torch import nn
        >>> from mosld import MoSLDLinear
        >>> linear, x = nn.Linear(6, 5), torch.randn(3, 6)
        >>> layer = MoSLDLinear.from_linear(linear, r=2, num_experts=4)
        >>> torch.equal(layer(x), linear(x)), layer.weight is linear.weight, linear.weight.requires_grad
        (True, True, False)
        """
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"from_linear takes a plain nn.Linear, got {type(linear).__name__}; quantised and other linear layers "
                "are adapted through PEFT: get_peft_model(model, MoSLDConfig(...))"
            )
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta", **hyperparameters)
        # In the layer's dtype before there is memory: leaving the meta device starts the weights.
        layer.adapter = layer.adapter.to(linear.weight.dtype).to_empty(device=linear.weight.device)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._freeze()
        return layer.train(linear.training)

    def all_adapters(self) -> tuple[MoSLDAdapter]:
        """Its one mixture, which always runs.

        >>> from mosld import MoSLDLinear
        >>> layer = MoSLDLinear(6, 5)
        >>> layer.all_adapters() == layer.running_adapters() == (layer.adapter,)
        True
        """
        return (self.adapter,)

    running_adapters = all_adapters

    def _freeze(self) -> None:
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    @property
    def shared_a(self) -> AdapterWeight:
        """`adapter.shared_a`; its weight is [r, in_features].

        >>> from mosld import MoSLDLinear
        >>> MoSLDLinear(6, 5, r=2, num_experts=4).shared_a.weight.shape
        torch.Size([2, 6])
        """
        return self.adapter.shared_a

    @property
    def expert_b(self) -> AdapterWeight:
        """`adapter.expert_b`; its weight is [out_features, num_experts * r].

        >>> from mosld import MoSLDLinear
        >>> MoSLDLinear(6, 5, r=2, num_experts=4).expert_b.weight.view(5, 4, 2)[:, 3].shape  # B of the last expert
        torch.Size([5, 2])
        """
        return self.adapter.expert_b

    @property
    def router(self) -> AdapterWeight:
        """`adapter.router`; its weight is [num_experts, in_features].

        >>> from mosld import MoSLDLinear
        >>> MoSLDLinear(6, 5, r=2, num_experts=4).router.weight.shape
        torch.Size([4, 6])
        """
        return self.adapter.router

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> y [..., out_features]

        >>> import torch
        >>> from mosld import MoSLDLinear
        >>> layer = MoSLDLinear(6, 5, num_experts=4)
        >>> layer(torch.randn(2, 3, 6)).shape, layer.adapter.router_logits.shape
        (torch.Size([2, 3, 5]), torch.Size([2, 3, 4]))
        """
        return self.adapter(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.adapter.extra_repr()}"

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args, **kwargs) -> None:
        if not any(key.startswith(f"{prefix}adapter.") for key in state_dict):
            weight = state_dict.get(f"{prefix}weight")
            if self.adapter._on_meta() and weight is not None and local_metadata.get("assign_to_params_buffers"):
                # assign=True puts the checkpoint's tensors where those without memory are.
                self.adapter = self.adapter.to(weight.dtype).to_empty(device=weight.device)
            state_dict.update({f"{prefix}adapter.{name}": p for name, p in self.adapter.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
