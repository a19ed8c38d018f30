"""One adapted layer beside its peers on the CPU: forward, backward and both, as ratios over the frozen layer; the bytes
kept for backward; the error against float64. `gpu_layers` is the same for GPUs, with their clocks."""

import copy
import gc
import statistics
from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..timing.shapes import LayerShape
from ..timing.timers import Budget, Phases, Timing, interleaved_phases
from .known import FROZEN, Builder, Mixture, build

DROPOUT = 0.1


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
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
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
    """One row a peer and step (forward, backward, both): median, 20th and 80th percentile in ms, `ratio` over the frozen
    layer; in the rows of the step "both" also `saved_bytes`, `parameters` and `error` (see `error_of`).

    training: False measures modules in eval mode without gradients, and gives rows of the step "forward" alone.
    A peer that raises gives one row with `failure`, and the others go on.
    """
    torch._dynamo.reset()  # so that a compiled peer is compiled for these sizes, in every table of a run
    linear, x, dout = inputs_of(shape, dtype, torch.device("cpu"))
    rows, ready, facts = [], {}, {}
    for name in tqdm(peers, desc=f"{label}: peers", leave=False):
        try:
            module = build(name, linear, mixture_of(shape)).train(training)
            memory = memory_of(module, x, dout)  # runs it once, backward too
            trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
            facts[name] = {**memory, "parameters": trained, "error": error_of(module, x)}
            ready[name] = phases_of(module, x, dout) if training else inference_of(module, x)
            ready[name][0]()
        except Exception as failure:  # whatever a peer does wrong is a result
            rows.append({"name": name, "failure": describe(failure)})
    times = interleaved_phases(ready, budget, label)
    for name, by_step in times.items():
        for step, timing in by_step.items():
            row = {**timing_row(name, timing, times[FROZEN][step]), "step": step}
            if training or step == "forward":
                rows.append({**row, **facts[name]} if step == "both" else row)
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
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    result = {"saved_bytes": saved_bytes(lambda: module(x), module, x)}
    torch.autograd.grad(module(x), wanted, dout)
    if x.device.type == "cuda":
        result["peak_bytes"] = _peak_bytes(lambda: torch.autograd.grad(module(x), wanted, dout), x.device)
    return result


def saved_bytes(forward: Callable[[], object], module: nn.Module, x: Tensor) -> int:
    """What `forward` keeps for backward beside x and the module's parameters, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = tensor  # held, so that no other storage takes the address meanwhile
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out
    return sum(t.untyped_storage().nbytes() for t in saved.values())


def _peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
