"""The public functions: check the arguments, choose the backend once, flatten x, run, and give x's shape back.

Eager mode calls the autograd function directly, because the dispatcher would cost more than a small layer takes.
Under torch.compile and torch.export the call is one opaque operator, `torch.ops.mosld.linear`, whose backward is
`torch.ops.mosld.linear_backward`: no graph break, and the same bits as in eager mode.
"""

import contextlib
import importlib.util
import os

import torch
from torch import Tensor

from . import autograd, plain
from .autograd import Inputs, MoSLDFunction, Settings
from .checks import check_input, check_mixing, check_seed
from .limits import size_obstacle
from .packing import expert_rank
from .precision import FLOATS, autocasts, castable_dtypes, no_autocast, product_dtype, router_dtype
from .products import frozen, multiplies_apart
from .transforms import needs_plain_operators

BACKENDS = ("auto", "eager", "triton")
TRITON_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
try:
    TRITON_INSTALLED = importlib.util.find_spec("triton") is not None  # looks for it and does not import it
except (ImportError, ValueError):  # ValueError: a stand-in for the module, without a specification
    TRITON_INSTALLED = False
INTERPRETED_FLOATS = (torch.float32, torch.float16)  # Triton's interpreter computes bfloat16 wrongly, without a word
LEAST_CAPABILITY = 8  # major version, of the NVIDIA GPUs that the kernels are compiled for
MOST_SCALE = torch.finfo(torch.float32).max


def mosld_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shared_a: Tensor,
    expert_b: Tensor,
    router_weight: Tensor,
    *,
    top_k: int,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
    mixing: str = "expand",
) -> tuple[Tensor, Tensor]:
    """A frozen linear layer with a mixture of LoRA experts that share A: y = x W0^T + b0 + s sum_k g_k B_k A~ x.

    The three adapter tensors (shared_a, expert_b, router_weight) share one dtype, which may differ from x's: they are
    cast to it, and their gradients come back in their own. float32 products follow torch's float32 matmul precision:
    TF32 only where it was asked for.

    Args:
        x: [..., D_in] in float32, bfloat16, float16 or float64. Any leading shape, also with no tokens.
        weight: [D_out, D_in], the base layer, in x's dtype.
        bias: [D_out] or None, in x's dtype.
        shared_a: [R, D_in], the shared down-projection A. With mixing "diagonal" [E * R, D_in], an A for each expert:
            `shared_a.view(E, R, D_in)[e]` is expert e's.
        expert_b: [D_out, E * R], the experts' up-projections side by side: `expert_b.view(D_out, E, R)[:, e]` is
            expert e's.
        router_weight: [E, D_in], no bias.
        top_k: experts chosen per token, K in [1, E]. Equal logits go to the lower index.
        scale: s = alpha / R.
        dropout_p: probability in [0, 1] of dropping an element of A (MoSLD's Eq. 2). The mask is one for all tokens,
            `keep_mask(seed, shared_a.shape, dropout_p)`: for all experts too where they share A.
        seed: int64 [1] on x's device, needed when dropout_p > 0. The mask is a pure function of it. Draw it with
            torch's generator, as in `torch.randint(2**62, (1,), device=x.device)`.
        backend: "eager" (torch products, any device), "triton" (kernels for NVIDIA GPUs) or "auto" (Triton where it
            runs on a GPU, else eager). "triton" needs compute capability 8.0, x and adapters in float32, bfloat16 or
            float16, R up to 128, E up to 64, and with mixing "diagonal" E * R up to 128, each rounded up to a power of
            two. On CPU tensors it runs only under Triton's interpreter, TRITON_INTERPRET=1.
        mixing: "expand" (one A for all experts) or "diagonal" (an A for each, as in MoLA, LoRAMoE and MoELoRA:
            y = x W0^T + b0 + s sum_k g_k B_k A~_k x).

    Returns:
        y [..., D_out] in x's dtype (the autocast dtype under autocast), and router_logits [..., E] in float32 (float64
        for float64 x). Both carry gradients for x, the adapter tensors, and weight and bias where they require one.

    Raises:
        ValueError: for shapes, dtypes, devices or values that do not fit, with the rule and the value.
        RuntimeError: for a backend that cannot run here.

    >>> import torch
    >>> from mosld_kernels import mosld_linear, reference
    >>> x, weight, bias = torch.randn(2, 3, 6), torch.randn(5, 6), torch.randn(5)
    >>> adapter = torch.randn(2, 6), torch.randn(5, 4 * 2), torch.randn(4, 6)  # A, B and router; R = 2, E = 4
    >>> y, router_logits = mosld_linear(x, weight, bias, *adapter, top_k=2, scale=2.0)
    >>> y.shape, router_logits.shape
    (torch.Size([2, 3, 5]), torch.Size([2, 3, 4]))
    >>> torch.allclose(y, reference.mosld_linear(x, weight, bias, *adapter, top_k=2, scale=2.0)[0], atol=1e-4)
    True
    """
    settings = Settings(top_k, scale, dropout_p, backend, mixing)
    return _run(x, weight, bias, shared_a, expert_b, router_weight, seed, settings)


