"""`mosld inspect`: what a saved adapter holds and uses or, before training, what methods train on a model and cost."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..analysis import cost
from ..analysis.saved_adapters import inspect_adapter, use_as_json
from ..embedded.base_model import EMBEDDED
from ..experiments.charts import draw_experts
from ..experiments.evaluate import expert_use
from ..experiments.results import summaries
from ..files.atomic import write_text_atomic
from .inspect_text import adapter_text, cost_text
from .options import add_data, inputs_of, output_of, refusing

HELP = "print what a saved adapter holds and uses, or what methods train and cost"
EXAMPLES = """examples:
  mosld inspect runs/mine/adapter
  mosld inspect runs/mine/adapter --model meta-llama/Llama-3.2-1B --task arc=arc_test.jsonl --output runs/mine/inspect
  mosld inspect runs/mosld/adapter --model embedded

before training, from a model's sizes alone, without a download: parameters and cost of every method, or of some
  mosld inspect --model llama-2-7b
  mosld inspect --model llama-2-7b --config mosld:num_experts=8/6/4/2 --config malora:r_up=16 \\
                --target-modules q_proj,v_proj
"""
TRAINER_ARGUMENTS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", metavar="ADAPTER", nargs="?", help="folder of a saved adapter")
    model_help = "also run this model, a folder or hub name, or `embedded` for that of mosld train"
    add_data(parser, "name=test.jsonl; once per task: count the experts' use on it", model_help)
    before = parser.add_argument_group(
        "before training: no ADAPTER, and --model is a name or a folder with config.json"
    )
    before.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="METHOD",
        help="a preset such as mosld or hydralora:r=4,num_experts=6, a JSON file of MoSLDConfig's fields, or an "
        "adapter's folder; once per method (default: every preset)",
    )
    before.add_argument(
        "--target-modules",
        help="comma-separated names, or all-linear (default: the method's, else PEFT's for the model)",
    )
    parser.add_argument("--output", help="also write inspect.json here and, with a model, the heat map experts.png")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--quick", action="store_true", help="with --model embedded: its tasks and model at the size of train --quick"
    )


def run(options: argparse.Namespace, trainer_words: Sequence[str]) -> None:
    saved = options.adapter is not None
    with refusing(ValueError):
        output = output_of(options)
        _check_output(output)
        report = _inspect(options, output) if saved else _count(options, output)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print(adapter_text(report) if saved else cost_text(report))


def _check_output(output: Path | None) -> None:
    if output is None or not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"{output} is a file: choose another --output")
    if any(output.iterdir()):
        raise ValueError(f"{output} is not empty: choose another --output")


def _inspect(options: argparse.Namespace, output: Path | None) -> dict[str, Any]:
    """The saved adapter and, with a model, which experts it uses for which task."""
    if options.config or options.target_modules:
        raise ValueError("--config and --target-modules are for a method before training: leave out ADAPTER")
    if (options.task or options.quick) and not options.model:
        raise ValueError("--task and --quick need --model: the experts' use is that of a model that runs")
    _check_quick(options)
    report = inspect_adapter(options.adapter)
    if options.model:
        stats, scores = expert_use(inputs_of(options), options.adapter)
        report["tasks"] = summaries(scores)
        report["use"] = use_as_json(stats)
    _write(report, output)
    # Of every task and layer one row of shares: what the chart shows, without gates and entropies.
    if output and options.model:
        loads = {}
        for task, layers in report["use"].items():
            loads[task] = {name: layer["load"] for name, layer in layers.items()}
        draw_experts(loads, output / "experts.png", report["top_k"])
    return report


def _count(options: argparse.Namespace, output: Path | None) -> dict[str, Any]:
    """What methods train on a model that nobody has trained, and cost."""
    if not options.model:
        raise ValueError("give the folder of an ADAPTER, or --model NAME to count what methods would train on it")
    if options.task:
        raise ValueError("--task is for an ADAPTER: a method that is not trained uses no experts yet")
    _check_quick(options)
    report = cost.count(options.model, options.config, options.target_modules, options.quick)
    _write(report, output)
    return report


def _check_quick(options: argparse.Namespace) -> None:
    if options.quick and options.model != EMBEDDED:
        raise ValueError("--quick is for --model embedded")


def _write(report: dict[str, Any], output: Path | None) -> None:
    if output:
        output.mkdir(parents=True, exist_ok=True)
        write_text_atomic(output / "inspect.json", json.dumps(report, indent=2) + "\n")
