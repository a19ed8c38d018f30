"""What the command line does: `prepare` and `train` a run into a folder, `evaluate` a model, `inspect` an adapter."""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import PartialState
from peft import PeftModel
from transformers import PreTrainedModel

from ..analysis import cost as counting
from ..analysis.saved_adapters import inspect_adapter, use_as_json
from ..convert.export import check_output, export_lora
from ..convert.fixed_gates import Gates
from ..files.atomic import write_text_atomic
from ..layers.stats import RouterStats, RouterUse
from ..mixture.spec import Mixture
from ..tasks.encode import Encoder
from ..tasks.examples import Task, TaskFileError
from ..tasks.proportions import parse_proportions
from ..tasks.scoring import candidates, score_tasks
from ..training.arguments import training_arguments
from ..tuner.config import MoSLDConfig
from . import export_command
from .charts import draw_charts, draw_experts
from .loading import load_adapter, load_model
from .methods import LORA, LORA_DEFAULTS, Adapter, targets, task_setter
from .plan import Recipe, Stage, plan
from .results import display_name, gather, table, versions
from .run_folder import check_free, claim, free_folder, model_state
from .stages import count_trained, drop_checkpoints, finish, finished, run_stage, score_base
from .task_options import EMBEDDED, check_quick, chosen_tasks, task_settings

LONGEST = 2048  # tokens, where the model allows more and --max-length says nothing

# The embedded tasks' settings were found on the embedded model; the others are the paper's, where it gives them.
EMBEDDED_TRAINER = {
    "lora": ["--learning_rate", "6e-3"],
    "mosld": ["--learning_rate", "4e-3"],
    "all": ["--num_train_epochs", "4", "--warmup_steps", "100", "--per_device_train_batch_size", "32"],
}
QUICK_TRAINER = ["--num_train_epochs", "1", "--warmup_steps", "10", "--per_device_train_batch_size", "32"]
OWN_TRAINER = ["--learning_rate", "3e-4", "--num_train_epochs", "3", "--warmup_steps", "0.05"]
COMMON_TRAINER = ["--logging_steps", "10", "--save_strategy", "epoch", "--dataloader_pin_memory", "false"]


@dataclass(frozen=True)
class Run:
    """A run whose every setting has been checked, with its folder claimed and its model loaded."""

    options: argparse.Namespace
    folder: Path
    settings: dict[str, object]
    recipe: Recipe
    tasks: list[Task]
    stages: list[Stage]
    base: PreTrainedModel
    encoder: Encoder


def prepare(options: argparse.Namespace, trainer_words: Sequence[str]) -> Run:
    """Everything of `mosld train` that can fail for a reason of the user's, in the order of what it costs.

    raises ValueError (TaskFileError, RunFolderError and ModelError among them); nothing is trained or written then.
    """
    _check(options)
    tasks = chosen_tasks(options)
    empty = [task.name for task in tasks if not task.train]
    if empty:
        raise TaskFileError(f"nothing to train on for {', '.join(empty)}")
    names = [task.name for task in tasks]
    adapters = _adapters(options, len(tasks))
    recipe = _recipe(options, adapters, trainer_words, parse_proportions(options.proportions, names))
    stages = plan(
        options.method, compare_lora=not options.no_lora, single=options.single, seeds=options.seeds, task_names=names
    )
    settings = _settings(options, recipe)
    folder = Path(options.output) if options.output else free_folder(_run_name(options), settings)
    check_free(folder, settings, options.overwrite)
    base, tokenizer = load_model(options)
    encoder = Encoder(tokenizer, longest_input(options, base))
    check_fit(encoder, tasks)
    for adapter in recipe.adapters.values():
        count_trained(base, adapter, len(tasks))
    if PartialState().is_main_process and claim(folder, settings, options.overwrite):
        print(f"going on with the unfinished run in {folder}")
    PartialState().wait_for_everyone()
    return Run(options, folder, settings, recipe, tasks, stages, base, encoder)