def mosld_delta(
    x: Tensor,
    shared_a: Tensor,
    expert_b: Tensor,
    router_weight: Tensor,
    *,
    top_k: int,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
    mixing: str = "expand",
) -> tuple[Tensor, Tensor]:
    """The update alone, s sum_k g_k B_k A~ x, for a base layer that is not a plain weight.

    Args:
        x: [..., D_in].
        shared_a: [R, D_in], or [E * R, D_in] with mixing "diagonal".
        expert_b: [D_out, E * R].
        router_weight: [E, D_in].
        top_k: K in [1, E].
        scale: s = alpha / R.
        dropout_p: probability in [0, 1] of dropping an element of A.
        seed: int64 [1], needed when dropout_p > 0.
        backend: "auto", "eager" or "triton".
        mixing: "expand" or "diagonal". All ten are as in `mosld_linear`.

    Returns:
        The update [..., D_out] in x's dtype (the autocast dtype under autocast), and router_logits [..., E].

    Raises:
        ValueError: for shapes, dtypes, devices or values that do not fit, with the rule and the value.
        RuntimeError: for a backend that cannot run here.

    >>> import torch
    >>> from mosld_kernels import mosld_delta
    >>> x, shared_a, expert_b = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 10.0]])
    >>> router_weight = torch.tensor([[0.0, 0.0], [1.0, 0.0]])  # expert 1 has the larger logit
    >>> mosld_delta(x, shared_a, expert_b, router_weight, top_k=1, scale=2.0)  # 2 * 10 * (1 + 2)
    (tensor([[60.]]), tensor([[0., 1.]]))
    """
    settings = Settings(top_k, scale, dropout_p, backend, mixing)
    return _run(x, None, None, shared_a, expert_b, router_weight, seed, settings)


def _run(x, weight, bias, shared_a, expert_b, router_weight, seed, settings: Settings):
    inputs = Inputs(x, weight, bias, shared_a, expert_b, router_weight, seed)
    _check_settings(settings)
    _check_tensors(inputs, settings)
    dtype = product_dtype(x)
    _check_dtypes(inputs, dtype)
    # float: an integer scale would compile kernels of its own.
    backend = _choose_backend(inputs, dtype, settings.backend, settings.mixing)
    settings = settings._replace(scale=float(settings.scale), backend=backend)
    if dtype != x.dtype or autocasts(x):  # casts are the first thing that runs
        cast = {}
        for name in ("x", "weight", "bias"):
            tensor = getattr(inputs, name)
            if tensor is not None:
                cast[name] = tensor.to(dtype)
        inputs = inputs._replace(**cast)
    leading = x.shape[:-1]
    base = None
    if inputs.weight is not None and multiplies_apart(inputs.x):
        base = frozen(inputs.x, inputs.weight, inputs.bias)
        inputs = inputs._replace(weight=None, bias=None)
    inputs = inputs._replace(x=inputs.x.reshape(-1, x.shape[-1]))
    if needs_plain_operators():
        with no_autocast(x.device.type) if autocasts(x) else contextlib.nullcontext():
            out, logits = plain.forward(inputs, settings)
        return _whole(base, out.view(*leading, out.shape[1])), logits.view(*leading, logits.shape[1])
    # Tensors without memory (fake ones) and other subclasses go the dispatcher's way, which knows what to do with them.
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter):
        out, logits, _, _ = torch.ops.mosld.linear(*inputs, *settings)
    else:
        # What is cast is cast: routing and products keep their dtypes, as they do in backward.
        with no_autocast(x.device.type) if autocasts(x) else contextlib.nullcontext():
            if torch.is_grad_enabled():
                out, logits = MoSLDFunction.apply(*inputs, *settings)
            else:  # a tenth of the time of a call with one token
                out, logits, _, _ = autograd.forward(inputs, settings)
    return _whole(base, out.view(*leading, out.shape[1])), logits.view(*leading, logits.shape[1])


def _whole(base: Tensor | None, out: Tensor) -> Tensor:
    return out if base is None else base + out


def _choose_backend(inputs: Inputs, dtype: torch.dtype, asked: str, mixing: str) -> str:
    """ "auto" takes Triton where it runs on a GPU; "triton" runs or raises with the reason."""
    if asked == "eager" or (asked == "auto" and (inputs.x.device.type != "cuda" or _interprets())):
        return "eager"
    obstacle = _triton_obstacle(inputs, dtype, mixing)
    if obstacle and asked == "triton":
        raise RuntimeError(f"backend='triton' cannot run: {obstacle}; backend='eager' can")
    return "eager" if obstacle else "triton"


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _triton_obstacle(inputs: Inputs, dtype: torch.dtype, mixing: str) -> str | None:
    """Why the kernels cannot take this call with products in `dtype`, or None."""
    device, shared_a, experts = inputs.x.device, inputs.shared_a, inputs.router_weight.shape[0]
    for name, used in (("x", dtype), ("shared_a, expert_b and router_weight", shared_a.dtype)):
        if used not in TRITON_FLOATS:
            return f"{name} must be float32, bfloat16 or float16, got {used}"
    if too_large := size_obstacle(expert_rank(shared_a.shape[0], experts, mixing), experts, mixing):
        return too_large
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if device.type not in ("cuda", "cpu") or (device.type == "cpu" and not _interprets()):
        return f"it needs an NVIDIA GPU, got x on {device} (cpu only with TRITON_INTERPRET=1, which is slow)"
    if _interprets():
        for used in (dtype, shared_a.dtype):
            if used not in INTERPRETED_FLOATS:
                return f"Triton's interpreter is wrong in {used}; float32 and float16 are right there"
        return None
    properties = torch.cuda.get_device_properties(device)  # of all ways to ask, the one torch.compile folds
    if torch.version.hip or properties.major < LEAST_CAPABILITY:
        found = f"{properties.name} of {properties.major}.{properties.minor}"
        return f"it needs an NVIDIA GPU of compute capability {LEAST_CAPABILITY}.0 or more, got {found}"
    return None


def _check_settings(settings: Settings) -> None:
    if settings.backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {settings.backend!r}")
    check_mixing(settings.mixing)
    for name, value in (("dropout_p", settings.dropout_p), ("scale", settings.scale)):
        if not isinstance(value, (int, float)):
            raise ValueError(f"{name} must be a number, got {value!r}")
    if not isinstance(settings.top_k, int):
        raise ValueError(f"top_k must be an integer, got {settings.top_k!r}")
    if not 0 <= settings.dropout_p <= 1:
        raise ValueError(f"dropout_p must be in [0, 1], got {settings.dropout_p}")
    # torch.compile cannot trace math.isfinite of a symbolic number, nor inside a checkpoint any comparison of one.
    if not torch.compiler.is_compiling() and not -MOST_SCALE < settings.scale < MOST_SCALE:
        raise ValueError(f"scale must be finite, in float32 too, got {settings.scale}")


def _check_tensors(inputs: Inputs, settings: Settings) -> None:
    x, weight, bias, shared_a, expert_b, router_weight, seed = inputs
    for name, tensor in zip(Inputs._fields, inputs, strict=True):
        if tensor is not None or name not in ("weight", "bias", "seed"):
            _expect_dense(tensor, name)
    check_input(x)
    rows_rule = "[E * R, D_in]" if settings.mixing == "diagonal" else "[R, D_in]"
    if not (shared_a.dim() == expert_b.dim() == router_weight.dim() == 2):
        raise ValueError(
            f"shared_a {rows_rule}, expert_b [D_out, E * R] and router_weight [E, D_in] must have two dimensions, got "
            f"{list(shared_a.shape)}, {list(expert_b.shape)}, {list(router_weight.shape)}"
        )
    d_in, d_out = x.shape[-1], expert_b.shape[0]
    rows, num_experts = shared_a.shape[0], router_weight.shape[0]
    if settings.mixing == "diagonal" and num_experts and rows % num_experts:
        raise ValueError(f"shared_a must be {rows_rule} with E={num_experts}, got {list(shared_a.shape)}")
    rank = expert_rank(rows, max(1, num_experts), settings.mixing)
    if rank < 1 or num_experts < 1 or d_out < 1:
        raise ValueError(f"R, E and D_out must be at least 1, got R={rank}, E={num_experts}, D_out={d_out}")
    _expect(shared_a, "shared_a", rows_rule, (rows, d_in))
    _expect(router_weight, "router_weight", "[E, D_in]", (num_experts, d_in))
    _expect(expert_b, "expert_b", f"[D_out, E * R] with E={num_experts}, R={rank}", (d_out, num_experts * rank))
    if weight is not None:
        _expect(weight, "weight", "[D_out, D_in]", (d_out, d_in))
    if bias is not None:
        _expect(bias, "bias", "[D_out]", (d_out,))
    if not 1 <= settings.top_k <= num_experts:
        raise ValueError(f"top_k must be in [1, num_experts={num_experts}], got {settings.top_k}")
    for name, tensor in zip(Inputs._fields[:6], inputs, strict=False):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    if settings.dropout_p > 0:
        if seed is None:
            raise ValueError(f"dropout_p={settings.dropout_p} needs a seed: an int64 tensor of shape [1]")
        check_seed(seed, x.device)


