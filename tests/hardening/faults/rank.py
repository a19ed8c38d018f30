"""Run by torchrun: `mosld` in processes of which one kills itself.

    DIE=RANK:step:N python -m torch.distributed.run --nproc_per_node=2 -m tests.hardening.faults.rank train ...

DIE=RANK:step:N   before its step N
DIE=RANK:save:N   in its N-th checkpoint, before its own file is written, when the others had time for theirs
"""

import os
import signal
import sys
import time

from transformers import Trainer

from mosld.cli.main import main

PATIENCE_S = 3


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_myself(what: str, number: int) -> None:
    step, save, saved = Trainer.training_step, Trainer._save_rng_state, []

    def training_step(trainer, *arguments, **options):
        if trainer.state.global_step + 1 == number:
            die()
        return step(trainer, *arguments, **options)

    def save_rng_state(trainer, *arguments, **options):
        saved.append(1)
        if len(saved) == number:
            time.sleep(PATIENCE_S)
            die()
        return save(trainer, *arguments, **options)

    if what == "step":
        Trainer.training_step = training_step
    else:
        Trainer._save_rng_state = save_rng_state


if __name__ == "__main__":
    rank, _, rest = os.environ.get("DIE", "").partition(":")
    if rank == os.environ["RANK"]:
        what, _, number = rest.partition(":")
        kill_myself(what, int(number))
    sys.exit(main(sys.argv[1:]))
