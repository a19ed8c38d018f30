"""One adapted layer on a GPU beside its peers: forward, backward and both, as ratios over the frozen layer; memory."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

import mosld_kernels
from mosld import MoSLDLinear

from ..peers.compare import describe, memory_of, mixture_of, trainable
from ..peers.known import FROZEN, LORA, OURS, build
from ..timing.shapes import LayerShape
from ..timing.timers import Timer, Timing
from .measurements import row

PEERS_MEASURED = (LORA, "PEFT LoRA, no dropout", "formula in plain torch", "HydraLoRA loop")
STEPS = ("forward", "backward", "both")
Steps = Mapping[str, Callable[[], object]]


class WithBackend(nn.Module):
    """MoSLD's layer by the operator itself, with the backend given."""

    def __init__(self, layer: MoSLDLinear, backend: str):
        super().__init__()
        self.layer, self.backend = layer, backend

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D_in] -> y [..., D_out]; raises what `mosld_kernels.mosld_linear` raises."""
        adapter, layer = self.layer.adapter, self.layer
        seed = torch.randint(2**62, (1,), device=x.device) if adapter.dropout else None
        tensors = (adapter.shared_a.weight, adapter.expert_b.weight, adapter.router.weight)
        settings: dict[str, Any] = dict(top_k=adapter.top_k, scale=adapter.scale, dropout_p=adapter.dropout, seed=seed)
        return mosld_kernels.mosld_linear(x, layer.weight, layer.bias, *tensors, **settings, backend=self.backend)[0]


def modules_for(shape: LayerShape, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Module]:
    """Name -> module on the device, all over one frozen weight."""
    linear, mixture = nn.Linear(shape.D_in, shape.D_out, device=device, dtype=dtype), mixture_of(shape)
    layer = cast(MoSLDLinear, build(OURS, linear, mixture))
    modules: dict[str, nn.Module] = {
        FROZEN: linear,
        "MoSLD triton": WithBackend(layer, "triton"),
        "MoSLD eager": WithBackend(layer, "eager"),
    }
    for name in PEERS_MEASURED:
        modules[name] = build(name, linear, mixture)
    return modules


def steps_of(module: nn.Module, x: Tensor, dout: Tensor) -> dict[str, Callable[[], object]]:
    """-> forward, backward (of one forward that is kept) and both, each as a call without arguments."""
    wanted = [x, *trainable(module)]
    kept = module(x)
    return {
        "forward": lambda: module(x),
        "backward": lambda: torch.autograd.grad(kept, wanted, dout, retain_graph=True),
        "both": lambda: torch.autograd.grad(module(x), wanted, dout),
    }


def compare(
    device: torch.device,
    timers: Mapping[str, Timer],
    shape: LayerShape,
    dtype: torch.dtype,
    left_out: Mapping[str, str] | None = None,
) -> list[dict]:
    """One row for each candidate, step and way to time.

    timers: way -> timer, such as "eager" and "graph". left_out: candidate -> why it is not run; its row says so.
    A candidate that raises gives a row with its error, and the others go on. A row has the times, `ratio` over the
    frozen layer, and for the step "both" the memory in bytes: `saved_bytes` for backward, `peak_bytes` beyond before.
    Where the frozen layer raises there are no ratios, and so no rows but errors.
    """
    left_out = left_out or {}
    torch.manual_seed(0)
    x = torch.randn(shape.T, shape.D_in, device=device).to(dtype).requires_grad_()
    dout = torch.randn(shape.T, shape.D_out, device=device).to(dtype)
    rows, ready, memory = [], {}, {}
    for name, module in modules_for(shape, dtype, device).items():
        try:
            if name in left_out:
                raise RuntimeError(left_out[name])
            memory[name] = memory_of(module, x, dout)
            ready[name] = steps_of(module, x, dout)
        except Exception as error:  # whatever a rival does wrong is a result
            rows.append(_failed(name, error))
    for way, timer in timers.items():
        rows += _timed(way, timer, ready, memory)
    return rows


def _timed(way: str, timer: Timer, ready: Mapping[str, Steps], memory: Mapping[str, dict]) -> list[dict]:
    rows = []
    for step in STEPS:
        running, failed = _trial(timer, {name: steps[step] for name, steps in ready.items()})
        for failure in failed:
            rows.append({**failure, "way": way, "step": step})
        if FROZEN not in running:
            continue
        times = timer(running)
        for name, timing in times.items():
            rows.append(_row(name, way, step, timing, times[FROZEN], memory[name]))
    return rows


def _trial(timer: Timer, runs: Steps) -> tuple[Steps, list[dict]]:
    """Each one alone and briefly, so that one that cannot be timed this way does not stop the others."""
    running, failed = {}, []
    for name, run in runs.items():
        try:
            timer({name: run}, rounds=2)
            running[name] = run
        except Exception as error:
            failed.append(_failed(name, error))
    return running, failed


def _row(name: str, way: str, step: str, timing: Timing, frozen: Timing, memory: dict) -> dict:
    more = memory if step == "both" else {}
    return row(name, timing, way=way, step=step, ratio=timing.median_ms / frozen.median_ms, **more)


def _failed(name: str, error: Exception) -> dict:
    return {"name": name, "error": describe(error)}
