"""The picture of `python -m benchmarks curves`: the curves, and their distances from float64 under the spread of
seeds."""

from pathlib import Path

from matplotlib.figure import Figure

from .curve_figures import OURS, SEEDS, TRUTH, smoothed

COLORS = ("#c2410c", "#1d4ed8", "#0f766e")
GREY, DPI = "#94a3b8", 120


def draw(result: dict, path: Path) -> None:
    """Write the picture of a result to `path` as PNG."""
    window = result["settings"]["window"]
    curves = smoothed(result["runs"], window)
    steps = range(window, window + len(curves[TRUTH]))
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in SEEDS[1:]:
        left.plot(steps, curves[name].numpy(), color=GREY, linewidth=1, label=name)
    left.plot(steps, curves[TRUTH].numpy(), color="black", linewidth=3, label=TRUTH)
    for name, color in zip(OURS, COLORS, strict=True):
        left.plot(steps, curves[name].numpy(), color=color, linewidth=1, label=name)
        apart = (curves[name] - curves[TRUTH]).abs().numpy()
        right.plot(steps, apart, color=color, linewidth=1.2, label=name)
        eager = curves[name.replace("ours", "eager")]
        right.plot(steps, (eager - curves[TRUTH]).abs().numpy(), color=color, linewidth=0.8, linestyle=":")
    right.plot([], [], color=GREY, linestyle=":", label="eager in the same dtype")
    right.axhline(result["spread"], color="black", linewidth=1, label="spread: two eager seeds, on average")
    right.set_yscale("log")
    left.set_ylabel(f"loss, mean over {window} steps")
    right.set_ylabel("distance from eager float64 (log scale)")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
