"""`mosld merge`: one model out of separately trained adapters or checkpoints, scored, and saved."""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import nn
from transformers import PreTrainedModel

from ..files.atomic import write_text_atomic
from ..merging.adaptive import AdaptiveSettings
from ..merging.channel import NOISES
from ..merging.concrete import ConcreteSettings
from ..merging.factored import check_fit
from ..merging.merge import Merged, MergeSettings, merge
from ..merging.methods import METHODS, WIRELESS
from ..merging.read import read_task_vectors
from ..merging.realign import RealignSettings, few, realign
from ..merging.save import applied, merged_weights, save_checkpoint, save_lora, save_mixture, save_model
from ..merging.unlabelled import Unlabelled, without_labels
from ..merging.vectors import TaskVector, check_whole, named_tensors
from ..tasks.encode import Encoder
from ..tasks.examples import Task
from ..tasks.scoring import score_tasks
from . import commands
from .loading import load_model
from .results import aligned, versions
from .run_folder import MERGE, check_free, claim, file_digest, model_state
from .stages import finish, finished
from .task_options import EMBEDDED, chosen_tasks, task_settings

FORMS = {"lora": "adapter", "mosld": "adapter", "checkpoint": "model"}


@dataclass(frozen=True)
class MergeRun:
    """A merge whose every setting has been checked, with its folder claimed and its base loaded."""

    options: argparse.Namespace
    folder: Path
    told: dict[str, Any]
    settings: MergeSettings
    realignment: RealignSettings | None
    channels: list[tuple[str, float]]
    vectors: list[TaskVector]
    base: PreTrainedModel
    encoder: Encoder
    tasks: list[Task]
    unlabelled: list[Unlabelled]


def prepare(options: argparse.Namespace) -> MergeRun:
    """Everything of `mosld merge` that can fail for a reason of the user's, in the order of what it costs.

    raises ValueError (TaskFileError, MergeError, RunFolderError and ModelError among them); nothing is written then.
    """
    settings = _settings(options)
    if options.unlabelled is not None and options.unlabelled < 1:
        raise ValueError(f"unlabelled must be at least 1, got {options.unlabelled}")
    channels = _channels(options)
    realignment = _realignment(options)
    form = _form(options)
    options = argparse.Namespace(**vars(options))
    options.model = None if options.base == EMBEDDED else options.base
    tasks = chosen_tasks(options) if options.task or options.model is None else []
    if not tasks and (realignment is not None or len(channels) > 1):
        what = "--shots" if realignment is not None else "a study of several channels"
        raise ValueError(f"{what} needs --tasks name=train.jsonl:test.jsonl")
    if realignment is not None:
        few(tasks, realignment)
    vectors = read_task_vectors(options.adapter)
    told = _told(options, settings, realignment, channels, form)
    folder = Path(options.output)
    check_free(folder, told, options.overwrite, MERGE)
    base, tokenizer = load_model(options)
    encoder = Encoder(tokenizer, commands.longest_input(options, base))
    commands.check_fit(encoder, tasks)
    check_fit(base, vectors)
    check_whole(vectors, named_tensors(base))
    unlabelled: list[Unlabelled] = []
    if settings.kind.adaptive:
        if not tasks:
            raise ValueError(f"{settings.method} needs unlabelled data, got none: give --tasks name=file.jsonl")
        unlabelled = [without_labels(encoder, task, options.unlabelled) for task in tasks]
    _tell_bases(options.base, vectors)
    if claim(folder, told, options.overwrite, MERGE):
        print(f"going on with the unfinished merge in {folder}")
    return MergeRun(
        options, folder, told, settings, realignment, channels, vectors, base.requires_grad_(False).eval(), encoder, tasks,
        unlabelled,
    )  # fmt: skip


def _tell_bases(base: str, vectors: list[TaskVector]) -> None:
    """A base under another name may be the same one, so this is no error."""
    others = sorted({vector.base for vector in vectors if vector.base} - {base})
    if others and base != EMBEDDED:
        print(f"note: the adapters were trained on {', '.join(others)}, and --base is {base}")


def run(work: MergeRun) -> None:
    """Merge, score, save; what is finished is not run again."""
    start = time.perf_counter()
    base_scores = _kept(work, "base", lambda: _scores(work, work.base, "score the base"))
    results: dict[str, Any] = {"settings": work.told, "base": base_scores, "versions": versions()}
    if len(work.channels) > 1:
        results["channels"] = [_channel(work, noise, snr) for noise, snr in work.channels]
        draw_snr(results, work.folder / "snr.png")
    else:
        ((noise, snr),) = work.channels
        merged = _merge(work, noise, snr)
        results |= _outcome(merged)
        results |= _save(work, merged)
    results["seconds"] = time.perf_counter() - start
    write_text_atomic(work.folder / "results.json", json.dumps(results, indent=2) + "\n")
    print(as_text(results, work.folder))