def train(run: Run) -> None:
    """`mosld train`: score the base, train and score every stage that is not finished yet, show and save the results."""
    start = time.perf_counter()
    writes = PartialState().is_main_process
    base_result = finished(run.folder, "base") or score_base(run.base, run.encoder, run.tasks, run.recipe)
    if writes:
        finish(run.folder, "base", base_result)
    results = []
    for stage in run.stages:
        result = finished(run.folder, stage.name)
        if result is not None and writes:
            drop_checkpoints(run.folder, stage.name)  # the process may have been killed before it did
        if result is None:
            folder = adapter_dir(run.folder, stage, run.options.method)
            result = run_stage(run.base, run.encoder, run.tasks, stage, run.recipe, run.folder, folder)
            if writes:
                finish(run.folder, stage.name, result)
        results.append(result)
    if writes:
        _report(gather(base_result, run.stages, results), run, time.perf_counter() - start)


def adapter_dir(run_dir: Path, stage: Stage, method: str) -> Path:
    """The run's own adapter is `adapter`; other seeds, methods and single tasks are under `adapters`."""
    if stage.label == method and stage.seed == 0:
        return run_dir / "adapter"
    return run_dir / "adapters" / stage.name


def evaluate(options: argparse.Namespace) -> dict:
    """`mosld eval`: task name -> score, of a model with or without an adapter."""
    if options.eval_batch_size < 1:
        raise ValueError(f"eval-batch-size must be at least 1, got {options.eval_batch_size}")
    output = Path(options.output) if options.output else None
    if output and (output.exists() or not output.parent.is_dir()):
        raise ValueError(f"{output} {'exists' if output.exists() else 'is in no folder'}: choose another --output")
    tasks = chosen_tasks(options, only_test=True)
    model, tokenizer = load_model(options)
    encoder = Encoder(tokenizer, longest_input(options, model))
    check_fit(encoder, tasks)
    on_task = None
    if options.adapter:
        model = load_adapter(model, options.adapter)
        on_task = task_setter(model, tasks, _mixture(model))
    results = score_tasks(model, encoder, tasks, options.eval_batch_size, on_task=on_task)
    scores = {name: score.summary() for name, score in results.items()}
    if output:
        write_text_atomic(output, json.dumps({"tasks": scores, "versions": versions()}, indent=2) + "\n")
    return scores


def export(options: argparse.Namespace) -> str:
    """`mosld export`: write an adapter as a plain LoRA; returns what there is to say about it.

    raises ValueError; nothing is written then.
    """
    gates: Gates = export_command.parse_gates(options.gates)
    if options.task and gates != "calibrate":
        raise ValueError(f"--task is for --gates calibrate, got --gates {options.gates}")
    if options.eval_batch_size < 1:
        raise ValueError(f"eval-batch-size must be at least 1, got {options.eval_batch_size}")
    output = Path(options.output)
    check_output(output, options.overwrite)
    tasks = chosen_tasks(options) if gates == "calibrate" else []
    base, tokenizer = load_model(options)
    if gates == "calibrate":
        encoder = Encoder(tokenizer, longest_input(options, base))
        gates = export_command.calibration_batches(encoder, tasks, options.eval_batch_size)
    model = load_adapter(base, options.adapter)
    layers = export_lora(
        model, output, gates, per_expert=options.per_expert, overwrite=options.overwrite, task=options.task_id
    )
    load = f"PeftModel.from_pretrained(base_model, {str(output)!r})"
    return f"{export_command.table(layers)}\n\nwritten to {output}; load it without mosld: peft.{load}"


