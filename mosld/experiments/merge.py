"""`mosld merge`: one model out of separately trained adapters or checkpoints, scored, and saved."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..files.atomic import write_text_atomic
from ..merging.merge import Merged, MergeSettings, merge
from ..merging.realign import RealignSettings, realign
from ..merging.save import applied, merged_weights, save_checkpoint, save_lora, save_mixture, save_model
from ..merging.unlabelled import Unlabelled
from ..merging.vectors import TaskVector
from ..tasks.encode import Encoder
from ..tasks.examples import Task
from ..tasks.scoring import score_tasks
from .charts import draw_snr
from .results import accuracies, summaries, versions
from .stages import finish, finished
from .tables import aligned, percent

FORMS = {"lora": "adapter", "mosld": "adapter", "checkpoint": "model"}  # --save-as -> the folder that it gets


@dataclass(frozen=True)
class MergeRun:
    """A merge whose every setting has been checked, with its folder claimed and its base loaded.

    settings: what decides the result, as run.json has it.
    channels: noise and SNR in dB of each; several make a study, and no model is saved.
    form: of FORMS, what is saved; None is the smallest that the method can.
    rank: of the A that the experts of a saved mixture share; None is an A each.
    """

    folder: Path
    settings: dict[str, Any]
    merging: MergeSettings
    realignment: RealignSettings | None
    channels: list[tuple[str, float]]
    form: str | None
    rank: int | None
    vectors: list[TaskVector]
    base: PreTrainedModel
    encoder: Encoder
    tasks: list[Task]
    unlabelled: list[Unlabelled]
    eval_batch_size: int


def run_merge(run: MergeRun) -> None:
    """Merge, score, save; what is finished is not run again."""
    start = time.perf_counter()
    base_scores = _kept(run, "base", lambda: _scores(run, run.base, "score the base"))
    results: dict[str, Any] = {"settings": run.settings, "base": base_scores, "versions": versions()}
    if len(run.channels) > 1:
        results["channels"] = [_channel(run, noise, snr) for noise, snr in run.channels]
        _draw_channels(results, run.folder / "snr.png")
    else:
        ((noise, snr),) = run.channels
        merged = _merge(run, noise, snr)
        results |= _outcome(merged)
        results |= _save(run, merged)
    results["seconds"] = time.perf_counter() - start
    write_text_atomic(run.folder / "results.json", json.dumps(results, indent=2) + "\n")
    print(merge_text(results, run.folder))


def _kept(run: MergeRun, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What an earlier run of the same merge has found, or what `make` finds now."""
    result = finished(run.folder, name)
    if result is None:
        result = make()
        finish(run.folder, name, result)
    return result


def _scores(run: MergeRun, model: nn.Module, label: str) -> dict[str, Any]:
    return summaries(score_tasks(model, run.encoder, run.tasks, run.eval_batch_size, label=label))


def _merge(run: MergeRun, noise: str, snr: float) -> Merged:
    settings = replace(run.merging, noise=noise, snr_db=snr)
    return merge(run.base, run.vectors, settings, run.unlabelled, run.folder / "state")


def _outcome(merged: Merged) -> dict[str, Any]:
    return {
        "layers": merged.layers,
        "coefficients": merged.coefficients.tolist(),
        "losses": merged.losses,
        "factored": merged.factored,
    }


def _channel(run: MergeRun, noise: str, snr: float) -> dict[str, Any]:
    """Scores after one channel, before and after realignment."""
    name = f"{noise}-{snr:g}"

    def make() -> dict[str, Any]:
        merged = _merge(run, noise, snr)
        with applied(run.base, merged) as model:
            found = {"noise": noise, "snr_db": snr, "tasks": _scores(run, model, f"score {name}")}
            if run.realignment is not None:
                _realign(run, merged, model, run.realignment)
                found["realigned"] = _scores(run, model, f"score {name}, realigned")
        return found

    return _kept(run, name, make)


def _realign(run: MergeRun, merged: Merged, model: nn.Module, settings: RealignSettings) -> None:
    realign(model, merged_weights(merged), run.encoder, run.tasks, settings, run.folder / "checkpoints")


def _save(run: MergeRun, merged: Merged) -> dict[str, Any]:
    """Score the merged model and write it; -> the scores, the form, the folder, and what dtype and form lose."""
    form = run.form or ("lora" if merged.factored else "checkpoint")
    target = run.folder / FORMS[form]
    tokenizer = run.encoder.tokenizer
    found: dict[str, Any] = {"form": form, "saved_to": target.name}
    with applied(run.base, merged) as model:
        found["tasks"] = _scores(run, model, "score the merged model")
        if run.realignment is not None:
            _realign(run, merged, model, run.realignment)
            found["realigned"] = _scores(run, model, "score the realigned model")
            # Inside, where the base holds the merged and realigned weights: they are no longer the merge's own.
            save_model(run.base, target, tokenizer)
            return found
    if form == "lora":
        # There already where a run was killed before it wrote its results.
        found["lost"] = save_lora(run.base, merged, target, overwrite=True)
    elif form == "mosld":
        found["lost"] = save_mixture(run.base, merged, target, run.rank)
    else:
        found["lost"] = save_checkpoint(run.base, merged, target, tokenizer)
    return found


def _average(tasks: Mapping[str, Any]) -> float:
    return statistics.fmean(accuracies(tasks))


def merge_text(results: dict[str, Any], folder: Path) -> str:
    """What results.json holds, for the terminal."""
    lines = []
    if results["base"]:
        lines += ["accuracy in percent on held-out items", "", aligned(_rows(results)), ""]
    if "coefficients" in results:
        lines.append(_coefficients(results["coefficients"]))
    if "lost" in results:
        form, lost = results["form"], results["lost"]
        lines.append(f"saved as {form}, which differs from the merge in float32 by {lost:.1e} of the update")
    written = ["results.json"]
    if "saved_to" in results:
        written.append(results["saved_to"])
    if "channels" in results:
        written.append("snr.png")
    lines.append(f"written to {folder}: {', '.join(written)}")
    return "\n".join(lines)


def _rows(results: dict[str, Any]) -> list[list[str]]:
    """The base, and every merged model as it is and realigned, with a head."""
    rows = [["model", *results["base"], "average"], _row("base", results["base"])]
    for merged in results.get("channels", [results]):
        name = f"{merged['noise']}, {merged['snr_db']:g} dB" if "noise" in merged else "merged"
        rows.append(_row(name, merged["tasks"]))
        if "realigned" in merged:
            rows.append(_row(f"{name}, realigned", merged["realigned"]))
    return rows


def _row(name: str, tasks: Mapping[str, Any]) -> list[str]:
    return [name, *map(percent, accuracies(tasks)), percent(_average(tasks))]


def _coefficients(found: list) -> str:
    """found: a number a task, or of each layer one a task."""
    title, by_task = "coefficients", found
    if isinstance(found[0], list):
        title = "coefficients, mean over layers"
        by_task = map(statistics.fmean, zip(*found, strict=True))
    return f"{title}: {' '.join(map('{:.3f}'.format, by_task))}"


def _draw_channels(results: dict[str, Any], path: Path) -> None:
    channels = []
    for found in results["channels"]:
        channel = {"noise": found["noise"], "snr_db": found["snr_db"], "received": 100 * _average(found["tasks"])}
        if "realigned" in found:
            channel["realigned"] = 100 * _average(found["realigned"])
        channels.append(channel)
    draw_snr(channels, 100 * _average(results["base"]), path)
