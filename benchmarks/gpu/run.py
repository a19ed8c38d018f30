"""Everything that needs a GPU in one command: checks, measurements, the layer beside its rivals; a JSON and pictures.

Parts run one after the other, and after each the file is written: an interruption keeps what is measured. A part that
fails is recorded with its error and the rest goes on; when the time is used, no further part is started.
"""

import argparse
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm.auto import tqdm

from ..timing.files import write
from ..timing.machine import gpu, machine
from ..timing.shapes import DROPOUT, LAYERS
from ..timing.timers import Timer, interleaved, with_events, with_graphs
from . import checks, device, layers, measurements, profile

BUDGET_S = 450.0
# The most that each check may take.
TESTS_S, SANITIZER_S, TRIAL_S = 150.0, 60.0, 60.0
LAYERS_MEASURED = (
    ("gpu-4096", "bfloat16"),
    ("gpu-4096-14336", "bfloat16"),
    ("gpu-14336-4096", "bfloat16"),
    ("gpu-2048", "bfloat16"),
    ("gpu-4096-t1024", "bfloat16"),
    ("gpu-4096-e32", "bfloat16"),
    ("gpu-4096", "float16"),
    ("gpu-4096", "float32"),
)
Rows = list[dict]


class Scale(NamedTuple):
    """How large and how often; the tests rehearse the whole run at toy size with other timers."""

    kernel: Timer = partial(with_graphs, rounds=15)
    layer_graph: Timer = partial(with_graphs, rounds=15, repeats=4)
    layer_eager: Timer = partial(with_events, rounds=20)
    host: Timer = partial(interleaved, rounds=30)
    dtype: torch.dtype = torch.bfloat16
    shapes: Sequence[tuple[int, int, int]] = measurements.SHAPES
    layers: Sequence[tuple[str, str]] = LAYERS_MEASURED
    copied_bytes: int = 2**30
    side: int = 8192


class Part(NamedTuple):
    """One step of the run: `run(left_s, done)` -> rows, with the seconds left and the rows of the parts before."""

    name: str
    run: Callable[[float, Mapping[str, Rows]], Rows]


def parts(device: torch.device, scale: Scale) -> list[Part]:
    """Checks first, because times of wrong kernels mean nothing; then what is least likely to go wrong."""
    on, shapes = measurements.Setting(device, scale.kernel, scale.dtype), scale.shapes
    sizes, layer_parts = [], []
    for name, dtype in scale.layers:
        sizes.append((LAYERS[name], dtype))
        layer_parts.append(Part(f"layer {name} {dtype}", partial(_layer, device, scale, name, dtype)))
    first_layer, *other_layers = layer_parts
    return [
        Part("tests", lambda left, done: checks.tests(min(left, TESTS_S))),
        Part("sanitizer", lambda left, done: checks.sanitizer(min(left, SANITIZER_S), device.type)),
        Part("trial", lambda left, done: checks.trial(min(left, TRIAL_S), sizes, device.type)),
        Part("rates", lambda left, done: measurements.rates(on, scale.copied_bytes, scale.side)),
        Part("accumulate", lambda left, done: measurements.accumulate(on, shapes)),
        Part("skinny", lambda left, done: measurements.skinny(on, shapes[0])),
        Part("tall", lambda left, done: measurements.tall(on, shapes[0])),
        first_layer,
        Part("launches", lambda left, done: measurements.launches(on, scale.host)),
        Part("own_product", lambda left, done: measurements.own_product(on, shapes)),
        Part("philox", lambda left, done: measurements.philox(on, shapes[0])),
        Part("overlap", lambda left, done: measurements.overlap(on, shapes[0])),
        Part("kernels", lambda left, done: _kernels(device, *scale.layers[0])),
        *other_layers,
    ]


def _layer(device: torch.device, scale: Scale, name: str, dtype: str, left: float, done: Mapping[str, Rows]) -> Rows:
    failed = checks.failures(done.get("trial", ())).get(checks.size_name(LAYERS[name], dtype))
    left_out = {"MoSLD triton": f"its trial failed: {failed}"} if failed else {}
    timers = {"eager": scale.layer_eager}
    # The other dtypes are there to be compared, not to be explained.
    if dtype == "bfloat16":
        timers["graph"] = scale.layer_graph
    return layers.compare(device, timers, LAYERS[name], getattr(torch, dtype), left_out)


