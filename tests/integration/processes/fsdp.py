"""Run by torchrun: one step under FSDP2, a unit for each transformer block, and the adapter saved from the shards.

Then a few of MoSLDTrainer's steps under accelerate's FSDP plugin.

python -m torch.distributed.run --nproc_per_node=2 -m tests.integration.processes.fsdp FOLDER
"""

import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.integration.processes.case import RATE, adapted, kept, losses, rows, save, trained


def by_block(model: peft.PeftModel, policy: MixedPrecisionPolicy) -> peft.PeftModel:
    for block in model.get_base_model().model.layers:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def step(model: nn.Module, name: str, folder: Path) -> None:
    """One step of SGD; the gradients, and the adapter before and after as PEFT saves it."""
    write(model, folder / f"{name}-before")
    loss = sum(losses(model, rows().chunk(2)[dist.get_rank()]))
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    save(folder, f"{name}-{dist.get_rank()}", kept(model, total / 2))
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE).step()
    write(model, folder / f"{name}-after")


def write(model: peft.PeftModel, folder: Path) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    model.save_pretrained(str(folder), state_dict=state, is_main_process=dist.get_rank() == 0)


def by_trainer(folder: Path) -> None:
    """MoSLDTrainer with the plugin in force: to accelerate these processes have a GPU each, which is the CPU."""
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))
    state = trained(folder / "trainer", 1, use_cpu=False, fsdp=True, fsdp_config={"version": 2})
    assert AcceleratorState().distributed_type == DistributedType.FSDP
    save(folder, f"trained-{dist.get_rank()}", state)


def refused(folder: Path) -> None:
    """What a layer says whose A is a unit of its own, never called and so never put together."""
    model = adapted()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    fully_shard(layer.mosld_shared_a["default"])
    try:
        losses(model, rows())
    except RuntimeError as error:
        (folder / f"refused-{dist.get_rank()}.txt").write_text(str(error))


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    step(by_block(adapted(), MixedPrecisionPolicy()), "float32", folder)
    step(by_block(adapted(), half), "mixed", folder)
    step(by_block(adapted(torch.bfloat16), half), "half-base", folder)
    refused(folder)
    by_trainer(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
