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
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from mosld import MoSLDLinear, balance_loss
from mosld_kernels import reference

from ..cpu.training import TARGETS, Size, base_model
from ..timing import files as results
from ..timing.timers import machine
from .small_runs import MODELS, text

OUT, CHART = Path("benchmarks/results/curves.json"), Path("docs/reliability/curves.png")
LEARNING_RATE, BALANCE, ROWS, WINDOW = 2e-3, 1e-2, 512, 25
HEAD = 10  # with the head as it starts no logit exceeds 1.3, and there is next to nothing to learn
TRUTH, SEEDS = "eager float64", ("eager float32", "eager float32, second seed", "eager float32, third seed")
OURS = ("ours float32", "ours bfloat16", "ours float16")


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
    **{name: Run(ReferenceLinear, torch.float32, seed) for seed, name in enumerate(SEEDS)},
    "eager bfloat16": Run(ReferenceLinear, torch.bfloat16),
    "eager float16": Run(ReferenceLinear, torch.float16),
    **dict(zip(OURS, (Run(MoSLDLinear, d) for d in (torch.float32, torch.bfloat16, torch.float16)), strict=True)),
}


def model_of(run: Run, size: Size) -> LlamaForCausalLM:
    """The frozen model and a fresh adapter, the same numbers for every layer class and dtype."""
    model, m = base_model(size), size.mixture
    with torch.no_grad():
        model.lm_head.weight.mul_(HEAD)
    torch.manual_seed(run.seed)
    fields = dict(r=m.r, alpha=2 * m.r, num_experts=m.num_experts, top_k=m.top_k, dropout=m.dropout)
    for path, linear in list(model.named_modules()):
        if path.rpartition(".")[2] in TARGETS["all"]:
            model.set_submodule(path, run.layer.from_linear(cast(nn.Linear, linear), **fields))
    if run.dtype == torch.float64:
        model.double()
        for path, norm in list(model.named_modules()):
            if isinstance(norm, LlamaRMSNorm):  # computes in float32 whatever it is given
                model.set_submodule(path, _double(norm))
    return model.train()


def _double(norm: LlamaRMSNorm) -> nn.RMSNorm:
    exact = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=torch.float64)
    exact.weight = norm.weight
    return exact


def train(run: Run, size: Size, steps: int, label: str = "") -> dict:
    """-> "losses", the task's loss of every step, without the balance loss, and what else is worth keeping"""
    model, start = model_of(run, size), time.perf_counter()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    half = run.dtype in (torch.bfloat16, torch.float16)
    scaler = GradScaler("cpu", enabled=run.dtype == torch.float16)
    rows, order = text(size, ROWS), torch.Generator().manual_seed(run.seed)
    torch.manual_seed(run.seed)
    losses, skipped = [], 0
    for _ in tqdm(range(steps), desc=label, unit="step", leave=False):
        ids = rows[torch.randperm(ROWS, generator=order)[: size.batch]]
        with torch.autocast("cpu", run.dtype if half else torch.bfloat16, enabled=half):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        task = F.cross_entropy(wide.flatten(0, 1), ids[:, 1:].flatten())
        scaler.scale(task + BALANCE * balance_loss(model)).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
        optimizer.zero_grad()
        losses.append(task.item())
    kept = {"losses": losses, "seed": run.seed, "seconds": time.perf_counter() - start}
    if run.dtype == torch.float16:
        kept |= {"skipped_steps": skipped, "scale": scaler.get_scale()}
    # Masks are functions of torch's generator: where it ends in the same state, they were the same.
    return {**kept, "generator": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()[:16]}


def smooth(losses: Sequence[float], window: int) -> Tensor:
    """float64 [steps - window + 1]: the mean over each `window` steps"""
    return torch.tensor(losses, dtype=torch.float64).unfold(0, window, 1).mean(-1)


def judged(runs: Mapping[str, dict], window: int) -> dict:
    """The figures that follow from the losses of all runs: "spread", and a row for each run but those with other seeds."""
    curves = {name: smooth(run["losses"], window) for name, run in runs.items()}
    pairs = torch.stack([(curves[one] - curves[other]).abs() for one, other in itertools.combinations(SEEDS, 2)])
    spread, widest, rows = pairs.mean().item(), pairs.amax(0), []
    for name, curve in curves.items():
        if name == TRUTH or name in SEEDS[1:]:
            continue
        apart = (curve - curves[TRUTH]).abs()
        rows.append({
            "name": name, "distance": apart.max().item(), "mean_distance": apart.mean().item(),
            "last_distance": apart[-1].item(), "of_spread": apart.max().item() / spread,
            "within": apart.max().item() <= spread, "inside": (apart <= widest).double().mean().item(),
            "follows": window - 1 + int((apart <= spread / 100).long().cumprod(0).sum()),
            "first_loss": curve[0].item(), "last_loss": curve[-1].item(),
            "same_masks": runs[name]["generator"] == runs[TRUTH]["generator"],
            **{key: runs[name][key] for key in ("skipped_steps", "scale") if key in runs[name]},
        })  # fmt: skip
    seeds = {"spread": spread, "least_spread": widest.min().item(), "greatest_spread": widest.max().item()}
    truth = {"first_loss": curves[TRUTH][0].item(), "last_loss": curves[TRUTH][-1].item()}
    return {**seeds, "float64": truth, "rows": rows}


def run(options: argparse.Namespace) -> int:
    """Train all, print the figures, write them and the chart, and return 1 where one of our curves is not within the
    spread. raises ValueError for too few steps."""
    window = min(WINDOW, options.steps // 2)
    if window < 1:
        raise ValueError(f"steps must be at least 2, got {options.steps}")
    size = MODELS["toy" if options.toy else "small"]
    settings = {"steps": options.steps, "window": window, "learning_rate": LEARNING_RATE, "balance_coef": BALANCE, "head": HEAD,
                "rows": ROWS, "model": {**vars(size), "mixture": vars(size.mixture)}}  # fmt: skip
    result = {"verb": "curves", "machine": machine(), "settings": settings}
    runs = {name: train(run, size, options.steps, name) for name, run in RUNS.items()}
    result |= {**judged(runs, window), "runs": runs}
    print("\n".join(lines(result)))
    if options.out:
        results.write(result, options.out)
    if options.chart:
        from . import curves_chart  # here, because Matplotlib is slow to import

        curves_chart.draw(result, options.chart)
    return 0 if all(row["within"] for row in result["rows"] if row["name"] in OURS) else 1


def lines(result: dict) -> list[str]:
    low, high = result["least_spread"], result["greatest_spread"]
    told = [
        f"two eager float32 seeds are {result['spread']:.2g} apart on average, the furthest {low:.2g} to {high:.2g}",
        f"{'':18}{'distance':>11}{'of spread':>11}{'within':>8}{'inside':>8}{'follows':>9}{'last loss':>11}{'skipped':>9}",
    ]
    for row in result["rows"]:
        numbers = f"{row['distance']:11.2g}{row['of_spread']:11.2g}{'yes' if row['within'] else 'NO':>8}"
        skipped = row.get("skipped_steps", "")
        told.append(
            f"{row['name']:18}{numbers}{row['inside']:8.0%}{row['follows']:9}{row['last_loss']:11.4f}{skipped:>9}"
        )
    return told


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks curves`."""
    parser.add_argument("--steps", type=int, default=500, help="of each training (default: 500)")
    parser.add_argument("--toy", action="store_true", help="with a tiny model, to see that it runs")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the JSON file with the figures (default: {OUT})")
    parser.add_argument("--chart", type=Path, default=CHART, help=f"the picture (default: {CHART})")
