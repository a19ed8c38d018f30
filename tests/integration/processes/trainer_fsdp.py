"""Run by torchrun on GPUs: MoSLDTrainer with accelerate's FSDP plugin, which needs an accelerator.

python -m torch.distributed.run --nproc_per_node=2 -m tests.integration.processes.trainer_fsdp FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.integration.processes.case import save, trained


def main(folder: Path) -> None:
    torch.set_float32_matmul_precision("highest")
    state = trained(folder, 1, use_cpu=False, fsdp=True, fsdp_config={"version": 2})
    save(folder, f"trained-{dist.get_rank()}", state)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
