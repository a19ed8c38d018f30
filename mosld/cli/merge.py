"""`mosld merge`: its options, what they decide, and the merge that they ask for."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..embedded.base_model import EMBEDDED
from ..experiments.inputs import RunInputs, chosen_tasks, model_state, questions_for, task_encoder, task_settings
from ..experiments.loading import load_model
from ..experiments.merge import FORMS, MergeRun, run_merge
from ..experiments.results import versions
from ..experiments.rows import check_known
from ..experiments.run_folder import MERGE, check_free, claim, file_digest
from ..merging.adaptive import AdaptiveSettings
from ..merging.channel import NOISES
from ..merging.concrete import ConcreteSettings
from ..merging.elementwise import TIES_RULES
from ..merging.factored import check_fit
from ..merging.merge import MergeSettings
from ..merging.methods import METHODS, WIRELESS
from ..merging.read import read_task_vectors
from ..merging.realign import RealignSettings, few
from ..merging.vectors import MergeError, TaskVector, check_whole, named_tensors
from ..tasks.examples import Task
from .options import QUICK_HELP, add_reading, check_at_least_one, inputs_of, refusing

HELP = "merge separately trained adapters or checkpoints into one model"
EXAMPLES = """examples:
  mosld merge --method task_arithmetic --base meta-llama/Llama-3.2-1B runs/a/adapter runs/b/adapter --output merged
  mosld merge --method adamerging_layer --base meta-llama/Llama-3.2-1B runs/a/adapter runs/b/adapter \\
              --tasks a=a.jsonl:a_test.jsonl b=b.jsonl:b_test.jsonl --output merged
  mosld merge --method task_arithmetic --base ... A B C --save-as mosld --rank 16 --output mixture     merge, then mix
  mosld merge --method r_mtllmf --base ... A B --noise ideal,isotropic,worst --snr-db=-10,0,10,20 --shots 16 \\
              --tasks ... --output snr