def inspect(options: argparse.Namespace) -> dict:
    """`mosld inspect`: what a saved adapter holds and, with a model and tasks, which experts it uses for which task; without
    an adapter what methods train on a model, and cost."""
    output = Path(options.output) if options.output else None
    if output and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is {'not empty' if output.is_dir() else 'a file'}: choose another --output")
    if options.adapter is None:
        return _write_report(_count(options), output)
    if options.config or options.target_modules:
        raise ValueError("--config and --target-modules are for a method before training: leave out ADAPTER")
    if (options.task or options.quick) and not options.model:
        raise ValueError("--task and --quick need --model: the experts' use is that of a model that runs")
    if options.quick and options.model != EMBEDDED:
        raise ValueError("--quick is for --model embedded")
    report = inspect_adapter(options.adapter)
    if options.model:
        stats, report["tasks"] = _run_adapter(options)
        report["use"] = use_as_json(stats)
    _write_report(report, output)
    if output and options.model:
        loads = {task: {name: own["load"] for name, own in u.items()} for task, u in report["use"].items()}
        draw_experts(loads, output / "experts.png", report["top_k"])
    return report


def _count(options: argparse.Namespace) -> dict:
    if not options.model:
        raise ValueError("give the folder of an ADAPTER, or --model NAME to count what methods would train on it")
    if options.task:
        raise ValueError("--task is for an ADAPTER: a method that is not trained uses no experts yet")
    if options.quick and options.model != EMBEDDED:
        raise ValueError("--quick is for --model embedded")
    return counting.count(options.model, options.config, options.target_modules, options.quick)


def _write_report(report: dict, output: Path | None) -> dict:
    if output:
        output.mkdir(parents=True, exist_ok=True)
        write_text_atomic(output / "inspect.json", json.dumps(report, indent=2) + "\n")  # last: with it, all is there
    return report


def _run_adapter(options: argparse.Namespace) -> tuple[dict[str, dict[str, RouterStats]], dict[str, dict]]:
    """task -> layer -> its routing of the test items, and task -> score."""
    if options.model == EMBEDDED:  # the other verbs' default
        options = argparse.Namespace(**{**vars(options), "model": None})
    tasks = chosen_tasks(options, only_test=True)
    base, tokenizer = load_model(options)
    encoder = Encoder(tokenizer, longest_input(options, base))
    check_fit(encoder, tasks)
    model, use = load_adapter(base, options.adapter), RouterUse()
    mixture = _mixture(model)
    counts = mixture is not None and mixture.tokens_choose
    on_batch = (lambda task, mask: use.update(task.name, model, mask)) if counts else None
    on_task = task_setter(model, tasks, mixture)
    scores = score_tasks(model, encoder, tasks, options.eval_batch_size, on_batch, on_task=on_task)
    return use.stats(), {name: score.summary() for name, score in scores.items()}


def _mixture(model: PeftModel) -> Mixture | None:
    """That of the adapter's layers; None of another method's."""
    config = model.peft_config["default"]
    return config.mixture_of("") if isinstance(config, MoSLDConfig) else None


def _check(options: argparse.Namespace) -> None:
    if options.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {options.seeds}")
    if options.eval_batch_size < 1:
        raise ValueError(f"eval-batch-size must be at least 1, got {options.eval_batch_size}")
    check_quick(options)


def refuse_words(words: Sequence[str], instead: Mapping[str, str], program: str) -> None:
    """raises ValueError for a Trainer's argument that the program sets itself."""
    given = {word.partition("=")[0].replace("-", "_").replace("__", "--", 1) for word in words}
    for word, better in instead.items():
        if word in given:
            raise ValueError(f"{word} is set by {program}: use {better}")


def _adapters(options: argparse.Namespace, num_tasks: int) -> dict[str, Adapter]:
    """The method's and, unless it is that, PEFT's LoRA beside it; raises ValueError for options that cannot be used."""
    names = ("r", "alpha", "num_experts", "top_k", "dropout", "balance_coef")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    adapters = {options.method: Adapter(options.method, given, targets(options.method, options.target_modules))}
    if options.method != LORA and not options.no_lora:
        beside = {name: value for name, value in given.items() if name in LORA_DEFAULTS}
        adapters[LORA] = Adapter(LORA, beside, targets(LORA, options.target_modules))
    for adapter in adapters.values():
        adapter.config(num_tasks)
    return adapters


