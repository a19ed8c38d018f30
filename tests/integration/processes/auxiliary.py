"""Run by torchrun: steps with the auxiliary losses under DistributedDataParallel and FSDP2, checkpointed and not.

python -m torch.distributed.run --nproc_per_node=2 -m tests.integration.processes.auxiliary FOLDER
"""

import gc
import sys
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from mosld import MoSLDAdapter, contrastive_loss, localized_balance_loss
from tests.helpers.models import checkpoint_layers
from tests.integration.processes.case import adapted, kept, rows, save
from tests.integration.processes.fsdp import by_block

CHECKPOINTING = {"off": None, "non-reentrant": False, "reentrant": True}


def case(checkpointing: str) -> nn.Module:
    model = adapted()
    if checkpointing != "off":
        checkpoint_layers(model.get_base_model(), CHECKPOINTING[checkpointing])
    return model


def step(model: nn.Module, ids: Tensor) -> Tensor:
    task = model(input_ids=ids, labels=ids, use_cache=False).loss
    kinds = (ids[:, 0] + ids[:, 1]) % 2
    loss = task + localized_balance_loss(model, kinds) + 0.1 * contrastive_loss(model, tokens=1000)
    loss.backward()
    return loss


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    MoSLDAdapter.keep_hidden = True
    rank = dist.get_rank()
    for checkpointing in CHECKPOINTING:
        model = case(checkpointing)
        loss = step(DistributedDataParallel(model), rows().chunk(2)[rank])
        save(folder, f"ddp-{checkpointing}-{rank}", kept(model, loss))
        model = by_block(case(checkpointing), MixedPrecisionPolicy())
        loss = step(model, rows().chunk(2)[rank])
        save(folder, f"fsdp-{checkpointing}-{rank}", kept(model, loss))
    gc.collect()  # DDP's reducer must go before the group
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
