"""Curves from losses, and the figures that are judged: how far a curve is from float64, beside how far seeds differ.

`python -m benchmarks curves --help` and the first lines of curves.py say what the figures mean.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

TRUTH = "eager float64"
SEEDS = ("eager float32", "eager float32, second seed", "eager float32, third seed")
OURS = ("ours float32", "ours bfloat16", "ours float16")


def smooth(losses: Sequence[float], window: int) -> Tensor:
    """float64 [steps - window + 1]: the mean over each `window` steps"""
    return torch.tensor(losses, dtype=torch.float64).unfold(0, window, 1).mean(-1)


def smoothed(runs: Mapping[str, dict], window: int) -> dict[str, Tensor]:
    """Name of a run -> its curve."""
    return {name: smooth(run["losses"], window) for name, run in runs.items()}


def judged(runs: Mapping[str, dict], window: int) -> dict:
    """The figures that follow from the losses of all runs: "spread", and a row for each run but those with other
    seeds."""
    curves = smoothed(runs, window)
    pairs = [(curves[one] - curves[other]).abs() for one, other in itertools.combinations(SEEDS, 2)]
    distances = torch.stack(pairs)  # [pairs, steps]
    spread, widest = distances.mean().item(), distances.amax(0)
    rows = []
    for name, curve in curves.items():
        if name != TRUTH and name not in SEEDS[1:]:
            row = _row(name, curve, curves[TRUTH], spread, widest, window)
            row["same_masks"] = runs[name]["generator"] == runs[TRUTH]["generator"]
            for key in ("skipped_steps", "scale"):
                if key in runs[name]:
                    row[key] = runs[name][key]
            rows.append(row)
    return {
        "spread": spread,
        "least_spread": widest.min().item(),
        "greatest_spread": widest.max().item(),
        "float64": {"first_loss": curves[TRUTH][0].item(), "last_loss": curves[TRUTH][-1].item()},
        "rows": rows,
    }


def _row(name: str, curve: Tensor, truth: Tensor, spread: float, widest: Tensor, window: int) -> dict:
    """widest: at each step the distance of the two seeds furthest apart."""
    apart = (curve - truth).abs()
    distance = apart.max().item()
    close = (apart <= spread / 100).long()
    return {
        "name": name,
        "distance": distance,
        "mean_distance": apart.mean().item(),
        "last_distance": apart[-1].item(),
        "of_spread": distance / spread,
        "within": distance <= spread,
        "inside": (apart <= widest).double().mean().item(),
        # The product stays 1 up to the first step that is not close; the first curve value is of `window` steps.
        "follows": window - 1 + int(close.cumprod(0).sum()),
        "first_loss": curve[0].item(),
        "last_loss": curve[-1].item(),
    }


def lines(result: dict) -> list[str]:
    low, high = result["least_spread"], result["greatest_spread"]
    distances = f"{'distance':>11}{'of spread':>11}{'within':>8}{'inside':>8}"
    text = [
        f"two eager float32 seeds are {result['spread']:.2g} apart on average, the furthest {low:.2g} to {high:.2g}",
        f"{'':18}{distances}{'follows':>9}{'last loss':>11}{'skipped':>9}",
    ]
    for row in result["rows"]:
        within = "yes" if row["within"] else "NO"
        distances = f"{row['distance']:11.2g}{row['of_spread']:11.2g}{within:>8}{row['inside']:8.0%}"
        skipped = row.get("skipped_steps", "")
        text.append(f"{row['name']:18}{distances}{row['follows']:9}{row['last_loss']:11.4f}{skipped:>9}")
    return text
