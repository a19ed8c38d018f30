"""Run by torchrun where DeepSpeed is installed: one step under ZeRO, and the adapter saved from what is partitioned.

python -m torch.distributed.run --nproc_per_node=2 -m tests.integration.processes.zero FOLDER STAGE
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from tests.integration.processes.case import RATE, adapted, losses, rows, save
from tests.integration.processes.launch import ROOT


def settings(stage: int) -> dict:
    """configs/deepspeed_zero*.json as Trainer would fill it in, and no parameter so small that it stays whole."""
    config = json.loads((ROOT / f"configs/deepspeed_zero{stage}.json").read_text())
    config |= {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}
    config |= {"gradient_clipping": 0.0, "bf16": {"enabled": False}}
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def main(folder: Path, stage: int) -> None:
    deepspeed.init_distributed("gloo")
    rank, model = dist.get_rank(), adapted()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(stage))
    loss = sum(losses(engine, rows().chunk(2)[rank]))
    engine.backward(loss)
    engine.step()
    assert stage < 3 or not any(p.numel() for p in model.parameters()), "ZeRO-3 left a parameter whole"
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with deepspeed.zero.GatheredParameters(list(names.values())):
        state = {name: p.detach().clone() for name, p in names.items()}
        save(folder, f"zero{stage}-{rank}", {"loss": loss.reshape(1), **state})
        model.save_pretrained(str(folder / f"zero{stage}"), state_dict=state, is_main_process=rank == 0)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
