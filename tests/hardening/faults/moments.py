"""A process of `mosld` that reports what it does, and dies by SIGKILL in the middle of it.

phase    start         until the frozen base is scored: the folder is claimed, the model loaded, what is finished read
         training      of an adapter, or of a merge's coefficients
         checkpointing one step of either is written to the disk
         scoring       of the base, an adapter or a merged model
         writing       an adapter, a finished stage or the results
moment   a phase, which time it is entered, and how long after; the kernel's timer sends the signal, so that native code
         and half-written files are hit as well
"""

import contextlib
import ctypes
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from transformers import Trainer

from mosld.cli import merge as merge_verb
from mosld.cli.main import main
from mosld.experiments import compare, compare_merged, compare_report, merge, stages, train
from mosld.merging import descent
from tests.helpers.kills import TIMEOUT_S, processes

PHASES = ("start", "training", "checkpointing", "scoring", "writing")
SAVE_STEPS = 2  # of a merge's state, instead of 50


@dataclass(frozen=True)
class Moment:
    phase: str
    entry: int
    after_s: float


@dataclass(frozen=True)
class Event:
    """What a process reports.

    phase: in force from now on. what: "step", "kept", "scored", "finished", with `name` of the stage and the step, or a
    phase that begins or ends. at_s: since the process began.
    """

    phase: str
    what: str
    name: str
    number: int
    at_s: float


@dataclass(frozen=True)
class Attempt:
    """killed_in: the phase; None where the process ended by itself, with `exit_code`."""

    events: list[Event]
    killed_in: str | None
    exit_code: int
    printed: str


def attempt(words: list[str], printed: Path, moment: Moment | None = None) -> Attempt:
    """`mosld *words` in a process of its own, killed at the moment if that comes."""
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=_run, args=(words, printed, sender, moment))
    process.start()
    sender.close()
    events = []
    with contextlib.suppress(EOFError, OSError):  # an event may be cut off
        while receiver.poll(TIMEOUT_S):
            events.append(receiver.recv())
    process.join(TIMEOUT_S)
    assert process.exitcode is not None, f"still running after {TIMEOUT_S} s: {' '.join(words)}"
    killed = process.exitcode == -signal.SIGKILL
    phase = events[-1].phase if events else PHASES[0]
    return Attempt(events, phase if killed else None, process.exitcode, printed.read_text())


def _run(words: list[str], printed: Path, sender: Connection, moment: Moment | None) -> None:
    file = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    save_often()
    _Told(sender, moment).listen()
    code = main(words)
    sys.stdout.flush()
    os._exit(code)


def save_often() -> None:
    """For this process: a merge's state after every other step."""
    for module in (compare_merged, merge_verb):
        module.AdaptiveSettings = functools.partial(module.AdaptiveSettings, save_steps=SAVE_STEPS)
        module.ConcreteSettings = functools.partial(module.ConcreteSettings, save_steps=SAVE_STEPS)


class _Told:
    """Patches this process alone, so that it sends an Event when a phase begins, and when it ends."""

    def __init__(self, sender: Connection, moment: Moment | None):
        self.sender, self.moment, self.entries = sender, moment, dict.fromkeys(PHASES, 0)
        self.phase = PHASES[0]
        self.begun = time.monotonic()
        self.enter(PHASES[0])

    def tell(self, what: str, name: str = "", number: int = 0) -> None:
        self.sender.send(Event(self.phase, what, name, number, time.monotonic() - self.begun))

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.entries[phase] += 1
        self.tell("begin", phase)
        if self.moment is not None and (phase, self.entries[phase]) == (self.moment.phase, self.moment.entry):
            die_in(self.moment.after_s)

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before = self.phase
        self.enter(phase)
        yield
        self.phase = (
            before if before != PHASES[0] else "training"
        )  # what lies between phases belongs to the next adapter
        self.tell("end", phase)

    def around(self, place: Any, name: str, phase: str, after: Callable[..., tuple] | None = None) -> None:
        """Whatever `place.name` is called for is this phase. after: of its arguments, what to tell when it is done."""
        inner = getattr(place, name)

        @functools.wraps(inner)
        def outer(*arguments, **options):
            with self.during(phase):
                result = inner(*arguments, **options)
            if after is not None:
                self.tell(*after(*arguments, **options))
            return result

        setattr(place, name, outer)

    def before(self, place: Any, name: str, tell: Callable[..., tuple]) -> None:
        inner = getattr(place, name)

        @functools.wraps(inner)
        def outer(*arguments, **options):
            self.tell(*tell(*arguments))
            return inner(*arguments, **options)

        setattr(place, name, outer)

    def listen(self) -> None:
        self.around(stages, "_train", "training")
        for module in (compare_merged, merge):
            self.around(module, "merge", "training")
        self.before(Trainer, "training_step", lambda own, *_: ("step", _stage(own), own.state.global_step + 1))
        self.around(
            Trainer, "_save_checkpoint", "checkpointing", lambda own, *_: ("kept", _stage(own), own.state.global_step)
        )
        self.before(descent.Descent, "done", lambda own, _: ("step", own.label, len(own.losses) + 1))
        self.around(descent.Descent, "_save", "checkpointing", lambda own: ("kept", own.label, len(own.losses)))
        for module in (stages, compare_merged, merge):
            self.around(module, "score_tasks", "scoring")
        for module in (train, compare, merge):
            self.around(module, "finish", "writing", lambda folder, name, result: ("finished", name))
        self.before(compare, "_run_cell", lambda run, stage: ("cell", stage.name))
        self.before(train, "run_stage", lambda base, encoder, tasks, stage, *_: ("cell", stage.name))
        self.around(stages, "save_adapter", "writing")
        self.around(train, "_report", "writing")
        self.around(compare_report, "write_comparison", "writing")
        self.around(merge, "save_lora", "writing")
        self.around(merge, "save_checkpoint", "writing")
        self.around(merge, "write_text_atomic", "writing")


def _stage(trainer: Trainer) -> str:
    return Path(trainer.args.output_dir).name


class _SigEvent(ctypes.Structure):
    """struct sigevent of <signal.h>; notify 0 is SIGEV_SIGNAL"""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_char * 48),
    )


class _TimerSpec(ctypes.Structure):
    _fields_ = (("interval", ctypes.c_long * 2), ("value", ctypes.c_long * 2))


def die_in(seconds: float) -> None:
    """SIGKILL for this process, from a timer of the kernel's."""
    libc, timer = ctypes.CDLL(None, use_errno=True), ctypes.c_void_p()
    event = _SigEvent(None, signal.SIGKILL, 0)
    nanoseconds = max(1, round(seconds * 1e9))
    spec = _TimerSpec((0, 0), (nanoseconds // 10**9, nanoseconds % 10**9))
    for failed in (
        libc.timer_create(1, ctypes.byref(event), ctypes.byref(timer)),  # 1 is CLOCK_MONOTONIC
        libc.timer_settime(timer, 0, ctypes.byref(spec), None),
    ):
        if failed:
            raise OSError(ctypes.get_errno(), "no timer")
