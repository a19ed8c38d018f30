"""A short version of everything that runs on a CPU, within five minutes on two cores, and the report from it."""

import argparse
import time
from pathlib import Path

from ..cpu import layer, memory, scaling, steps, training
from ..peers.known import FROZEN, LORA, OURS, choose
from ..timing.timers import Budget
from . import page

FEW = (FROZEN, OURS, LORA, "PEFT LoRA, no dropout", "fused LoRA pattern, no dropout", "concatenated product")
# End to end, where every peer costs a model's step, few are measured.
ENDS = (FROZEN, OURS, LORA, "HydraLoRA loop")
LAYERS = ("cpu-1024", "cpu-2048", "cpu-768-3072", "decode-2048")
FILES = ("layer", "peers", "inference", "kernels", "memory", "scaling", "training_qv", "training_all")
RESULTS = Path("benchmarks/results")
DTYPES = ("float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks bench`."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON files")
    parser.add_argument("--out", type=Path, default=page.PAGE, help="the document")
    parser.add_argument("--toy", action="store_true", help="everything tiny, to see that it runs")


def run(options: argparse.Namespace) -> int:
    """Write one file a verb into `options.results`, then the document with its charts."""
    start = time.monotonic()
    files = {name: options.results / f"{name}.json" for name in FILES}
    if options.toy:
        measure_toy(files)
    else:
        measure(files)
    page.write_page(list(files.values()), options.out)
    print(f"\n{time.monotonic() - start:.0f} s; results in {options.results}, report in {options.out}")
    return 0


def measure(files: dict[str, Path]) -> None:
    """Real sizes; the seconds of each table add up to five minutes on two cores."""
    few, first = choose(FEW), LAYERS[:1]
    layer.measure_tables(layer.layers(LAYERS, DTYPES), few, _seconds(6.5), files["layer"])
    layer.measure_tables(layer.layers(first, DTYPES[:1]), choose(), _seconds(10, least=4), files["peers"])
    decoding = layer.layers((*first, "decode-2048"), DTYPES, training=False)
    layer.measure_tables(decoding, few, _seconds(4), files["inference"])
    steps.measure_shapes(first, DTYPES[:1], _seconds(3), files["kernels"])
    memory.measure_shapes(("cpu-1024", "llama-2-7b-qkvo"), "float32", choose(), files["memory"])
    values = {"E": scaling.SWEEPS["E"], "T": (1, 16, 256, 4096)}
    growth = scaling.tables(("E", "T"), values)
    peers = choose(scaling.PEERS)
    layer.measure_tables(growth, peers, _seconds(1.5, least=4), files["scaling"], verb="scaling")
    for targets in ("qv", "all"):
        training.measure_sizes(["small"], targets, choose(ENDS), _seconds(5, least=3), files[f"training_{targets}"])


def _seconds(seconds: float, least: int = 5) -> Budget:
    return Budget(200, seconds, least)


def measure_toy(files: dict[str, Path]) -> None:
    """The same at tiny sizes and in two rounds, which shows that everything runs and nothing else."""
    few, twice = choose(FEW), Budget(2, 60.0, 2)
    layer.measure_tables(layer.layers(["toy"], DTYPES), few, twice, files["layer"])
    layer.measure_tables(layer.layers(["toy"], DTYPES[:1]), choose(), twice, files["peers"])
    layer.measure_tables(layer.layers(["toy"], DTYPES, training=False), few, twice, files["inference"])
    steps.measure_shapes(["toy"], DTYPES[:1], twice, files["kernels"])
    memory.measure_shapes(["toy"], "float32", choose(), files["memory"])
    growth = scaling.tables(("E", "T"), {"E": (2, 4), "T": (4, 8)}, scaling.TOY)
    layer.measure_tables(growth, choose(scaling.PEERS), twice, files["scaling"], verb="scaling")
    for targets in ("qv", "all"):
        training.measure_sizes(["toy"], targets, choose(ENDS), twice, files[f"training_{targets}"])
