"""The command line: `mosld train`, `compare`, `merge`, `eval`, `inspect` and `export`, also as `python -m mosld ...`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..analysis import cost as counting
from ..analysis.saved_adapters import as_text
from ..embedded.base_model import EMBEDDED
from ..experiments import commands, compare, compare_merged
from ..experiments import merge as merge_command
from ..experiments.methods import METHODS
from ..experiments.run_folder import release
from ..files.errors import escape_control_chars, explain
from ..files.version import __version__
from ..merging.channel import NOISES
from ..merging.methods import METHODS as METHODS_OF_MERGING
from ..merging.vectors import MergeError

TRAIN_EXAMPLES = """examples:
  mosld train                         six small tasks and a tiny language model made on the spot, no download
  mosld train --quick                 the same, far smaller, in under 50 seconds
  mosld train --model meta-llama/Llama-3.2-1B --task arc=arc.jsonl:arc_test.jsonl --task csqa=csqa.jsonl --output runs/mine

a task file has one JSON object a line:
  {"prompt": "...", "choices": ["...", "..."], "answer": 0}     or     {"prompt": "...", "completion": "..."}

every argument of transformers' TrainingArguments can be given as well, for example
  --learning_rate 1e-3 --num_train_epochs 2 --per_device_train_batch_size 4 --bf16 true --gradient_checkpointing true
"""

COMPARE_EXAMPLES = """examples:
  mosld compare --quick --setting mixture --seeds 2
  mosld compare --methods lora,hydralora,mosld --seeds 5 --output runs/three
  mosld compare --merge task_arithmetic,ties,adamerging_layer      the single LoRAs, merged, in the same table
  mosld compare --sweep rank=2,4,8,16,32          the paper's ablations: rank, experts by parts of the layers, dropout
  mosld compare --sweep experts=2-8,8-2,5-5       first and second half; four numbers are quarters
  mosld compare --methods lora,mosld --sweep learning_rate=2e-3,4e-3,8e-3 --validation 0.1

a finished cell (method, setting, task, seed) is never run again: the same command goes on, and more methods, seeds or
settings may be added. Every argument of transformers' TrainingArguments can be given as well, for all methods
"""

MERGE_EXAMPLES = """examples:
  mosld merge --method task_arithmetic --base meta-llama/Llama-3.2-1B runs/a/adapter runs/b/adapter --output merged
  mosld merge --method adamerging_layer --base meta-llama/Llama-3.2-1B runs/a/adapter runs/b/adapter \\
              --tasks a=a.jsonl:a_test.jsonl b=b.jsonl:b_test.jsonl --output merged
  mosld merge --method task_arithmetic --base ... A B C --save-as mosld --rank 16 --output mixture     merge, then mix
  mosld merge --method r_mtllmf --base ... A B --noise ideal,isotropic,worst --snr-db=-10,0,10,20 --shots 16 --tasks ... --output snr

what is merged: PEFT LoRA or MoSLD adapters of any ranks and targets, or full checkpoints, of one base. DIR gets results.json
and `adapter` (one LoRA, or a MoSLD with an expert a task) or `model` (a plain checkpoint); the same command goes on where it
was cut off
"""

EVAL_EXAMPLES = """example:
  mosld eval --model meta-llama/Llama-3.2-1B --adapter runs/mine/adapter --task arc=arc_test.jsonl
"""

EXPORT_EXAMPLES = """examples:
  mosld export --model meta-llama/Llama-3.2-1B --adapter runs/mine/adapter --output served
  mosld export --model meta-llama/Llama-3.2-1B --adapter runs/mine/adapter --gates calibrate --task arc=arc.jsonl --output served

the folder gets adapter_config.json and adapter_model.safetensors, which PEFT and its servers load without mosld, and
export.json with the gates of every layer and, with --gates calibrate, what is lost by fixing them
"""

INSPECT_EXAMPLES = """examples:
  mosld inspect runs/mine/adapter
  mosld inspect runs/mine/adapter --model meta-llama/Llama-3.2-1B --task arc=arc_test.jsonl --output runs/mine/inspect
  mosld inspect runs/mosld/adapter --model embedded

before training, from a model's sizes alone, without a download: parameters and cost of every method, or of some
  mosld inspect --model llama-2-7b
  mosld inspect --model llama-2-7b --config mosld:num_experts=8/6/4/2 --config malora:r_up=16 --target-modules q_proj,v_proj
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mosld", description="Mixtures of LoRA experts that share one down-projection."
    )
    parser.add_argument("--version", action="version", version=f"mosld {__version__}")
    verbs = parser.add_subparsers(dest="command", required=True, metavar="{train,compare,merge,eval,inspect,export}")
    _add_train(verbs)
    _add_compare(verbs)
    _add_merge(verbs)
    _add_eval(verbs)
    _add_inspect(verbs)
    _add_export(verbs)
    return parser


