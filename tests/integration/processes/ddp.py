"""Run by torchrun: a step under DistributedDataParallel in both of its modes, then a few of MoSLDTrainer's.

python -m torch.distributed.run --nproc_per_node=2 -m tests.integration.processes.ddp FOLDER
"""

import gc
import sys
from pathlib import Path

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.integration.processes.case import adapted, kept, loads, losses, rows, save, trained


def steps(folder: Path, rank: int) -> None:
    for mode in (False, True):
        model = adapted()
        wrapped = DistributedDataParallel(model, find_unused_parameters=mode)
        loss = sum(losses(wrapped, rows().chunk(2)[rank]))
        loss.backward()
        save(folder, f"{mode}-{rank}", kept(model, loss))
        save(folder, f"loads-{rank}", loads(model))
    save(folder, f"trained-{rank}", trained(folder / "trainer", accumulation=1))


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    steps(folder, dist.get_rank())
    gc.collect()  # DDP's reducer must go before the group: freed last, it can wait for gloo's threads for ever
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
