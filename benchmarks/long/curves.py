"""Training curves in every dtype beside those of the formula in float64: does a long run in low precision go elsewhere?

    eager       `mosld_kernels.reference`, the formula in plain torch, differentiated by autograd
    ours        the library's path
    float64     all in float64; float32: all in float32
    bfloat16    autocast, weights and optimiser in float32
    float16     autocast with torch's GradScaler

All train the same adapter on the same batches with the same dropout masks, but for the eager float32 runs with other
seeds, which tell how far apart two trainings are anyhow. The adapters are in every linear layer of a small LLaMA, the
loss is the task's and the balance loss. Curves are moving averages over `window` steps.

    spread      the mean distance between two eager float32 curves with different seeds, over steps and pairs
    distance    the greatest distance over steps of a curve from the eager float64 curve
    within      distance <= spread
    follows     the last step up to which the distance is at most a hundredth of the spread
    inside      the share of steps at which the distance is at most that of the two seeds furthest apart at this step
"""

import argparse
import hashlib
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mosld import MoSLDLinear, balance_loss
from mosld_kernels import reference

from ..cpu.training import Size, base_model, targeted_linears
from ..peers.compare import trainable
from ..timing import files
from ..timing.machine import machine
from .curve_figures import OURS, SEEDS, TRUTH, judged, lines
from .models import MODELS, text

OUT, CHART = Path("benchmarks/results/curves.json"), Path("docs/reference/reliability/curves.png")
LEARNING_RATE, BALANCE, ROWS, WINDOW = 2e-3, 1e-2, 512, 25
# Factor of the head: as it starts no logit exceeds 1.3, and there is next to nothing to learn.
HEAD = 10


class ReferenceLinear(MoSLDLinear):
    """MoSLDLinear by the formula itself: the same parameters, masks and router logits."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.adapter
        seed = torch.randint(2**62, (1,)) if self.training and a.dropout else None
        tensors = (a.shared_a.weight, a.expert_b.weight, a.router.weight)
        p = a.dropout if seed is not None else 0.0
        out, a.router_logits = reference.mosld_linear(
            x, self.weight, self.bias, *tensors, top_k=a.top_k, scale=a.scale, dropout_p=p, seed=seed
        )
        return out


class Run(NamedTuple):
    layer: type[MoSLDLinear]
    dtype: torch.dtype
    seed: int = 0  # of the adapter's start, the order of the data and the masks


RUNS = {
    TRUTH: Run(ReferenceLinear, torch.float64),
    SEEDS[0]: Run(ReferenceLinear, torch.float32, 0),
    SEEDS[1]: Run(ReferenceLinear, torch.float32, 1),
    SEEDS[2]: Run(ReferenceLinear, torch.float32, 2),
    "eager bfloat16": Run(ReferenceLinear, torch.bfloat16),
    "eager float16": Run(ReferenceLinear, torch.float16),
    OURS[0]: Run(MoSLDLinear, torch.float32),
    OURS[1]: Run(MoSLDLinear, torch.bfloat16),
    OURS[2]: Run(MoSLDLinear, torch.float16),
}


def model_of(run: Run, size: Size) -> LlamaForCausalLM:
    """The frozen model and a fresh adapter, the same numbers for every layer class and dtype."""
    model, m = base_model(size), size.mixture
    with torch.no_grad():
        model.lm_head.weight.mul_(HEAD)
    torch.manual_seed(run.seed)
    fields = dict(r=m.r, alpha=2 * m.r, num_experts=m.num_experts, top_k=m.top_k, dropout=m.dropout)
    for path, linear in targeted_linears(model, "all"):
        model.set_submodule(path, run.layer.from_linear(linear, **fields))
    if run.dtype == torch.float64:
        model.double()
        for path, norm in list(model.named_modules()):
            # Transformers' own computes in float32 whatever it is given.
            if isinstance(norm, LlamaRMSNorm):
                model.set_submodule(path, _double(norm))
    return model.train()


def _double(norm: LlamaRMSNorm) -> nn.RMSNorm:
    exact = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=torch.float64)
    exact.weight = norm.weight
    return exact


def train(run: Run, size: Size, steps: int, label: str = "") -> dict:
    """-> "losses", the task's loss of every step, without the balance loss, and what else is worth keeping"""
    model, start = model_of(run, size), time.perf_counter()
    optimizer = torch.optim.AdamW(trainable(model), lr=LEARNING_RATE)
    scaler = GradScaler("cpu", enabled=run.dtype == torch.float16)
    rows, order = text(size, ROWS), torch.Generator().manual_seed(run.seed)
    torch.manual_seed(run.seed)
    losses, skipped = [], 0
    for _ in tqdm(range(steps), desc=label, unit="step", leave=False):
        ids = rows[torch.randperm(ROWS, generator=order)[: size.batch]]
        task = _task_loss(model, ids, run.dtype)
        scaler.scale(task + BALANCE * balance_loss(model)).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        # The scale falls where a step is skipped, and only there.
        skipped += scaler.get_scale() < before
        optimizer.zero_grad()
        losses.append(task.item())
    kept = {"losses": losses, "seed": run.seed, "seconds": time.perf_counter() - start}
    if run.dtype == torch.float16:
        kept |= {"skipped_steps": skipped, "scale": scaler.get_scale()}
    # Masks are functions of torch's generator: where it ends in the same state, they were the same.
    return {**kept, "generator": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()[:16]}


def _task_loss(model: LlamaForCausalLM, ids: Tensor, dtype: torch.dtype) -> Tensor:
    half = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast("cpu", dtype if half else torch.bfloat16, enabled=half):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), ids[:, 1:].flatten())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks curves`."""
    parser.add_argument("--steps", type=int, default=500, help="of each training (default: 500)")
    parser.add_argument("--toy", action="store_true", help="with a tiny model, to see that it runs")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the JSON file with the figures (default: {OUT})")
    parser.add_argument("--chart", type=Path, default=CHART, help=f"the picture (default: {CHART})")


def run(options: argparse.Namespace) -> int:
    """Train all, print the figures, write them and the chart, and return 1 where one of our curves is not within the
    spread. raises ValueError for too few steps."""
    window = min(WINDOW, options.steps // 2)
    if window < 1:
        raise ValueError(f"steps must be at least 2, got {options.steps}")
    size = MODELS["toy" if options.toy else "small"]
    settings = {
        "steps": options.steps,
        "window": window,
        "learning_rate": LEARNING_RATE,
        "balance_coef": BALANCE,
        "head": HEAD,
        "rows": ROWS,
        "model": {**vars(size), "mixture": vars(size.mixture)},
    }
    result = {"verb": "curves", "machine": machine(), "settings": settings}
    runs = {name: train(run, size, options.steps, name) for name, run in RUNS.items()}
    result |= {**judged(runs, window), "runs": runs}
    print("\n".join(lines(result)))
    if options.out:
        files.write(result, options.out)
    if options.chart:
        # Imported here, because Matplotlib is slow to import.
        from . import curve_chart

        curve_chart.draw(result, options.chart)
    for row in result["rows"]:
        if row["name"] in OURS and not row["within"]:
            return 1
    return 0