def _add_train(verbs) -> None:
    train = verbs.add_parser(
        "train", help="train adapters on several tasks and compare them", epilog=TRAIN_EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _add_data(train, "name=train.jsonl or name=train.jsonl:test.jsonl; once per task")
    train.add_argument("--output", help="folder of the run (default: a new one under runs/)")
    train.add_argument("--overwrite", action="store_true", help="replace the run that --output holds")
    train.add_argument(
        "--method", choices=METHODS, default="mosld", metavar="NAME",
        help=f"PEFT's LoRA or a preset: {', '.join(METHODS)} (default: mosld)",
    )  # fmt: skip
    train.add_argument("--no-lora", action="store_true", help="do not train PEFT's LoRA beside the method")
    train.add_argument("--single", action="store_true", help="also train one model a task")
    train.add_argument("--seeds", type=int, default=1, metavar="N", help="repeat with seeds 0 to N-1 (default: 1)")
    train.add_argument("--quick", action="store_true", help="a smoke test of the whole way on the embedded tasks")
    train.add_argument(
        "--proportions", default="proportional", help="proportional, equal or name=weight,... (default: proportional)"
    )
    adapter = train.add_argument_group(
        "adapter", "Unless given, the method's own; in brackets those of mosld and lora."
    )
    adapter.add_argument("--r", type=int, help="rank (8)")
    adapter.add_argument("--alpha", type=float, help="the update is scaled by alpha / r (16)")
    adapter.add_argument("--num-experts", type=int, help="experts per layer (8)")
    adapter.add_argument("--top-k", type=int, help="experts per token (2)")
    adapter.add_argument("--dropout", type=float, help="on elements of the shared factor, of lora on the input (0.1)")
    adapter.add_argument("--balance-coef", type=float, help="weight of the balance loss (0.001)")
    adapter.add_argument(
        "--target-modules", help="comma-separated names, or all-linear (default: all-linear, of mixlora its preset's)"
    )


def _add_compare(verbs) -> None:
    parser = verbs.add_parser(
        "compare", help="compare methods on the same tasks, over seeds", epilog=COMPARE_EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _add_data(parser, "name=train.jsonl:test.jsonl; once per task")
    parser.add_argument("--output", help="folder of the comparison (default: one under runs/)")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that --output holds")
    parser.add_argument(
        "--methods", metavar="A,B,...",
        help=f"of {', '.join(compare.KNOWN)} (default: {','.join(compare.DEFAULT)}; with --sweep {compare.REFERENCE})",
    )  # fmt: skip
    parser.add_argument(
        "--setting", choices=("mixture", "single", "both"), default="both",
        help="one adapter on all tasks, one a task, or both (default)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N-1 (default: 3)")
    parser.add_argument(
        "--sweep", metavar="NAME=V,...", help="each value is a row: rank, experts, dropout, learning_rate"
    )
    parser.add_argument("--learning-rates", metavar="A=RATE,...", help="of single methods; --learning_rate is for all")
    parser.add_argument(
        "--merge", metavar="A,B,...",
        help=f"also merge the LoRAs of single tasks, by methods of {', '.join(compare_merged.KNOWN)}",
    )  # fmt: skip
    parser.add_argument(
        "--merge-options", metavar="NAME=V,...",
        help=f"of adaptive merging: {', '.join(compare_merged.OPTIONS)} (default: the method's)",
    )  # fmt: skip
    parser.add_argument(
        "--validation", type=float, metavar="SHARE",
        help="score this share of the training examples, held out, instead of the test items: for choosing settings",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a smoke test of the whole way on the embedded tasks")
    parser.add_argument("--proportions", default="proportional", help="as in mosld train (default: proportional)")
    parser.add_argument(
        "--target-modules", help="comma-separated names, or all-linear (default: all-linear, of mixlora its preset's)"
    )


def _add_merge(verbs) -> None:
    parser = verbs.add_parser(
        "merge", help="merge separately trained adapters or checkpoints into one model", epilog=MERGE_EXAMPLES,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "adapter", metavar="ADAPTER", nargs="+", help="folder of a saved adapter, or of a full checkpoint"
    )
    parser.add_argument("--method", required=True, choices=METHODS_OF_MERGING, metavar="NAME",
                        help=f"of {', '.join(METHODS_OF_MERGING)}")  # fmt: skip
    parser.add_argument("--base", default=merge_command.EMBEDDED, metavar="MODEL",
                        help="what the adapters were trained on: a folder or hub name, or `embedded` (default)")  # fmt: skip
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the merge")
    parser.add_argument("--overwrite", action="store_true", help="replace the merge that --output holds")
    parser.add_argument(
        "--tasks", "--task", dest="task", nargs="+", action="extend", default=[], metavar="NAME=FILE",
        help="name=train.jsonl:test.jsonl of each task: adaptive methods predict on its questions, without their answers, and "
        f"the merged model is scored; or {EMBEDDED}, all of the embedded tasks (default: none; of the embedded base those)",
    )  # fmt: skip
    parser.add_argument("--save-as", choices=tuple(merge_command.FORMS), help="default: lora where the method keeps "
                        "adapters factored, else checkpoint. mosld: one expert a task, with a router to train on")  # fmt: skip
    parser.add_argument("--rank", type=int, help="of the A that the experts of --save-as mosld share (default: an A each, "
                        "which loses nothing)")  # fmt: skip
    how = parser.add_argument_group("method")
    how.add_argument("--scale", type=float, metavar="LAMBDA", help="coefficients at first (0.3; of ties 1)")
    how.add_argument("--keep", type=float, default=0.2, metavar="SHARE", help="that TIES trims to (default: 0.2)")
    how.add_argument(
        "--steps",
        type=int,
        help="of adaptive methods, and of their masks (default: 500; concrete_task_arithmetic 2000, "
        "concrete_adamerging 1000 and 1000)",
    )
    how.add_argument("--learning-rate", type=float, default=1e-3, help="Adam's, of adaptive methods (default: 1e-3)")
    how.add_argument("--batch-size", type=int, default=16, help="questions of each task in a step (default: 16)")
    how.add_argument("--clamp", action="store_true", help="keep trained coefficients in [0, 1]")
    how.add_argument("--temperature", type=float, default=0.5, help="of the masks of concrete_* (default: 0.5)")
    how.add_argument("--discrete", action="store_true", help="masks of concrete_* are 0 or 1 in the end")
    how.add_argument(
        "--unlabelled", type=int, metavar="N", help="use the first N questions of each task (default: all)"
    )
    how.add_argument("--seed", type=int, default=0, help="of the order of questions, masks and noise (default: 0)")
    air = parser.add_argument_group("r_mtllmf: task vectors sent over a noisy channel, and realignment")
    air.add_argument("--noise", metavar="A,B,...", help=f"of {', '.join(NOISES)} (default: ideal)")
    air.add_argument("--snr-db", metavar="X,Y,...", help="each vector's power over the noise's; several make a study with a "
                     "chart, and no model is saved (give negative numbers as --snr-db=-10,0)")  # fmt: skip
    air.add_argument("--shots", type=int, metavar="N", help="realign on N labelled training examples of each task")
    air.add_argument("--realign-rate", type=float, default=1e-4, help="learning rate of realignment (default: 1e-4)")
    air.add_argument("--realign-epochs", type=float, default=5, help="passes over the N examples (default: 5)")
    _add_reading(parser)
    parser.add_argument(
        "--quick", action="store_true", help="the embedded tasks and model at the size of train --quick"
    )


def _add_eval(verbs) -> None:
    evaluate = verbs.add_parser(
        "eval", help="score a model, with or without an adapter", epilog=EVAL_EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _add_data(evaluate, "name=test.jsonl; once per task (with name=train.jsonl:test.jsonl the second file is scored)")
    evaluate.add_argument("--adapter", help="folder of a saved adapter")
    evaluate.add_argument("--output", help="also write the scores to this JSON file")
    evaluate.add_argument(
        "--quick", action="store_true", help="the embedded tasks and model at the size of train --quick"
    )


def _add_export(verbs) -> None:
    export = verbs.add_parser(
        "export", help="write an adapter as a plain LoRA of the same rank", epilog=EXPORT_EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _add_data(export, "name=train.jsonl; once per task whose prompts and answers --gates calibrate runs")
    export.add_argument("--adapter", required=True, help="folder of a saved MoSLD adapter")
    export.add_argument("--output", required=True, help="folder of the LoRA")
    export.add_argument(
        "--gates", default="uniform",
        help="uniform (default), one weight an expert such as 0.5,0.5, or calibrate: each layer's mean gates on the tasks",
    )  # fmt: skip
    export.add_argument(
        "--per-expert", action="store_true", help="also write one LoRA an expert, in expert_0 and so on"
    )
    export.add_argument(
        "--task-id", type=int, metavar="N", help="which task's LoRA, for methods that route by task (0 is the first)"
    )
    export.add_argument("--overwrite", action="store_true", help="replace the export that --output holds")
    export.add_argument(
        "--quick", action="store_true", help="the embedded tasks and model at the size of train --quick"
    )


def _add_inspect(verbs) -> None:
    inspect = verbs.add_parser(
        "inspect", help="print what a saved adapter holds and uses, or what methods train and cost", epilog=INSPECT_EXAMPLES,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    inspect.add_argument("adapter", metavar="ADAPTER", nargs="?", help="folder of a saved adapter")
    model_help = "also run this model, a folder or hub name, or `embedded` for that of mosld train"
    _add_data(inspect, "name=test.jsonl; once per task: count the experts' use on it", model_help)
    before = inspect.add_argument_group(
        "before training: no ADAPTER, and --model is a name or a folder with config.json"
    )
    before.add_argument(
        "--config", action="append", default=[], metavar="METHOD",
        help="a preset such as mosld or hydralora:r=4,num_experts=6, a JSON file of MoSLDConfig's fields, or an adapter's "
        "folder; once per method (default: every preset)",
    )  # fmt: skip
    before.add_argument(
        "--target-modules",
        help="comma-separated names, or all-linear (default: the method's, else PEFT's for the model)",
    )
    inspect.add_argument("--output", help="also write inspect.json here and, with a model, the heat map experts.png")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of tables")
    inspect.add_argument(
        "--quick", action="store_true", help="with --model embedded: its tasks and model at the size of train --quick"
    )


MODEL_HELP = "folder or hub name of a causal language model (default: the embedded one)"


def _add_data(parser: argparse.ArgumentParser, task_help: str, model_help: str = MODEL_HELP) -> None:
    parser.add_argument("--model", help=model_help)
    parser.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help=f"{task_help}; or {EMBEDDED}, all of the embedded tasks",
    )
    _add_reading(parser)


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--split",
        choices=("block", "name"),
        default="block",
        help="of the embedded tasks: test other Unicode blocks and files than trained on (block), or other texts (name)",
    )
    parser.add_argument("--max-length", type=int, help="longest input in tokens (default: the model's, at most 2048)")
    parser.add_argument("--eval-batch-size", type=int, default=64, help="choices scored together (default: 64)")


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    options, rest = parser.parse_known_args(argv)
    if options.command not in ("train", "compare") and rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    folder = Path(options.output) if getattr(options, "output", None) else None
    if options.command in ("train", "compare", "eval", "export") and options.model == EMBEDDED:
        options.model = None  # which is their default
    try:
        try:
            if options.command == "train":
                work = commands.prepare(options, rest)
            elif options.command == "compare":
                work = compare.prepare(options, rest)
            elif options.command == "merge":
                work = merge_command.prepare(options)
            else:
                verbs = {"eval": commands.evaluate, "inspect": commands.inspect, "export": commands.export}
                work = verbs[options.command](options)
        except ValueError as error:  # the user's to mend; whatever fails after this is ours and keeps its traceback
            print(escape_control_chars(f"mosld {options.command}: {error}"), file=sys.stderr)
            return 2
        if isinstance(work, (commands.Run, compare.Comparison)):
            folder = work.folder
        if isinstance(work, merge_command.MergeRun):
            return _merge(work)
        if isinstance(work, commands.Run):
            commands.train(work)
        elif isinstance(work, compare.Comparison):
            compare.compare(work)
        elif options.command == "inspect" and not options.json:
            print(counting.as_text(work) if "methods" in work else as_text(work))
        else:
            print(work if isinstance(work, str) else json.dumps(work, indent=2))
    except KeyboardInterrupt:
        print("\nstopped; what is finished is kept. Run the same command again to go on.", file=sys.stderr)
        return 130
    except Exception as error:
        told = explain(error, options.command, folder)
        if told is None:
            raise
        print(f"\nmosld {options.command}: {told}", file=sys.stderr)
        return 1
    finally:
        release()
    return 0


def _merge(work: merge_command.MergeRun) -> int:
    try:
        merge_command.run(work)
    except (MergeError, ArithmeticError) as error:  # a checkpoint's values are read when their turn comes
        print(escape_control_chars(f"mosld merge: {error}"), file=sys.stderr)
        return 2
    return 0
