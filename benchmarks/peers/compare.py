"""One adapted layer beside its peers on the CPU: forward, backward and both, as ratios over the frozen layer; the bytes
kept for backward; the error against float64. `gpu.layers` is the same for GPUs, with their clocks."""

import copy
import gc
import statistics
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..timing.shapes import DROPOUT, LayerShape
from ..timing.timers import Budget, Phases, Timing, interleaved_phases
from .known import FROZEN, Builder, Mixture, build


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that want gradients, in their order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def count_trainable(module: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in trainable(module))


def mixture_of(shape: LayerShape) -> Mixture:
    return Mixture(r=shape.R, num_experts=shape.E, top_k=shape.K, dropout=DROPOUT)


def inputs_of(shape: LayerShape, dtype: torch.dtype, device: torch.device) -> tuple[nn.Linear, Tensor, Tensor]:
    """-> a frozen linear, x [T, D_in] that wants a gradient, dout [T, D_out]; the same for every peer and run."""
    torch.manual_seed(0)
    linear = nn.Linear(shape.D_in, shape.D_out, device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn(shape.T, shape.D_in, device=device).to(dtype).requires_grad_()
    return linear, x, torch.randn(shape.T, shape.D_out, device=device).to(dtype)


def phases_of(module: nn.Module, x: Tensor, dout: Tensor) -> Phases:
    """-> forward, and backward of what it returned, with x and the adapters wanting gradients."""
    wanted = [x, *trainable(module)]
    return lambda: module(x), lambda out: torch.autograd.grad(out, wanted, dout)


def inference_of(module: nn.Module, x: Tensor) -> Phases:
    """-> forward without gradients, and nothing."""
    return torch.no_grad()(lambda: module(x)), lambda out: None


def compare(
    peers: Mapping[str, Builder],
    shape: LayerShape,
    dtype: torch.dtype,
    budget: Budget,
    label: str = "",
    training: bool = True,
) -> list[dict]:
    """One row a peer and step (forward, backward, both): median, 20th and 80th percentile in ms, `ratio` over the
    frozen layer; in the rows of the step "both" also `saved_bytes`, `parameters` and `error` (see `error_of`).

    training: False measures modules in eval mode without gradients, and gives rows of the step "forward" alone.
    A peer that raises gives one row with `failure`, and the others go on.
    """
    # Without this a compiled peer would be compiled for any size once a second table comes.
    torch._dynamo.reset()
    linear, x, dout = inputs_of(shape, dtype, torch.device("cpu"))
    rows, ready, facts = [], {}, {}
    for name in tqdm(peers, desc=f"{label}: peers", leave=False):
        try:
            module = build(name, linear, mixture_of(shape)).train(training)
            memory = memory_of(module, x, dout)  # runs it once, backward too
            facts[name] = {**memory, "parameters": count_trainable(module), "error": error_of(module, x)}
            ready[name] = phases_of(module, x, dout) if training else inference_of(module, x)
            # A compiled module compiles once more where gradients are off, which belongs to no round.
            forward, _ = ready[name]
            forward()
        except Exception as failure:  # whatever a peer does wrong is a result
            rows.append({"name": name, "failure": describe(failure)})
    times = interleaved_phases(ready, budget, label)
    for name, by_step in times.items():
        for step, timing in by_step.items():
            if not training and step != "forward":
                continue
            row = {**timing_row(name, timing, times[FROZEN][step]), "step": step}
            if step == "both":
                row |= facts[name]
            rows.append(row)
    return rows


def timing_row(name: str, timing: Timing, frozen: Timing) -> dict:
    """The times in ms, and `ratio`: the median over rounds of the time over the frozen layer's in the same round."""
    times = {"median_ms": timing.median_ms, "low_ms": timing.low_ms, "high_ms": timing.high_ms}
    return {"name": name, **times, "ratio": timing.over(frozen)}


def describe(failure: Exception) -> str:
    """The failure's type and the first line of what it says."""
    return f"{type(failure).__name__}: {failure}".strip().splitlines()[0]


def error_of(module: nn.Module, x: Tensor) -> float:
    """The median over tokens of |y - y64| / |y64|, y64 the same module and weights in float64, both in eval mode.

    The median, because one token that two precisions route to different experts says nothing about arithmetic.
    """
    plain = cast(nn.Module, getattr(module, "_orig_mod", module))
    training = plain.training
    with torch.no_grad():
        some = x[:256]
        truth = copy.deepcopy(plain).double().eval()(some.double())
        y = plain.eval()(some).double()
        plain.train(training)
        relative = (y - truth).norm(dim=-1) / truth.norm(dim=-1)
    return statistics.median(relative.flatten().tolist())


def memory_of(module: nn.Module, x: Tensor, dout: Tensor) -> dict[str, int]:
    """-> saved_bytes: what forward keeps for backward beside x and the parameters, each storage once;
    peak_bytes: the most that forward and backward hold beyond what was held before, on a GPU."""
    wanted = [x, *trainable(module)]
    result = {"saved_bytes": saved_bytes(lambda: module(x), module, x)}
    torch.autograd.grad(module(x), wanted, dout)
    if x.device.type == "cuda":
        result["peak_bytes"] = _peak_bytes(lambda: torch.autograd.grad(module(x), wanted, dout), x.device)
    return result


def saved_bytes(forward: Callable[[], object], module: nn.Module, x: Tensor) -> int:
    """What `forward` keeps for backward beside x and the module's parameters, each storage once."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *module.parameters())}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            # The tensor is held, so that no other storage takes the address meanwhile.
            saved[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def _peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
