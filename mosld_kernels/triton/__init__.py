"""The steps of `..eager` as Triton kernels for NVIDIA GPUs from compute capability 8.0: the same names, arguments and
results, so that one closed form drives either. Importing this package imports Triton.

    prepare   writes A with its dropout over the router, and B, in the products' dtype     prepare.py
    down      one pass over x: hidden, logits, gates, mixed                                down.py
    up        one pass over dout: dhidden and dlogits; u = dout B stays in registers       up.py
    gram      one pass over dout or x: the gradients of B, and of A and the router         gram.py

`up` and `grad_x` are those of `..products`: torch's own, which accumulate the base product onto the small one.
No atomics and no traffic between programs: what is summed across programs goes through planes, added in a fixed order.
"""

from ..products import grad_x
from .down import down
from .gram import down_backward, grad_expert_b
from .prepare import prepare
from .up import up, up_backward

__all__ = ["down", "down_backward", "grad_expert_b", "grad_x", "prepare", "up", "up_backward"]
