"""Whether the call runs inside a transform that an autograd function cannot follow."""

import torch


def needs_plain_operators() -> bool:
    """Inside torch.func's transforms (grad, vmap, jvp, per-sample gradients) and while a model is exported to ONNX.

    There the formula runs in torch's own operators, each of which these know: `plain`, and the plain products of
    `staged`.

    >>> import torch
    >>> from mosld_kernels.transforms import needs_plain_operators
    >>> needs_plain_operators(), torch.func.grad(lambda x: x * needs_plain_operators())(torch.tensor(1.0))
    (False, tensor(1.))
    """
    if torch.onnx.is_in_onnx_export():
        return True
    # While torch.compile traces, its own transforms are on the stack, and it knows the registered operator.
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore
