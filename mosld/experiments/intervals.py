"""Means of paired differences with intervals that take both seeds and items for samples."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy

CONFIDENCE = 0.95


class Interval(NamedTuple):
    mean: float
    low: float
    high: float


def interval(values: Sequence[numpy.ndarray]) -> Interval:
    """values: for each task [seeds, items] -> the mean over tasks of their means, with its 95 % interval.

        v_seeds = var over seeds of the average / S
        v_items = sum over tasks of (var over items of the mean over seeds / n) / tasks^2
        half width = t(df) sqrt(v_seeds + v_items)
        df = (v_seeds + v_items)^2 / (v_seeds^2 / (S - 1) + v_items^2 / (n - tasks))

    With one seed v_seeds is unknown and left out, with one item of a task that task's part of v_items.
    """
    per_seed = numpy.mean([task.mean(1) for task in values], axis=0)
    seeds = len(per_seed)
    mean = float(per_seed.mean())
    v_seeds = float(per_seed.var(ddof=1)) / seeds if seeds > 1 else 0.0
    items, of_tasks = 0, 0.0
    for task in values:
        items += task.shape[1]
        if task.shape[1] > 1:
            of_tasks += task.mean(0).var(ddof=1) / task.shape[1]
    v_items = float(of_tasks) / len(values) ** 2
    variance = v_seeds + v_items
    if variance == 0:
        return Interval(mean, mean, mean)
    # Welch and Satterthwaite's degrees of freedom of a sum of two variances.
    weight = 0.0
    if v_seeds:
        weight += v_seeds**2 / (seeds - 1)
    if v_items:
        weight += v_items**2 / (items - len(values))
    half = t_quantile(variance**2 / weight) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half)


def t_quantile(freedom: float, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| < t) = confidence, for Student's T; by Simpson's rule and bisection, to about 1e-6 of itself."""
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)

    def inside(t: float) -> float:
        # x = sqrt(freedom) tan(angle): the tails of few degrees of freedom are long, the angle's range is short.
        angles = numpy.linspace(0, math.atan(t / math.sqrt(freedom)), 2001)
        density = numpy.cos(angles) ** (freedom - 1)
        weights = numpy.ones(2001)
        weights[1:-1:2], weights[2:-1:2] = 4, 2
        total = (weights * density).sum() * (angles[1] - angles[0]) / 3
        return 2 * math.exp(log_scale) * math.sqrt(freedom) * float(total)

    low, high = 0.0, 1.0
    while inside(high) < confidence:
        high *= 2
    while high - low > 1e-7 * high:
        middle = (low + high) / 2
        if inside(middle) < confidence:
            low = middle
        else:
            high = middle
    return (low + high) / 2
