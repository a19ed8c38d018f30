"""Run by torchrun on several machines: MoSLDTrainer with a checkpoint a step, which can be interrupted and resumed.

python -m torch.distributed.run --nnodes=2 ... -m tests.integration.processes.machines FOLDER STEPS [STOPS_AFTER]

With STOPS_AFTER the second machine kills itself, its torchrun included, after so many steps.
"""

import gc
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from mosld import MoSLDTrainer
from tests.integration.processes.case import RATE, adapted, rows, save, whole


class LosesPower(TrainerCallback):
    """Ends this machine's processes at once, as a machine that is switched off does."""

    def __init__(self, after: int):
        self.after = after

    def on_step_end(self, args, state, control, **more):
        if state.global_step == self.after:
            os.killpg(os.getppid(), signal.SIGKILL)  # torchrun first, so that it can tell nobody
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, steps: int, stops_after: int | None) -> None:
    settings = TrainingArguments(
        output_dir=str(folder / "checkpoints"), max_steps=steps, per_device_train_batch_size=4,
        learning_rate=RATE, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, report_to="none",
        save_strategy="steps", save_steps=1, use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    dataset = [{"input_ids": row, "labels": row} for row in rows(16)]
    trainer = MoSLDTrainer(model=adapted(), args=settings, train_dataset=dataset)
    rank = dist.get_rank()
    if stops_after is not None and rank == 1:
        trainer.add_callback(LosesPower(stops_after))
    last = get_last_checkpoint(settings.output_dir) if Path(settings.output_dir).is_dir() else None
    print(f"rank {rank} begins after {Path(last).name if last else 'nothing'}", flush=True)
    trainer.train(resume_from_checkpoint=last)
    state = {name: whole(p.detach()) for name, p in trainer.model.named_parameters() if p.requires_grad}
    save(folder, f"trained-{rank}", state)
    del trainer
    gc.collect()  # DDP's reducer must go before the group
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
