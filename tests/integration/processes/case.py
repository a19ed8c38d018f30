"""The model, the rows and the loss that every script of this folder runs, alone or as one of two processes.

Low and high token ids go to different experts, and each process gets ids of one kind: for each of them there are
experts that only the other's tokens chose.
"""

from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainingArguments

from mosld import MoSLDConfig, MoSLDTrainer, balance_loss, router_stats
from tests.helpers.models import perturb, tiny_llama

COEF = 0.5
RATE = 0.5


def adapted(dtype: torch.dtype = torch.float32) -> peft.PeftModel:
    """The frozen base in `dtype`, trained-looking float32 adapters; the first half of the experts likes low ids."""
    base = tiny_llama()
    embedding = base.get_input_embeddings().weight.data
    embedding.normal_(std=0.3, generator=torch.Generator().manual_seed(5))
    embedding[:48, 0], embedding[48:, 0] = 3, -3
    config = MoSLDConfig(
        r=2, num_experts=6, dropout=0.0, balance_coef=COEF, target_modules=["q_proj", "v_proj", "up_proj"]
    )
    model = peft.get_peft_model(base.to(dtype), config)
    torch.manual_seed(4)
    perturb(model)
    for name, parameter in model.named_parameters():
        if "mosld_router" in name:
            parameter.data[:3, 0], parameter.data[3:, 0] = 0.5, -0.5
    return model.train()


def rows(number: int = 8, length: int = 6) -> Tensor:
    """[number, length] token ids: the first half of the rows has low ones, the second high ones."""
    generator = torch.Generator().manual_seed(0)
    halves = [torch.randint(low, low + 46, (number // 2, length), generator=generator) for low in (2, 50)]
    return torch.cat(halves)


def losses(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """-> the task's mean loss, and the weighted balance loss of the same forward"""
    task = model(input_ids=ids, labels=ids, use_cache=False).loss
    return task, COEF * balance_loss(model)


def alone(dtype: torch.dtype = torch.float32) -> tuple[peft.PeftModel, dict[str, Tensor]]:
    """One process and the whole batch: the task's gradient in one piece, the balance loss in its mean over halves.

    -> the model with its gradients, and what `kept` tells of it
    """
    model, ids = adapted(dtype), rows()
    total = losses(model, ids)[0]
    total.backward()
    for half in ids.chunk(2):
        penalty = losses(model, half)[1] / 2
        penalty.backward()
        total = total + penalty
    return model, kept(model, total)


def halves_alone(dtype: torch.dtype) -> dict[str, Tensor]:
    """One process, every parameter in bfloat16, the halves one after the other: the means of loss and gradients."""
    results = []
    for half in rows().chunk(2):
        model = adapted(dtype)
        for parameter in model.parameters():  # not the buffers, which FSDP leaves as they are
            parameter.data = parameter.data.to(torch.bfloat16)
        loss = torch.stack(losses(model, half)).sum()
        loss.backward()
        results.append(kept(model, loss))
    first, second = results
    return {name: (tensor.float() + second[name].float()) / 2 for name, tensor in first.items()}


def kept(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The loss, and every gradient by its parameter's name, put together where it is sharded."""
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().reshape(1), **gradients}


def loads(model: nn.Module) -> dict[str, Tensor]:
    """Layer name -> share of each expert in the last forward."""
    return {name: stats.load for name, stats in router_stats(model).items()}


def save(folder: Path, name: str, tensors: dict[str, Tensor]) -> None:
    save_file(
        {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors"
    )


def trained(folder: Path, accumulation: int, **changes) -> dict[str, Tensor]:
    """The adapter after three of MoSLDTrainer's steps over batches of four rows, `accumulation` of them a step.

    It is also saved, by the Trainer, to `folder`/adapter.
    """
    model = adapted()
    settings = dict(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=accumulation,
        learning_rate=RATE, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    dataset = [{"input_ids": row, "labels": row} for row in rows(16)]
    trainer = MoSLDTrainer(model=model, args=TrainingArguments(**{**settings, **changes}), train_dataset=dataset)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    return {name: whole(p.detach()) for name, p in model.named_parameters() if p.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together; others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