def _check_dtypes(inputs: Inputs, dtype: torch.dtype) -> None:
    """dtype: of the products. Autocast casts to it what is a float of at most 32 bits; nothing else is cast."""
    castable = castable_dtypes(inputs.x, dtype)
    for name, tensor in zip(Inputs._fields[:3], inputs, strict=False):
        if tensor is not None and tensor.dtype not in castable:
            raise ValueError(f"{name} must have x's dtype {inputs.x.dtype}, got {tensor.dtype}")
    shared = inputs.shared_a.dtype
    for name, tensor in zip(Inputs._fields[3:6], inputs[3:6], strict=True):
        if tensor.dtype not in FLOATS or tensor.dtype != shared:
            raise ValueError(
                f"shared_a, expert_b and router_weight must share one floating-point dtype, got {tensor.dtype} "
                f"for {name} beside {shared} for shared_a"
            )


def _expect_dense(tensor: object, name: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
        got = type(tensor).__name__ if not isinstance(tensor, Tensor) else tensor.layout
        raise ValueError(f"{name} must be a dense torch.Tensor, got {got}")


def _expect(tensor: Tensor, name: str, rule: str, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {rule} = {list(shape)}, got {list(tensor.shape)}")


@torch.library.custom_op("mosld::linear", mutates_args=())
def _linear_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shared_a: Tensor,
    expert_b: Tensor,
    router_weight: Tensor,
    seed: Tensor | None,
    top_k: int,
    scale: float,
    dropout_p: float,
    backend: str,
    mixing: str = "expand",  # programs exported before there was another have none
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> out [T, D_out], logits [T, E], and for backward hidden [T, R or E * R], gates [T, E]"""
    inputs = Inputs(x, weight, bias, shared_a, expert_b, router_weight, seed)
    with no_autocast(x.device.type):
        return autograd.forward(inputs, Settings(top_k, scale, dropout_p, backend, mixing))


@_linear_op.register_fake
def _(x, weight, bias, shared_a, expert_b, router_weight, seed, top_k, scale, dropout_p, backend,
      mixing="expand"):  # fmt: skip
    tokens, num_experts = x.shape[0], router_weight.shape[0]
    routed = router_dtype(x.dtype)
    return (
        x.new_empty(tokens, expert_b.shape[0]),
        x.new_empty(tokens, num_experts, dtype=routed),
        x.new_empty(tokens, shared_a.shape[0]),
        x.new_empty(tokens, num_experts, dtype=routed),
    )


@torch.library.custom_op("mosld::linear_backward", mutates_args=())
def _linear_backward_op(
    dout: Tensor,
    dlogits: Tensor,
    hidden: Tensor,
    gates: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shared_a: Tensor,
    expert_b: Tensor,
    router_weight: Tensor,
    seed: Tensor | None,
    top_k: int,
    scale: float,
    dropout_p: float,
    backend: str,
    mixing: str,
    needs: list[bool],
) -> list[Tensor]:
    """The needed gradients of x, weight, bias, shared_a, expert_b, router_weight, in that order, the others left out"""
    inputs = Inputs(x, weight, bias, shared_a, expert_b, router_weight, seed)
    settings = Settings(top_k, scale, dropout_p, backend, mixing)
    with no_autocast(x.device.type):
        grads = autograd.backward(dout, dlogits, hidden, gates, inputs, settings, tuple(needs))
    return [grad for grad, need in zip(grads, needs, strict=True) if need and grad is not None]


@_linear_backward_op.register_fake
def _(dout, dlogits, hidden, gates, x, weight, bias, shared_a, expert_b, router_weight, seed,
      top_k, scale, dropout_p, backend, mixing, needs):  # fmt: skip
    wanted = zip((x, weight, bias, shared_a, expert_b, router_weight), needs, strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, need in wanted if need]


def _setup_context(ctx, inputs, output):
    tensors, settings = inputs[:7], inputs[7:]
    _, _, hidden, gates = output
    ctx.mark_non_differentiable(hidden, gates)
    ctx.save_for_backward(hidden, gates, *tensors)
    ctx.settings = Settings(*settings)


def _backward(ctx, dout, dlogits, dhidden, dgates):
    hidden, gates, *tensors = ctx.saved_tensors
    needs = [bool(need) for need in ctx.needs_input_grad[:6]]
    grads = iter(torch.ops.mosld.linear_backward(dout, dlogits, hidden, gates, *tensors, *ctx.settings, needs))
    of_tensors = [next(grads) if need else None for need in needs]
    return *of_tensors, *[None] * (1 + len(ctx.settings))  # the seed and the settings have none


_linear_op.register_autograd(_backward, setup_context=_setup_context)