def _recipe(
    options: argparse.Namespace, adapters: dict[str, Adapter], trainer_words: Sequence[str],
    proportions: dict[str, float] | str,
) -> Recipe:  # fmt: skip
    refuse_words(trainer_words, {"--seed": "--seeds N", "--output_dir": "--output DIR"}, "mosld train")
    trainer = {}
    for method in adapters:
        words = list(COMMON_TRAINER)
        if options.model:
            words += OWN_TRAINER
        else:
            own = EMBEDDED_TRAINER.get(method, EMBEDDED_TRAINER["mosld"])
            words += own + (QUICK_TRAINER if options.quick else EMBEDDED_TRAINER["all"])
        trainer[method] = [*words, *trainer_words]
        training_arguments(trainer[method], Path("unused"))  # a bad word is reported before anything is trained
    return Recipe(adapters, trainer, proportions, options.eval_batch_size)


def _settings(options: argparse.Namespace, recipe: Recipe) -> dict[str, object]:
    """What decides the results: two runs with equal settings are the same run."""
    return {
        "model": options.model or EMBEDDED,
        **task_settings(options),
        "method": options.method,
        "compare_lora": not options.no_lora,
        "single": options.single,
        "seeds": options.seeds,
        "processes": PartialState().num_processes,
        "model_files": model_state(options.model) if options.model else {},
        "versions": versions(),
        "max_length": options.max_length,
        **asdict(recipe),
    }


def _run_name(options: argparse.Namespace) -> str:
    return "-".join([options.method, *(["quick"] if options.quick else []), *(["own"] if options.model else [])])


def longest_input(options: argparse.Namespace, model: PreTrainedModel) -> int:
    own = getattr(model.config, "max_position_embeddings", None) or LONGEST
    if options.max_length is not None and not 2 <= options.max_length <= own:
        raise ValueError(f"max-length must be in [2, {own}], the model's longest input, got {options.max_length}")
    return options.max_length or min(own, LONGEST)


def check_fit(encoder: Encoder, tasks: Sequence[Task]) -> None:
    """Every answer fits, before hours of training end at one that does not."""
    for task in tasks:
        try:
            for example in task.train:
                encoder.training_row(example)
            for example in task.test:
                for text in candidates(example):
                    encoder.pair(example.prompt, text)
        except TaskFileError as error:
            raise TaskFileError(f"task {task.name}: {error}") from None


def _report(methods: dict[str, dict], run: Run, seconds: float) -> None:
    options, run_dir = run.options, run.folder
    mixture = run.recipe.adapters[options.method].mixture(len(run.tasks))
    charts = draw_charts(methods, options.method, run_dir, mixture.experts_per_token if mixture else 1)
    results = {
        "tasks": methods[options.method]["tasks"],
        "methods": methods,
        "settings": run.settings,
        "seeds": list(range(options.seeds)),
        "versions": versions(),
        "seconds": seconds,
    }
    write_text_atomic(run_dir / "results.json", json.dumps(results, indent=2) + "\n")
    if methods["base"]["tasks"]:
        print(f"\naccuracy in percent on held-out items\n\n{table(methods)}")
    untested = [task.name for task in run.tasks if not task.test]
    if untested:
        print(f"\ntrained on but not scored, since they have no test file: {', '.join(untested)}")
    if options.quick:
        print("\nA quick run shows that every step works; it is too short to learn the tasks.")
    elif not options.task:
        print(
            "\nThis run shows that the library trains and learns on this machine. It does not rank methods: the tasks "
            "are small,\nthe model is tiny, and seeds differ by more than methods do."
        )
    print(f"\nwritten to {run_dir}: results.json, adapter, {', '.join(path.name for path in charts)} ({seconds:.0f} s)")
    lines = ["from peft import AutoPeftModelForCausalLM"]
    if options.method != LORA:
        lines.insert(0, "import mosld  # makes the method known to PEFT")
    lines.append(f"model = AutoPeftModelForCausalLM.from_pretrained({str(run_dir / 'adapter')!r})")
    print(f"load the {display_name(options.method)} adapter:\n\n    " + "\n    ".join(lines))
