"""`mosld export`: an adapter as a plain LoRA of the same rank."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..convert.export import check_output, export_lora
from ..convert.fixed_gates import Gates, LayerGates
from ..experiments.calibration import calibration_batches
from ..experiments.inputs import RunInputs, chosen_tasks, longest_input
from ..experiments.loading import load_adapter, load_model
from ..experiments.tables import aligned
from ..tasks.encode import Encoder
from .options import QUICK_HELP, add_data, check_at_least_one, inputs_of, refusing

HELP = "write an adapter as a plain LoRA of the same rank"
EXAMPLES = """examples:
  mosld export --model meta-llama/Llama-3.2-1B --adapter runs/mine/adapter --output served
  mosld export --model meta-llama/Llama-3.2-1B --adapter runs/mine/adapter --gates calibrate --task arc=arc.jsonl \\
               --output served

the folder gets adapter_config.json and adapter_model.safetensors, which PEFT and its servers load without mosld, and
export.json with the gates of every layer and, with --gates calibrate, what is lost by fixing them
"""
TRAINER_ARGUMENTS = False
CALIBRATE = "calibrate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser, "name=train.jsonl; once per task whose prompts and answers --gates calibrate runs")
    parser.add_argument("--adapter", required=True, help="folder of a saved MoSLD adapter")
    parser.add_argument("--output", required=True, help="folder of the LoRA")
    parser.add_argument(
        "--gates",
        default="uniform",
        help="uniform (default), one weight an expert such as 0.5,0.5, or calibrate: each layer's mean gates on the "
        "tasks",
    )
    parser.add_argument(
        "--per-expert", action="store_true", help="also write one LoRA an expert, in expert_0 and so on"
    )
    parser.add_argument(
        "--task-id", type=int, metavar="N", help="which task's LoRA, for methods that route by task (0 is the first)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the export that --output holds")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)


def run(options: argparse.Namespace, trainer_words: Sequence[str]) -> None:
    with refusing(ValueError):
        layers = _export(options, inputs_of(options))
    load = f"PeftModel.from_pretrained(base_model, {str(Path(options.output))!r})"
    print(f"{gates_text(layers)}\n\nwritten to {Path(options.output)}; load it without mosld: peft.{load}")


def _export(options: argparse.Namespace, inputs: RunInputs) -> dict[str, LayerGates]:
    """Layer -> its gates; raises ValueError, and nothing is written then."""
    gates: Gates = parse_gates(options.gates)
    calibrates = gates == CALIBRATE
    if inputs.tasks and not calibrates:
        raise ValueError(f"--task is for --gates calibrate, got --gates {options.gates}")
    # It is the size of the calibration batches.
    check_at_least_one("eval-batch-size", inputs.eval_batch_size)
    output = Path(options.output)
    check_output(output, options.overwrite)
    tasks = chosen_tasks(inputs) if calibrates else []
    base, tokenizer = load_model(inputs)
    if calibrates:
        encoder = Encoder(tokenizer, longest_input(inputs, base))
        gates = calibration_batches(encoder, tasks, inputs.eval_batch_size)
    model = load_adapter(base, options.adapter)
    return export_lora(
        model, output, gates, per_expert=options.per_expert, overwrite=options.overwrite, task=options.task_id
    )


def parse_gates(text: str) -> str | list[float]:
    """ "uniform", "calibrate", or numbers with commas between them; raises ValueError for anything else."""
    if text in ("uniform", CALIBRATE):
        return text
    try:
        return list(map(float, text.split(",")))
    except ValueError:
        raise ValueError(f"gates must be uniform, calibrate or weights such as 0.5,0.5, got {text!r}") from None


def gates_text(layers: Mapping[str, LayerGates]) -> str:
    """The layers with their gates and, where they come from tokens, what is lost by fixing them, as text."""
    measured = any(layer.gate_variance is not None for layer in layers.values())
    measures = ["tokens", "gate variance", "update error", "output error"] if measured else []
    rows = [["layer", *measures, "gates"]]
    for name, layer in layers.items():
        lost = [""] * 4
        if layer.gate_variance is not None:
            variance = f"{sum(layer.gate_variance):.4f}"
            lost = [str(layer.tokens), variance, f"{layer.update_error:.4f}", f"{layer.output_error:.4f}"]
        gates = " ".join(map("{:.3f}".format, layer.gates))
        rows.append([name, *lost, gates] if measured else [name, gates])
    return aligned(rows, words=(0, len(rows[0]) - 1))
