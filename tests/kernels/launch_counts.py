"""Prints as JSON what one call launches on a GPU, by recording it on tensors without data: kernels and torch operators.

Run in a process of its own: in the tests' own process the kernels belong to Triton's interpreter.
"""

import itertools
import json

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.compile.recorded import Problem, launches, recording
from benchmarks.timing.shapes import LayerShape
from mosld_kernels import autograd

# These make or view memory; every other operator launches something.
FREE = {"empty", "new_empty", "empty_like", "t", "detach", "view", "transpose", "_to_copy", "alias"}
NEEDS = ("x", "weight", "bias", "shared_a", "expert_b", "router_weight")


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(operator.overloadpacket.__name__)
        return operator(*args, **(kwargs or {}))


def launched(problem, function, *args):
    """-> what `function` returns, and the names of what it launches"""
    with recording(problem) as kernels, Operators() as operators:
        result = function(*args)
    names = [launch.kernel.partition(":")[2].strip("_").removesuffix("_kernel") for launch in kernels]
    assert "_to_copy" not in operators.names, "a cast outside the kernels"
    return result, names + [name for name in operators.names if name not in FREE]


def call(shape, needs, adapter_dtype=torch.float32, base=True, mixing="expand"):
    T, D_in, D_out, R, E, K = shape
    problem = Problem(shape, "bfloat16", "float32", 90, mixing=mixing)
    rows = E * R if mixing == "diagonal" else R

    def tensor(*size, dtype=torch.bfloat16):
        return torch.empty(*size, dtype=dtype, device="meta")

    inputs = autograd.Inputs(
        tensor(T, D_in),
        tensor(D_out, D_in) if base else None,
        tensor(D_out) if base else None,
        tensor(rows, D_in, dtype=adapter_dtype),
        tensor(D_out, E * R, dtype=adapter_dtype),
        tensor(E, D_in, dtype=adapter_dtype),
        tensor(1, dtype=torch.int64),
    )
    settings, dout = autograd.Settings(K, 2.0, 0.1, "triton", mixing), tensor(T, D_out)
    (_, logits, hidden, gates), forward = launched(problem, autograd.forward, inputs, settings)
    wanted = tuple(name in needs for name in NEEDS)
    _, backward = launched(problem, autograd.backward, dout, logits, hidden, gates, inputs, settings, wanted)
    return dict(forward=forward, backward=backward)


def main():
    wide = LayerShape(32768, 32768, 32768, 16, 8, 2)  # fills the chip without planes
    usual = LayerShape(8192, 4096, 4096, 16, 8, 2)
    adapter = ("shared_a", "expert_b", "router_weight")
    counts = {
        f"{name} {str(dtype).removeprefix('torch.')}": call(shape, ("x", *adapter), dtype)
        for (name, shape), dtype in itertools.product(
            (("wide", wide), ("usual", usual)), (torch.float32, torch.bfloat16)
        )
    }
    counts["wide diagonal"] = call(wide, ("x", *adapter), mixing="diagonal")
    counts["usual diagonal"] = call(usual._replace(R=8), ("x", *adapter), mixing="diagonal")
    counts["delta"] = call(wide, ("x", *adapter), base=False)
    counts["x needs no gradient"] = call(wide, adapter)
    counts["x needs no gradient, same dtype"] = call(wide, adapter, torch.bfloat16)
    counts["only x"] = call(wide, ("x",))
    counts["only B"] = call(wide, ("expert_b",))
    # What the compiler would get for other lengths of the same bucket, ragged ones too.
    variants = [launches(Problem(usual._replace(T=T), "bfloat16", "float32", 90)) for T in (8192, 8191, 4097)]
    print(json.dumps({**counts, "one variant a bucket": variants[0] == variants[1] == variants[2]}))


if __name__ == "__main__":
    main()