def _kernels(device: torch.device, name: str, dtype: str) -> Rows:
    return profile.kernels(device, LAYERS[name], getattr(torch, dtype))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks gpu`."""
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and the pictures")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these parts, such as: rates 'layer gpu-4096'")
    text = f"seconds after which no part is started any more (default: {BUDGET_S:g})"
    parser.add_argument("--budget", type=float, default=BUDGET_S, help=text)


def run(options: argparse.Namespace) -> int:
    """-> 0 where every part ran, 1 where one failed or was left out.

    raises ValueError, with nothing written, where there is no NVIDIA GPU, or for a part that does not exist.
    """
    on, scale, path = device.nvidia_gpu(), Scale(), options.out / "gpu.json"
    chosen = choose(parts(on, scale), options.parts)
    settings = {
        "budget_s": options.budget,
        "dropout": DROPOUT,
        "timers": _timers_in_words(scale),
        "parts": names_of(chosen),
    }
    result = {"machine": {**machine(), **gpu()}, "settings": settings, "parts": []}
    # One stream for everything, not the default one: captures need that, and autograd stays on the stream of forward.
    with torch.cuda.stream(torch.cuda.Stream(on)):
        run_parts(chosen, result, path, options.budget, lost=device.context_is_lost)
    result["pictures"] = _pictures(result, options.out)
    write(result, path)
    states = [part["state"] for part in result["parts"]]
    print(f"{states.count('done')} of {len(states)} parts ran; see {path}")
    return 0 if set(states) == {"done"} else 1


def _timers_in_words(scale: Scale) -> dict[str, str]:
    """Field of the scale -> the timer's function and what is bound to it."""
    timers = {}
    for name, timer in scale._asdict().items():
        if isinstance(timer, partial):
            timers[name] = f"{timer.func.__name__} {timer.keywords}"
    return timers


def choose(known: Sequence[Part], names: Sequence[str] | None) -> list[Part]:
    """The parts whose name is given, or starts with one given and a space, in their own order; all without names.

    raises ValueError for a name that no part has, listing those that exist.
    """
    if not names:
        return list(known)
    wanted = set()
    for name in names:
        matching = [part for part in known if part.name == name or part.name.startswith(f"{name} ")]
        if not matching:
            raise ValueError(f"there is no part {name!r}; there are: {', '.join(names_of(known))}")
        wanted.update(names_of(matching))
    return [part for part in known if part.name in wanted]


def names_of(parts: Sequence[Part]) -> list[str]:
    return [part.name for part in parts]


def run_parts(chosen: Sequence[Part], result: dict, path: Path, budget_s: float, lost: Callable[[], bool]) -> None:
    """Run the parts and append an entry for each to result["parts"], written to `path` after every one.

    lost: asked after a failure, whether the GPU can still be used; if not, what follows is left out.
    """
    start, done, reason = time.monotonic(), {}, ""
    for part in tqdm(chosen, desc="gpu", unit="part"):
        left = budget_s - (time.monotonic() - start)
        if not reason and left <= 0:
            reason = f"the budget of {budget_s:g} s is used"
        entry = {"name": part.name, "state": "left out", "error": reason} if reason else run_part(part, left, done)
        if entry["state"] == "failed" and lost():
            reason = f"the GPU cannot be used any more since {part.name!r} failed"
        done[part.name] = entry.get("rows", [])
        result["parts"].append(entry)
        write(result, path)


def run_part(part: Part, left_s: float, done: Mapping[str, Rows]) -> dict:
    """-> the part's name, state ("done" or "failed"), seconds and rows, with the error and its line if it failed."""
    start = time.monotonic()
    try:
        entry: dict = {"state": "done", "rows": part.run(left_s, done)}
    except Exception as error:  # whatever it is, it is recorded
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error}"
        line = f"{Path(where.filename).name}:{where.lineno} {where.line}"
        entry = {"state": "failed", "error": text[:1000], "line": line, "rows": getattr(error, "rows", [])}
    return {"name": part.name, "seconds": round(time.monotonic() - start, 2), **entry}


def _pictures(result: dict, folder: Path) -> list[str] | str:
    """-> the names of the pictures, or why there are none"""
    try:
        # Imported here, because Matplotlib may be missing where times can be taken.
        from .charts import draw

        return draw(result, folder)
    except Exception as error:  # pictures are no reason to lose an exit status
        return f"none: {type(error).__name__}: {error}"
