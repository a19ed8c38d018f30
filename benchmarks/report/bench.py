"""A short version of everything that runs on a CPU, within five minutes on two cores, and the report from it."""

import time
from pathlib import Path

from ..cpu import layer, memory, scaling, training
from ..cpu import steps as kernels
from ..peers.known import FROZEN, LORA, OURS, choose
from ..timing.timers import Budget
from . import page as report

FEW = (FROZEN, OURS, LORA, "PEFT LoRA, no dropout", "fused LoRA pattern, no dropout", "concatenated product")
ENDS = (FROZEN, OURS, LORA, "HydraLoRA loop")  # end to end, where every peer costs a model's step
LAYERS = ("cpu-1024", "cpu-2048", "cpu-768-3072", "decode-2048")
FILES = ("layer", "peers", "inference", "kernels", "memory", "scaling", "training_qv", "training_all")


def run(results: Path, out: Path, toy: bool = False) -> None:
    """Write one file a verb into `results`, then the document `out` with its charts.

    toy: tiny sizes and two rounds, which shows that everything runs and nothing else.
    """
    start = time.monotonic()
    few, ends, growth = choose(FEW), choose(ENDS), choose(scaling.PEERS)
    files = {name: results / f"{name}.json" for name in FILES}

    def budget(seconds: float, least: int = 5) -> Budget:
        return Budget(2, seconds, 2) if toy else Budget(200, seconds, least)

    shapes, first = (["toy"], ["toy"]) if toy else (LAYERS, LAYERS[:1])
    dtypes = ["float32", "bfloat16"]
    layer.run(layer.layers(shapes, dtypes), few, budget(6.5), files["layer"])
    layer.run(layer.layers(first, dtypes[:1]), choose(), budget(10, least=4), files["peers"])
    decoding = first if toy else (*first, "decode-2048")
    layer.run(layer.layers(decoding, dtypes, training=False), few, budget(4), files["inference"])
    kernels.run(first, dtypes[:1], budget(3), files["kernels"])
    memory.run(first if toy else ("cpu-1024", "llama-2-7b-qkvo"), "float32", choose(), files["memory"])
    values = {"E": (2, 4), "T": (4, 8)} if toy else {"E": scaling.SWEEPS["E"], "T": (1, 16, 256, 4096)}
    tables = scaling.tables(("E", "T"), values, scaling.TOY if toy else scaling.MIDDLE)
    scaling.run(tables, growth, budget(1.5, least=4), files["scaling"])
    for targets in ("qv", "all"):
        training.run(["toy" if toy else "small"], targets, ends, budget(5, least=3), files[f"training_{targets}"])
    report.run(list(files.values()), out)
    print(f"\n{time.monotonic() - start:.0f} s; results in {results}, report in {out}")