what is merged: PEFT LoRA or MoSLD adapters of any ranks and targets, or full checkpoints, of one base. DIR gets
results.json and `adapter` (one LoRA, or a MoSLD with an expert a task) or `model` (a plain checkpoint); the same
command goes on where it was cut off
"""
TRAINER_ARGUMENTS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "adapter", metavar="ADAPTER", nargs="+", help="folder of a saved adapter, or of a full checkpoint"
    )
    parser.add_argument("--method", required=True, choices=METHODS, metavar="NAME", help=f"of {', '.join(METHODS)}")
    parser.add_argument(
        "--base",
        default=EMBEDDED,
        metavar="MODEL",
        help="what the adapters were trained on: a folder or hub name, or `embedded` (default)",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the merge")
    parser.add_argument("--overwrite", action="store_true", help="replace the merge that --output holds")
    parser.add_argument(
        "--tasks",
        "--task",
        dest="task",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FILE",
        help="name=train.jsonl:test.jsonl of each task: adaptive methods predict on its questions, without their "
        f"answers, and the merged model is scored; or {EMBEDDED}, all of the embedded tasks (default: none; of the "
        "embedded base those)",
    )
    parser.add_argument(
        "--save-as",
        choices=tuple(FORMS),
        help="default: lora where the method keeps adapters factored, else checkpoint. mosld: one expert a task, with "
        "a router to train on",
    )
    parser.add_argument(
        "--rank",
        type=int,
        help="of the A that the experts of --save-as mosld share (default: an A each, which loses nothing)",
    )
    _add_method(parser.add_argument_group("method"))
    _add_channel(parser.add_argument_group("r_mtllmf: task vectors sent over a noisy channel, and realignment"))
    add_reading(parser)
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)


def _add_method(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--scale", type=float, metavar="LAMBDA", help="coefficients at first (0.3; of ties 1)")
    group.add_argument("--keep", type=float, default=0.2, metavar="SHARE", help="that TIES trims to (default: 0.2)")
    group.add_argument(
        "--steps",
        type=int,
        help="of adaptive methods, and of their masks (default: 500; concrete_task_arithmetic 2000, "
        "concrete_adamerging 1000 and 1000)",
    )
    group.add_argument("--learning-rate", type=float, default=1e-3, help="Adam's, of adaptive methods (default: 1e-3)")
    group.add_argument("--batch-size", type=int, default=16, help="questions of each task in a step (default: 16)")
    group.add_argument(
        "--ties-rule",
        choices=TIES_RULES,
        default="paper",
        help="code: TIES as in its authors' code, which keeps one element more (default: paper)",
    )
    clamps = group.add_mutually_exclusive_group()
    clamps.add_argument(
        "--clamp", action="store_true", help="put trained coefficients back into [0, 1] after each step"
    )
    clamps.add_argument(
        "--clamp-at-use",
        action="store_true",
        help="merge with coefficients clamped to [0, 1] and train them unclamped, as in the code of AdaMerging and "
        "concrete_adamerging",
    )
    group.add_argument(
        "--inner-at",
        choices=("start", "previous"),
        default="start",
        help="where concrete_adamerging takes the gradient of its step on coefficients; previous: as in its authors' "
        "code (default: start)",
    )
    group.add_argument("--temperature", type=float, default=0.5, help="of the masks of concrete_* (default: 0.5)")
    group.add_argument("--discrete", action="store_true", help="masks of concrete_* are 0 or 1 in the end")
    group.add_argument(
        "--drawn", action="store_true", help="masks of concrete_* are a draw in the end, as in their authors' code"
    )
    group.add_argument(
        "--unlabelled", type=int, metavar="N", help="use the first N questions of each task (default: all)"
    )
    group.add_argument("--seed", type=int, default=0, help="of the order of questions, masks and noise (default: 0)")


def _add_channel(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--noise", metavar="A,B,...", help=f"of {', '.join(NOISES)} (default: ideal)")
    group.add_argument(
        "--snr-db",
        metavar="X,Y,...",
        help="each vector's power over the noise's; several make a study with a chart, and no model is saved (give "
        "negative numbers as --snr-db=-10,0)",
    )
    group.add_argument("--shots", type=int, metavar="N", help="realign on N labelled training examples of each task")
    group.add_argument("--realign-rate", type=float, default=1e-4, help="learning rate of realignment (default: 1e-4)")
    group.add_argument("--realign-epochs", type=float, default=5, help="passes over the N examples (default: 5)")


def run(options: argparse.Namespace, trainer_words: Sequence[str]) -> None:
    with refusing(ValueError):
        merging = prepare_merge(options)
    with refusing(MergeError, ArithmeticError):  # a checkpoint's values are read when their turn comes
        run_merge(merging)


def prepare_merge(options: argparse.Namespace) -> MergeRun:
    """Everything of `mosld merge` that can fail for a reason of the user's, in the order of what it costs.

    raises ValueError (TaskFileError, MergeError, RunFolderError and ModelError among them); nothing is written then.
    """
    merging = merge_settings(options)
    if options.unlabelled is not None:
        check_at_least_one("unlabelled", options.unlabelled)
    channels = _channels(options)
    realignment = _realignment(options)
    form = _form(options)
    # Models and tasks are read as those of other verbs, which call the base their model.
    options.model = options.base
    inputs = inputs_of(options)
    tasks = chosen_tasks(inputs) if inputs.tasks or inputs.model is None else []
    _check_tasks(tasks, realignment, channels)
    vectors = read_task_vectors(options.adapter)
    settings = {
        **_settings(options, inputs),
        "merge": asdict(merging),
        "channels": channels,
        "realignment": asdict(realignment) if realignment else None,
        "save_as": form,
    }
    # Before the base is loaded, which takes longest of all that is checked.
    folder = Path(options.output)
    check_free(folder, settings, options.overwrite, MERGE)
    base, tokenizer = load_model(inputs)
    encoder = task_encoder(inputs, base, tokenizer, tasks)
    check_fit(base, vectors)
    check_whole(vectors, named_tensors(base))
    if merging.kind.adaptive and not tasks:
        raise ValueError(f"{merging.method} needs unlabelled data, got none: give --tasks name=file.jsonl")
    unlabelled = questions_for(merging, encoder, tasks, options.unlabelled)
    _note_other_bases(options.base, vectors)
    if claim(folder, settings, options.overwrite, MERGE):
        print(f"going on with the unfinished merge in {folder}")
    return MergeRun(
        folder=folder,
        settings=settings,
        merging=merging,
        realignment=realignment,
        channels=channels,
        form=form,
        rank=options.rank,
        vectors=vectors,
        base=base.eval(),
        encoder=encoder,
        tasks=tasks,
        unlabelled=unlabelled,
        eval_batch_size=inputs.eval_batch_size,
    )


def merge_settings(options: argparse.Namespace) -> MergeSettings:
    method = METHODS[options.method]
    steps, mask_steps = method.steps, method.mask_steps
    if options.steps is not None:
        steps = mask_steps = options.steps
    common = {"learning_rate": options.learning_rate, "batch_size": options.batch_size, "seed": options.seed}
    clamp = "use" if options.clamp_at_use else options.clamp
    adaptive = AdaptiveSettings(steps=steps, clamp=clamp, **common)
    concrete = ConcreteSettings(
        steps=mask_steps,
        temperature=options.temperature,
        discrete=options.discrete,
        drawn=options.drawn,
        inner_at=options.inner_at,
        **common,
    )
    return MergeSettings(
        options.method,
        options.scale,
        options.keep,
        adaptive,
        concrete,
        seed=options.seed,
        ties_rule=options.ties_rule,
    )


def _channels(options: argparse.Namespace) -> list[tuple[str, float]]:
    """Noise and SNR in dB of every channel that is asked for; one without noise where none is."""
    if options.method != WIRELESS:
        _refuse_channel_options(options)
        return [("ideal", 0.0)]
    noises = _noises(options)
    ratios = _ratios(options.snr_db)
    if options.snr_db is not None and set(noises) == {"ideal"}:
        raise ValueError(
            f"--snr-db {options.snr_db} is of noise, and --noise is ideal: give --noise isotropic or worst"
        )
    if len(set(noises)) < len(noises) or len(set(ratios)) < len(ratios):
        raise ValueError(f"noise and snr-db must differ, got {options.noise} and {options.snr_db}")
    channels = []
    for noise in noises:
        for ratio in [0.0] if noise == "ideal" else ratios:
            channels.append((noise, ratio))
    return channels


def _refuse_channel_options(options: argparse.Namespace) -> None:
    for name in ("noise", "snr_db", "shots"):
        if getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} is for --method {WIRELESS}, got --method {options.method}")


def _noises(options: argparse.Namespace) -> list[str]:
    noises = str(options.noise or "ideal").split(",")
    check_known("noise", noises, NOISES)
    if options.snr_db is None and set(noises) != {"ideal"}:
        raise ValueError(f"--noise {options.noise} needs --snr-db, the ratio of each vector's power to the noise's")
    return noises


def _ratios(text: str | None) -> list[float]:
    try:
        ratios = list(map(float, (text or "0").split(",")))
    except ValueError:
        raise ValueError(f"snr-db must be numbers with commas between them, got {text!r}") from None
    for ratio in ratios:
        if not abs(ratio) <= 200:  # of nan too
            raise ValueError(f"snr-db must be in [-200, 200], got {text}")
    return ratios


def _realignment(options: argparse.Namespace) -> RealignSettings | None:
    if options.shots is None:
        return None
    return RealignSettings(options.shots, options.realign_epochs, options.realign_rate, seed=options.seed)


def _form(options: argparse.Namespace) -> str | None:
    """raises ValueError for a form that the method cannot have; None is the smallest that it can."""
    if options.save_as in ("lora", "mosld") and not METHODS[options.method].factored:
        raise ValueError(
            f"--save-as {options.save_as} contradicts --method {options.method}, whose updates have no low rank"
        )
    if options.rank is not None:
        if options.save_as != "mosld":
            raise ValueError("--rank is the rank of the shared A of --save-as mosld")
        check_at_least_one("rank", options.rank)
    return options.save_as


def _check_tasks(
    tasks: Sequence[Task], realignment: RealignSettings | None, channels: Sequence[tuple[str, float]]
) -> None:
    """raises ValueError where there are none, or too few examples, for what is asked."""
    if not tasks and (realignment is not None or len(channels) > 1):
        what = "--shots" if realignment is not None else "a study of several channels"
        raise ValueError(f"{what} needs --tasks name=train.jsonl:test.jsonl")
    if realignment is not None:
        few(tasks, realignment)


def _settings(options: argparse.Namespace, inputs: RunInputs) -> dict[str, Any]:
    """What decides the result, beside how it is merged: two merges with equal settings are the same."""
    adapters = {}
    for folder in options.adapter:
        weights = sorted(Path(folder).glob("*.safetensors"))
        adapters[str(folder)] = {path.name: file_digest(path) for path in weights}
    return {
        "base": options.base,
        "base_files": model_state(inputs.model),
        "adapters": adapters,
        **task_settings(inputs),
        "max_length": inputs.max_length,
        "unlabelled": options.unlabelled,
        "rank": options.rank,
        "versions": versions(),
    }


def _note_other_bases(base: str, vectors: Sequence[TaskVector]) -> None:
    """A base under another name may be the same one, so this is no error."""
    others = sorted({vector.base for vector in vectors if vector.base} - {base})
    if others and base != EMBEDDED:
        print(f"note: the adapters were trained on {', '.join(others)}, and --base is {base}")