def _settings(options: argparse.Namespace) -> MergeSettings:
    kind = METHODS[options.method]
    steps, mask_steps = (kind.steps, kind.mask_steps) if options.steps is None else (options.steps, options.steps)
    common = {"learning_rate": options.learning_rate, "batch_size": options.batch_size, "seed": options.seed}
    return MergeSettings(
        options.method, options.scale, options.keep,
        AdaptiveSettings(steps=steps, clamp=options.clamp, **common),
        ConcreteSettings(steps=mask_steps, temperature=options.temperature, discrete=options.discrete, **common),
        seed=options.seed,
    )  # fmt: skip


def _channels(options: argparse.Namespace) -> list[tuple[str, float]]:
    if options.method != WIRELESS:
        for name in ("noise", "snr_db", "shots"):
            if getattr(options, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} is for --method {WIRELESS}, got --method {options.method}"
                )
        return [("ideal", 0.0)]
    noises = (options.noise or "ideal").split(",")
    if unknown := [noise for noise in noises if noise not in NOISES]:
        raise ValueError(f"noise must be of {', '.join(NOISES)}, got {', '.join(unknown)}")
    if options.snr_db is None and set(noises) != {"ideal"}:
        raise ValueError(f"--noise {options.noise} needs --snr-db, the ratio of each vector's power to the noise's")
    try:
        ratios = [float(part) for part in (options.snr_db or "0").split(",")]
    except ValueError:
        raise ValueError(f"snr-db must be numbers with commas between them, got {options.snr_db!r}") from None
    if not all(abs(ratio) <= 200 for ratio in ratios):
        raise ValueError(f"snr-db must be in [-200, 200], got {options.snr_db}")
    if options.snr_db is not None and set(noises) == {"ideal"}:
        raise ValueError(
            f"--snr-db {options.snr_db} is of noise, and --noise is ideal: give --noise isotropic or worst"
        )
    if len(set(noises)) < len(noises) or len(set(ratios)) < len(ratios):
        raise ValueError(f"noise and snr-db must differ, got {options.noise} and {options.snr_db}")
    return [(noise, ratio) for noise in noises for ratio in (ratios if noise != "ideal" else [0.0])]


def _realignment(options: argparse.Namespace) -> RealignSettings | None:
    if options.shots is None:
        return None
    return RealignSettings(options.shots, options.realign_epochs, options.realign_rate, seed=options.seed)


def _form(options: argparse.Namespace) -> str | None:
    """raises ValueError for a form that the method cannot have; None is the smallest that it can."""
    factored = METHODS[options.method].factored
    if options.save_as in ("lora", "mosld") and not factored:
        raise ValueError(
            f"--save-as {options.save_as} contradicts --method {options.method}, whose updates have no low rank"
        )
    if options.rank is not None and options.save_as != "mosld":
        raise ValueError("--rank is the rank of the shared A of --save-as mosld")
    if options.rank is not None and options.rank < 1:
        raise ValueError(f"rank must be at least 1, got {options.rank}")
    return options.save_as


def _told(options, settings, realignment, channels, form) -> dict[str, Any]:
    """What decides the result: two merges with equal settings are the same."""
    adapters = {
        str(folder): {path.name: file_digest(path) for path in sorted(Path(folder).glob("*.safetensors"))}
        for folder in options.adapter
    }
    return {
        "base": options.base,
        "base_files": model_state(options.model) if options.model else {},
        "adapters": adapters,
        **task_settings(options),
        "max_length": options.max_length,
        "unlabelled": options.unlabelled,
        "merge": asdict(settings),
        "channels": channels,
        "realignment": realignment and asdict(realignment),
        "save_as": form,
        "rank": options.rank,
        "versions": versions(),
    }


def _kept(work: MergeRun, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an earlier run of the same merge has found, or what `make` finds now."""
    result = finished(work.folder, name)
    if result is None:
        result = make()
        finish(work.folder, name, result)
    return result


def _scores(work: MergeRun, model: nn.Module, label: str) -> dict[str, Any]:
    scores = score_tasks(model, work.encoder, work.tasks, work.options.eval_batch_size, label=label)
    return {name: score.summary() for name, score in scores.items()}


def _merge(work: MergeRun, noise: str, snr: float) -> Merged:
    settings = replace(work.settings, noise=noise, snr_db=snr)
    return merge(work.base, work.vectors, settings, work.unlabelled, work.folder / "state")


def _outcome(merged: Merged) -> dict[str, Any]:
    return {
        "layers": merged.layers,
        "coefficients": merged.coefficients.tolist(),
        "losses": merged.losses,
        "factored": merged.factored,
    }


def _channel(work: MergeRun, noise: str, snr: float) -> dict[str, Any]:
    """Scores after one channel, before and after realignment."""
    name = f"{noise}-{snr:g}"

    def make() -> dict[str, Any]:
        with applied(work.base, merged := _merge(work, noise, snr)) as model:
            found = {"noise": noise, "snr_db": snr, "tasks": _scores(work, model, f"score {name}")}
            if work.realignment is not None:
                _realign(work, merged, model)
                found["realigned"] = _scores(work, model, f"score {name}, realigned")
        return found

    return _kept(work, name, make)


def _realign(work: MergeRun, merged: Merged, model: nn.Module) -> None:
    assert work.realignment is not None
    realign(model, merged_weights(merged), work.encoder, work.tasks, work.realignment, work.folder / "checkpoints")


def _save(work: MergeRun, merged: Merged) -> dict[str, Any]:
    """Score the merged model and write it; -> the scores, the form, the folder, and what its dtype or its form loses."""
    form = work.options.save_as or ("lora" if merged.factored else "checkpoint")
    target = work.folder / FORMS[form]
    tokenizer = work.encoder.tokenizer
    found: dict[str, Any] = {"form": form, "saved_to": target.name}
    with applied(work.base, merged) as model:
        found["tasks"] = _scores(work, model, "score the merged model")
        if work.realignment is not None:
            _realign(work, merged, model)
            found["realigned"] = _scores(work, model, "score the realigned model")
            save_model(work.base, target, tokenizer)
            return found
    if form == "lora":
        # There already where a run was killed before it wrote its results.
        found["lost"] = save_lora(work.base, merged, target, overwrite=True)
    elif form == "mosld":
        found["lost"] = save_mixture(work.base, merged, target, work.options.rank)
    else:
        found["lost"] = save_checkpoint(work.base, merged, target, tokenizer)
    return found


def as_text(results: dict[str, Any], folder: Path) -> str:
    lines = []
    if results["base"]:
        tasks = list(results["base"])
        rows = [["model", *tasks, "average"], _row("base", results["base"])]
        for own in results.get("channels", [results]):
            name = f"{own['noise']}, {own['snr_db']:g} dB" if "noise" in own else "merged"
            rows.append(_row(name, own["tasks"]))
            if "realigned" in own:
                rows.append(_row(f"{name}, realigned", own["realigned"]))
        lines += ["accuracy in percent on held-out items", "", aligned(rows, left=1), ""]
    if "coefficients" in results:
        own = results["coefficients"]
        by_task = [sum(c) / len(c) for c in zip(*own, strict=True)] if isinstance(own[0], list) else own
        what = "coefficients, mean over layers" if isinstance(own[0], list) else "coefficients"
        lines.append(f"{what}: {' '.join(f'{value:.3f}' for value in by_task)}")
    if "lost" in results:
        lines.append(
            f"saved as {results['form']}, which differs from the merge in float32 by {results['lost']:.1e} of the update"
        )
    files = [name for name in ("snr.png",) if "channels" in results]
    saved = [results["saved_to"]] if "saved_to" in results else []
    lines.append(f"written to {folder}: results.json{''.join(f', {name}' for name in [*saved, *files])}")
    return "\n".join(lines)


def _row(name: str, tasks: dict[str, Any]) -> list[str]:
    values = [own["accuracy"] for own in tasks.values()]
    return [name, *(f"{100 * value:.1f}" for value in values), f"{100 * sum(values) / len(values):.1f}"]


def draw_snr(results: dict[str, Any], path: Path) -> None:
    """Average accuracy against the SNR, with and without realignment; without noise as a line across."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="SNR of each user's task vector, dB", ylabel="average accuracy, %")

    def mean(tasks: dict[str, Any]) -> float:
        return 100 * sum(own["accuracy"] for own in tasks.values()) / len(tasks)

    styles = (("tasks", "dashed", "as received"), ("realigned", "solid", "realigned"))
    for place, noise in enumerate(dict.fromkeys(own["noise"] for own in results["channels"])):
        own = [found for found in results["channels"] if found["noise"] == noise]
        for key, style, label in styles:
            points = [(found["snr_db"], mean(found[key])) for found in own if key in found]
            if not points:
                continue
            title, color = f"{noise}, {label}", f"C{place}"
            if noise == "ideal":
                axes.axhline(points[0][1], color=color, linestyle=style, linewidth=1, label=title)
            else:
                axes.plot(
                    *zip(*points, strict=True), color=color, linestyle=style, marker="o", markersize=4, label=title
                )
    axes.axhline(mean(results["base"]), color="black", linestyle="dotted", linewidth=1, label="frozen base")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
